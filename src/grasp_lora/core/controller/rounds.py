"""Run the controller as an ask-and-tell loop: state and losses in, new state and a record out.

Call `begin` once. For each round that `is_due`, do these steps:

1. `propose` the candidate ratios.
2. Measure their losses on the examples of `next_examples`. If `needs_baseline`, also measure the
   model as it is.
3. `conclude` the round.
4. If `record.committed`, apply a mask at `record.mask_ratio`.

At the end, call `choose_ratio`. This module knows nothing about models, and the state survives a
JSON round trip.

A commit moves the current ratio towards the best candidate by at most `max_step`, and prunes at the
ratio that it records. Our departure from the published code, which prunes at the candidate's ratio;
`benchmarks.controllers` does that for comparison.

Without a baseline, the rewards of a round compare with the lowest ratio of the round. The policy
and the history use only differences of rewards, which stay the same, and a quarter of the forward
passes is saved. The best reward of a round is then never negative, so every round with a finite
trial commits.

A trial whose loss is not finite is lost: it is left out of means, of the policy update and of the
choice of the best candidate. It has no other effect.
"""

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

import torch

from grasp_lora.core.controller.policy import (
    PRIOR_RATIO,
    Policy,
    clip,
    confirmation_candidates,
    drawn_from_policy,
    final_confirmation_rounds,
    initial_policy,
    initial_stratified_rounds,
    round_kind,
    sampled_candidates,
    stratified_candidates,
    updated_policy,
)
from grasp_lora.core.controller.schedule import draw_examples, is_due, planned_rounds
from grasp_lora.core.controller.settings import CONTROLLER_PRESETS, ControllerConfig
from grasp_lora.core.evidence.crossfit import forward_splits
from grasp_lora.core.evidence.history import (
    RoundRecord,
    curve_minimum,
    curve_minimum_near,
    lowest_profile,
    observations,
)
from grasp_lora.core.evidence.verdict import RatioChoice, ratio_choice

__all__ = [
    "ControllerConfig",
    "ControllerState",
    "RatioChoice",
    "RoundRecord",
    "begin",
    "choose_ratio",
    "conclude",
    "draw_examples",
    "is_due",
    "needs_baseline",
    "next_examples",
    "planned_rounds",
    "propose",
    "state_from_json",
    "state_to_json",
]


_COMMITTED = "committed"


@dataclass(frozen=True)
class ControllerState:
    """The state of the controller between two rounds.

    Attributes:
        mu: Centre of the policy, a ratio.
        sigma: Standard deviation of the policy, in units of ratio.
        ratio: Current ratio.
        mask_ratio: Ratio of the mask in force; 0 before the first commit.
        horizon: Planned number of rounds. It sets the number of stratified rounds and how fast old
            rounds lose weight in the loss curve.
        records: The records of the rounds so far, in order.
        tilts: Centre of the policy's tilts (`core.pruning.profile`); empty if the search has none.
    """

    mu: float
    sigma: float
    ratio: float
    mask_ratio: float
    horizon: int
    records: tuple[RoundRecord, ...]
    tilts: tuple[float, ...] = ()

    @property
    def round(self) -> int:
        """Return the index of the next round, from 0."""
        return len(self.records)

    @property
    def policy(self) -> Policy:
        """Return the policy that the next round draws from."""
        return Policy(self.mu, self.sigma, self.tilts)


def begin(config: ControllerConfig, planned: int | None = None, tilts: int = 0) -> ControllerState:
    """Return the state before the first round.

    Args:
        config: Settings of the controller.
        planned: Result of `planned_rounds` for this run; default is `rounds` of the settings.
        tilts: Number of tilts that are searched beside the ratio.
    """
    policy = initial_policy(config)
    horizon = planned or config.rounds or cast(int, CONTROLLER_PRESETS["standard"]["rounds"])
    return ControllerState(policy.mu, policy.sigma, config.start, 0.0, horizon, (), (0.0,) * tilts)


def propose(
    state: ControllerState, config: ControllerConfig, generator: torch.Generator
) -> tuple[float, ...]:
    """Return the candidate ratios of the next round, each in [low, high]."""
    kind = round_kind(state.round, state.horizon, config)
    if kind == "coverage":
        return stratified_candidates(state.round, config)
    seen = () if config.preset == "paper" else observations(state.records)
    incumbent = curve_minimum(seen, state.horizon, config) if seen else None
    if kind == "confirmation" and incumbent is not None:
        return confirmation_candidates(state.policy, config, generator, incumbent)
    return sampled_candidates(state.policy, config, generator, incumbent)


def needs_baseline(config: ControllerConfig) -> bool:
    """Return whether a round must also measure the model as it is, on the same examples."""
    return config.baseline


def next_examples(
    state: ControllerState,
    groups: Sequence[str],
    config: ControllerConfig,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Return the positions of the examples of the next round, those probed least often first.

    So the `rounds` x `rows` probes of a search see as many different examples as possible. Where
    tilts are searched, a confirmation first draws from its own part of the groups, see
    `held_out_part`.

    Args:
        state: The state before the round; `rows` of its records holds such positions.
        groups: Group of each example, as in `draw_examples`.
        config: Settings of the controller.
        generator: Source of the randomness.

    Raises:
        ValueError: If there is no example.
    """
    probed = Counter(example for record in state.records for example in record.rows)
    if state.tilts and round_kind(state.round, state.horizon, config) == "confirmation":
        _, tested = held_out_part(state.round, state.horizon, groups)
        after_all = dict.fromkeys(set(range(len(groups))) - set(tested), state.round + 1)
        probed.update(after_all)
    return draw_examples(groups, config.rows, generator, probed)


def held_out_part(
    index: int, horizon: int, groups: Sequence[Hashable]
) -> tuple[list[int], list[int]]:
    """Return the examples that may choose the profile of a confirmation, and those that test it.

    Args:
        index: Index of the round, a confirmation.
        horizon: Planned number of rounds.
        groups: Group of each example, at least `crossfit.LEAST_GROUPS` different ones.
    """
    count = final_confirmation_rounds(horizon)
    parts = list(forward_splits(groups, count))
    return parts[index - (horizon - count)]


def conclude(
    state: ControllerState,
    config: ControllerConfig,
    candidates: Sequence[float],
    baseline: Sequence[float] | None,
    losses: Sequence[Sequence[float]],
    rows: Sequence[int],
    step: int,
    tilts: Sequence[tuple[float, ...]] = (),
) -> tuple[ControllerState, RoundRecord]:
    """Return the state after a round and the record of the round.

    Args:
        state: The state that `propose` got.
        config: Settings of the controller.
        candidates: The ratios tried, [candidates].
        baseline: Loss of each example under the model as it is, in nats, [examples]; None if it was
            not measured. A measured baseline is used even if the settings do not ask for one.
        losses: Loss of each example under each candidate's mask, in nats, [candidates][examples].
        rows: Id of each example; an example has the same id in every round.
        step: Optimizer step that the round followed.
        tilts: Tilts of each candidate; empty if the search has none.

    Raises:
        ValueError: If the lengths do not agree, an id occurs twice, or the settings ask for a
            baseline and there is none.
    """
    if baseline is None and config.baseline:
        raise ValueError(
            "controller.baseline is on, but the round has no losses of the model as it is; measure "
            "them or turn the setting off"
        )
    _check_lengths(candidates, baseline, losses, rows)
    base = None if baseline is None else _mean_or_none(baseline)
    means = tuple(_mean_or_none(trial_losses) for trial_losses in losses)
    reference = _lowest_trial(candidates, means) if baseline is None else base
    rewards = tuple(
        None if reference is None or mean is None else reference - mean for mean in means
    )
    ratio, mask_ratio, best, reason = _commit(state, config, candidates, rewards, means)
    policy = _policy_after(state, config, candidates, rewards, tilts)
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
        per_row=tuple(tuple(_or_none(loss) for loss in trial_losses) for trial_losses in losses),
        baseline_rows=tuple(_or_none(loss) for loss in baseline or ()),
        reason=reason,
        tilts=tuple(tilts),
    )
    return _state_after(replace(state, tilts=policy.tilts), config, record)


def choose_ratio(
    state: ControllerState, config: ControllerConfig, groups: Sequence[Hashable] | None = None
) -> RatioChoice:
    """Return the final ratio of the search and the evidence for it; see `ratio_choice`.

    Args:
        state: The state after the last round.
        config: Settings of the controller.
        groups: Group of each example, by its id, as in `next_examples`. Give it wherever several
            examples share a context; None makes each example its own group.
    """
    return ratio_choice(state.records, state.ratio, state.horizon, config, groups)


def state_to_json(state: ControllerState) -> str:
    """Return the state as JSON text; `state_from_json` returns exactly the same state."""
    return json.dumps(asdict(state), allow_nan=False)


def state_from_json(text: str) -> ControllerState:
    """Return the state that `state_to_json` wrote.

    Raises:
        ValueError: If the text is not a saved state.
    """
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"a saved controller state must be JSON, but {error}; start the search again"
        ) from error
    values = _checked_fields(loaded, ControllerState)
    values["tilts"] = tuple(values.get("tilts", ()))
    records = tuple(
        RoundRecord(**{name: _lists_to_tuples(value) for name, value in fields_of.items()})
        for fields_of in (_checked_fields(item, RoundRecord) for item in values.pop("records"))
    )
    return ControllerState(records=records, **values)


def _commit(
    state: ControllerState,
    config: ControllerConfig,
    candidates: Sequence[float],
    rewards: Sequence[float | None],
    means: Sequence[float | None],
) -> tuple[float, float, float | None, str]:
    """Return (current ratio, mask ratio, best candidate, reason) after the round."""
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
    tilts: Sequence[tuple[float, ...]],
) -> Policy:
    """Return the policy moved by the trials whose ratios were drawn from it."""
    policy, kind = state.policy, round_kind(state.round, state.horizon, config)
    seen = bool(observations(state.records))
    drawn = drawn_from_policy(kind, len(candidates), config, seen, bool(tilts))
    finite = [
        (candidate, reward, own)
        for candidate, reward, own, one in zip(
            candidates, rewards, tilts or ((),) * len(candidates), drawn, strict=True
        )
        if one and reward is not None
    ]
    if not finite:
        return policy
    tried, gained, tilted = zip(*finite, strict=True)
    return updated_policy(policy, tried, gained, state.ratio, config, tilted)


def _state_after(
    state: ControllerState, config: ControllerConfig, record: RoundRecord
) -> tuple[ControllerState, RoundRecord]:
    """Return the next state and the record; the last initial stratified round also sets mu.

    With `standard`, mu then becomes the minimum of the loss curve near the prior ratio, and the
    tilts those of the lowest profile.
    """
    tilts = state.tilts
    records = (*state.records, record)
    if config.preset == "standard" and len(records) == initial_stratified_rounds(state.horizon):
        seen = observations(records)
        if seen:
            centre = clip(PRIOR_RATIO, config.low, config.high)
            record = replace(record, mu=curve_minimum_near(seen, state.horizon, config, centre))
            records = (*state.records, record)
            tilts = lowest_profile(seen, state.horizon, config).tilts if tilts else ()
    after = ControllerState(
        record.mu, record.sigma, record.ratio, record.mask_ratio, state.horizon, records, tilts
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
    lengths = [len(example_losses) for example_losses in measured]
    if not rows or any(length != len(rows) for length in lengths):
        raise ValueError(
            f"a round needs one loss per example for every candidate and the baseline, got "
            f"{lengths} losses for {len(rows)} examples; use the same examples throughout a round"
        )
    if len(set(rows)) != len(rows):
        raise ValueError(
            f"example ids must differ within a round, got {list(rows)}; draw each example once"
        )


def _mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean, or None if any value is not finite."""
    if not all(math.isfinite(value) for value in values):
        return None
    return math.fsum(values) / len(values)


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _checked_fields(value: Any, kind: type) -> dict[str, Any]:
    """Return a JSON object as a dict, once its keys are exactly the fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    # A state of an earlier version knows no tilts.
    needed = names - {"tilts"}
    if not isinstance(value, Mapping) or not needed <= set(cast(Mapping[str, Any], value)) <= names:
        raise ValueError(
            f"this is not a saved {kind.__name__}: its keys must be {sorted(names)}; "
            "the file is damaged or from another version, so start the search again"
        )
    return dict(cast(Mapping[str, Any], value))


def _lists_to_tuples(value: Any) -> Any:
    """Return the value with all lists turned into tuples, at every depth."""
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in cast(list[Any], value))
    return value
