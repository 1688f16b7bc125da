"""From importance scores and ratios to keep masks with exact counts, one bit an entry.

All candidate ratios of a tensor are cut in one pass over its scores (`keep_masks`): what separates
kept from pruned is the k-th smallest score, and of the entries that tie with it the later ones go.
Departure from the published code, whose `scores <= k-th value` prunes every entry tied with the
k-th: there an all-zero tensor loses all of its entries at any ratio.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """A keep mask at rest, an eighth of a bool tensor's size.

    Attributes:
        bits: uint8 [ceil(entries / 8)]; entry i is bit i % 8 of byte i // 8, set when it is kept.
        shape: shape of the tensor the mask is for.
    """

    bits: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, keep: Tensor, place: Tensor | None = None) -> "Mask":
        """Return the mask that holds a bool tensor, True = kept.

        Args:
            keep: the tensor.
            place: uint8 [packed_size(entries)] to write the bits to; None makes a tensor.
        """
        flat = keep.reshape(-1)
        size = packed_size(flat.numel())
        if flat.numel() < 8 * size:
            flat = torch.cat([flat, flat.new_zeros(8 * size - flat.numel())])
        bits = flat.new_empty(size, dtype=torch.uint8) if place is None else place
        # Eight bools are the bytes of one integer; the product moves byte i to bit 56 + i.
        bits.copy_((flat.view(torch.int64) * _GATHER) >> 56)
        return cls(bits, keep.shape)

    def keep(self) -> Tensor:
        """Return the bool tensor, True = kept."""
        spread = torch.index_select(_spread(self.bits.device), 0, self.bits.int())
        return spread.view(torch.bool)[: self.shape.numel()].view(self.shape)


_GATHER = 0x0102040810204080


def packed_size(entries: int) -> int:
    """Return the bytes of a mask's bits."""
    return -(-entries // 8)


@cache
def _spread(device: torch.device) -> Tensor:
    """Return int64 [256]: byte -> eight bytes, each one of its bits."""
    values = torch.arange(256, device=device).unsqueeze(1)
    bits = (values >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)


def keep_masks(scores: Tensor, ratios: Sequence[float]) -> list[Tensor]:
    """Return for each ratio the keep mask (bool, True = kept) that prunes the least important.

    Exactly `pruned_count` entries go. Of two equal scores the earlier entry is the more important
    one, so that equal scores never change a count, and the masks are nested: an entry kept at some
    ratio is kept at every lower one.

    Args:
        scores: importance of each entry, any shape.
        ratios: fractions removed, each in [0, 1].

    Raises:
        ValueError: If a score is NaN, or a ratio is not in [0, 1].
    """
    flat = scores.detach().reshape(-1)
    if flat.numel() > 0 and bool(torch.isnan(flat.max())):
        raise ValueError(
            "importance scores must be numbers, got NaN; the weights have probably diverged, "
            "so lower the learning rate"
        )
    counts = [pruned_count(flat.numel(), ratio) for ratio in ratios]
    inner = sorted({count for count in counts if 0 < count < flat.numel()})
    borders = dict(zip(inner, _smallest(flat, inner), strict=True))
    cut: list[Tensor] = []
    for count in counts:
        if count in borders:
            cut.append(_above(flat, borders[count], count).view(scores.shape))
        else:
            full = torch.full(scores.shape, count == 0, dtype=torch.bool, device=scores.device)
            cut.append(full)
    return cut


def keep_entries(
    score_a: Tensor, score_b: Tensor, ratios: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Return for each ratio the keep masks of A [r, in] and B [out, r], each cut by itself."""
    return list(zip(keep_masks(score_a, ratios), keep_masks(score_b, ratios), strict=True))


def keep_components(
    score_a: Tensor, score_b: Tensor, ratios: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Return for each ratio the keep masks that remove whole components.

    A component is a row of A with its column of B, worth the sum of its entries' importance.
    `pruned_count(r, ratio)` components go, so a module of rank r knows r + 1 ratios. Our departure
    from arXiv 2601.06702, which prunes single entries.

    Args:
        score_a: importance, [r, in].
        score_b: importance, [out, r].
        ratios: fractions removed, each in [0, 1].
    """
    worth = score_a.float().sum(dim=1) + score_b.float().sum(dim=0)
    return [
        (keep[:, None].expand_as(score_a), keep[None, :].expand_as(score_b))
        for keep in keep_masks(worth, ratios)
    ]


def without_dead_components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [k, in] and B [out, k] without the components that add nothing; `B @ A` is the same.

    One is kept where all are dead: a LoRA layer has a rank of at least 1.
    """
    alive = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    if not bool(alive.any()):
        alive[0] = True
    return a[alive], b[:, alive]


STRUCTURES = {"entries": keep_entries, "rank": keep_components}
"""What is removed -> (scores of A, scores of B, ratios) -> keep masks of both for each ratio."""


def _smallest(flat: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the count-th smallest score for each count, 0-d tensors.

    A CPU selects them all in one call, in linear time (numpy's vectorised partition takes about a
    third of the time of three `torch.kthvalue`, and a tenth of a sort's); other devices sort once.
    """
    places = [count - 1 for count in counts]
    if flat.device.type == "cpu" and places:
        return list(torch.from_numpy(np.partition(_as_numpy(flat), places)[places]))
    ordered = torch.sort(flat).values
    return [ordered[place] for place in places]


def _as_numpy(flat: Tensor) -> Any:
    exact = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
    return exact.numpy()


def _above(flat: Tensor, border: Tensor, count: int) -> Tensor:
    keep = flat > border
    missing = flat.numel() - count - int(keep.sum())
    if missing > 0:
        tied = (flat == border).nonzero().view(-1)
        keep[tied[:missing]] = True
    return keep


def pruned_count(entries: int, ratio: float) -> int:
    """Return how many of the entries a ratio removes: floor(ratio * entries + 0.5).

    Raises:
        ValueError: If the ratio is not in [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(
            f"a ratio is the fraction of entries removed, in [0, 1], got {ratio}; write 40 % as 0.4"
        )
    return math.floor(ratio * entries + 0.5)


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Return the share of exact zeros among all entries of the tensors, in [0, 1]; 0 for none."""
    entries = zeros = 0
    for tensor in tensors:
        entries += tensor.numel()
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    return zeros / entries if entries else 0.0
