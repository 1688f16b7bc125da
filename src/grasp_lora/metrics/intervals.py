"""Compute bootstrap intervals of scores and paired tests of two systems, by groups of rows.

Questions on one context are easy or hard together, so the rows of a group are drawn together.
Single draws would give intervals that are too narrow. The interval is the percentile bootstrap
(Efron & Tibshirani 1993, ch. 13; of groups: Field & Welsh 2007). The test is the paired permutation
test, which swaps the rows of the two systems group by group (approximate randomization, Noreen
1989; Riezler & Maxwell 2005). Both recompute the score from summed statistics, so they also hold
for scores that are not a mean of rows, such as BLEU. With fewer than about twenty groups, the
interval is narrower than its confidence claims.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, permutation_test

from grasp_lora.metrics.records import check_resampling

Value = Callable[[np.ndarray], np.ndarray]
"""Sums over rows, shape [..., k] -> scores, shape [...]."""

# Size of one batch of group indices, 8 bytes each. scipy holds several copies of a batch.
_BATCH_BYTES = 8 * 2**20
# A sum in another order differs by rounding, so scores that agree to this many decimals are equal.
_DECIMALS = 10


@dataclass(frozen=True)
class PairedDifference:
    """The difference of systems A and B on the same rows, with interval and p-value."""

    difference: float
    """Score of A minus score of B."""
    low: float | None
    """Lower end of the bootstrap interval; None without an interval."""
    high: float | None
    """Upper end of the bootstrap interval."""
    p_value: float | None
    """Two-sided: fraction of swapped systems that differ at least this much; None if untested."""


def interval(
    statistics: np.ndarray,
    groups: Sequence[str],
    value: Value,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the bootstrap interval (low, high) of a score, with groups drawn with replacement.

    Args:
        statistics: statistics of each row, additive over rows, shape [n, k].
        groups: group of each row, length n; the order of the rows does not matter.
        value: function from summed statistics to scores, see `Value`.
        resamples: number of drawn sets of groups; 0 gives no interval.
        confidence: fraction of the drawn scores inside the interval, in (0, 1).
        seed: seed of the draws; equal seeds give equal intervals.

    Returns:
        (low, high), equal if all groups have equal scores. None with fewer than two groups, with no
        resamples, or if the score of a drawn set is not finite.

    Raises:
        ValueError: shapes do not fit, or an option is out of its range.
    """
    _check_shapes(statistics, groups)
    check_resampling(resamples, confidence)
    score = _score_of_sums(value, np.sum(statistics, axis=0))
    return _interval(_by_group(statistics, groups), value, score, resamples, confidence, seed)


def paired_difference(
    statistics_a: np.ndarray,
    statistics_b: np.ndarray,
    groups: Sequence[str],
    value: Value,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Return the difference of two systems on the same rows, given in the same order.

    The interval is a bootstrap interval; both systems are scored on the same drawn groups. If the
    2^groups ways of swapping are no more than `resamples`, the p-value is exact over all of them.
    Otherwise it is estimated from `resamples` random ways and is never below 2 / (resamples + 1).

    Args:
        statistics_a: statistics of system A, shape [n, k]; for the other arguments see `interval`.
        statistics_b: statistics of system B, shape [n, k].

    Returns:
        The difference. The p-value is None without resamples or if a score is not finite. `low` and
        `high` are None if `interval` returns None.

    Raises:
        ValueError: as `interval`, the shapes of the statistics differ, or there is no row.
    """
    _check_shapes(statistics_a, groups)
    check_resampling(resamples, confidence)
    if np.shape(statistics_a) != np.shape(statistics_b) or not len(groups):
        raise ValueError(
            f"statistics of shapes {np.shape(statistics_a)} and {np.shape(statistics_b)} cannot be "
            "compared; give both systems on the same rows, at least one"
        )
    sums_a, sums_b = _by_group(statistics_a, groups), _by_group(statistics_b, groups)
    k = sums_a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return value(sums[..., :k]) - value(sums[..., k:])

    both = np.concatenate([sums_a, sums_b], axis=1)
    totals = np.sum(statistics_a, axis=0), np.sum(statistics_b, axis=0)
    observed = _score_of_sums(difference, np.concatenate(totals))
    ends = _interval(both, difference, observed, resamples, confidence, seed)
    low, high = ends or (None, None)
    return PairedDifference(observed, low, high, _p_value(sums_a, sums_b, value, resamples, seed))


def _check_shapes(statistics: np.ndarray, groups: Sequence[str]) -> None:
    if np.ndim(statistics) != 2 or len(statistics) != len(groups):
        raise ValueError(
            f"statistics of shape {np.shape(statistics)} with {len(groups)} groups; "
            "give one row of statistics and one group per scored row"
        )


def _by_group(statistics: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return the summed statistics of each group, groups sorted, shape [groups, k]."""
    place = {group: index for index, group in enumerate(sorted(set(groups)))}
    sums = np.zeros((len(place), np.shape(statistics)[1]))
    np.add.at(sums, [place[group] for group in groups], np.asarray(statistics, dtype=np.float64))
    return sums


def _score_of_sums(value: Value, sums: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(value(sums))


def _interval(
    sums: np.ndarray, value: Value, score: float, resamples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    count = len(sums)
    if count < 2 or resamples == 0:
        return None

    def drawn_scores(drawn: np.ndarray, axis: int) -> np.ndarray:
        del axis  # always the last axis
        # Counts of the drawn groups times their sums: k times less memory than the drawn rows.
        cells = drawn.reshape(-1, count)
        cells = cells + count * np.arange(len(cells))[:, None]
        counts = np.bincount(cells.ravel(), minlength=cells.size).reshape(drawn.shape)
        scores = value(counts.astype(np.float64) @ sums)
        return np.where(np.isfinite(scores), scores, np.nan)

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # the NaN is handled below
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
    low, high = (score if _equal_but_for_rounding(end, score) else float(end) for end in ends)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _p_value(
    sums_a: np.ndarray, sums_b: np.ndarray, value: Value, resamples: int, seed: int
) -> float | None:
    count = len(sums_a)
    gap, total_a, total_b = sums_b - sums_a, sums_a.sum(axis=0), sums_b.sum(axis=0)
    scale = max(1.0, abs(_score_of_sums(value, total_a)), abs(_score_of_sums(value, total_b)))
    if resamples == 0 or not math.isfinite(scale):
        return None
    if count == 1:
        return 1.0  # swapping the only group turns the sign, so both ways differ equally

    def difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        del second, axis  # a group that is not swapped in `first` is not swapped in `second`
        moved = (first >= count).astype(np.float64) @ gap
        apart = (value(total_a + moved) - value(total_b - moved)) / scale
        # Without rounding, equal differences would count as larger or smaller at random.
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


def _equal_but_for_rounding(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=10**-_DECIMALS, abs_tol=10**-_DECIMALS)
