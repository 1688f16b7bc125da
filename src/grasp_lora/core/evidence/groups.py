"""Mean gains over examples that come in groups, and what they show.

Questions on one context are easy or hard together, so the examples of a group are not independent.
An error that counts every example by itself is too small. Here the groups are what varies: the
errors are those of a mean whose groups are drawn (Liang & Zeger 1986), with Student's t for the
number of groups less one. An example without a group of its own kind is a group by itself.
"""

# scipy and numpy leave their results untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Level of the one-sided tests."""
NEGLIGIBLE = 1e-9
"""A gain below this many nats is rounding."""
Choose = Callable[[np.ndarray, Mapping[Hashable, int]], np.ndarray]
"""(weights of the groups [draws, groups], group -> its column) -> [draws, tried]: whether a draw
could choose what was tried. A draw may choose nothing."""
_DRAWS = 999
_SEED = 0
# Weights of Webb (2014), of mean 0 and variance 1: signs have too few values for few groups.
_WEIGHTS = np.array([-math.sqrt(1.5), -1.0, -math.sqrt(0.5), math.sqrt(0.5), 1.0, math.sqrt(1.5)])


@dataclass(frozen=True)
class Gain:
    """A mean gain with its standard error.

    Attributes:
        gain: mean over the examples of the loss saved, in nats.
        error: standard error of the gain over groups of examples, in nats.
        groups: number of groups of examples, at least 2.
    """

    gain: float
    error: float
    groups: int

    @property
    def z(self) -> float | None:
        """Return gain / error; None if the error is 0."""
        return self.gain / self.error if self.error > 0 else None

    def above_zero(self, level: float = LEVEL) -> bool:
        """Return whether the gain is above 0 by the one-sided t test at a level."""
        return self.gain > max(NEGLIGIBLE, critical_value(self.groups - 1, level) * self.error)

    @property
    def shown(self) -> bool:
        """Return whether the gain is above 0 at the one-sided 5 % level."""
        return self.above_zero()


def mean_gain(gains: Sequence[float], groups: Sequence[Hashable] | None = None) -> Gain | None:
    """Return the mean gain and its standard error over groups.

    Args:
        gains: gain of each example, in nats.
        groups: group of each example; None makes each example its own group.

    Returns:
        The gain; None with fewer than two groups, or if a gain is not finite.
    """
    labels = own_groups(len(gains)) if groups is None else groups
    if len(set(labels)) < 2 or not all(map(math.isfinite, gains)):
        return None
    return Gain(math.fsum(gains) / len(gains), standard_error(gains, labels), len(set(labels)))


def standard_error(values: Collection[float], groups: Sequence[Hashable] | None = None) -> float:
    """Return the standard error of the mean of values whose groups are drawn.

    Args:
        values: at least two.
        groups: group of each value, at least two different ones; None makes each its own group,
            which gives the usual standard error.
    """
    labels = own_groups(len(values)) if groups is None else groups
    mean = math.fsum(values) / len(values)
    off: dict[Hashable, float] = {}
    for value, label in zip(values, labels, strict=True):
        off[label] = off.get(label, 0.0) + value - mean
    count = len(off)
    return math.sqrt(count / (count - 1) * math.fsum(x * x for x in off.values())) / len(values)


def own_groups(count: int) -> Sequence[Hashable]:
    """Return labels that make each of `count` examples its own group."""
    return range(count)


def critical_value(freedom: float, level: float = LEVEL) -> float:
    """Return the one-sided critical value of Student's t.

    Args:
        freedom: degrees of freedom, above 0: groups less one for a mean.
        level: of the test, in (0, 1).
    """
    return float(stats.t.isf(level, freedom))


def group_of(example: int, groups: Sequence[Hashable] | None) -> Hashable:
    """Return the group of an example; without groups it is the example itself."""
    return example if groups is None else groups[example]


def chance_of_choice(
    chosen: Mapping[int, float],
    tried: Sequence[Mapping[int, float]],
    groups: Sequence[Hashable] | None = None,
    choose: Choose | None = None,
    also: Collection[int] = (),
) -> float:
    """Return how likely a choice among gains of nothing would look as good as the chosen one.

    The chosen gain may be the best because of the very examples it is tested on. So its t is
    compared with that of the choice when all gains of a group get a random weight of mean 0, the
    same for all that were tried (wild cluster bootstrap: Cameron, Gelbach & Miller 2008). Gains
    that fewer groups saw count by the probability of their t.

    Args:
        chosen: example -> gain in nats, finite, of at least two groups.
        tried: the same for everything that could have been chosen.
        groups: group of each example, by its id; None makes each its own group.
        choose: what could be chosen; the largest t of these counts. None takes the largest of all,
            which is at least that of any rule.
        also: further examples, without gains, that `choose` goes by.

    Returns:
        A probability, at least 1 / 1000.
    """
    everything = [chosen, *tried]
    examples = {example for own in everything for example in own} | set(also)
    labels = {group_of(example, groups) for example in examples}
    place = {label: index for index, label in enumerate(sorted(labels, key=str))}
    sums, counts = np.zeros((2, len(everything), len(place)))
    for row, own in enumerate(everything):
        for example, gain in own.items():
            column = place[group_of(example, groups)]
            sums[row, column] += gain
            counts[row, column] += 1
    random = np.random.default_rng(_SEED)
    weights = _WEIGHTS[random.integers(len(_WEIGHTS), size=(_DRAWS, len(place)))]
    seen = _normal_scores(np.ones((1, len(place))), sums[:1], counts[:1])
    wide = (counts > 0).sum(axis=1) > 1
    drawn = np.full((_DRAWS, len(everything)), -np.inf)
    drawn[:, wide] = _normal_scores(weights, sums[wide], counts[wide])
    if choose is not None:
        drawn = np.where(choose(weights, place), drawn[:, 1:], -np.inf)
    return float((1 + (drawn.max(axis=1) >= seen[0, 0]).sum()) / (_DRAWS + 1))


def _normal_scores(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the t of weighted groups as normal scores, [draws, candidates].

    Args:
        weights: [draws, groups].
        sums: sum of the gains of each group, [candidates, groups].
        counts: number of examples of each group, likewise.
    """
    total = counts.sum(axis=1)
    number = (counts > 0).sum(axis=1)
    means = weights @ sums.T / total
    # sum over groups of (w S - n mean)^2, without an array of [draws, candidates, groups]
    squares = (
        weights**2 @ (sums**2).T
        - 2 * means * (weights @ (sums * counts).T)
        + means**2 * (counts**2).sum(axis=1)
    )
    errors = np.sqrt(np.maximum(squares, 0.0) * number / (number - 1)) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(means / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return stats.norm.isf(stats.t.sf(t, number - 1))
