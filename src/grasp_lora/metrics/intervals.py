"""How sure a score is, and whether two systems differ: resampling of whole groups of rows.

Questions on one context are easy or hard together, so rows of a group are drawn together; drawn
one by one they would promise intervals that are too narrow. The interval is the percentile
bootstrap (Efron & Tibshirani 1993, ch. 13; of groups: Field & Welsh 2007), the test the paired
permutation test, which swaps the two systems' rows group by group (approximate randomization,
Noreen 1989; Riezler & Maxwell 2005). Both recompute the score from summed statistics, so they
hold for scores that are no mean of rows, such as BLEU. With few groups, below about twenty, the
interval is narrower than it says.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, permutation_test

Value = Callable[[np.ndarray], np.ndarray]
"""Sums over rows, shape [..., k] -> scores, shape [...]."""

# Group indices, 8 bytes each, in one batch of resamples; scipy holds several copies of a batch.
_BATCH_BYTES = 8 * 2**20
# The same sum in another order differs by rounding; scores closer than this are equal.
_DECIMALS = 10


@dataclass(frozen=True)
class Paired:
    """How far system A is above system B on the same rows."""

    difference: float
    """Score of A minus score of B."""
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided: how often swapped systems lie as far apart as these, were they alike."""


def interval(
    statistics: np.ndarray,
    groups: Sequence[str],
    value: Value,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the bootstrap interval of a score, groups drawn with replacement.

    Args:
        statistics: what the score is computed from, additive over rows, shape [n, k].
        groups: each row's group, n of them; their order and that of the rows do not matter.
        value: see `Value`.
        resamples: drawn sets of groups; 0 asks for no interval.
        confidence: share of the drawn scores inside, in (0, 1).
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        Low and high, equal where all groups score alike; None with fewer than two groups, with
        no resamples, or where the score of a drawn set is not a finite number.

    Raises:
        ValueError: for shapes that do not fit, or options out of their ranges.
    """
    _check_shapes(statistics, groups)
    check_resampling(resamples, confidence)
    score = _at(value, np.sum(statistics, axis=0))
    return _interval(_by_group(statistics, groups), value, score, resamples, confidence, seed)


def paired(
    statistics_a: np.ndarray,
    statistics_b: np.ndarray,
    groups: Sequence[str],
    value: Value,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compare two systems on the same rows, which stand in the same order.

    The interval is the bootstrap's, both systems scored on the same drawn groups. The p-value is
    exact, by all 2^groups ways of swapping, where these are no more than `resamples`; else it is
    estimated from `resamples` ways drawn at random, and is never below 2 / (resamples + 1).

    Args:
        statistics_a: of system A, shape [n, k]; see `interval`, also for the other arguments.
        statistics_b: of system B, shape [n, k].

    Returns:
        The comparison; without p-value where it has no resamples or a score is not finite, and
        without ends where `interval` has none.

    Raises:
        ValueError: as `interval`, for statistics of different shapes, or without a row.
    """
    _check_shapes(statistics_a, groups)
    check_resampling(resamples, confidence)
    if np.shape(statistics_a) != np.shape(statistics_b) or not len(groups):
        raise ValueError(
            f"statistics of shapes {np.shape(statistics_a)} and {np.shape(statistics_b)}; "
            "two systems are compared on the same rows, at least one"
        )
    sums_a, sums_b = _by_group(statistics_a, groups), _by_group(statistics_b, groups)
    k = sums_a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return value(sums[..., :k]) - value(sums[..., k:])

    both = np.concatenate([sums_a, sums_b], axis=1)
    totals = np.sum(statistics_a, axis=0), np.sum(statistics_b, axis=0)
    observed = _at(difference, np.concatenate(totals))
    ends = _interval(both, difference, observed, resamples, confidence, seed)
    low, high = ends or (None, None)
    return Paired(observed, low, high, _p_value(sums_a, sums_b, value, resamples, seed))


def check_resampling(resamples: int, confidence: float) -> None:
    """Refuse options that no interval can be made with, see `interval`.

    Raises:
        ValueError: for a number of resamples or a confidence out of its range.
    """
    if resamples < 0 or resamples == 1:
        raise ValueError(f"resamples must be 0 (no intervals) or at least 2, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, like 0.95, got {confidence}")


def _check_shapes(statistics: np.ndarray, groups: Sequence[str]) -> None:
    if np.ndim(statistics) != 2 or len(statistics) != len(groups):
        raise ValueError(
            f"statistics of shape {np.shape(statistics)} with {len(groups)} groups; "
            "give one row of statistics and one group for each scored row"
        )


def _by_group(statistics: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return the sums of each group, groups sorted, shape [groups, k]."""
    place = {group: index for index, group in enumerate(sorted(set(groups)))}
    sums = np.zeros((len(place), np.shape(statistics)[1]))
    np.add.at(sums, [place[group] for group in groups], np.asarray(statistics, dtype=np.float64))
    return sums


def _at(value: Value, sums: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(value(sums))


def _interval(
    sums: np.ndarray, value: Value, score: float, resamples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    count = len(sums)
    if count < 2 or resamples == 0:
        return None

    def drawn_scores(drawn: np.ndarray, axis: int) -> np.ndarray:
        del axis  # always the last one
        # How often each group was drawn, times its sums: k times less memory than the rows drawn.
        cells = drawn.reshape(-1, count)
        cells = cells + count * np.arange(len(cells))[:, None]
        counts = np.bincount(cells.ravel(), minlength=cells.size).reshape(drawn.shape)
        scores = value(counts.astype(np.float64) @ sums)
        return np.where(np.isfinite(scores), scores, np.nan)

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # it announces the NaN seen below
        ends = bootstrap(
            (np.arange(count),),
            drawn_scores,
            n_resamples=resamples,
            batch=_batch(count),
            vectorized=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = (score if _same(end, score) else float(end) for end in ends)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _p_value(
    sums_a: np.ndarray, sums_b: np.ndarray, value: Value, resamples: int, seed: int
) -> float | None:
    count = len(sums_a)
    gap, total_a, total_b = sums_b - sums_a, sums_a.sum(axis=0), sums_b.sum(axis=0)
    scale = max(1.0, abs(_at(value, total_a)), abs(_at(value, total_b)))
    if resamples == 0 or not math.isfinite(scale):
        return None
    if count == 1:
        return 1.0  # swapping the only group turns the sign: both ways lie as far apart

    def difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        del second, axis  # a group that is not swapped in `first` is not swapped in `second`
        moved = (first >= count).astype(np.float64) @ gap
        apart = (value(total_a + moved) - value(total_b - moved)) / scale
        # Without rounding, differences that are equal on paper would be counted at random.
        return np.round(apart, _DECIMALS)

    with np.errstate(all="ignore"):
        test = permutation_test(
            (np.arange(count), np.arange(count, 2 * count)),
            difference,
            permutation_type="samples",
            n_resamples=resamples,
            batch=_batch(count),
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
    return float(test.pvalue) if np.isfinite(test.null_distribution).all() else None


def _batch(groups: int) -> int:
    return max(1, _BATCH_BYTES // (8 * groups))


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=10**-_DECIMALS, abs_tol=10**-_DECIMALS)
