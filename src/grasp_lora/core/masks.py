"""From importance scores and a ratio to keep masks with exact counts.

The entries of a tensor are ordered once (`rank_entries`); every candidate ratio then costs one
comparison (`keep_at`). Departure from the published code, whose `scores <= k-th value` prunes
every entry tied with the k-th: there an all-zero tensor loses all of its entries at any ratio.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_MOST_ENTRIES = 2**31 - 1


def rank_entries(scores: Tensor) -> Tensor:
    """Return each entry's position from most (0) to least important, int32, same shape.

    Of two equal scores the earlier entry is the more important one, so that equal scores never
    change a count.

    Raises:
        ValueError: If a score is NaN, or there are too many entries for int32.
    """
    if bool(torch.isnan(scores).any()):
        raise ValueError(
            "importance scores must be numbers, got NaN; the weights have probably diverged, "
            "so lower the learning rate"
        )
    flat = scores.detach().reshape(-1)
    if flat.numel() > _MOST_ENTRIES:
        raise ValueError(
            f"a tensor of {flat.numel()} entries is too large to rank (limit {_MOST_ENTRIES}); "
            "mask it in smaller blocks"
        )
    order = torch.sort(flat, descending=True, stable=True).indices
    ranks = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
    ranks[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    return ranks.reshape(scores.shape)


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


def keep_at(ranks: Tensor, ratio: float) -> Tensor:
    """Return the keep mask (bool, True = kept) that removes `pruned_count` least important entries.

    The masks are nested: an entry kept at some ratio is kept at every lower one.

    Args:
        ranks: Output of `rank_entries`, any shape.
        ratio: Fraction removed, in [0, 1].

    Raises:
        ValueError: If the ratio is not in [0, 1].
    """
    return ranks < ranks.numel() - pruned_count(ranks.numel(), ratio)


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Return the share of exact zeros among all entries of the tensors, in [0, 1]; 0 for none."""
    entries = zeros = 0
    for tensor in tensors:
        entries += tensor.numel()
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    return zeros / entries if entries else 0.0
