"""The ratio a search ends with, and whether its gain over the lowest ratio is more than luck."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.crossfit import Gain, halves, pooled, standard_error
from grasp_lora.core.evidence.history import (
    RoundRecord,
    grid,
    lowest,
    observations,
    resampled_curves,
    winsorised,
)

Verdict: TypeAlias = Literal["learned", "flat", "never-fired"]

_NEAR = 0.07  # a trial this close to `low` stands for it, and trials this close are tested together
_LATE_ROUNDS = 3
_RESAMPLES = 400


@dataclass(frozen=True)
class RatioChoice:
    """The outcome of a search.

    Attributes:
        ratio: The ratio to prune at; given whatever the verdict is.
        verdict: `learned` if a gain over `low` was shown, `flat` if not, `never-fired` if the run
            had no round.
        gain: Cross-fitted loss at `low` - loss at the chosen ratio, in nats; None without evidence.
        gain_error: Standard error of the gain; None without evidence.
        z: gain / gain_error; None without evidence or without spread over the rows.
        rule: How the ratio was picked, in a few words.
        history_minimum: Lowest point of the curve over all rounds; None without evidence.
        late_mu: Mean centre of the last policy rounds; None if there were none. For the reader, it
            does not move the ratio.
        interval: Where 95 % of the lowest points lie that other draws of the same rows give, (low,
            high); None without evidence. The curve's smoothing is the same in all of them, so it
            holds the true optimum less often (`benchmarks.controller` says how often).
    """

    ratio: float
    verdict: Verdict
    gain: float | None
    gain_error: float | None
    z: float | None
    rule: str
    history_minimum: float | None
    late_mu: float | None
    interval: tuple[float, float] | None = None


def ratio_choice(
    records: Sequence[RoundRecord], current: float, horizon: int, config: ControllerConfig
) -> RatioChoice:
    """Return the final ratio and the evidence for it.

    Preset `paper` takes the candidate with the largest reward of all rounds, as published. Its
    reward is a difference to its own round's baseline, so this finds the round with the worst
    baseline as much as the best ratio, and the largest of many noisy numbers flatters itself
    (winner's curse). Preset `standard` takes the lowest point of the curve over all rounds; where
    nothing is shown and `when_flat` is `largest`, the largest ratio that is not worse by more than
    one standard error over resampled rows, for the smallest adapter.

    Args:
        records: All rounds, in order.
        current: Current ratio, the answer if nothing else is known.
        horizon: Rounds the run was planned for.
        config: Settings of the controller.
    """
    late = [record.mu for record in records if record.kind == "policy"][-_LATE_ROUNDS:]
    late_mu = math.fsum(late) / len(late) if late else None
    seen = observations(records)
    minimum = lowest(seen, horizon, config) if seen else None
    curves = resampled_curves(seen, horizon, config, _RESAMPLES) if seen else None
    interval = None if curves is None else _interval(curves, config)
    found = cross_fitted_gain(records, config)
    verdict: Verdict = "learned" if found and found.shown else "flat"
    if not records:
        verdict = "never-fired"
    if config.preset == "paper":
        ratio, rule = _largest_reward(records, current)
    elif verdict == "flat" and config.when_flat == "largest" and curves is not None:
        ratio, rule = _largest_as_good(curves, config), "largest ratio within one standard error"
    else:
        ratio, rule = _history_minimum(minimum, current)
    return RatioChoice(
        ratio=ratio,
        verdict=verdict,
        gain=found.gain if found else None,
        gain_error=found.error if found else None,
        z=found.z if found else None,
        rule=rule,
        history_minimum=minimum,
        late_mu=late_mu,
        interval=interval,
    )


def _interval(curves: Tensor, config: ControllerConfig) -> tuple[float, float]:
    lowest_points = grid(config)[curves.argmin(dim=1)]
    ends = torch.quantile(lowest_points, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _largest_as_good(curves: Tensor, config: ControllerConfig) -> float:
    """Return the largest ratio whose loss is within one standard error of the lowest point's."""
    best = int(curves.mean(dim=0).argmin())
    behind = curves - curves[:, best : best + 1]
    as_good = behind.mean(dim=0) <= behind.std(dim=0)
    return float(grid(config)[int(as_good.nonzero().max())])


def cross_fitted_gain(records: Sequence[RoundRecord], config: ControllerConfig) -> Gain | None:
    """Return the gain over `low` of choosing a ratio, tested on rows that it was not chosen on.

    The ratio is chosen on one half of the rows, by its gain less one standard error, and its gain
    measured on the other, then the halves swap. A ratio's gain is that of all trials near it, in
    all rounds.

    Returns:
        None if no round had a ratio near `low` beside a higher one, or too few rows for two halves.
    """
    contrasts = _contrasts(records, config)
    ratios = sorted({contrast.ratio for contrast in contrasts})
    rows = sorted({row for contrast in contrasts for row in contrast.gaps})
    tested: list[list[float]] = []
    for chosen_on, tested_on in halves(rows):
        sides = [
            (_near(contrasts, ratio, chosen_on), _near(contrasts, ratio, tested_on))
            for ratio in ratios
        ]
        whole = [(a, b) for a, b in sides if len(a) > 1 and len(b) > 1]
        if whole:
            tested.append(max(whole, key=lambda side: _at_least(side[0]))[1])
    return pooled(tested)


def _at_least(gains: Sequence[float]) -> float:
    return statistics.fmean(gains) - standard_error(gains)


@dataclass(frozen=True)
class _Contrast:
    """A trial beside which `low` was measured: row -> loss at `low` less the trial's."""

    ratio: float
    gaps: dict[int, float]


def _contrasts(records: Sequence[RoundRecord], config: ControllerConfig) -> list[_Contrast]:
    """Return the contrast of every trial with the lowest ratio of its round, where that is near
    `low`.

    Within one round alone, where rows and weights are the same. The curve over all rounds is no
    measure for this: a trial beyond a cliff shifts its whole round, and however flat the plateau
    before the cliff is, the curve's errors there are a share of the cliff.
    """
    found: list[_Contrast] = []
    in_force = 0.0  # nothing is pruned before the first commit
    for record in records:
        trials = list(zip(record.candidates, record.per_row, strict=True))
        measured = [(in_force, record.baseline_rows)] if record.baseline_rows else []
        in_force = record.mask_ratio
        lowest_ratio, reference = min((*trials, *measured), key=lambda trial: trial[0])
        if lowest_ratio > config.low + _NEAR:
            continue
        for ratio, losses in trials:
            gaps = {
                row: low - high
                for row, low, high in zip(record.rows, reference, losses, strict=True)
                if low is not None and high is not None
            }
            if gaps and ratio > lowest_ratio + _NEAR:
                values = winsorised(list(gaps.values()))
                found.append(_Contrast(ratio, dict(zip(gaps, values, strict=True))))
    return found


def _near(contrasts: Sequence[_Contrast], ratio: float, rows: set[int]) -> list[float]:
    """Return the mean gap of each of the rows over the contrasts near the ratio that have it."""
    gaps: dict[int, list[float]] = {}
    for contrast in contrasts:
        if abs(contrast.ratio - ratio) <= _NEAR:
            for row in rows & contrast.gaps.keys():
                gaps.setdefault(row, []).append(contrast.gaps[row])
    return [statistics.fmean(gaps[row]) for row in sorted(gaps)]


def _largest_reward(records: Sequence[RoundRecord], current: float) -> tuple[float, str]:
    trials = [
        (reward, candidate)
        for record in records
        for reward, candidate in zip(record.rewards, record.candidates, strict=True)
        if reward is not None
    ]
    if not trials:
        return current, "current ratio: no trial gave a finite reward"
    return max(trials, key=lambda trial: trial[0])[1], "candidate with the largest reward"


def _history_minimum(minimum: float | None, current: float) -> tuple[float, str]:
    if minimum is None:
        return current, "current ratio: no round had two finite trials to compare"
    return minimum, "history minimum"
