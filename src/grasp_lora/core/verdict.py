"""The ratio a search ends with, and whether its gain over the lowest ratio is more than luck."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from grasp_lora.core.history import (
    Observation,
    RoundRecord,
    fit_curve,
    lowest,
    observations,
    restricted,
)
from grasp_lora.core.settings import ControllerConfig

Verdict: TypeAlias = Literal["learned", "flat", "never-fired"]

Z_LEARNED = 1.645
"""One-sided 5 % level of a standard normal."""
_NEGLIGIBLE = 1e-9  # nats; below it a gain is rounding
_SPLITS = 5
_SPLIT_SEED = 0
_AGREE = 0.15
_LATE_ROUNDS = 3


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
        late_mu: Mean centre of the last policy rounds; None if there were none.
    """

    ratio: float
    verdict: Verdict
    gain: float | None
    gain_error: float | None
    z: float | None
    rule: str
    history_minimum: float | None
    late_mu: float | None


def ratio_choice(
    records: Sequence[RoundRecord], current: float, horizon: int, config: ControllerConfig
) -> RatioChoice:
    """Return the final ratio and the evidence for it.

    Preset `paper` takes the candidate with the largest reward of all rounds, as published. Its
    reward is a difference to its own round's baseline, so this finds the round with the worst
    baseline as much as the best ratio, and the largest of many noisy numbers flatters itself
    (winner's curse). Preset `standard` takes the lowest point of the curve over all rounds,
    averaged with the policy's late centre where the two agree within 0.15.

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
    if config.preset == "paper":
        ratio, rule = _largest_reward(records, current)
    else:
        ratio, rule = _joined(minimum, late_mu, current)
    if not records:
        return RatioChoice(ratio, "never-fired", None, None, None, rule, minimum, late_mu)
    evidence = cross_fitted_gain(seen, horizon, config)
    if evidence is None:
        return RatioChoice(ratio, "flat", None, None, None, rule, minimum, late_mu)
    gain, error = evidence
    z = gain / error if error > 0 else None
    verdict = "learned" if gain > max(_NEGLIGIBLE, Z_LEARNED * error) else "flat"
    return RatioChoice(ratio, verdict, gain, error, z, rule, minimum, late_mu)


def cross_fitted_gain(
    seen: Sequence[Observation], horizon: int, config: ControllerConfig
) -> tuple[float, float] | None:
    """Return the gain over `low` of choosing a ratio, and its standard error, in nats.

    The rows are split in two halves; the ratio is chosen on one and its gain measured on the other,
    then the halves swap. So the gain does not profit from the luck of the choice. Averaged over a
    few splits, drawn with a fixed seed. The errors of halves and splits are averaged as if fully
    correlated, since they share all rows: the test errs on the side of `flat`.

    Returns:
        None if there are too few rows or trials for two halves.
    """
    rows = sorted({row for observation in seen for row in observation.gaps})
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    gains: list[float] = []
    errors: list[float] = []
    for _ in range(_SPLITS):
        order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[i] for i in order]
        first = restricted(seen, set(shuffled[: len(rows) // 2]))
        second = restricted(seen, set(shuffled[len(rows) // 2 :]))
        if not first or not second:
            continue
        for chosen_on, tested_on in ((first, second), (second, first)):
            ratio = lowest(chosen_on, horizon, config)
            gain, error = _measured_gain(tested_on, ratio, horizon, config)
            gains.append(gain)
            errors.append(error)
    if not gains:
        return None
    return math.fsum(gains) / len(gains), math.fsum(errors) / len(errors)


def _measured_gain(
    seen: Sequence[Observation], ratio: float, horizon: int, config: ControllerConfig
) -> tuple[float, float]:
    """Return curve(low) - curve(ratio) and its standard error, clustered by row.

    The curve is linear in the gaps, so the difference is a sum over rows; a row that was probed in
    several rounds contributes once, with all of its gaps.
    """
    curve = fit_curve(seen, horizon)
    ends = curve.weights(torch.tensor([config.low, ratio], dtype=torch.float64))
    weights: list[float] = (ends[0] - ends[1]).tolist()
    shares: dict[int, float] = {}
    for weight, observation in zip(weights, seen, strict=True):
        count = len(observation.gaps)
        # Residuals of few rows are too small by this factor, as in any sample variance.
        unbiased = math.sqrt(count / (count - 1))
        for row, gap in observation.gaps.items():
            residual = (gap - observation.mean) * unbiased
            shares[row] = shares.get(row, 0.0) + weight * residual / count
    gain = math.fsum(w * o.mean for w, o in zip(weights, seen, strict=True))
    return gain, math.sqrt(math.fsum(share**2 for share in shares.values()))


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


def _joined(minimum: float | None, late_mu: float | None, current: float) -> tuple[float, str]:
    if minimum is None:
        return current, "current ratio: no round had two finite trials to compare"
    if late_mu is not None and abs(late_mu - minimum) <= _AGREE:
        return (minimum + late_mu) / 2, "mean of the history minimum and the late policy centre"
    return minimum, "history minimum"
