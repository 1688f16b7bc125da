"""Losses of merges that are not trained after merging.

The merges differ in their weights, in their strength (a factor on the whole merge), or in the
fraction that is pruned. Single adapters and the bare backbone are measured with them. The precheck
and the stage `probe` measure all of them on the same few examples. These losses do not tell how
good a merge would be after training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grasp_lora.adapters.folder import check_fits, read_adapter
from grasp_lora.base.choice import lowest
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.controller.rounds import draw_examples
from grasp_lora.core.lora import Adapter, MergedModule, average_weights, merge, unscaled_weights
from grasp_lora.core.merge_kinds import UNWEIGHTED
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.example_losses import State, example_losses, losses_in_states
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.training.live import LiveAdapter, block_fit, block_importance
from grasp_lora.workbench.context import POOLS, Context
from grasp_lora.workbench.merged_folder import read_start

EXAMPLES = 16
LEAST_EXAMPLES = 4
WHOLE = "whole"
"""Name of an adapter as it is, beside fits of lower rank."""
MERGE = "merge"
"""Name of the merge as configured."""
BARE = "no adapter"
"""Name of the bare backbone."""
SOURCE, TARGET = "source alone", "target alone"
"""Names of the adapters without a merge."""


@dataclass(frozen=True)
class UntrainedMerge:
    """One merge that is measured.

    Attributes:
        group: `single` (one adapter or none), `merge` (as configured), `weights` (other weights or
            strengths), `pruned`.
        weights: the merge weights of the source and the target adapter; None takes those of the
            configuration.
        factor: multiplies what the merge adds to the backbone.
        ratio: fraction removed, in [0, 1].
    """

    group: str
    weights: tuple[float, float] | None = None
    factor: float = 1.0
    ratio: float = 0.0


UNTRAINED_MERGES: Mapping[str, UntrainedMerge] = {
    MERGE: UntrainedMerge("merge"),
    SOURCE: UntrainedMerge("single", (1.0, 0.0)),
    TARGET: UntrainedMerge("single", (0.0, 1.0)),
    BARE: UntrainedMerge("single", factor=0.0),
    "source alone, x 0.75": UntrainedMerge("single", (1.0, 0.0), 0.75),
    "source alone, x 0.5": UntrainedMerge("single", (1.0, 0.0), 0.5),
    "weights 0.75 + 0.25": UntrainedMerge("weights", (0.75, 0.25)),
    "weights 0.5 + 0.5": UntrainedMerge("weights", (0.5, 0.5)),
    "weights 0.25 + 0.75": UntrainedMerge("weights", (0.25, 0.75)),
    "weights 0.75 + 0.25, x 0.75": UntrainedMerge("weights", (0.75, 0.25), 0.75),
    "weights 0.25 + 0.75, x 0.75": UntrainedMerge("weights", (0.25, 0.75), 0.75),
    **{
        f"merge x {factor:g}": UntrainedMerge("weights", None, factor)
        for factor in (0.25, 0.5, 0.75, 0.9, 1.25)
    },
    **{f"ratio {n / 10:g}": UntrainedMerge("pruned", ratio=n / 10) for n in range(1, 9)},
}
"""Name -> variant; 24 in all, the merge as configured among them."""


def configured_weights(
    given: Sequence[float] | str | None, adapters: Sequence[Adapter]
) -> tuple[float, ...]:
    """Return the numbers that `merge.weights` stands for.

    Args:
        given: the setting; the average stands for weights that are still to be learned.
        adapters: what is merged.

    Raises:
        ValueError: `unscaled` has no meaning for these adapters.
    """
    if given == "unscaled":
        return unscaled_weights(adapters)
    if given is None or isinstance(given, str):
        return average_weights(len(adapters))
    return tuple(given)


@dataclass(frozen=True)
class Probed:
    """The losses of untrained merges on the same examples.

    Attributes:
        ids: of the examples drawn.
        groups: group of each of them, such as its context.
        losses: variant -> loss of each example, in nats; NaN or infinite where the model overflows.
    """

    ids: list[str]
    groups: list[str]
    losses: dict[str, list[float]]


def measure(
    context: Context,
    folders: tuple[Path, Path],
    variants: Mapping[str, UntrainedMerge],
    rows: int,
    splits: Sequence[str] | None = None,
) -> Probed:
    """Return the losses of each variant on examples drawn for it.

    Args:
        context: examples and backbone.
        folders: the folders of the source and of the target adapter.
        variants: name -> the merge that is measured.
        rows: how many examples are drawn; all are taken if there are fewer.
        splits: the splits of the target that they are drawn from; None takes those that the
            controller probes.

    Raises:
        ValueError: an adapter does not fit the backbone, or there are fewer than 4 examples.
    """
    config = context.config
    loaded = [read_adapter(folder, context.backbone.model) for folder in folders]
    for folder, adapter in zip(folders, loaded, strict=True):
        check_fits(adapter, context.backbone.model, str(folder))
    examples, batches = _drawn(context, rows, splits)
    kind, rank = config.merge.kind, config.merge.rank
    assert kind not in UNWEIGHTED, f"a merge of kind {kind} has no weights to compare"
    usual = configured_weights(config.merge.weights, [one.adapter for one in loaded])
    losses: dict[str, list[float]] = {}
    with context.reporter.bar("untrained merges", len(variants)) as done:
        for weights, alike in _by_weights(variants, usual).items():
            kept = [i for i, weight in enumerate(weights) if weight != 0]
            both = len(kept) > 1
            merged = merge(
                kind if both else "cat",
                [loaded[i].adapter for i in kept],
                [weights[i] for i in kept],
                rank if both else None,
            )
            losses |= _measure(context, merged, alike, batches, len(examples))
            done(len(losses))
    return Probed(
        [example.id for example in examples],
        [example.group for example in examples],
        {name: losses[name] for name in variants},
    )


def measure_ratios(context: Context, folder: Path, ratios: Sequence[float], rows: int) -> Probed:
    """Return the losses of an adapter, whole ("0.0") and pruned at each ratio, without training.

    Args:
        context: examples and backbone.
        folder: an adapter folder.
        ratios: fractions removed, in (0, 1).
        rows: as in `measure`.

    Raises:
        ValueError: the adapter does not fit the backbone, or there are fewer than 4 examples.
    """
    examples, batches = _drawn(context, rows)
    pruned = {str(ratio): ratio for ratio in ratios}
    with context.live(read_start(folder, context.backbone), "merged") as live:
        whole: dict[str, State] = {str(0.0): partial(live.scaled, 1.0)}
        states = whole | _pruned(context, live, pruned)
        found = _losses_in(live, states, batches, len(examples))
    return Probed([one.id for one in examples], [one.group for one in examples], found)


def measure_ranks(context: Context, folder: Path, ranks: Sequence[int], rows: int) -> Probed:
    """Return the losses of an adapter, whole ("whole") and as its best fit of each rank.

    Args:
        context: examples and backbone.
        folder: an adapter folder.
        ranks: ranks of the fits.
        rows: as in `measure`.

    Raises:
        ValueError: the adapter does not fit the backbone, or there are fewer than 4 examples.
    """
    adapter = read_adapter(folder, context.backbone.model).adapter
    examples, batches = _drawn(context, rows)
    found: dict[str, list[float]] = {}
    for rank in (None, *ranks):
        merged = merge("cat" if rank is None else "svd", [adapter], [1.0], rank)
        with context.live(merged, "merged") as live:
            live.model.eval()
            name = WHOLE if rank is None else str(rank)
            found[name] = example_losses(live.model, batches, len(examples))
    return Probed([one.id for one in examples], [one.group for one in examples], found)


def learns_weights(config: RunConfig) -> bool:
    """Return whether the weights of the configured merge are chosen by probes."""
    given = config.merge.weights
    return given == "auto" or (config.merge.when == "after" and given is None)


def check_pool(count: int) -> None:
    """Check that there are enough examples to compare merges on.

    Args:
        count: micro-dev examples, with the dev examples where the settings probe these too.

    Raises:
        ValueError: there are fewer than 4.
    """
    if count < LEAST_EXAMPLES:
        raise ValueError(
            f"comparing merges (merge.weights: auto, merge.when: after) needs at least "
            f"{LEAST_EXAMPLES} micro-dev or dev examples, got {count}; raise "
            "data.target.rows.micro_dev"
        )


def _drawn(
    context: Context, rows: int, splits: Sequence[str] | None = None
) -> tuple[list[EncodedExample], Any]:
    """Return the examples that untrained adapters are measured on, and their batches.

    Raises:
        ValueError: there are fewer than 4 examples.
    """
    config = context.config
    pool = context.rows("target", splits or POOLS[config.controller.probe_rows])
    check_pool(len(pool.encoded))
    generator = torch.Generator().manual_seed(config.seed)
    drawn = draw_examples([e.group for e in pool.encoded], rows, generator)
    return [pool.encoded[i] for i in drawn], pool.batches(drawn)


def mean_losses(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return name -> mean loss of the examples; not finite where one of them is not.

    Raises:
        ValueError: none is finite, so nothing can be chosen.
    """
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    if lowest(means) is None:
        raise ValueError(
            f"none of the {len(means)} untrained merges has a finite loss, so none can be chosen: "
            "use model.dtype float32 if the model overflows in half precision, and check that the "
            "adapters belong to this backbone"
        )
    return means


def _by_weights(
    variants: Mapping[str, UntrainedMerge], usual: tuple[float, ...]
) -> dict[tuple[float, ...], dict[str, UntrainedMerge]]:
    grouped: dict[tuple[float, ...], dict[str, UntrainedMerge]] = {}
    for name, variant in variants.items():
        grouped.setdefault(variant.weights or usual, {})[name] = variant
    return grouped


def _measure(
    context: Context,
    merged: Mapping[str, MergedModule],
    variants: Mapping[str, UntrainedMerge],
    batches: Any,
    count: int,
) -> dict[str, list[float]]:
    """Return name -> loss of each example in nats, for the variants of one merge."""
    config = context.config
    unit = config.mask_unit if any(len(m.parts) > 1 for m in merged.values()) else "merged"
    with context.live(merged, unit) as live:
        states: dict[str, State] = {
            name: partial(live.scaled, variant.factor)
            for name, variant in variants.items()
            if variant.ratio == 0
        }
        pruned = {name: one.ratio for name, one in variants.items() if one.ratio > 0}
        if pruned:
            states |= _pruned(context, live, pruned)
        return _losses_in(live, states, batches, count)


def _pruned(context: Context, live: LiveAdapter, ratios: Mapping[str, float]) -> dict[str, State]:
    """Return name -> the state in which the adapter is pruned at its ratio."""
    rule = context.config.importance
    measured = context.norms(live, rule)
    score, fit = block_importance(IMPORTANCE[rule], measured), block_fit(rule, measured)
    found = live.masks(score, list(ratios.values()))
    return {
        name: partial(live.trial, masks, fit) for name, masks in zip(ratios, found, strict=True)
    }


def _losses_in(
    live: LiveAdapter, states: Mapping[str, State], batches: Any, count: int
) -> dict[str, list[float]]:
    """Return name -> loss of each example in nats, for the states of an adapter."""
    found = losses_in_states(live.model, list(states.values()), batches, count)
    return dict(zip(states, found, strict=True))


def weights_of(name: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Return the merge weights that give a variant without pruning: its weights times its factor.

    Args:
        name: a key of `UNTRAINED_MERGES`.
        usual: the weights of a variant that has none of its own.
    """
    variant = UNTRAINED_MERGES[name]
    return tuple(round(weight * variant.factor, 4) for weight in variant.weights or usual)
