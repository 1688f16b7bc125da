"""The controller as an ask-and-tell loop: state and losses in, new state and a record out.

`begin` once; then for each round that `is_due`: `propose` ratios, measure their losses on the rows
of `next_rows` (and those of the model as it is, if `needs_baseline`), `conclude`, and apply a mask
at `record.mask_ratio` if `record.committed`; `choose_ratio` at the end. Nothing here knows a model,
and the state survives a JSON round trip.

A commit moves the current ratio towards the best candidate by at most `max_step` and cuts the mask
at the ratio it records. Departure from the published code, which cuts the mask at the candidate's
ratio; `benchmarks.controllers` does that for comparison.

Without a baseline the rewards of a round compare with the lowest ratio it tried: their differences,
which are all that the policy and the history use, are the same, and a quarter of the forwards is
saved. The best of the round is then never negative, so every round with a finite trial commits.

A trial whose loss is not finite loses, and nothing else: it takes no part in means, in the policy
update or in the choice of the best.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

import torch

from grasp_lora.core.controller.policy import (
    PRIOR_RATIO,
    Policy,
    clip,
    confirming_candidates,
    coverage_candidates,
    initial_coverage,
    initial_policy,
    round_kind,
    sampled_candidates,
    updated_policy,
)
from grasp_lora.core.controller.schedule import draw_rows, is_due, planned_rounds
from grasp_lora.core.controller.settings import CONTROLLER_PRESETS, ControllerConfig
from grasp_lora.core.evidence.history import RoundRecord, lowest, lowest_near, observations
from grasp_lora.core.evidence.verdict import RatioChoice, ratio_choice

__all__ = [
    "ControllerConfig",
    "ControllerState",
    "RatioChoice",
    "RoundRecord",
    "begin",
    "choose_ratio",
    "conclude",
    "draw_rows",
    "is_due",
    "needs_baseline",
    "next_rows",
    "planned_rounds",
    "propose",
    "state_from_json",
    "state_to_json",
]


_COMMITTED = "committed"


@dataclass(frozen=True)
class ControllerState:
    """Where the controller stands between two rounds.

    Attributes:
        mu: Centre of the policy, a ratio.
        sigma: Standard deviation of the policy, in units of ratio.
        ratio: Current ratio.
        mask_ratio: Ratio of the mask in force; 0 before the first commit.
        horizon: Rounds the run is planned for; sets the share of coverage and the memory's length.
        records: The rounds so far.
    """

    mu: float
    sigma: float
    ratio: float
    mask_ratio: float
    horizon: int
    records: tuple[RoundRecord, ...]

    @property
    def round(self) -> int:
        """Return the number of the next round, from 0."""
        return len(self.records)


def begin(config: ControllerConfig, planned: int | None = None) -> ControllerState:
    """Return the state before the first round.

    Args:
        config: Settings of the controller.
        planned: What `planned_rounds` says of this run; default is the number in the settings.
    """
    policy = initial_policy(config)
    horizon = planned or config.rounds or cast(int, CONTROLLER_PRESETS["standard"]["rounds"])
    return ControllerState(policy.mu, policy.sigma, config.start, 0.0, horizon, ())


def propose(
    state: ControllerState, config: ControllerConfig, generator: torch.Generator
) -> tuple[float, ...]:
    """Return the ratios to try in the next round, each in [low, high]."""
    kind = round_kind(state.round, state.horizon, config)
    if kind == "coverage":
        return coverage_candidates(state.round, config)
    seen = () if config.preset == "paper" else observations(state.records)
    favourite = lowest(seen, state.horizon, config) if seen else None
    if kind == "confirmation" and favourite is not None:
        policy = Policy(state.mu, state.sigma)
        return confirming_candidates(policy, config, generator, favourite)
    return sampled_candidates(Policy(state.mu, state.sigma), config, generator, favourite)


def needs_baseline(config: ControllerConfig) -> bool:
    """Return whether a round must also measure the model as it is, on the rows of the round."""
    return config.baseline


def next_rows(
    state: ControllerState,
    groups: Sequence[str],
    config: ControllerConfig,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Return the row positions of the next round; rows that earlier rounds probed less come first.

    So that `rounds` x `rows` probes see as many different rows as they can.

    Args:
        state: The state before the round; its records name the rows by these positions.
        groups: Group of each row, as in `draw_rows`.
        config: Settings of the controller.
        generator: Source of the randomness.

    Raises:
        ValueError: If there is no row.
    """
    probed = Counter(row for record in state.records for row in record.rows)
    return draw_rows(groups, config.rows, generator, probed)


def conclude(
    state: ControllerState,
    config: ControllerConfig,
    candidates: Sequence[float],
    baseline: Sequence[float] | None,
    losses: Sequence[Sequence[float]],
    rows: Sequence[int],
    step: int,
) -> tuple[ControllerState, RoundRecord]:
    """Return the state after a round and the record of it.

    Args:
        state: The state `propose` was asked with.
        config: Settings of the controller.
        candidates: The ratios tried, [candidates].
        baseline: Loss of each row under the model as it is, in nats, [rows]; None if it was not
            measured. If it was it is used, whatever the settings ask for.
        losses: Loss of each row under each candidate's mask, [candidates][rows].
        rows: Id of each row; the same row has the same id in every round.
        step: Optimizer step the round followed.

    Raises:
        ValueError: If the lengths do not agree, a row id occurs twice, or the settings ask for a
            baseline and there is none.
    """
    if baseline is None and config.baseline:
        raise ValueError(
            "controller.baseline is on, but the round came without the losses of the model as it "
            "is; measure them or turn the setting off"
        )
    _check_lengths(candidates, baseline, losses, rows)
    base = None if baseline is None else _mean_or_none(baseline)
    means = tuple(_mean_or_none(row_losses) for row_losses in losses)
    reference = _lowest_trial(candidates, means) if baseline is None else base
    rewards = tuple(
        None if reference is None or mean is None else reference - mean for mean in means
    )
    ratio, mask_ratio, best, reason = _commit(state, config, candidates, rewards, means)
    policy = _policy_after(state, config, candidates, rewards)
    record = RoundRecord(
        round=state.round,
        step=step,
        kind=round_kind(state.round, state.horizon, config),
        candidates=tuple(candidates),
        rewards=rewards,
        baseline=base,
        losses=means,
        committed=reason == _COMMITTED,
        ratio_before=state.ratio,
        ratio=ratio,
        mask_ratio=mask_ratio,
        best=best,
        mu=policy.mu,
        sigma=policy.sigma,
        rows=tuple(rows),
        per_row=tuple(tuple(_or_none(loss) for loss in row_losses) for row_losses in losses),
        baseline_rows=tuple(_or_none(loss) for loss in baseline or ()),
        reason=reason,
    )
    return _recentred(state, config, record)


def choose_ratio(state: ControllerState, config: ControllerConfig) -> RatioChoice:
    """Return the ratio the search ends with and the evidence for it; see `ratio_choice`."""
    return ratio_choice(state.records, state.ratio, state.horizon, config)


def state_to_json(state: ControllerState) -> str:
    """Return the state as JSON text; `state_from_json` gives back exactly the same state."""
    return json.dumps(asdict(state), allow_nan=False)


def state_from_json(text: str) -> ControllerState:
    """Return the state that `state_to_json` wrote.

    Raises:
        ValueError: If the text is not such a state.
    """
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"a saved controller state must be JSON, but {error}; start the search again"
        ) from error
    values = _keyed(loaded, ControllerState)
    records = tuple(
        RoundRecord(**{name: _tuples(value) for name, value in _keyed(item, RoundRecord).items()})
        for item in values.pop("records")
    )
    return ControllerState(records=records, **values)


def _commit(
    state: ControllerState,
    config: ControllerConfig,
    candidates: Sequence[float],
    rewards: Sequence[float | None],
    means: Sequence[float | None],
) -> tuple[float, float, float | None, str]:
    """Return (ratio, mask ratio, best candidate, reason) after the round."""
    finite = [(r, c) for r, c in zip(rewards, candidates, strict=True) if r is not None]
    if not finite:
        no_trial = all(mean is None for mean in means)
        reason = "no trial was finite" if no_trial else "the baseline loss is not finite"
        return state.ratio, state.mask_ratio, None, reason
    reward, best = max(finite, key=lambda trial: trial[0])
    if reward < 0:
        return state.ratio, state.mask_ratio, best, "best reward below 0"
    ratio = state.ratio + clip(best - state.ratio, -config.max_step, config.max_step)
    return ratio, ratio, best, _COMMITTED


def _lowest_trial(candidates: Sequence[float], means: Sequence[float | None]) -> float | None:
    """Return the mean loss at the lowest ratio whose trial was finite, or None."""
    finite = [(c, mean) for c, mean in zip(candidates, means, strict=True) if mean is not None]
    return min(finite)[1] if finite else None


def _policy_after(
    state: ControllerState,
    config: ControllerConfig,
    candidates: Sequence[float],
    rewards: Sequence[float | None],
) -> Policy:
    """Return the updated policy; a coverage round does not move it, its ratios are no samples."""
    policy = Policy(state.mu, state.sigma)
    finite = [(c, r) for c, r in zip(candidates, rewards, strict=True) if r is not None]
    if not finite or round_kind(state.round, state.horizon, config) != "policy":
        return policy
    tried, gained = zip(*finite, strict=True)
    return updated_policy(policy, tried, gained, state.ratio, config)


def _recentred(
    state: ControllerState, config: ControllerConfig, record: RoundRecord
) -> tuple[ControllerState, RoundRecord]:
    """Return the next state; the last round of the initial coverage hands its finding to mu."""
    records = (*state.records, record)
    if config.preset == "standard" and len(records) == initial_coverage(state.horizon):
        seen = observations(records)
        if seen:
            centre = clip(PRIOR_RATIO, config.low, config.high)
            record = replace(record, mu=lowest_near(seen, state.horizon, config, centre))
            records = (*state.records, record)
    after = ControllerState(
        record.mu, record.sigma, record.ratio, record.mask_ratio, state.horizon, records
    )
    return after, record


def _check_lengths(
    candidates: Sequence[float],
    baseline: Sequence[float] | None,
    losses: Sequence[Sequence[float]],
    rows: Sequence[int],
) -> None:
    if not candidates or len(losses) != len(candidates):
        raise ValueError(
            f"a round needs one list of losses per candidate, got {len(losses)} lists for "
            f"{len(candidates)} candidates; measure every candidate once"
        )
    measured = losses if baseline is None else (baseline, *losses)
    lengths = [len(row_losses) for row_losses in measured]
    if not rows or any(length != len(rows) for length in lengths):
        raise ValueError(
            f"a round needs one loss per row for every candidate and the baseline, got {lengths} "
            f"losses for {len(rows)} rows; use the same rows throughout a round"
        )
    if len(set(rows)) != len(rows):
        raise ValueError(f"row ids must differ within a round, got {list(rows)}; draw rows once")


def _mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean, or None if any value (or their sum) is not finite."""
    if not all(math.isfinite(value) for value in values):
        return None
    return math.fsum(values) / len(values)


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _keyed(value: Any, kind: type) -> dict[str, Any]:
    """Return a JSON object whose keys are exactly the fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    if not isinstance(value, Mapping) or set(cast(Mapping[str, Any], value)) != names:
        raise ValueError(
            f"this is not a saved {kind.__name__}: its keys must be {sorted(names)}; "
            "the file is damaged or of another version, so start the search again"
        )
    return dict(cast(Mapping[str, Any], value))


def _tuples(value: Any) -> Any:
    """Return JSON lists as tuples, at every depth."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in cast(list[Any], value))
    return value
