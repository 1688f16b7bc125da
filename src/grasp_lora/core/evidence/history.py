"""Record the rounds of a search, and fit the curve of loss over ratio to their observations.

A round's losses are compared within the round only, because the model changes between rounds and
examples differ in difficulty. So each example's loss under a candidate is centred on that example's
mean over the candidates. A Gaussian process joins the centred values of all rounds. The process has
one scale, so a cliff of several nats would hide all smaller differences. Before the fit, trials far
above the best trial of their round are therefore compressed. This is our departure from
arXiv 2601.06702, which keeps the single best reward difference.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grasp_lora.core.controller.policy import RoundKind
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.groups import group_of
from grasp_lora.core.pruning.profile import MOST_TILT, Profile

GRID_POINTS = 161
_LENGTH = 0.25  # length scale of the kernel, in units of ratio
_ROUND_FACTOR = 10.0  # variance of the shared term of a round / variance of the curve
_OUTLIER = 4 * 1.4826  # 4 standard deviations, in median absolute deviations of a normal
_STEEP = 4.0  # in median distances to the best of a round; larger distances count logarithmically
_LEAST_NOISE = 1e-3  # fraction of the curve's variance: probing examples are only a sample
_LEAST_SIGNAL = 0.1  # fraction of the spread of the observations
_TINY = 1e-18
_NODES = 41
_OWN = 2.0  # a group's own function and the one that all share: of one size at the ends
_LEVELS = 33
_TILTS = 9  # of a tilt, from one end to the other; odd, so that none is among them


@dataclass(frozen=True)
class RoundRecord:
    """The measurements and decisions of one round; numbers, strings and None only, so JSON-able.

    Losses and rewards are in nats; None stands for a value that was not finite.

    Attributes:
        round: Index of the round, from 0.
        step: Optimizer step that the round followed.
        kind: `coverage` (a stratified round, evenly spaced candidates), `policy` (sampled
            candidates) or `confirmation` (the lowest ratio beside the incumbent).
        candidates: Ratios tried.
        rewards: Baseline loss - trial loss of each candidate. Without a baseline: loss of the
            lowest ratio with a finite trial - trial loss.
        baseline: Mean loss of the model before the round; None if it was not measured.
        losses: Mean loss of each candidate.
        committed: Whether the round moved the current ratio and applied a mask.
        ratio_before: Current ratio before the round.
        ratio: Current ratio after the round.
        mask_ratio: Ratio of the mask in force after the round; 0 before any commit.
        best: Candidate with the largest reward.
        mu: Centre of the policy after the round.
        sigma: Standard deviation of the policy after the round.
        rows: Ids of the probing examples.
        per_row: Loss of each example under each candidate, [candidates][examples].
        baseline_rows: Loss of each example under the model before the round; empty if it was not
            measured.
        reason: Why the round did or did not commit, in a few words.
        tilts: Tilts of each candidate (`core.pruning.profile`), [candidates][tilts]; all zero for
            one ratio for all groups. Empty if the search has no tilts.
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
    tilts: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Observation:
    """One trial: how much worse (> 0) or better (< 0) it was than the average trial of its round.

    Attributes:
        ratio: The ratio tried.
        round: Index of the round.
        gaps: Example id -> winsorised loss difference of the example, in nats. The differences of a
            trial far above the best of its round are compressed.
        tilts: Tilts of the trial; empty if the search has none.
    """

    ratio: float
    round: int
    gaps: dict[int, float]
    tilts: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Return the mean gap over the examples, in nats."""
        return math.fsum(self.gaps.values()) / len(self.gaps)


@dataclass(frozen=True, eq=False)
class Curve:
    """Posterior of the loss curve at the latest round, known up to a constant.

    Attributes:
        ratios: Ratio of each observation, [n], float64.
        tilts: Tilts of each observation, [n, tilts], float64.
        rounds: Round of each observation, [n], float64.
        means: Mean gap of each observation in nats, [n], float64.
        covariance: Prior covariance of the observations, noise included, [n, n].
        variance: Prior variance of the curve, in nats squared.
        horizon: Age in rounds at which the correlation has fallen to 1/e.
        latest: Round that the curve describes.
    """

    ratios: Tensor
    tilts: Tensor
    rounds: Tensor
    means: Tensor
    covariance: Tensor
    variance: float
    horizon: int
    latest: int

    def weights(self, at: Tensor, tilts: Tensor | None = None) -> Tensor:
        """Return the weights W [m, n] such that the curve at the ratios `at` [m] is `W @ means`.

        Args:
            at: Ratios, [m].
            tilts: Tilts there, [m, tilts]; None is one ratio for all groups.
        """
        ages = (self.latest - self.rounds).abs()
        there = self.tilts.new_zeros(1, self.tilts.shape[1]) if tilts is None else tilts
        there = there.expand(len(at), -1)
        cross = _kernel(
            (at, there), (self.ratios, self.tilts), ages[None, :], self.variance, self.horizon
        )
        return torch.linalg.solve(self.covariance, cross.T).T

    def values(self, at: Tensor, tilts: Tensor | None = None) -> Tensor:
        """Return the posterior mean at the ratios `at` [m] and `tilts` [m, tilts], in nats."""
        return self.weights(at, tilts) @ self.means


def records_of(lines: Sequence[Mapping[str, Any]]) -> tuple[list[RoundRecord], list[Hashable]]:
    """Return the rounds of a `rounds.jsonl`, and the group of each example.

    Args:
        lines: the lines of the file, in order. Their examples are numbered in the order they come
            up; one without a group is its own.
    """
    places: dict[str, int] = {}
    groups: list[Hashable] = []
    found: list[RoundRecord] = []
    known = {field.name for field in fields(RoundRecord)}
    for line in lines:
        for row, group in zip(line["rows"], line.get("groups") or line["rows"], strict=True):
            if row not in places:
                places[row] = len(places)
                groups.append(group)
        rows = tuple(places[row] for row in line["rows"])
        values: dict[str, Any] = {name: line[name] for name in line if name in known}
        values["rows"] = rows
        for name in ("candidates", "rewards", "losses", "baseline_rows"):
            values[name] = tuple(values[name])
        for name in ("per_row", "tilts"):
            values[name] = tuple(tuple(own) for own in values.get(name, ()))
        found.append(RoundRecord(**values))
    return found, groups


def observations(records: Sequence[RoundRecord]) -> tuple[Observation, ...]:
    """Return the finite trials of all rounds with at least two; steep trials are compressed."""
    return compressed(observations_by_round(records))


def observations_by_round(records: Sequence[RoundRecord]) -> list[list[Observation]]:
    """Return the finite trials of each round; rounds with fewer than two are left out."""
    rounds: list[list[Observation]] = []
    for record in records:
        trials = _trials(record)
        if len(trials) < 2:
            continue
        each = [losses for *_, losses in trials]
        centres = [statistics.fmean(column) for column in zip(*each, strict=True)]
        gaps = [winsorised([y - c for y, c in zip(t, centres, strict=True)]) for t in each]
        rounds.append(
            [
                Observation(ratio, record.round, dict(zip(record.rows, own, strict=True)), tilts)
                for (ratio, tilts, _), own in zip(trials, gaps, strict=True)
            ]
        )
    return rounds


def finite_trials(record: RoundRecord) -> list[tuple[float, list[float]]]:
    """Return (ratio, loss of each example) of the trials of a round that are finite throughout.

    Trials whose groups have different ratios are left out.
    """
    return [(ratio, losses) for ratio, tilts, losses in _trials(record) if not any(tilts)]


def _trials(record: RoundRecord) -> list[tuple[float, tuple[float, ...], list[float]]]:
    """Return (ratio, tilts, loss of each example) of the trials that are finite throughout."""
    tilts = record.tilts or ((),) * len(record.candidates)
    trials = zip(record.candidates, tilts, map(finite_losses, record.per_row), strict=True)
    return [(ratio, own, losses) for ratio, own, losses in trials if losses is not None]


def of_examples(record: RoundRecord, kept: Collection[int]) -> RoundRecord:
    """Return the measurements of a round on some of its examples alone."""
    places = [place for place, row in enumerate(record.rows) if row in kept]
    return replace(
        record,
        rows=tuple(record.rows[place] for place in places),
        per_row=tuple(tuple(losses[place] for place in places) for losses in record.per_row),
    )


def finite_losses(losses: Sequence[float | None]) -> list[float] | None:
    """Return the losses; None if there are none or one of them is not finite."""
    known = [loss for loss in losses if loss is not None]
    return known if known and len(known) == len(losses) else None


def compressed(
    rounds: Sequence[Sequence[Observation]], multiple: float = _STEEP
) -> tuple[Observation, ...]:
    """Return the observations of all rounds, with large distances to the best trial compressed.

    Let d be the distance of a trial's mean to the lowest mean of its round. The trial moves to the
    distance `s log(1 + d / s)`, and the gaps of its examples move in proportion. Each round is then
    centred again. s is `multiple` times the median of all positive d. The order within a round does
    not change, and a d much smaller than s hardly changes.

    Args:
        rounds: The observations of each round; within a round all are on the same examples.
        multiple: Above 0; infinity changes nothing.
    """
    least = [min(one, key=lambda o: o.mean) for one in rounds]
    above = [o.mean - low.mean for one, low in zip(rounds, least, strict=True) for o in one]
    scale = multiple * statistics.median([d for d in above if d > 0] or [1.0])
    found: list[Observation] = []
    for one, low in zip(rounds, least, strict=True):
        drawn = [_compressed_gaps(low, o, scale) for o in one]
        centres = {row: statistics.fmean(own[row] for own in drawn) for row in low.gaps}
        for observation, own in zip(one, drawn, strict=True):
            gaps = {row: gap - centres[row] for row, gap in own.items()}
            found.append(replace(observation, gaps=gaps))
    return tuple(found)


def _compressed_gaps(low: Observation, other: Observation, scale: float) -> dict[int, float]:
    distance = other.mean - low.mean
    if distance <= 0 or math.isinf(scale):
        return other.gaps
    share = scale * math.log1p(distance / scale) / distance
    return {row: low.gaps[row] + share * (gap - low.gaps[row]) for row, gap in other.gaps.items()}


def winsorised(values: Sequence[float]) -> list[float]:
    """Return the values with outliers clipped to 4 robust standard deviations from the median.

    If more than half of the values are equal, the robust scale is 0 and nothing is changed.
    """
    middle = statistics.median(values)
    reach = _OUTLIER * statistics.median(abs(value - middle) for value in values)
    if reach == 0:
        return list(values)
    return [min(max(value, middle - reach), middle + reach) for value in values]


def fit_curve(seen: Sequence[Observation], horizon: int) -> Curve:
    """Return the posterior of the loss curve at the latest round observed.

    The kernel is `u^2 (1 + x) exp(-x) exp(-|dt| / horizon)` with `x = sqrt(3) |dr| / 0.25`. It is a
    Matern 3/2 kernel, because a plateau may end in a cliff. Two terms are added: one shared by the
    trials of a round, and the noise, which is the variance over examples / number of examples.
    `u^2` is the spread of the observations less their noise. With tilts the loss is the mean over
    groups of a function of the group's ratio, which changes evenly with the group's position along
    each tilt; all these functions have that kernel.

    Args:
        seen: At least one observation.
        horizon: Number of rounds of the run.
    """
    ratios = torch.tensor([o.ratio for o in seen], dtype=torch.float64)
    tilts = torch.tensor([o.tilts for o in seen], dtype=torch.float64)
    rounds = torch.tensor([o.round for o in seen], dtype=torch.float64)
    means = torch.tensor([o.mean for o in seen], dtype=torch.float64)
    spread = max(float((means**2).mean()), _TINY)
    sampling = _sampling_noise(seen, spread)
    variance = max(spread - float(sampling.mean()), _LEAST_SIGNAL * spread)
    ages = (rounds[:, None] - rounds).abs()
    covariance = (
        _kernel((ratios, tilts), (ratios, tilts), ages, variance, horizon)
        + _ROUND_FACTOR * variance * (ages == 0)
        + torch.diag(sampling.clamp(min=_LEAST_NOISE * variance))
    )
    latest = max(o.round for o in seen)
    return Curve(ratios, tilts, rounds, means, covariance, variance, horizon, latest)


def grid(config: ControllerConfig) -> Tensor:
    """Return the ratios at which curves are evaluated, `low` to `high`, [GRID_POINTS], float64."""
    return torch.linspace(config.low, config.high, GRID_POINTS, dtype=torch.float64)


def curve_minimum(seen: Sequence[Observation], horizon: int, config: ControllerConfig) -> float:
    """Return the ratio of `grid` with the lowest fitted loss; of equal ones the smaller."""
    at = grid(config)
    return float(at[int(fit_curve(seen, horizon).values(at).argmin())])


def lowest_profile(seen: Sequence[Observation], horizon: int, config: ControllerConfig) -> Profile:
    """Return the profile with the lowest fitted loss, on a grid of levels and tilts.

    Args:
        seen: At least one observation, all with tilts.
        horizon: Number of rounds of the run.
        config: Settings of the controller.
    """
    curve = fit_curve(seen, horizon)
    levels = torch.linspace(config.low, config.high, _LEVELS, dtype=torch.float64)
    shares = torch.linspace(-1.0, 1.0, _TILTS, dtype=torch.float64)
    each = torch.cartesian_prod(levels, *[shares] * curve.tilts.shape[1])
    level, tilts = each[:, 0], MOST_TILT * each[:, 1:]
    room = 2 * torch.minimum(level - config.low, config.high - level)
    held = tilts.abs().sum(1) <= room + 1e-9
    level, tilts = level[held], tilts[held]
    place = int(curve.values(level, tilts).argmin())
    lowest: list[float] = tilts[place].tolist()
    return Profile(float(level[place]), tuple(lowest))


def curve_minimum_near(
    seen: Sequence[Observation], horizon: int, config: ControllerConfig, centre: float
) -> float:
    """Return the ratio where the loss curve plus a weak pull to `centre` is lowest.

    The pull decides where the curve is flat. It is a quarter of the curve's prior standard
    deviation at a distance of 1.
    """
    at = grid(config)
    curve = fit_curve(seen, horizon)
    pull = 0.25 * math.sqrt(curve.variance) * (at - centre) ** 2
    return float(at[int((curve.values(at) + pull).argmin())])


def resampled_curves(
    seen: Sequence[Observation],
    horizon: int,
    config: ControllerConfig,
    count: int,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Tensor:
    """Return bootstrap resamples of the loss curve over `grid`, in nats, [count, GRID_POINTS].

    Groups of examples are drawn with replacement, each with all of its losses. The weights of the
    observations stay those of the original examples. A trial keeps its own mean if none of its
    examples is drawn.

    Args:
        seen: at least one observation.
        horizon: number of rounds of the run.
        config: settings of the controller.
        count: number of resamples.
        groups: group of each example, by its id; None makes each its own group.
        seed: seed of the draws.
    """
    examples = sorted({example for observation in seen for example in observation.gaps})
    labels = [group_of(example, groups) for example in examples]
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    member = torch.tensor([numbers[label] for label in labels])
    place = {example: i for i, example in enumerate(examples)}
    gaps = torch.zeros(len(examples), len(seen), dtype=torch.float64)
    measured = torch.zeros_like(gaps)
    for column, observation in enumerate(seen):
        for example, gap in observation.gaps.items():
            gaps[place[example], column] = gap
            measured[place[example], column] = 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(numbers), (count, len(numbers)), generator=generator)
    times = torch.zeros(count, len(numbers), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    times = times[:, member]
    curve = fit_curve(seen, horizon)
    counted = times @ measured
    means = torch.where(counted > 0, times @ gaps / counted.clamp(min=1), curve.means)
    return means @ curve.weights(grid(config)).T


def weighted_minima(
    seen: Sequence[Observation],
    horizon: int,
    config: ControllerConfig,
    weights: np.ndarray,
    groups: Sequence[Hashable] | None,
    place: Mapping[Hashable, int],
) -> np.ndarray:
    """Return the place in `grid` of the lowest fitted loss where groups have weights, [draws].

    The gaps of an example count times the weight of its group. The weights of the observations stay
    those of the original examples.

    Args:
        seen: at least one observation.
        horizon: number of rounds of the run.
        config: settings of the controller.
        weights: [draws, groups].
        groups: group of each example, by its id; None makes each its own group.
        place: group of any example -> its column.
    """
    summed = np.zeros((len(place), len(seen)))
    for column, observation in enumerate(seen):
        for example, gap in observation.gaps.items():
            summed[place[group_of(example, groups)], column] += gap / len(observation.gaps)
    curve = fit_curve(seen, horizon)
    return (weights @ summed @ curve.weights(grid(config)).numpy().T).argmin(axis=1)


def _kernel(
    at: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
    ages: Tensor,
    variance: float,
    horizon: int,
) -> Tensor:
    """Return the prior covariance of the curve, without shared terms and noise, [m, n].

    Args:
        at: Ratios [m] and tilts [m, tilts].
        seen: Ratios [n] and tilts [n, tilts].
        ages: Differences of the rounds, broadcastable to [m, n].
        variance: Prior variance of the curve, in nats squared.
        horizon: Number of rounds of the run.
    """
    if at[1].shape[1] == 0:
        return _matern(at[0][:, None] - seen[0], variance, ages / horizon)
    nodes = torch.linspace(0.0, 1.0, _NODES, dtype=torch.float64)
    curve = _matern(nodes[:, None] - nodes, variance, torch.zeros(()))
    alike = torch.einsum("kma,ab,knb->mn", _by_node(*at), curve, _by_node(*seen))
    return alike * torch.exp(-ages / horizon)


def _matern(distance: Tensor, variance: float, fading: Tensor) -> Tensor:
    scaled = math.sqrt(3) * distance.abs() / _LENGTH
    return variance * (1 + scaled) * torch.exp(-scaled - fading)


def _by_node(ratios: Tensor, tilts: Tensor) -> Tensor:
    """Return the weight of each node of a function of the ratio in the loss of profiles.

    All groups are taken to lie at an end of every tilt, equally many at each corner. A function
    that is given at the nodes is linear in between.

    Args:
        ratios: Levels, [m].
        tilts: Tilts, [m, tilts].

    Returns:
        [1 + tilts, m, nodes]: of the function that the groups share, and of what the later end
        has more of it than the first, for each tilt.
    """
    ends = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    corners = torch.cartesian_prod(*[ends] * tilts.shape[1]).reshape(-1, tilts.shape[1])
    own = (ratios[:, None] + tilts @ corners.T).clamp(0.0, 1.0) * (_NODES - 1)
    near = (1 - (own[..., None] - torch.arange(_NODES)).abs()).clamp(min=0.0)
    signs = torch.cat([torch.ones_like(corners[:, :1]), _OWN * corners], dim=1) / len(corners)
    return torch.einsum("mca,ck->kma", near, signs)


def _sampling_noise(seen: Sequence[Observation], spread: float) -> Tensor:
    """Return the variance of each mean gap, [n]; a trial on one example gets `spread` instead.

    Each result is half its own variance and half the mean over the trials, because a variance of
    few examples is itself uncertain.
    """
    own = torch.tensor(
        [_variance(o.gaps.values()) / len(o.gaps) if len(o.gaps) > 1 else spread for o in seen],
        dtype=torch.float64,
    )
    return 0.5 * own + 0.5 * own.mean()


def _variance(values: Collection[float]) -> float:
    # `statistics.variance` is exact to the last digit, but many times slower than all else here.
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
