"""Gains that do not profit from the luck of a choice: choose on half of the rows, test on the rest.

The best of many noisy numbers flatters itself. So what is compared is chosen on one half of the
rows and its gain measured on the other, then the halves swap; a few random splits are averaged.
This is our departure from arXiv 2601.06702, which takes the largest reward at its word.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Z_SHOWN = 1.645
"""One-sided 5 % level of a standard normal."""
NEGLIGIBLE = 1e-9
"""Nats; below it a gain is rounding."""
_SHARED = 0.25  # correlation at which the gains of two halves of the rows are averaged
_SPLITS = 5
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Gain:
    """A gain and how sure it is.

    Attributes:
        gain: mean loss saved, in nats.
        error: its standard error, in nats.
        rows: the fewest rows that a half was tested on.
    """

    gain: float
    error: float
    rows: int

    @property
    def z(self) -> float | None:
        """Return gain / error; None without any spread over the rows."""
        return self.gain / self.error if self.error > 0 else None

    @property
    def shown(self) -> bool:
        """Return whether the gain is above 0 at the one-sided 5 % level."""
        return self.gain > max(NEGLIGIBLE, critical(self.rows) * self.error)


def halves(rows: Sequence[int]) -> Iterator[tuple[set[int], set[int]]]:
    """Yield (rows to choose on, rows to test on), both ways round, for a few fixed splits."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    for _ in range(_SPLITS):
        order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[i] for i in order]
        first, second = set(shuffled[: len(rows) // 2]), set(shuffled[len(rows) // 2 :])
        yield first, second
        yield second, first


def pooled(tested: Sequence[Sequence[float]]) -> Gain | None:
    """Return the gain over the halves tested.

    The splits' errors are averaged as if fully correlated, since they share all rows. Two halves
    share none, but what is tested on one was chosen on the other: as if correlated at 0.25, which
    kept false alarms below their level in simulation (docs/results/controller.md).

    Args:
        tested: for every half the gain of each of its rows, in nats, at least two.

    Returns:
        None if there is no half.
    """
    if not tested:
        return None
    errors = [standard_error(gains) for gains in tested]
    error = math.sqrt((1 + _SHARED) / 2) * math.fsum(errors) / len(errors)
    gain = math.fsum(statistics.fmean(gains) for gains in tested) / len(tested)
    return Gain(gain, error, min(map(len, tested)))


def gain_of_best(
    challengers: Mapping[str, Sequence[float]], references: Mapping[str, Sequence[float]]
) -> Gain | None:
    """Return what the best challenger saves over the best reference, both chosen on other rows.

    Args:
        challengers: name -> loss of each row, in nats, [rows].
        references: likewise, on the same rows.

    Returns:
        None with fewer than four rows, or if a loss is not finite in all of a group.

    Raises:
        ValueError: a group is empty, or the numbers of rows differ.
    """
    lengths = {len(losses) for group in (challengers, references) for losses in group.values()}
    if not challengers or not references or len(lengths) != 1:
        raise ValueError(
            f"two groups with losses on the same rows are compared, got {len(challengers)} "
            f"challengers and {len(references)} references with {sorted(lengths)} rows; measure "
            "all on the same rows"
        )
    finite = [
        {name: losses for name, losses in group.items() if all(map(math.isfinite, losses))}
        for group in (challengers, references)
    ]
    (count,) = lengths
    if count < 4 or not all(finite):
        return None
    tested: list[list[float]] = []
    for chosen_on, tested_on in halves(range(count)):
        best, reference = (
            min(group.values(), key=lambda losses: math.fsum(losses[row] for row in chosen_on))
            for group in finite
        )
        tested.append([reference[row] - best[row] for row in sorted(tested_on)])
    return pooled(tested)


def as_good_as_best(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the names whose mean loss is above the lowest by one standard error at most.

    The error is that of the rows' differences to the lowest. Of several that are about as good one
    may then be taken for other reasons: the lowest of a few noisy numbers is often mere luck.

    Args:
        losses: name -> loss of each row, in nats, on the same rows, at least two.

    Returns:
        Names in the order given; empty where every mean is NaN or infinite.

    Raises:
        ValueError: the numbers of rows differ, or there are fewer than two.
    """
    lengths = {len(values) for values in losses.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"losses on the same rows are compared, at least 2, got {sorted(lengths)}; measure all "
            "on the same rows"
        )
    finite = {name: values for name, values in losses.items() if all(map(math.isfinite, values))}
    if not finite:
        return []
    best = min(finite.values(), key=math.fsum)
    gaps = {
        name: [value - lowest for value, lowest in zip(values, best, strict=True)]
        for name, values in finite.items()
    }
    return [name for name, gap in gaps.items() if statistics.fmean(gap) <= standard_error(gap)]


def critical(rows: int, z: float = Z_SHOWN) -> float:
    """Return the level of Student's t for the mean of `rows` that a normal has at `z`.

    To second order in 1 / degrees of freedom (Cornish and Fisher): 2 % too small for 4 rows.
    """
    freedom = rows - 1
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + first + second


def variance(values: Collection[float]) -> float:
    """Return the sample variance of at least two values.

    That of `statistics` is exact to the last digit, and many times as slow as a round's other work.
    """
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def standard_error(values: Collection[float]) -> float:
    """Return the standard error of the mean of at least two values."""
    return math.sqrt(variance(values) / len(values))
