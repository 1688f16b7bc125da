"""Part of the search: a ratio for each group of tensors.

The groups of most scopes are probed around the learned ratio, after the search. With scope `policy`
the rounds of the search have probed profiles already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from grasp_lora.core.controller.profiles import ProfileChoice
from grasp_lora.core.controller.rounds import draw_examples
from grasp_lora.core.evidence.crossfit import LEAST_GROUPS, forward_splits
from grasp_lora.core.evidence.groups import Gain, mean_gain
from grasp_lora.core.pruning.group_ratios import combined_ratios, group_trials
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.profile import Slopes, profile_ratios
from grasp_lora.models.example_losses import losses_in_states
from grasp_lora.training.groups import group_sizes, ratio_by_group
from grasp_lora.training.live import LiveAdapter, block_fit, block_importance
from grasp_lora.workbench.context import Context

ROWS = 16
TESTED_PARTS = 2
"""Combinations of ratios that are measured: each is chosen on all examples before its part."""


_NOTHING: dict[str, Any] = {"ratios": None, "evidence": None, "forwards": 0}


def spread_ratio(
    context: Context,
    live: LiveAdapter,
    norms: Mapping[str, Any] | None,
    ratio: float,
    splits: tuple[str, ...],
) -> dict[str, Any]:
    """Probe ratios that differ between groups, and return the ratios to use with the evidence.

    Args:
        context: examples and settings; `scope` defines the groups.
        live: the adapter at the end of the search.
        norms: what the importance rule needs; None if it needs nothing.
        ratio: the learned ratio, a fraction in [0, 1].
        splits: splits of the target examples that are probed.

    Returns:
        `ratios`: group -> fraction removed; None if no better ratios than one for all were shown.
        `evidence`: losses and gain; None if the ratio is 0 or 1, or if the examples are of fewer
        than 4 groups. `forwards`: number of examples read.
    """
    nothing = dict(_NOTHING)
    scope, rule = context.config.scope, IMPORTANCE[context.config.importance]
    rows = context.rows("target", splits)
    generator = torch.Generator().manual_seed(context.config.seed)
    drawn = draw_examples([e.group for e in rows.encoded], ROWS, generator)
    groups = [rows.encoded[place].group for place in drawn]
    if not 0.0 < ratio < 1.0 or len(set(groups)) < LEAST_GROUPS:
        return nothing
    batches, sizes = rows.batches(drawn), group_sizes(live, scope)
    measured = 0

    @contextmanager
    def under(ratios: Mapping[str, float]) -> Iterator[None]:
        (masks,) = live.masks(block_importance(rule, norms), [ratio_by_group(scope, ratios)])
        fit = block_fit(context.config.importance, norms)
        with live.trial(masks, fit), context.clock.span("probe"):
            yield

    def losses(each: Sequence[Mapping[str, float]]) -> list[list[float]]:
        nonlocal measured
        measured += len(drawn) * len(each)
        states = [partial(under, ratios) for ratios in each]
        return losses_in_states(live.model, states, batches, len(drawn))

    trials = group_trials(ratio, sizes)
    base, *tried = losses([dict.fromkeys(sizes, ratio), *trials.values()])
    found = dict(zip(trials, tried, strict=True))
    tested: list[int] = []
    gains: list[float] = []
    for chosen_on, tested_on in forward_splits(groups, TESTED_PARTS):
        (values,) = losses([combined_ratios(ratio, found, base, chosen_on, sizes)])
        tested += tested_on
        gains += [base[row] - values[row] for row in tested_on]
    gain = mean_gain(gains, [groups[row] for row in tested])
    shown = gain is not None and gain.shown
    chosen = combined_ratios(ratio, found, base, range(len(drawn)), sizes)
    _say(context, shown, gain)
    return {
        "ratios": chosen if shown else None,
        "evidence": {
            **_gain_facts(gain),
            "shown": shown,
            "chosen": chosen,
            "rows": [rows.encoded[i].id for i in drawn],
            "groups": groups,
            "base": base,
            "trials": [
                {"group": group, "shift": shift, "losses": values}
                for (group, shift), values in found.items()
            ],
        },
        "forwards": measured,
    }


def spread_of_profile(
    context: Context, found: ProfileChoice | None, slopes: Slopes
) -> dict[str, Any]:
    """Return the ratios of the groups under a profile that the rounds probed, with the evidence.

    Args:
        context: settings.
        found: the profile and its gains; None if no tilts were probed.
        slopes: how the groups differ.

    Returns:
        `ratios`: group -> fraction removed; None if the profile was not shown to be better than one
        ratio for all. `profile`: its level and tilts by name. `evidence`: gain over one ratio for
        all and over the lowest ratio, with standard errors. Both are None if no tilts were probed,
        as with examples of fewer than 4 groups. `forwards`: 0, as the rounds read the examples.
    """
    if found is None:
        context.reporter.say("scope policy: one ratio for all, too few contexts to test another")
        return _NOTHING | {"profile": None}
    controller = context.config.controller
    ratios = profile_ratios(found.chosen, slopes, controller.low, controller.high)
    _say(context, found.shown, found.gain)
    over_lowest = _gain_facts(found.over_lowest)
    return {
        "ratios": ratios if found.shown else None,
        "profile": {
            "level": found.chosen.level,
            **dict(zip(slopes.names, found.chosen.tilts, strict=True)),
        },
        "evidence": {
            **_gain_facts(found.gain),
            "shown": found.shown,
            "over_lowest_ratio": over_lowest,
        },
        "forwards": 0,
    }


def _say(context: Context, shown: bool, gain: Gain | None) -> None:
    told = "the losses are not finite"
    if gain is not None:
        told = f"gain {gain.gain:.4f} nats (standard error {gain.error:.4f})"
    taken = "a ratio for each group" if shown else "one ratio for all"
    context.reporter.say(f"scope {context.config.scope}: {taken}, {told}")


def _gain_facts(gain: Gain | None) -> dict[str, float | None]:
    return {
        "gain": None if gain is None else gain.gain,
        "standard_error": None if gain is None else gain.error,
    }
