"""What the rounds saw, and the curve of loss over ratio that it supports.

A round's losses are compared within the round only: the model moves between rounds, and rows
differ in how hard they are. So each row's loss under a candidate is centred on that row's mean
over the candidates, and the centred values of all rounds are joined by a Gaussian process. The
process has one scale; before it is fitted, the trials far above the best of their round are drawn
nearer, or a cliff of several nats would be the only thing that it sees. This is our departure from
arXiv 2601.06702, which keeps the single best reward difference.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grasp_lora.core.controller.policy import RoundKind
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.crossfit import variance

GRID_POINTS = 161
_LENGTH = 0.25  # ratios this far apart are seen as related
_ROUND_FACTOR = 10.0  # variance of a round's shared term over that of the curve
_OUTLIER = 4 * 1.4826  # 4 standard deviations, in median absolute deviations of a normal
_STEEP = 4.0  # median distances to the best of a round, above which losses count as logarithms
_LEAST_NOISE = 1e-3  # of the curve's variance: the probing rows are never the whole truth
_LEAST_SIGNAL = 0.1  # of the spread of the observations
_TINY = 1e-18


@dataclass(frozen=True)
class RoundRecord:
    """All that one round saw and decided; only numbers, strings and None, so it is JSON-able.

    Losses and rewards are in nats; None stands for a value that was not finite.

    Attributes:
        round: Number of the round, from 0.
        step: Optimizer step it followed.
        kind: `coverage` (evenly spaced candidates), `policy` (sampled ones) or `confirmation` (the
            lowest ratio beside the best so far).
        candidates: Ratios tried.
        rewards: Baseline loss - trial loss of each candidate; without a baseline, loss of the
            lowest ratio whose trial was finite - trial loss.
        baseline: Mean loss of the model as it was; None if it was not measured.
        losses: Mean loss of each candidate.
        committed: Whether the current ratio was moved and a mask applied.
        ratio_before: Current ratio before the round.
        ratio: Current ratio after it.
        mask_ratio: Ratio of the mask in force after it; 0 before any commit.
        best: Candidate with the largest reward.
        mu: Centre of the policy after the round.
        sigma: Standard deviation of the policy after the round.
        rows: Ids of the probing rows.
        per_row: For each candidate the loss of each row.
        baseline_rows: Loss of each row of the model as it was; empty if it was not measured.
        reason: Why the round did or did not commit, in a few words.
    """

    round: int
    step: int
    kind: RoundKind
    candidates: tuple[float, ...]
    rewards: tuple[float | None, ...]
    baseline: float | None
    losses: tuple[float | None, ...]
    committed: bool
    ratio_before: float
    ratio: float
    mask_ratio: float
    best: float | None
    mu: float
    sigma: float
    rows: tuple[int, ...]
    per_row: tuple[tuple[float | None, ...], ...]
    baseline_rows: tuple[float | None, ...]
    reason: str


@dataclass(frozen=True)
class Observation:
    """One trial: how much worse (> 0) or better (< 0) it was than its round's trials on average.

    Attributes:
        ratio: The ratio tried.
        round: Number of the round.
        gaps: Row id -> the row's winsorised loss difference, in nats; of a trial far above the best
            of its round, in compressed nats.
    """

    ratio: float
    round: int
    gaps: dict[int, float]

    @property
    def mean(self) -> float:
        """Return the mean gap over the rows."""
        return math.fsum(self.gaps.values()) / len(self.gaps)


@dataclass(frozen=True, eq=False)
class Curve:
    """Posterior of the loss curve at the latest round; up to a constant, only differences count.

    Attributes:
        ratios: Ratios of the observations, [n], float64.
        rounds: Their rounds, [n], float64.
        means: Their mean gaps, [n], float64.
        covariance: Prior covariance of the observations, noise included, [n, n].
        variance: Prior variance of the curve.
        horizon: Rounds after which a memory has faded to 1/e.
        latest: Round the curve is drawn for.
    """

    ratios: Tensor
    rounds: Tensor
    means: Tensor
    covariance: Tensor
    variance: float
    horizon: int
    latest: int

    def weights(self, at: Tensor) -> Tensor:
        """Return [m, n] weights: the curve at `at` [m] is `weights @ means`."""
        ages = (self.latest - self.rounds).abs()
        cross = _kernel(at[:, None] - self.ratios, ages[None, :], self.variance, self.horizon)
        return torch.linalg.solve(self.covariance, cross.T).T

    def values(self, at: Tensor) -> Tensor:
        """Return the posterior mean at the ratios `at` [m], in nats."""
        return self.weights(at) @ self.means


def observations(records: Sequence[RoundRecord]) -> tuple[Observation, ...]:
    """Return the trials of all rounds that had at least two finite ones, steep ones compressed."""
    return compressed(gaps_of(records))


def gaps_of(records: Sequence[RoundRecord]) -> list[list[Observation]]:
    """Return the trials of each round that had at least two finite ones to compare."""
    rounds: list[list[Observation]] = []
    for record in records:
        trials = [
            (ratio, [loss for loss in losses if loss is not None])
            for ratio, losses, mean in zip(
                record.candidates, record.per_row, record.losses, strict=True
            )
            if mean is not None
        ]
        if len(trials) < 2:
            continue
        centres = [statistics.fmean(column) for column in zip(*(t for _, t in trials), strict=True)]
        gaps = [winsorised([y - c for y, c in zip(t, centres, strict=True)]) for _, t in trials]
        rounds.append(
            [
                Observation(ratio, record.round, dict(zip(record.rows, own, strict=True)))
                for (ratio, _), own in zip(trials, gaps, strict=True)
            ]
        )
    return rounds


def compressed(
    rounds: Sequence[Sequence[Observation]], multiple: float = _STEEP
) -> tuple[Observation, ...]:
    """Return the observations of all rounds with those far above the best of theirs drawn nearer.

    One whose mean is d above the least of its round moves to `s log(1 + d / s)` above it, its rows
    in proportion, and the round is centred again; s is `multiple` times the median d of all but the
    least. The order within a round stays, and a d much smaller than s hardly changes.

    Args:
        rounds: The observations of each round; those of a round are on the same rows.
        multiple: Over 0; infinity leaves everything as it is.
    """
    least = [min(one, key=lambda o: o.mean) for one in rounds]
    above = [o.mean - low.mean for one, low in zip(rounds, least, strict=True) for o in one]
    scale = multiple * statistics.median([d for d in above if d > 0] or [1.0])
    found: list[Observation] = []
    for one, low in zip(rounds, least, strict=True):
        drawn = [_drawn_to(low, o, scale) for o in one]
        centres = {row: statistics.fmean(own[row] for own in drawn) for row in low.gaps}
        for observation, own in zip(one, drawn, strict=True):
            gaps = {row: gap - centres[row] for row, gap in own.items()}
            found.append(replace(observation, gaps=gaps))
    return tuple(found)


def _drawn_to(low: Observation, other: Observation, scale: float) -> dict[int, float]:
    distance = other.mean - low.mean
    if distance <= 0 or math.isinf(scale):
        return other.gaps
    share = scale * math.log1p(distance / scale) / distance
    return {row: low.gaps[row] + share * (gap - low.gaps[row]) for row, gap in other.gaps.items()}


def winsorised(values: Sequence[float]) -> list[float]:
    """Return the values with outliers pulled in to 4 robust standard deviations.

    If more than half of the values are equal, no scale can be told and nothing is changed.
    """
    middle = statistics.median(values)
    reach = _OUTLIER * statistics.median(abs(value - middle) for value in values)
    if reach == 0:
        return list(values)
    return [min(max(value, middle - reach), middle + reach) for value in values]


def restricted(seen: Sequence[Observation], rows: Collection[int]) -> tuple[Observation, ...]:
    """Return the observations on these rows only; one with fewer than two of them is left out."""
    cut = (
        Observation(o.ratio, o.round, {row: gap for row, gap in o.gaps.items() if row in rows})
        for o in seen
    )
    return tuple(o for o in cut if len(o.gaps) >= 2)


def fit_curve(seen: Sequence[Observation], horizon: int) -> Curve:
    """Return the posterior over the loss curve at the latest round seen.

    Kernel `u^2 (1 + x) exp(-x) exp(-|dt| / horizon)` with `x = sqrt(3) |dr| / 0.25` (Matern 3/2,
    for a plateau may end in a cliff), plus a term shared by the trials of a round, plus noise: the
    variance over rows / number of rows. `u^2` is the spread of the observations less their noise.

    Args:
        seen: At least one observation.
        horizon: Number of rounds of the run.
    """
    ratios = torch.tensor([o.ratio for o in seen], dtype=torch.float64)
    rounds = torch.tensor([o.round for o in seen], dtype=torch.float64)
    means = torch.tensor([o.mean for o in seen], dtype=torch.float64)
    spread = max(float((means**2).mean()), _TINY)
    sampling = _sampling_noise(seen, spread)
    variance = max(spread - float(sampling.mean()), _LEAST_SIGNAL * spread)
    ages = (rounds[:, None] - rounds).abs()
    covariance = (
        _kernel(ratios[:, None] - ratios, ages, variance, horizon)
        + _ROUND_FACTOR * variance * (ages == 0)
        + torch.diag(sampling.clamp(min=_LEAST_NOISE * variance))
    )
    latest = max(o.round for o in seen)
    return Curve(ratios, rounds, means, covariance, variance, horizon, latest)


def grid(config: ControllerConfig) -> Tensor:
    """Return the ratios at which curves are compared, from `low` to `high`, float64."""
    return torch.linspace(config.low, config.high, GRID_POINTS, dtype=torch.float64)


def lowest(seen: Sequence[Observation], horizon: int, config: ControllerConfig) -> float:
    """Return the ratio where the curve of the observations is lowest; the smaller of equal ones."""
    at = grid(config)
    return float(at[int(fit_curve(seen, horizon).values(at).argmin())])


def lowest_near(
    seen: Sequence[Observation], horizon: int, config: ControllerConfig, centre: float
) -> float:
    """Return the lowest point of the curve plus a weak pull to `centre`, which settles flat ones.

    The pull is a quarter of the curve's prior standard deviation at a distance of 1.
    """
    at = grid(config)
    curve = fit_curve(seen, horizon)
    pull = 0.25 * math.sqrt(curve.variance) * (at - centre) ** 2
    return float(at[int((curve.values(at) + pull).argmin())])


def resampled_curves(
    seen: Sequence[Observation], horizon: int, config: ControllerConfig, count: int, seed: int = 0
) -> Tensor:
    """Return the curve over `grid` as it would be had other rows been drawn, [count, GRID_POINTS].

    The rows are drawn with replacement, together with all their losses; how observations are
    weighed against each other stays that of the rows there were. A trial none of whose rows is
    drawn keeps its own mean.

    Args:
        seen: at least one observation.
        horizon: number of rounds of the run.
        config: settings of the controller.
        count: how many draws.
        seed: of the draws.
    """
    rows = sorted({row for observation in seen for row in observation.gaps})
    place = {row: i for i, row in enumerate(rows)}
    gaps = torch.zeros(len(rows), len(seen), dtype=torch.float64)
    measured = torch.zeros_like(gaps)
    for column, observation in enumerate(seen):
        for row, gap in observation.gaps.items():
            gaps[place[row], column] = gap
            measured[place[row], column] = 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (count, len(rows)), generator=generator)
    times = torch.zeros(count, len(rows), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    curve = fit_curve(seen, horizon)
    counted = times @ measured
    means = torch.where(counted > 0, times @ gaps / counted.clamp(min=1), curve.means)
    return means @ curve.weights(grid(config)).T


def _kernel(distance: Tensor, age: Tensor, variance: float, horizon: int) -> Tensor:
    scaled = math.sqrt(3) * distance.abs() / _LENGTH
    return variance * (1 + scaled) * torch.exp(-scaled - age / horizon)


def _sampling_noise(seen: Sequence[Observation], spread: float) -> Tensor:
    """Return the variance of each mean gap; a trial on one row gets the spread, for want of more.

    Half of it is pooled over the trials, because a variance of few rows is itself uncertain.
    """
    own = torch.tensor(
        [variance(o.gaps.values()) / len(o.gaps) if len(o.gaps) > 1 else spread for o in seen],
        dtype=torch.float64,
    )
    return 0.5 * own + 0.5 * own.mean()
