"""Search a profile in the rounds of the ratio: tilts beside the level, judged on held-out groups.

A search with tilts has the rounds and probes of one without. Stratified rounds spread the tilts as
they spread the levels, policy rounds draw both from one Gaussian, and a confirmation measures three
things on the same examples: the lowest ratio, the best ratio for all groups, and the best profile.
The profile of a confirmation is chosen without the examples that it is tested on, in the order of
`core.evidence.crossfit`, so that its gain there is not flattered by the choice.

Commits prune at one ratio for all groups: masks in force while the search trains have no tilts.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.policy import (
    final_confirmation_rounds,
    round_kind,
    sampled_candidates,
    sampled_tilts,
    stratified_candidates,
    stratified_tilts,
)
from grasp_lora.core.controller.rounds import ControllerState, held_out_part
from grasp_lora.core.controller.settings import LEAST_CANDIDATES, ControllerConfig
from grasp_lora.core.evidence.crossfit import LEAST_GROUPS
from grasp_lora.core.evidence.groups import Gain, mean_gain
from grasp_lora.core.evidence.history import (
    RoundRecord,
    curve_minimum,
    lowest_profile,
    observations,
    of_examples,
)
from grasp_lora.core.evidence.verdict import RatioChoice
from grasp_lora.core.pruning.profile import Profile


@dataclass(frozen=True)
class ProfileChoice:
    """The profile that a search with tilts speaks for, and what it gains.

    Attributes:
        chosen: the profile with the lowest loss of the model over all probes.
        gain: of profiles chosen like it over one ratio for all groups, in nats, on examples that
            they were not chosen on; None without such examples, or if a loss is not finite.
        over_lowest: the same over the lowest ratio.
    """

    chosen: Profile
    gain: Gain | None
    over_lowest: Gain | None

    @property
    def shown(self) -> bool:
        """Whether the profile is to be taken in place of one ratio."""
        return self.chosen.tilted and self.gain is not None and self.gain.shown


def can_tilt(config: ControllerConfig, horizon: int, groups: Sequence[Hashable]) -> bool:
    """Return whether a search has confirmations that can test a profile, and groups to do so."""
    if config.preset != "standard" or config.candidates < LEAST_CANDIDATES:
        return False
    return final_confirmation_rounds(horizon) > 0 and len(set(groups)) >= LEAST_GROUPS


def propose_profiles(
    state: ControllerState,
    config: ControllerConfig,
    generator: torch.Generator,
    groups: Sequence[Hashable],
) -> tuple[Profile, ...]:
    """Return the profiles to try in the next round; without tilts those of `propose`.

    Args:
        state: the state before the round.
        config: settings of the controller.
        generator: source of the randomness.
        groups: group of each example, as in `next_examples`.
    """
    if not state.tilts:
        return tuple(Profile(level) for level in rounds.propose(state, config, generator))
    kind = round_kind(state.round, state.horizon, config)
    if kind == "coverage":
        levels = stratified_candidates(state.round, config)
        tilts = stratified_tilts(state.round, levels, config, generator, len(state.tilts))
        return tuple(map(Profile, levels, tilts))
    drawn = _drawn(state, config, generator)
    seen = observations(state.records)
    if not seen:
        return drawn
    if kind == "confirmation":
        return (*_compared(state, config, groups), *drawn[LEAST_CANDIDATES:])
    if config.candidates % 2 == 0:
        return drawn
    return (*drawn[:-1], lowest_profile(seen, state.horizon, config))


def _drawn(
    state: ControllerState, config: ControllerConfig, generator: torch.Generator
) -> tuple[Profile, ...]:
    levels = sampled_candidates(state.policy, config, generator)
    return tuple(map(Profile, levels, sampled_tilts(state.policy, levels, config, generator)))


def _compared(
    state: ControllerState, config: ControllerConfig, groups: Sequence[Hashable]
) -> tuple[Profile, ...]:
    """Return the lowest ratio, the best one for all groups, and a profile chosen without the test.

    The ratio for all groups is chosen on all examples, so luck is on its side.
    """
    none = (0.0,) * len(state.tilts)
    one = Profile(curve_minimum(observations(state.records), state.horizon, config), none)
    choosing, _ = held_out_part(state.round, state.horizon, groups)
    own = observations([of_examples(record, set(choosing)) for record in state.records])
    profile = lowest_profile(own, state.horizon, config) if own else one
    return Profile(config.low, none), one, profile


def choose_profile(
    state: ControllerState, config: ControllerConfig, groups: Sequence[Hashable]
) -> ProfileChoice | None:
    """Return the profile of a search with tilts and its gains; None if nothing was measured.

    Args:
        state: the state after the last round.
        config: settings of the controller.
        groups: group of each example, as in `next_examples`.
    """
    seen = observations(state.records)
    if not seen or not state.tilts:
        return None
    gains: list[tuple[float, float]] = []
    labels: list[Hashable] = []
    for record in state.records:
        if record.kind == "confirmation":
            _, tested = held_out_part(record.round, state.horizon, groups)
            found = _tested_gains(record, set(tested))
            gains += found.values()
            labels += [groups[row] for row in found]
    over_one, over_lowest = zip(*gains, strict=True) if gains else ((), ())
    chosen = lowest_profile(seen, state.horizon, config)
    return ProfileChoice(chosen, mean_gain(over_one, labels), mean_gain(over_lowest, labels))


def _tested_gains(record: RoundRecord, tested: set[int]) -> dict[int, tuple[float, float]]:
    """Return example -> loss saved by the profile against one ratio, and against the lowest one."""
    lowest, one, profile = (
        [float("nan") if loss is None else loss for loss in losses]
        for losses in record.per_row[:LEAST_CANDIDATES]
    )
    return {
        row: (one[place] - profile[place], lowest[place] - profile[place])
        for place, row in enumerate(record.rows)
        if row in tested
    }


def with_profile(choice: RatioChoice, found: ProfileChoice) -> RatioChoice:
    """Return the outcome of a search whose profile is taken: its level, and its gain."""
    gain = found.over_lowest
    shown = gain is not None and gain.shown
    return replace(
        choice,
        ratio=found.chosen.level,
        verdict="learned" if shown else "flat",
        gain=gain and gain.gain,
        gain_error=gain and gain.error,
        z=gain and gain.z,
        rule="lowest profile of the model over all probes",
        interval=None,
        p_value=None,
    )
