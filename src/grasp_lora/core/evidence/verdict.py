"""Choose the final ratio of a search, and test its gain over the lowest ratio."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.groups import (
    LEVEL,
    NEGLIGIBLE,
    Gain,
    chance_of_choice,
    group_of,
    mean_gain,
)
from grasp_lora.core.evidence.history import (
    RoundRecord,
    curve_minimum,
    finite_losses,
    finite_trials,
    grid,
    observations,
    resampled_curves,
    weighted_minima,
)

Verdict: TypeAlias = Literal["learned", "flat", "never-fired"]

# A trial at most this far above `low` counts as a trial at `low`; trials this close are pooled.
_NEAR_RATIO = 0.07
# The policy tries ratios where the losses seemed low, which no redrawn loss can repeat. So the
# largest gain this close to a redrawn choice counts (`benchmarks.levels` measures the level).
_BESIDE = _NEAR_RATIO / 2
_LATE_ROUNDS = 3
_RESAMPLES = 400


@dataclass(frozen=True)
class RatioChoice:
    """The outcome of a search.

    Attributes:
        ratio: The ratio to prune at, whatever the verdict is.
        verdict: `learned` if a gain of this ratio over `low` was shown, `flat` if not,
            `never-fired` if the run had no round.
        gain: Loss at `low` - loss near `ratio`, in nats: the plain mean over the examples that saw
            both in one round. The ratio was chosen on these examples as well, which flatters the
            gain a little; `p_value` takes the choice into account. None without evidence, such as
            where `ratio` is as good as `low`.
        gain_error: Standard error of the gain over groups of examples, in nats; None without
            evidence.
        z: gain / gain_error; None without evidence or if the error is 0.
        rule: How the ratio was chosen, in a few words.
        history_minimum: Ratio where the curve over all rounds is lowest; None without evidence.
        late_mu: Mean centre of the last policy rounds; None if there were none. It informs the
            reader and does not change the ratio.
        interval: (low, high), which holds the ratio of lowest loss for 95 % of the bootstrap
            resamples of the groups of examples; None without evidence. All resamples share the
            smoothing of the curve, so the interval holds the true optimum less often
            (`benchmarks.controller` measures how often).
        p_value: How likely the ratio that is chosen would look as good if no ratio had any gain;
            None without evidence.
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
    p_value: float | None = None


def ratio_choice(
    records: Sequence[RoundRecord],
    current: float,
    horizon: int,
    config: ControllerConfig,
    groups: Sequence[Hashable] | None = None,
) -> RatioChoice:
    """Return the final ratio and the evidence for it.

    Preset `paper` takes the candidate with the largest reward of all rounds, as published. A reward
    is a difference to the baseline of its own round, so this rule favours the round with the worst
    baseline as much as the best ratio. The largest of many noisy numbers also overstates its gain
    (winner's curse).

    Preset `standard` takes the ratio where the curve over all rounds is lowest. If no gain was
    shown and `when_flat` is `largest`, it takes the largest ratio that is not worse by more than
    one standard error over resampled groups, which gives the smallest adapter.

    Args:
        records: All rounds, in order.
        current: Current ratio; the result if there is no evidence.
        horizon: Planned number of rounds.
        config: Settings of the controller.
        groups: Group of each example, such as its context; the ids in `rows` of the records are
            places in it. None makes each example its own group.
    """
    late = [record.mu for record in records if record.kind == "policy"][-_LATE_ROUNDS:]
    late_mu = math.fsum(late) / len(late) if late else None
    seen = observations(records)
    minimum = curve_minimum(seen, horizon, config) if seen else None
    curves = resampled_curves(seen, horizon, config, _RESAMPLES, groups) if seen else None
    interval = None if curves is None else _interval(curves, config)
    if config.preset == "paper":
        ratio, rule = _largest_reward(records, current)
    else:
        ratio, rule = _history_minimum(minimum, current)
    by_curve = horizon if config.preset != "paper" else None
    found = gain_at(ratio, records, config, groups, by_curve)
    largest = config.preset != "paper" and config.when_flat == "largest"
    if largest and curves is not None and not _shown(found):
        ratio, rule = _largest_as_good(curves, config), "largest ratio within one standard error"
        found = gain_at(ratio, records, config, groups)
    verdict: Verdict = "learned" if _shown(found) else "flat"
    return RatioChoice(
        ratio=ratio,
        verdict=verdict if records else "never-fired",
        gain=found.mean.gain if found else None,
        gain_error=found.mean.error if found else None,
        z=found.mean.z if found else None,
        rule=rule,
        history_minimum=minimum,
        late_mu=late_mu,
        interval=interval,
        p_value=found.p_value if found else None,
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


@dataclass(frozen=True)
class RatioGain:
    """The gain of a ratio over `low`, tested with the choice of the ratio taken into account.

    Attributes:
        mean: The gain and its error over groups of examples.
        p_value: How likely the ratio that is chosen would look as good if no ratio had any gain.
    """

    mean: Gain
    p_value: float


def _shown(found: RatioGain | None) -> bool:
    return found is not None and found.mean.gain > NEGLIGIBLE and found.p_value <= LEVEL


def gain_at(
    ratio: float,
    records: Sequence[RoundRecord],
    config: ControllerConfig,
    groups: Sequence[Hashable] | None = None,
    horizon: int | None = None,
) -> RatioGain | None:
    """Return the gain of a ratio over `low`, in nats, tested as a choice among all ratios.

    The gain is the plain mean over examples, as the loss is. An example's gain is its mean over all
    trials near the ratio, in whichever round.

    Args:
        ratio: Any ratio; it may have been chosen on the same records.
        records: All rounds, in order.
        config: Settings of the controller.
        groups: As in `ratio_choice`.
        horizon: Planned number of rounds, if the ratio was chosen as the lowest point of the curve.
            None holds the gain against the largest of all ratios tried, whatever chose the ratio.

    Returns:
        The gain; None if the ratio is near `low`, if no round tried a ratio near it beside one near
        `low`, or if the examples that saw both are of fewer than two groups.
    """
    contrasts = _contrasts(records, config)
    near = _gains_near(contrasts, ratio)
    labels = [group_of(example, groups) for example in near]
    mean = mean_gain(list(near.values()), labels)
    if mean is None or ratio <= config.low + _NEAR_RATIO:
        return None
    if horizon is None:
        tried = {one.ratio: _gains_near(contrasts, one.ratio) for one in contrasts}
        return RatioGain(mean, chance_of_choice(near, list(tried.values()), groups))
    seen, ratios = observations(records), grid(config).numpy()

    def choose(weights: np.ndarray, place: Mapping[Hashable, int]) -> np.ndarray:
        lowest = ratios[weighted_minima(seen, horizon, config, weights, groups, place), None]
        return (lowest > config.low + _NEAR_RATIO) & (abs(ratios - lowest) <= _BESIDE)

    could = [_gains_near(contrasts, float(one)) for one in ratios]
    also = {example for observation in seen for example in observation.gaps}
    return RatioGain(mean, chance_of_choice(near, could, groups, choose, also))


@dataclass(frozen=True)
class _Contrast:
    """A trial of a round that also measured `low`.

    Attributes:
        ratio: The ratio tried.
        gains: Example id -> loss at `low` - loss of the trial, in nats.
    """

    ratio: float
    gains: dict[int, float]


def _contrasts(records: Sequence[RoundRecord], config: ControllerConfig) -> list[_Contrast]:
    """Return the contrasts of all trials in rounds whose lowest ratio is near `low`.

    A contrast compares a trial with the lowest ratio of the same round, where examples and weights
    are the same. A trial whose loss is not finite is lost. The curve over all rounds cannot serve
    here: a trial beyond a cliff shifts its whole round, so the curve's errors on the plateau before
    the cliff grow with the cliff.
    """
    found: list[_Contrast] = []
    in_force = 0.0  # nothing is pruned before the first commit
    for record in records:
        trials = finite_trials(record)
        whole = finite_losses(record.baseline_rows)
        measured = [*trials, *([] if whole is None else [(in_force, whole)])]
        in_force = record.mask_ratio
        if not measured:
            continue
        lowest_ratio, reference = min(measured, key=lambda trial: trial[0])
        if lowest_ratio > config.low + _NEAR_RATIO:
            continue
        for ratio, losses in trials:
            if ratio > lowest_ratio + _NEAR_RATIO:
                gaps = [low - high for low, high in zip(reference, losses, strict=True)]
                found.append(_Contrast(ratio, dict(zip(record.rows, gaps, strict=True))))
    return found


def _gains_near(contrasts: Sequence[_Contrast], ratio: float) -> dict[int, float]:
    """Return the mean gain of each example over the contrasts near the ratio that measured it."""
    gains: dict[int, list[float]] = {}
    for contrast in contrasts:
        if abs(contrast.ratio - ratio) <= _NEAR_RATIO:
            for example, gain in contrast.gains.items():
                gains.setdefault(example, []).append(gain)
    return {example: statistics.fmean(own) for example, own in gains.items()}


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
