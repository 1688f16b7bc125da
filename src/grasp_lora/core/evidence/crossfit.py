"""Measure gains without selection bias: choose on half of the examples, test on the other half.

The best of many noisy numbers overstates its gain. So the best is chosen on one half of the
examples and its gain measured on the other half; then the halves swap. A few random splits are
averaged. This is our departure from arXiv 2601.06702, which takes the largest reward as it is.
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
"""A gain below this many nats is rounding."""
_SHARED = 0.25  # assumed correlation of the gains of two halves of the examples
_SPLITS = 5
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Gain:
    """A gain with its standard error.

    Attributes:
        gain: mean loss saved, in nats.
        error: standard error of the gain, in nats.
        rows: the smallest number of examples that a half was tested on.
    """

    gain: float
    error: float
    rows: int

    @property
    def z(self) -> float | None:
        """Return gain / error; None if the error is 0."""
        return self.gain / self.error if self.error > 0 else None

    @property
    def shown(self) -> bool:
        """Return whether the gain is above 0 at the one-sided 5 % level."""
        return self.gain > max(NEGLIGIBLE, critical_value(self.rows) * self.error)


def split_halves(examples: Sequence[int]) -> Iterator[tuple[set[int], set[int]]]:
    """Yield (examples to choose on, examples to test on), both ways round, for fixed splits."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    for _ in range(_SPLITS):
        order: list[int] = torch.randperm(len(examples), generator=generator).tolist()
        shuffled = [examples[i] for i in order]
        first, second = set(shuffled[: len(examples) // 2]), set(shuffled[len(examples) // 2 :])
        yield first, second
        yield second, first


def pooled_gain(tested: Sequence[Sequence[float]]) -> Gain | None:
    """Return the gain averaged over all tested halves.

    The errors of the splits are averaged as if fully correlated, because all splits share the same
    examples. The two halves of a split share no example, but each was the choosing half of the
    other. They count as correlated at 0.25, which kept false alarms below their level in simulation
    (docs/results/controller.md).

    Args:
        tested: for every half the gain of each of its examples, in nats, at least two.

    Returns:
        The gain; None if there is no half.
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
    """Return the gain of the best challenger over the best reference, tested on held-out halves.

    Both are chosen on one half of the examples and compared on the other half.

    Args:
        challengers: name -> loss of each example, in nats, [examples].
        references: name -> loss of each example, in nats, on the same examples.

    Returns:
        The gain; None with fewer than four examples, or if every member of a group has a loss that
        is not finite.

    Raises:
        ValueError: a group is empty, or the numbers of examples differ.
    """
    lengths = {len(losses) for group in (challengers, references) for losses in group.values()}
    if not challengers or not references or len(lengths) != 1:
        raise ValueError(
            f"two groups with losses on the same examples are compared, got {len(challengers)} "
            f"challengers and {len(references)} references with {sorted(lengths)} examples; "
            "measure all on the same examples"
        )
    finite = [
        {name: losses for name, losses in group.items() if all(map(math.isfinite, losses))}
        for group in (challengers, references)
    ]
    (count,) = lengths
    if count < 4 or not all(finite):
        return None
    tested: list[list[float]] = []
    for chosen_on, tested_on in split_halves(range(count)):
        best, reference = (
            min(group.values(), key=lambda losses: math.fsum(losses[i] for i in chosen_on))
            for group in finite
        )
        tested.append([reference[i] - best[i] for i in sorted(tested_on)])
    return pooled_gain(tested)


def within_one_error_of_best(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the names whose mean loss is at most one standard error above the lowest mean.

    The standard error is that of the examples' differences to the losses with the lowest mean. The
    lowest of a few noisy means is often lowest by luck, so the caller may choose among these names
    for other reasons.

    Args:
        losses: name -> loss of each example, in nats, on the same examples, at least two.

    Returns:
        Names in the order given. A name with a loss that is not finite is left out.

    Raises:
        ValueError: the numbers of examples differ, or there are fewer than two.
    """
    lengths = {len(values) for values in losses.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"losses on the same examples are compared, at least 2, got {sorted(lengths)}; measure "
            "all on the same examples"
        )
    finite = {name: values for name, values in losses.items() if all(map(math.isfinite, values))}
    if not finite:
        return []
    best = min(finite.values(), key=math.fsum)
    gaps = {
        name: [value - curve_minimum for value, curve_minimum in zip(values, best, strict=True)]
        for name, values in finite.items()
    }
    return [name for name, gap in gaps.items() if statistics.fmean(gap) <= standard_error(gap)]


def critical_value(count: int, z: float = Z_SHOWN) -> float:
    """Return the critical value of Student's t for a mean of `count` values.

    It has the tail probability that a standard normal has above `z`. The Cornish-Fisher expansion
    is to second order in 1 / degrees of freedom: 2 % too small for 4 values.
    """
    freedom = count - 1
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + first + second


def variance(values: Collection[float]) -> float:
    """Return the sample variance of at least two values.

    `statistics.variance` is exact to the last digit, but many times slower than the other work of a
    round.
    """
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def standard_error(values: Collection[float]) -> float:
    """Return the standard error of the mean of at least two values."""
    return math.sqrt(variance(values) / len(values))
