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

import torch
from torch import Tensor

_MOST_SELECTIONS = 4
"""Selections on a CPU that take less time than one sort (16M entries: 0.4 s each, a sort 2 s)."""


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
    def of(cls, keep: Tensor) -> "Mask":
        """Return the mask that holds a bool tensor, True = kept."""
        flat = keep.reshape(-1)
        whole = flat.new_zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8)
        whole[: flat.numel()] = flat
        places = _places(keep.device)
        bits = (whole.view(-1, 8) * places).sum(1, dtype=torch.uint8)
        return cls(bits, keep.shape)

    def keep(self) -> Tensor:
        """Return the bool tensor, True = kept."""
        whole = (self.bits.unsqueeze(1) & _places(self.bits.device)) != 0
        return whole.view(-1)[: self.shape.numel()].view(self.shape)

    def to(self, device: torch.device | str) -> "Mask":
        """Return the mask on a device."""
        return Mask(self.bits.to(device), self.shape)


def _places(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


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
    if bool(torch.isnan(scores).any()):
        raise ValueError(
            "importance scores must be numbers, got NaN; the weights have probably diverged, "
            "so lower the learning rate"
        )
    flat = scores.detach().reshape(-1)
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


def _smallest(flat: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the count-th smallest score for each count, 0-d tensors.

    A CPU selects each in linear time, which beats a sort as long as they are few; other devices
    sort once.
    """
    if flat.device.type == "cpu" and len(counts) <= _MOST_SELECTIONS:
        return [torch.kthvalue(flat, count).values for count in counts]
    ordered = torch.sort(flat).values
    return [ordered[count - 1] for count in counts]


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
