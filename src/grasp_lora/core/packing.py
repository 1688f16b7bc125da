"""Number formats that LoRA factors are stored in, and the bytes that these take in a file.

`bf16` is a rounded number of 16 bits. `int8` and `int4` are symmetric: every `GROUP` neighbours of
a component's vector (a row of A, a column of B) share a scale in bf16, the largest magnitude among
them divided by 127 or 7. A value is the nearest multiple of its scale. Two values of int4 share a
byte. Whatever the format, a factor is used in bf16.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32
"""Neighbours along a component's vector that share a scale; the last group may have fewer."""
FORMATS: Mapping[str, int] = {"bf16": 16, "int8": 8, "int4": 4}
"""Format -> bits of a value, without its share of a scale."""

SCALES = ".scales"
"""Ends the name of the scales of a stored factor."""


def stored_bytes(form: str, rank: int, inputs: int, outputs: int) -> int:
    """Return the bytes of both factors of a module in a file, the file's header aside.

    Args:
        form: a key of `FORMATS`.
        rank: number of components.
        inputs: inputs of the module.
        outputs: outputs of the module.
    """
    return rank * sum(_row_bytes(form, length) for length in (inputs, outputs))


def _row_bytes(form: str, length: int) -> int:
    scales = 0 if form == "bf16" else 2 * math.ceil(length / GROUP)
    return math.ceil(length * FORMATS[form] / 8) + scales


@dataclass(frozen=True, eq=False)
class Packed:
    """The factors of a module as they are stored.

    Attributes:
        form: a key of `FORMATS`.
        tensors: name -> tensor: "A" by rows and "B" by columns, in int8 and int4 with their scales.
        inputs: inputs of the module.
        outputs: outputs of the module.
    """

    form: str
    tensors: Mapping[str, Tensor]
    inputs: int
    outputs: int

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] in bf16."""
        found: list[Tensor] = []
        for side, length in (("A", self.inputs), ("B", self.outputs)):
            rows = self.tensors[side]
            if self.form != "bf16":
                codes = _from_pairs(rows, length) if self.form == "int4" else rows
                rows = multiplied(codes, self.tensors[side + SCALES])
            found.append(rows)
        return found[0], found[1].T


def packed(form: str, A: Tensor, B: Tensor) -> Packed:
    """Return factors in a number format.

    Args:
        form: a key of `FORMATS`.
        A: down projection, [rank, in].
        B: up projection, [out, rank].
    """
    tensors: dict[str, Tensor] = {}
    for side, rows in (("A", A), ("B", B.T)):
        if form == "bf16":
            tensors[side] = rows.to(torch.bfloat16).contiguous()
            continue
        codes, tensors[side + SCALES] = quantised(rows, FORMATS[form])
        tensors[side] = _in_pairs(codes) if form == "int4" else codes
    return Packed(form, tensors, A.shape[1], B.shape[0])


def quantised(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes of vectors, int8 [count, length], and their scales, bf16 [count, groups].

    Args:
        rows: vectors, [count, length].
        bits: of a code, 8 or 4; codes lie within +-(2^(bits - 1) - 1).
    """
    most = 2 ** (bits - 1) - 1
    length = rows.shape[1]
    padded = pad(rows.float(), (0, -length % GROUP))
    grouped = padded.reshape(len(rows), -1, GROUP)
    scales = (grouped.abs().amax(2) / most).to(torch.bfloat16)
    # A group of zeros has the scale 0; any other keeps its zeros too.
    codes = (grouped / scales.float().unsqueeze(2)).nan_to_num(0.0).round().clamp(-most, most)
    return codes.flatten(1)[:, :length].to(torch.int8).contiguous(), scales


def multiplied(codes: Tensor, scales: Tensor) -> Tensor:
    """Return codes times their scales, rounded to bf16, [count, length].

    Args:
        codes: int8, [count, length].
        scales: bf16, [count, groups].
    """
    each = scales.float().repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]
    return (codes.float() * each).to(torch.bfloat16)


def _in_pairs(codes: Tensor) -> Tensor:
    """Return codes of 4 bits two by two, uint8 [count, half the length rounded up]."""
    even = (pad(codes, (0, codes.shape[1] % 2)) + 8).to(torch.uint8)
    return even[:, ::2] | (even[:, 1::2] << 4)


def _from_pairs(pairs: Tensor, length: int) -> Tensor:
    codes = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)[:, :length]
    return codes.to(torch.int8) - 8
