"""Merges beside those by weights: the mean, a layer swap, TIES, PEFT's kinds, and LoRAHub.

The stage `merge` (`grasp_lora.stages.merge`) uses them. One that cannot merge the given adapters
raises `NotApplicable` with the reason.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grasp_lora.adapters.folder import LoadedAdapter
from grasp_lora.adapters.peft_merges import peft_merge
from grasp_lora.base.choice import lowest
from grasp_lora.base.files import read_json, write_json
from grasp_lora.core.layer_swap import layer_swap, outer_layers
from grasp_lora.core.lora import (
    LoraFactors,
    MergedModule,
    MergeKind,
    Part,
    average_weights,
    merge,
)
from grasp_lora.core.ties import DENSITY, ties
from grasp_lora.models.example_losses import example_losses
from grasp_lora.stages.stage import Cost, Sizes, Stage, Work

BUDGET = 40
"""Number of weight vectors that LoRAHub tries, as published."""
BOUND = 1.5
L1 = 0.05
"""Penalty in nats on the mean absolute weight, as published."""

Merged = tuple[Mapping[str, MergedModule], dict[str, Any]]
"""Module name -> merged factors, and facts about the merge."""


class NotApplicable(ValueError):
    """A stage cannot run on these adapters or on this machine; the message says why."""


def by_mean(work: Work, loaded: Sequence[LoadedAdapter]) -> Merged:
    """Merge by the mean of the deltas, exactly: the ranks add up.

    The input `rank`, the folder of a probe, gives the best fit of that rank instead. Option
    `made_of` only says in the key what is merged.
    """
    weights = average_weights(len(loaded))
    probe = work.inputs.get("rank")
    rank = None if probe is None else read_json(probe / "rank.json")["rank"]
    kind: MergeKind = "cat" if rank is None else "svd"
    merged = merge(kind, [one.adapter for one in loaded], list(weights), rank)
    return merged, {"kind": kind, "weights": list(weights)}


def by_peft(work: Work, loaded: Sequence[LoadedAdapter]) -> Merged:
    """Merge by PEFT's rule `options["kind"]` at `options["density"]`.

    Raises:
        NotApplicable: the rule cannot merge these adapters, such as TIES on different ranks.
    """
    kind, density = work.stage.options["kind"], work.stage.options["density"]
    alone = [merge("cat", [one.adapter], [1.0]) for one in loaded]
    weights = average_weights(len(alone))
    try:
        merged = peft_merge(
            work.context.backbone.model, alone, kind, weights, density, work.config.seed
        )
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    return merged, {"kind": kind, "weights": weights}


def by_layer_swap(work: Work, loaded: Sequence[LoadedAdapter]) -> Merged:
    """Merge by layers: the second adapter in the outer ones, the first in the middle.

    Raises:
        NotApplicable: there is no middle, or nothing of an adapter would be left.
    """
    source, target = (one.adapter for one in loaded)
    try:
        merged = layer_swap(source, target)
        outer = outer_layers({"source": source, "target": target})
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    return merged, {"kind": "layer-swap", "outer_layers": sorted(outer)}


def by_ties_delta(work: Work, loaded: Sequence[LoadedAdapter]) -> Merged:
    """Merge the deltas by TIES.

    The fact `lost` is the relative error of the factors that stand for the merge.

    Raises:
        NotApplicable: the adapters cannot be merged.
    """
    try:
        merged, lost = ties([one.adapter for one in loaded])
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    work.context.reporter.say(f"TIES: factors of this rank lose {lost:.0%} of the merged deltas")
    return merged, {"kind": "ties-delta", "density": DENSITY, "lost": lost}


def by_lorahub(work: Work, loaded: Sequence[LoadedAdapter]) -> Merged:
    """Merge by weights that nevergrad chooses by the loss of the train examples and an L1 penalty.

    This is LoRAHub (arXiv 2307.13269) with the loss of a causal model on the answers. It sums the
    factors, not the deltas, so the result also holds products of the factors of two adapters. All
    weights that were tried are written to `tried.json`.

    Raises:
        NotApplicable: nevergrad is not installed, or the adapters differ in shape.
        ValueError: no weights that were tried give a finite loss.
    """
    try:
        import nevergrad
    except ImportError:
        raise NotApplicable("LoRAHub needs nevergrad; run: pip install nevergrad") from None
    context, adapters = work.context, [one.adapter for one in loaded]
    cost, read = _price_of(work, adapters)
    wanted = nevergrad.p.Array(init=[0.0] * len(loaded)).set_bounds(-BOUND, BOUND)
    wanted.random_state.seed(work.config.seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=wanted, budget=BUDGET)
    tried: list[tuple[float, list[float]]] = []
    with context.reporter.bar("weights", BUDGET) as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nevergrad warns about its own settings
        for number in range(BUDGET):
            candidate = optimizer.ask()
            weights = [float(value) for value in candidate.value]
            tried.append((cost(weights), weights))
            optimizer.tell(candidate, tried[-1][0])
            done(number + 1)
    if lowest({number: loss for number, (loss, _) in enumerate(tried)}) is None:
        raise ValueError(
            f"none of the {BUDGET} weights that LoRAHub tried has a finite loss: use model.dtype "
            "float32 if the model overflows in half precision"
        )
    best = [float(value) for value in optimizer.provide_recommendation().value]
    write_json(work.out / "tried.json", {"weights": best, "tried": tried})
    about = {"kind": "lorahub", "weights": best, "forwards": BUDGET * read}
    return summed(adapters, best), about


def _price_of(
    work: Work, adapters: Sequence[Mapping[str, LoraFactors]]
) -> tuple[Callable[[Sequence[float]], float], int]:
    """Return (weights -> loss plus penalty in nats, number of examples that a call reads)."""
    context = work.context
    train = context.rows("target", ["train"])
    count = len(train.encoded)
    batches = train.batches(range(count))

    def cost(weights: Sequence[float]) -> float:
        with context.live(summed(adapters, weights), "merged") as live:
            live.model.eval()
            losses = example_losses(live.model, batches, count)
        price = L1 * sum(abs(weight) for weight in weights) / len(weights)
        return sum(losses) / len(losses) + price

    return cost, count


def summed(
    adapters: Sequence[Mapping[str, LoraFactors]], weights: Sequence[float]
) -> dict[str, MergedModule]:
    """Return the merge whose delta is `(sum w_i B_i) (sum w_i A_i)` times the adapters' scaling.

    Raises:
        NotApplicable: the adapters differ in modules, shapes or scaling.
    """
    merged: dict[str, MergedModule] = {}
    if any(one.keys() != adapters[0].keys() for one in adapters):
        raise NotApplicable("LoRAHub needs adapters with the same modules")
    for name in adapters[0]:
        parts = [one[name] for one in adapters]
        if len({(p.A.shape, p.B.shape, p.scaling) for p in parts}) > 1:
            raise NotApplicable(
                f"LoRAHub needs adapters of the same rank and scaling; in {name} the ranks are "
                f"{[p.rank for p in parts]}, the scalings {[p.scaling for p in parts]}"
            )
        a = sum(w * p.A.float() for w, p in zip(weights, parts, strict=True))
        b = sum(w * p.B.float() for w, p in zip(weights, parts, strict=True))
        merged[name] = MergedModule("cat", (Part(None, a, b * parts[0].scaling),))  # type: ignore[arg-type]
    return merged


def lorahub_cost(_stage: Stage, sizes: Sizes) -> Cost:
    """Return the cost of LoRAHub's search."""
    return sizes.reading(BUDGET, ("target", "train"))


Rule = Callable[[Work, Sequence[LoadedAdapter]], Merged]

UNWEIGHTED_RULES: Mapping[str, Rule] = {"layer-swap": by_layer_swap, "ties-delta": by_ties_delta}
"""Setting `merge.kind` -> the function that merges, of the kinds that have no weights."""
RULES: Mapping[str, Rule] = {"mean": by_mean, "peft": by_peft, "lorahub": by_lorahub}
"""Option `rule` of the stage `merge` -> the function that merges."""
