"""The ratio a search ends with, and whether its gain over the lowest ratio is more than luck."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from grasp_lora.core.history import RoundRecord, lowest, observations, winsorised
from grasp_lora.core.settings import ControllerConfig

Verdict: TypeAlias = Literal["learned", "flat", "never-fired"]

Z_LEARNED = 1.645
"""One-sided 5 % level of a standard normal."""
_NEGLIGIBLE = 1e-9  # nats; below it a gain is rounding
_NEAR_LOW = 0.07  # a trial this close to `low` stands for it
_WINDOW = 0.1  # trials this far apart are tested together; one nearer to `low` shows no gain
_SHARED = 0.5  # correlation at which the gains of two halves of the rows are averaged
_SPLITS = 5
_SPLIT_SEED = 0
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
        late_mu: Mean centre of the last policy rounds; None if there were none. For the reader, it
            does not move the ratio.
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
    (winner's curse). Preset `standard` takes the lowest point of the curve over all rounds.

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
        ratio, rule = _history_minimum(minimum, current)
    if not records:
        return RatioChoice(ratio, "never-fired", None, None, None, rule, minimum, late_mu)
    evidence = cross_fitted_gain(records, config)
    if evidence is None:
        return RatioChoice(ratio, "flat", None, None, None, rule, minimum, late_mu)
    gain, error, rows = evidence
    z = gain / error if error > 0 else None
    verdict = "learned" if gain > max(_NEGLIGIBLE, _critical(rows) * error) else "flat"
    return RatioChoice(ratio, verdict, gain, error, z, rule, minimum, late_mu)


def cross_fitted_gain(
    records: Sequence[RoundRecord], config: ControllerConfig
) -> tuple[float, float, int] | None:
    """Return the gain over `low` of choosing a ratio, its standard error (nats), and rows tested.

    The rows are split in two halves; the ratio is chosen on one, by its gain less one standard
    error, and its gain measured on the other, then the halves swap. So the gain does not profit
    from the luck of the choice. A ratio's gain is that of all trials near it, in all rounds.
    Averaged over a few splits, drawn with a fixed seed. The splits' errors are averaged as if fully
    correlated, since they share all rows, those of two halves as if half so.

    Returns:
        None if no round had a ratio near `low` beside a higher one, or too few rows for two halves.
    """
    contrasts = _contrasts(records, config)
    ratios = sorted({contrast.ratio for contrast in contrasts})
    rows = sorted({row for contrast in contrasts for row in contrast.gaps})
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    gains: list[float] = []
    errors: list[float] = []
    counts: list[int] = []
    for _ in range(_SPLITS):
        order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[i] for i in order]
        first, second = set(shuffled[: len(rows) // 2]), set(shuffled[len(rows) // 2 :])
        for chosen_on, tested_on in ((first, second), (second, first)):
            halves = [
                (_near(contrasts, ratio, chosen_on), _near(contrasts, ratio, tested_on))
                for ratio in ratios
            ]
            whole = [(a, b) for a, b in halves if len(a) > 1 and len(b) > 1]
            if whole:
                _, tested = max(whole, key=lambda half: statistics.fmean(half[0]) - _error(half[0]))
                gains.append(statistics.fmean(tested))
                errors.append(_error(tested))
                counts.append(len(tested))
    if not gains:
        return None
    error = math.sqrt((1 + _SHARED) / 2) * math.fsum(errors) / len(errors)
    return math.fsum(gains) / len(gains), error, min(counts)


def _critical(rows: int) -> float:
    """Return the 5 % level of Student's t for the mean of `rows`, to first order in 1 / rows."""
    return Z_LEARNED * (1 + (Z_LEARNED**2 + 1) / (4 * (rows - 1)))


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
        if lowest_ratio > config.low + _NEAR_LOW:
            continue
        for ratio, losses in trials:
            gaps = {
                row: low - high
                for row, low, high in zip(record.rows, reference, losses, strict=True)
                if low is not None and high is not None
            }
            if gaps and ratio > lowest_ratio + _WINDOW:
                values = winsorised(list(gaps.values()))
                found.append(_Contrast(ratio, dict(zip(gaps, values, strict=True))))
    return found


def _near(contrasts: Sequence[_Contrast], ratio: float, rows: set[int]) -> list[float]:
    """Return the mean gap of each of the rows over the contrasts near the ratio that have it."""
    gaps: dict[int, list[float]] = {}
    for contrast in contrasts:
        if abs(contrast.ratio - ratio) <= _WINDOW:
            for row in rows & contrast.gaps.keys():
                gaps.setdefault(row, []).append(contrast.gaps[row])
    return [statistics.fmean(gaps[row]) for row in sorted(gaps)]


def _error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


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
