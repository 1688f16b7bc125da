"""Choose the final ratio of a search, and test its gain over the lowest ratio."""

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
from grasp_lora.core.evidence.crossfit import Gain, pooled_gain, split_halves, standard_error
from grasp_lora.core.evidence.history import (
    RoundRecord,
    curve_minimum,
    grid,
    observations,
    resampled_curves,
    winsorised,
)

Verdict: TypeAlias = Literal["learned", "flat", "never-fired"]

# A trial at most this far above `low` counts as a trial at `low`; trials this close are pooled.
_NEAR_RATIO = 0.07
_LATE_ROUNDS = 3
_RESAMPLES = 400


@dataclass(frozen=True)
class RatioChoice:
    """The outcome of a search.

    Attributes:
        ratio: The ratio to prune at, whatever the verdict is.
        verdict: `learned` if a gain over `low` was shown, `flat` if not, `never-fired` if the run
            had no round.
        gain: Cross-fitted loss at `low` - loss at the chosen ratio, in nats; None without evidence.
        gain_error: Standard error of the gain, in nats; None without evidence.
        z: gain / gain_error; None without evidence or if the error is 0.
        rule: How the ratio was chosen, in a few words.
        history_minimum: Ratio where the curve over all rounds is lowest; None without evidence.
        late_mu: Mean centre of the last policy rounds; None if there were none. It informs the
            reader and does not change the ratio.
        interval: (low, high), which holds the ratio of lowest loss for 95 % of the bootstrap
            resamples of the examples; None without evidence. All resamples share the smoothing of
            the curve, so the interval holds the true optimum less often (`benchmarks.controller`
            measures how often).
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

    Preset `paper` takes the candidate with the largest reward of all rounds, as published. A reward
    is a difference to the baseline of its own round, so this rule favours the round with the worst
    baseline as much as the best ratio. The largest of many noisy numbers also overstates its gain
    (winner's curse).

    Preset `standard` takes the ratio where the curve over all rounds is lowest. If no gain was
    shown and `when_flat` is `largest`, it takes the largest ratio that is not worse by more than
    one standard error over resampled examples, which gives the smallest adapter.

    Args:
        records: All rounds, in order.
        current: Current ratio; the result if there is no evidence.
        horizon: Planned number of rounds.
        config: Settings of the controller.
    """
    late = [record.mu for record in records if record.kind == "policy"][-_LATE_ROUNDS:]
    late_mu = math.fsum(late) / len(late) if late else None
    seen = observations(records)
    minimum = curve_minimum(seen, horizon, config) if seen else None
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
    """Return the largest ratio whose loss is within one standard error of the lowest loss."""
    best = int(curves.mean(dim=0).argmin())
    behind = curves - curves[:, best : best + 1]
    as_good = behind.mean(dim=0) <= behind.std(dim=0)
    return float(grid(config)[int(as_good.nonzero().max())])


def cross_fitted_gain(records: Sequence[RoundRecord], config: ControllerConfig) -> Gain | None:
    """Return the gain of the chosen ratio over `low`, tested on other examples than the choice.

    The ratio is chosen on one half of the examples, by its gain less one standard error. Its gain
    is measured on the other half; then the halves swap. The gain of a ratio pools all trials near
    the ratio, over all rounds.

    Returns:
        The gain; None if no round had a ratio near `low` beside a higher one, or if there are too
        few examples for two halves.
    """
    contrasts = _contrasts(records, config)
    ratios = sorted({contrast.ratio for contrast in contrasts})
    examples = sorted({example for contrast in contrasts for example in contrast.gaps})
    tested: list[list[float]] = []
    for chosen_on, tested_on in split_halves(examples):
        sides = [
            (_gaps_near(contrasts, ratio, chosen_on), _gaps_near(contrasts, ratio, tested_on))
            for ratio in ratios
        ]
        whole = [(a, b) for a, b in sides if len(a) > 1 and len(b) > 1]
        if whole:
            tested.append(max(whole, key=lambda side: _gain_less_one_error(side[0]))[1])
    return pooled_gain(tested)


def _gain_less_one_error(gains: Sequence[float]) -> float:
    return statistics.fmean(gains) - standard_error(gains)


@dataclass(frozen=True)
class _Contrast:
    """A trial of a round that also measured `low`.

    Attributes:
        ratio: The ratio tried.
        gaps: Example id -> winsorised loss at `low` - loss of the trial, in nats.
    """

    ratio: float
    gaps: dict[int, float]


def _contrasts(records: Sequence[RoundRecord], config: ControllerConfig) -> list[_Contrast]:
    """Return the contrasts of all trials in rounds whose lowest ratio is near `low`.

    A contrast compares a trial with the lowest ratio of the same round, where examples and weights
    are the same. The curve over all rounds cannot serve here: a trial beyond a cliff shifts its
    whole round, so the curve's errors on the plateau before the cliff grow with the cliff.
    """
    found: list[_Contrast] = []
    in_force = 0.0  # nothing is pruned before the first commit
    for record in records:
        trials = list(zip(record.candidates, record.per_row, strict=True))
        measured = [(in_force, record.baseline_rows)] if record.baseline_rows else []
        in_force = record.mask_ratio
        lowest_ratio, reference = min((*trials, *measured), key=lambda trial: trial[0])
        if lowest_ratio > config.low + _NEAR_RATIO:
            continue
        for ratio, losses in trials:
            gaps = {
                example: low - high
                for example, low, high in zip(record.rows, reference, losses, strict=True)
                if low is not None and high is not None
            }
            if gaps and ratio > lowest_ratio + _NEAR_RATIO:
                values = winsorised(list(gaps.values()))
                found.append(_Contrast(ratio, dict(zip(gaps, values, strict=True))))
    return found


def _gaps_near(contrasts: Sequence[_Contrast], ratio: float, examples: set[int]) -> list[float]:
    """Return the mean gap of each example over the contrasts near the ratio that measured it."""
    gaps: dict[int, list[float]] = {}
    for contrast in contrasts:
        if abs(contrast.ratio - ratio) <= _NEAR_RATIO:
            for example in examples & contrast.gaps.keys():
                gaps.setdefault(example, []).append(contrast.gaps[example])
    return [statistics.fmean(gaps[example]) for example in sorted(gaps)]


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
