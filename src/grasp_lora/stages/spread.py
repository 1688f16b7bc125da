"""Part of the search: a ratio for each group of tensors, probed around the learned ratio."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from grasp_lora.core.controller.rounds import draw_examples
from grasp_lora.core.evidence.crossfit import LEAST_GROUPS, forward_splits
from grasp_lora.core.evidence.groups import mean_gain
from grasp_lora.core.pruning.group_ratios import combined_ratios, group_trials
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.example_losses import losses_in_states
from grasp_lora.training.groups import group_sizes, ratio_by_group
from grasp_lora.training.live import LiveAdapter, block_fit, block_importance
from grasp_lora.workbench.context import Context

ROWS = 16
TESTED_PARTS = 2
"""Combinations of ratios that are measured: each is chosen on all examples before its part."""


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
    nothing: dict[str, Any] = {"ratios": None, "evidence": None, "forwards": 0}
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
    told = "the losses are not finite"
    if gain is not None:
        told = f"gain {gain.gain:.4f} nats (standard error {gain.error:.4f})"
    context.reporter.say(
        f"scope {scope}: {'a ratio for each group' if shown else 'one ratio for all'}, {told}"
    )
    return {
        "ratios": chosen if shown else None,
        "evidence": {
            "gain": None if gain is None else gain.gain,
            "standard_error": None if gain is None else gain.error,
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
