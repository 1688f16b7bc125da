"""Turn importance scores and ratios into keep masks with exact counts, and pack them into bits.

`keep_masks` makes the masks of all candidate ratios in one pass over a tensor's scores. The k-th
smallest score separates pruned from kept entries; of the entries that tie with it, the later ones
are pruned. Our departure from the published code: its `scores <= k-th value` prunes every entry
that ties with the k-th, so an all-zero tensor loses all of its entries at any ratio.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grasp_lora.core.pruning.n_of_m import N_OF_M, nearer_known


class NotANumber(ValueError):
    """A score is NaN: the weights, or what the scores are computed from, are not finite."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A keep mask in storage: one bit per entry, an eighth of the size of a bool tensor.

    Attributes:
        bits: uint8 [ceil(entries / 8)]; entry i is bit i % 8 of byte i // 8, set where it is kept.
        shape: shape of the tensor that the mask belongs to.
    """

    bits: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, keep: Tensor, place: Tensor | None = None) -> "Mask":
        """Return the packed mask of a bool tensor, True = kept.

        Args:
            keep: the bool tensor.
            place: uint8 [packed_size(entries)] that receives the bits; None makes a new tensor.
        """
        flat = keep.reshape(-1)
        size = packed_size(flat.numel())
        if flat.numel() < 8 * size or flat.storage_offset() % 8:
            # The copy is padded, and starts where an integer of eight bytes may start.
            flat = torch.cat([flat, flat.new_zeros(8 * size - flat.numel())])
        bits = flat.new_empty(size, dtype=torch.uint8) if place is None else place
        # Eight bools are the bytes of one integer. The product moves byte i to bit 56 + i.
        bits.copy_((flat.view(torch.int64) * _GATHER_BITS) >> 56)
        return cls(bits, keep.shape)

    def keep(self) -> Tensor:
        """Return the bool tensor, True = kept."""
        spread = torch.index_select(_bytes_of_bits(self.bits.device), 0, self.bits.int())
        return spread.view(torch.bool)[: self.shape.numel()].view(self.shape)


_GATHER_BITS = 0x0102040810204080


def packed_size(entries: int) -> int:
    """Return the number of bytes that hold one bit per entry."""
    return -(-entries // 8)


@cache
def _bytes_of_bits(device: torch.device) -> Tensor:
    """Return int64 [256]: byte -> its eight bits, each stored as one byte."""
    values = torch.arange(256, device=device).unsqueeze(1)
    bits = (values >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)


def keep_masks(scores: Tensor, ratios: Sequence[float]) -> list[Tensor]:
    """Return one keep mask per ratio (bool, True = kept); it prunes the least important entries.

    Each mask prunes exactly `pruned_count` entries. Of two equal scores, the earlier entry counts
    as more important, so ties never change a count. The masks are nested: an entry kept at one
    ratio is kept at every lower ratio.

    Args:
        scores: importance of each entry, any shape.
        ratios: fractions removed, each in [0, 1].

    Raises:
        NotANumber: If a score is NaN.
        ValueError: If a ratio is not in [0, 1].
    """
    flat = scores.detach().reshape(-1)
    if flat.numel() > 0 and bool(torch.isnan(flat.max())):
        raise NotANumber("importance scores must be numbers, got NaN, so no mask can be cut")
    counts = [pruned_count(flat.numel(), ratio) for ratio in ratios]
    inner = sorted({count for count in counts if 0 < count < flat.numel()})
    borders = dict(zip(inner, _kth_smallest(flat, inner), strict=True))
    cut: list[Tensor] = []
    for count in counts:
        if count in borders:
            cut.append(_keep_above(flat, borders[count], count).view(scores.shape))
        else:
            full = torch.full(scores.shape, count == 0, dtype=torch.bool, device=scores.device)
            cut.append(full)
    return cut


def keep_entries(
    score_a: Tensor, score_b: Tensor, ratios: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Return (keep of A, keep of B) per ratio; A [r, in] and B [out, r] are pruned separately."""
    return list(zip(keep_masks(score_a, ratios), keep_masks(score_b, ratios), strict=True))


def keep_components(
    score_a: Tensor, score_b: Tensor, ratios: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Return (keep of A, keep of B) per ratio; the masks prune whole components.

    A component is a row of A and the matching column of B. Its importance is the sum over its
    entries. `pruned_count(r, ratio)` components are pruned, so a module of rank r has r + 1
    distinct masks. Our departure from arXiv 2601.06702, which prunes single entries.

    Args:
        score_a: importance, [r, in].
        score_b: importance, [out, r].
        ratios: fractions removed, each in [0, 1].
    """
    importance = score_a.float().sum(dim=1) + score_b.float().sum(dim=0)
    return [
        (keep[:, None].expand_as(score_a), keep[None, :].expand_as(score_b))
        for keep in keep_masks(importance, ratios)
    ]


def keep_of_every(kept: int, size: int) -> "Structure":
    """Return the structure "kept:size", such as 2:4: of every `size` entries `kept` stay.

    The groups lie along the input dimension: in a row of A [r, in] along `in`, in a row of B
    [out, r] along r. A shorter last group counts as if it were filled up with zeros, as hardware
    does it: of its k entries min(k, kept) stay. There are two masks, this one and that of ratio 0;
    see `n_of_m.known_ratio`. Of two equal scores, the earlier entry counts as more important.
    """

    def keep(
        score_a: Tensor, score_b: Tensor, ratios: Sequence[float]
    ) -> list[tuple[Tensor, Tensor]]:
        def cut(scores: Tensor, ratio: float) -> Tensor:
            if nearer_known(ratio, kept, size) == 0:
                return torch.ones_like(scores, dtype=torch.bool)
            return _keep_best(scores, kept, size)

        return [(cut(score_a, ratio), cut(score_b, ratio)) for ratio in ratios]

    return keep


def _keep_best(scores: Tensor, kept: int, size: int) -> Tensor:
    """Return True for the `kept` highest scores of every `size` neighbours in a row."""
    scores = scores.detach().float()
    if bool(torch.isnan(scores).any()):
        raise NotANumber("importance scores must be numbers, got NaN, so no mask can be cut")
    rows, length = scores.shape
    filled = torch.full((rows, -(-length // size) * size), -math.inf, device=scores.device)
    filled[:, :length] = scores
    groups = filled.view(rows, -1, size)
    best = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :kept]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return keep.view(rows, -1)[:, :length].contiguous()


def without_dead_components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [k, in] and B [out, k] without components whose row of A or column of B is zero.

    `B @ A` does not change. If every component is zero, one stays, because a LoRA layer has a rank
    of at least 1.
    """
    alive = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    if not bool(alive.any()):
        alive[0] = True
    return a[alive], b[:, alive]


Structure = Callable[[Tensor, Tensor, Sequence[float]], list[tuple[Tensor, Tensor]]]
STRUCTURES: Mapping[str, Structure] = {
    "entries": keep_entries,
    "rank": keep_components,
    **{name: keep_of_every(*counts) for name, counts in N_OF_M.items()},
}
"""Unit of pruning -> function(scores of A, scores of B, ratios) -> (keep of A, keep of B) per
ratio."""


def _kth_smallest(flat: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the count-th smallest score for each count, as 0-d tensors.

    On a CPU, numpy's vectorised partition selects all of them in one call, in linear time. It takes
    about a third of the time of three `torch.kthvalue`, and a tenth of the time of a sort. Other
    devices sort once.
    """
    places = [count - 1 for count in counts]
    if flat.device.type == "cpu" and places:
        return list(torch.from_numpy(np.partition(_as_numpy(flat), places)[places]))
    ordered = torch.sort(flat).values
    return [ordered[place] for place in places]


def _as_numpy(flat: Tensor) -> Any:
    exact = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
    return exact.numpy()


def _keep_above(flat: Tensor, border: Tensor, count: int) -> Tensor:
    keep = flat > border
    missing = flat.numel() - count - int(keep.sum())
    if missing > 0:
        tied = (flat == border).nonzero().view(-1)
        keep[tied[:missing]] = True
    return keep


def pruned_count(entries: int, ratio: float) -> int:
    """Return how many entries a ratio removes: floor(ratio * entries + 0.5).

    Raises:
        ValueError: If the ratio is not in [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(
            f"a ratio is the fraction of entries removed, in [0, 1], got {ratio}; write 40 % as 0.4"
        )
    return math.floor(ratio * entries + 0.5)


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Return the fraction of exact zeros over all entries, in [0, 1]; 0 without any entry."""
    entries = zeros = 0
    for tensor in tensors:
        entries += tensor.numel()
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    return zeros / entries if entries else 0.0
