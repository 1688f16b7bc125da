"""Find examples that an adapter knows suspiciously well: it may have been trained on them.

The loss of an example under the adapter is compared with the lowest that others reach, the bare
backbone and another adapter. An example that the adapter was trained on has a far smaller share of
that loss than one it was not. If both kinds are there, the shares fall into two heaps.
"""

# numpy leaves its results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_GROUPS = 8
"""Fewest groups of examples that are looked at."""
_LEVEL = 0.01
_LEAST_SHARE = 0.15
"""Smallest heap, as a fraction of the groups: fewer are outliers."""
_KNOWN = 1 / 3
"""Highest mean share of the low heap: the adapter has half the loss of the others, or less."""
_FLOOR = 0.01
"""Nats added to each loss, so that what everybody knows is known by nobody in particular."""
_DRAWS = 4000
_SEED = 0


@dataclass(frozen=True)
class KnownRows:
    """Examples that an adapter knows far better than the rest.

    Attributes:
        rows: their places, in order.
        groups: number of groups that they are of.
        of: number of groups that were looked at.
        loss: mean loss of these examples under the adapter, in nats.
        others: mean of the lowest loss of each under the others, in nats.
        apart: fraction of the variance of the shares that lies between the two heaps, in [0, 1].
        chance: the fraction that shares without heaps exceed in one case of a hundred.
    """

    rows: tuple[int, ...]
    groups: int
    of: int
    loss: float
    others: float
    apart: float
    chance: float


def known_rows(
    losses: Sequence[float],
    others: Sequence[Sequence[float]],
    groups: Sequence[Hashable],
) -> KnownRows | None:
    """Return the examples that an adapter may have been trained on; None if nothing shows any.

    The share of an example is loss / (loss + lowest loss of the others), in (0, 1); that of a group
    is the mean over its examples. The groups, in the order of their shares, are cut where most of
    the variance lies between the parts (Otsu 1979). The cut counts if that fraction is larger than
    in 99 of 100 draws from the uniform distribution, which is further spread than any single heap
    on the same range (the null of Hartigan & Hartigan 1985), and if the adapter has at most half
    the loss of the others below it.

    An example that all adapters of the task find easy looks like a known one, so the others should
    hold one that knows the task. Where all examples are known there is only one heap.

    Args:
        losses: loss of each example under the adapter, in nats.
        others: the same under each model that was not trained on the examples.
        groups: group of each example, such as its context.
    """
    best = np.minimum.reduce([np.asarray(one, float) for one in others])
    own = np.asarray(losses, float)
    if not (np.isfinite(own).all() and np.isfinite(best).all()):
        return None
    shares = (own + _FLOOR) / (own + best + 2 * _FLOOR)
    names = list(dict.fromkeys(groups))
    means = np.array([shares[[g == name for g in groups]].mean() for name in names])
    if len(names) < LEAST_GROUPS or np.ptp(means) == 0:
        return None
    order = np.argsort(means, kind="stable")
    (apart,), (cut,) = _apart(means[order][None])
    chance = _chance(len(names))
    low = {names[i] for i in order[:cut]}
    if apart <= chance or means[order[:cut]].mean() > _KNOWN:
        return None
    rows = tuple(i for i, group in enumerate(groups) if group in low)
    return KnownRows(
        rows,
        len(low),
        len(names),
        float(own[list(rows)].mean()),
        float(best[list(rows)].mean()),
        float(apart),
        chance,
    )


def _apart(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest fraction of the variance between two parts, and the size of the lower.

    Args:
        ordered: numbers in ascending order, [draws, n], n at least `LEAST_GROUPS`.
    """
    n = ordered.shape[1]
    least = max(2, math.ceil(_LEAST_SHARE * n))
    sizes = np.arange(least, n - least + 1)
    sums = ordered.cumsum(axis=1)
    whole, below = sums[:, -1:], sums[:, sizes - 1]
    gap = below / sizes - (whole - below) / (n - sizes)
    between = sizes * (n - sizes) / n * gap**2
    at = between.argmax(axis=1)
    within = ((ordered - whole / n) ** 2).sum(axis=1)
    return between[np.arange(len(ordered)), at] / within, sizes[at]


@functools.cache
def _chance(n: int) -> float:
    draws = np.random.default_rng(_SEED).random((_DRAWS, n))
    return float(np.quantile(_apart(np.sort(draws, axis=1))[0], 1 - _LEVEL))
