"""Hold LoRA factors and merge adapters in three ways, named by their algebra.

An adapter changes a linear map by `delta = scaling * B @ A`. Adapter i enters a merge with the
signed strength `e_i = weight_i * scaling_i`. The kinds of merge are

- `cat`: `sum_i e_i B_i A_i`, exact; the merged rank is the sum of the ranks;
- `linear`: `(sum_i sign(e_i) sqrt|e_i| B_i) (sum_i sqrt|e_i| A_i)`, the merge of arXiv 2601.06702.
  It is not the sum of the deltas, because it also holds the cross terms `B_i A_j`, i != j;
- `svd`: the best approximation of `cat` of a given rank.

Our departure from the published code: the scaling (alpha / rank) is never dropped. So the merge of
one adapter with weight 1 equals that adapter. `unscaled_weights` gives the published computation.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The two factors of one LoRA module.

    Attributes:
        A: Down projection, [rank, in].
        B: Up projection, [out, rank].
        scaling: Factor on `B @ A`; see `lora_scaling`.

    Raises:
        ValueError: If the shapes of A and B do not fit or the scaling is not finite.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"LoRA factors must be A [rank, in] and B [out, rank], got A {_shape(self.A)} and "
                f"B {_shape(self.B)}; check which tensor is which"
            )
        if not math.isfinite(self.scaling):
            raise ValueError(
                f"the LoRA scaling must be a finite number, got {self.scaling}; "
                "check alpha and rank"
            )

    @property
    def rank(self) -> int:
        """Return the number of rank-1 terms."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Return the change of the weight, `scaling * B @ A`, [out, in]."""
        return self.scaling * (self.B @ self.A)


Adapter: TypeAlias = Mapping[str, LoraFactors]
"""Full module name in the bare base model -> LoRA factors of the module."""

MergeKind: TypeAlias = Literal["cat", "linear", "svd"]


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter's share of a merged module; A and B include its weight and scaling.

    Attributes:
        source: Position of the adapter in the merge; None for a blend of all adapters (`svd`).
        A: Down projection, [rank, in], float32.
        B: Up projection, [out, rank], float32; holds the sign of a negative strength.
    """

    source: int | None
    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class MergedModule:
    """One module of a merged adapter; its scaling is 1.

    Attributes:
        kind: Name of the merge, a key of `MERGES`.
        parts: The adapters' shares, in the order of the adapters. An adapter without this module
            has no part.
    """

    kind: str
    parts: tuple[Part, ...]

    @property
    def A(self) -> Tensor:
        """Return the down projection of the whole module, [rank, in]."""
        if self.kind == "linear":
            return torch.stack([part.A for part in self.parts]).sum(dim=0)
        return torch.cat([part.A for part in self.parts], dim=0)

    @property
    def B(self) -> Tensor:
        """Return the up projection of the whole module, [out, rank]."""
        if self.kind == "linear":
            return torch.stack([part.B for part in self.parts]).sum(dim=0)
        return torch.cat([part.B for part in self.parts], dim=1)

    def block(self, source: int) -> slice:
        """Return the slice of the rank axis (rows of A, columns of B) that belongs to a source.

        Raises:
            ValueError: If the kind is not `cat`, or the source has no part in this module.
        """
        if self.kind != "cat":
            raise ValueError(
                f"only a 'cat' merge keeps its sources in blocks, this one is {self.kind!r}; "
                "merge with kind 'cat'"
            )
        start = 0
        for part in self.parts:
            stop = start + part.A.shape[0]
            if part.source == source:
                return slice(start, stop)
            start = stop
        raise ValueError(
            f"source {source} has no part in this module; it holds the sources "
            f"{[part.source for part in self.parts]}"
        )


def lora_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """Return the factor on `B @ A`: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.

    Raises:
        ValueError: If the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"a LoRA rank must be at least 1, got {rank}; check the adapter's config")
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def average_weights(count: int) -> tuple[float, ...]:
    """Return `count` equal merge weights that sum to 1, so that the merge does not overshoot.

    Raises:
        ValueError: If the count is below 1.
    """
    if count < 1:
        raise ValueError(f"merge weights need at least one adapter, got {count}; name an adapter")
    return (1.0 / count,) * count


def unscaled_weights(adapters: Sequence[Adapter]) -> tuple[float, ...]:
    """Return the merge weights that undo the scaling of each adapter: 1 / scaling.

    With these weights a `linear` merge is `(sum_i B_i) (sum_i A_i)`. The published code of arXiv
    2601.06702 computes this, because it adds the factors and drops the scaling.

    Raises:
        ValueError: If an adapter has no module, a scaling of 0, or different scalings.
    """
    weights: list[float] = []
    for place, adapter in enumerate(adapters):
        scalings = sorted({factors.scaling for factors in adapter.values()})
        if len(scalings) != 1 or scalings[0] == 0:
            raise ValueError(
                f"weights without the scaling need one scaling per adapter that is not 0, but "
                f"adapter {place + 1} has the scalings {scalings}; give merge.weights as numbers"
            )
        weights.append(1.0 / scalings[0])
    return tuple(weights)


def merge(
    kind: MergeKind,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | None = None,
) -> dict[str, MergedModule]:
    """Return module name -> merged module, for every module that any adapter has.

    Args:
        kind: A key of `MERGES`.
        adapters: At least one adapter. A module is merged from the adapters that have it.
        weights: One finite weight per adapter. A negative weight subtracts the adapter; 0 gives a
            part of zeros.
        rank: Rank of an `svd` merge; default is the largest rank among the module's adapters. A
            module gets min(rank, sum of ranks, in, out), the largest rank its delta can have.

    Raises:
        ValueError: If an argument breaks these rules, the adapters disagree on a module's in or
            out size, a factor is not finite, or the ranks of a `linear` merge differ.
    """
    _check_request(kind, adapters, weights, rank)
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    if not names:
        raise ValueError("the adapters hold no LoRA module at all; check the adapter folders")
    merged: dict[str, MergedModule] = {}
    for name in names:
        parts = tuple(
            _part_of(source, adapter[name], weight, name)
            for source, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
            if name in adapter
        )
        _check_sizes(parts, name)
        merged[name] = MergedModule(kind, MERGES[kind](parts, rank, name))
    return merged


def _cat(parts: tuple[Part, ...], rank: int | None, name: str) -> tuple[Part, ...]:
    return parts


def _linear(parts: tuple[Part, ...], rank: int | None, name: str) -> tuple[Part, ...]:
    ranks = [part.A.shape[0] for part in parts]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"a 'linear' merge adds factors and needs equal ranks, but module {name!r} has ranks "
            f"{ranks}; use kind 'cat' or 'svd'"
        )
    return parts


def rank_errors(factors: LoraFactors) -> list[float]:
    """Return the relative error of the best approximation of a delta for every rank from 0.

    Returns:
        rank + 1 numbers in [0, 1], the last one 0: the Frobenius norm of what is lost, divided by
        that of the delta (Eckart and Young). All are 0 for a delta of zeros.
    """
    core_B = torch.linalg.qr(factors.B.double())[1]
    core_A = torch.linalg.qr(factors.A.double().T)[1]
    squares = torch.linalg.svdvals(core_B @ core_A.T).square()
    squares = torch.cat([squares, squares.new_zeros(factors.rank + 1 - squares.shape[0])])
    lost = squares.flip(0).cumsum(0).flip(0)
    return (lost / lost[0].clamp_min(torch.finfo(lost.dtype).tiny)).sqrt().tolist()


def _svd(parts: tuple[Part, ...], rank: int | None, name: str) -> tuple[Part, ...]:
    """Truncate the SVD of the `cat` delta; QR of the factors avoids any [out, in] matrix."""
    A = torch.cat([part.A for part in parts], dim=0).double()  # [sum of ranks, in]
    B = torch.cat([part.B for part in parts], dim=1).double()  # [out, sum of ranks]
    basis_B, core_B = torch.linalg.qr(B)
    basis_A, core_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    wanted = max(part.A.shape[0] for part in parts) if rank is None else rank
    kept = min(wanted, S.shape[0])
    root = S[:kept].sqrt()
    new_B = (basis_B @ U[:, :kept]) * root
    new_A = root[:, None] * (Vh[:kept] @ basis_A.T)
    return (Part(None, new_A.float(), new_B.float()),)


MERGES: dict[str, Callable[[tuple[Part, ...], int | None, str], tuple[Part, ...]]] = {
    "cat": _cat,
    "linear": _linear,
    "svd": _svd,
}
"""Kind of merge -> function(parts, rank, module name) -> parts of the merged module."""


def _check_request(
    kind: str, adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None
) -> None:
    if kind not in MERGES:
        raise ValueError(f"unknown merge kind {kind!r}; choose one of {sorted(MERGES)}")
    if not adapters:
        raise ValueError("a merge needs at least one adapter, got none; name an adapter")
    if len(weights) != len(adapters):
        raise ValueError(
            f"a merge needs one weight per adapter, got {len(weights)} weights for "
            f"{len(adapters)} adapters; give {len(adapters)} weights"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"merge weights must be finite numbers, got {list(weights)}; correct them")
    if rank is not None and kind != "svd":
        raise ValueError(
            f"the rank of a {kind!r} merge follows from its adapters, got rank={rank}; "
            "leave the rank out or use kind 'svd'"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"the rank of an 'svd' merge must be at least 1, got {rank}; raise it")


def _part_of(source: int, factors: LoraFactors, weight: float, name: str) -> Part:
    """Return one adapter's part in float32, sqrt(|weight * scaling|) multiplied into A and B."""
    A, B = factors.A.float(), factors.B.float()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError(
            f"adapter {source + 1} holds NaN or infinite values in module {name!r}; "
            "a merge needs finite factors, so use another checkpoint of it"
        )
    strength = weight * factors.scaling
    root = math.sqrt(abs(strength))
    return Part(source, A * root, B * math.copysign(root, strength))


def _check_sizes(parts: Sequence[Part], name: str) -> None:
    sizes = [(part.A.shape[1], part.B.shape[0]) for part in parts]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the adapters disagree on the (in, out) sizes of module {name!r}: {sizes}; "
            "merge only adapters of the same base model"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
