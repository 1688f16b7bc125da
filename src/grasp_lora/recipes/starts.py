"""Where a fine-tuning run of a comparison starts: an adapter, or a merge of the two."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grasp_lora.core.lora import LoraFactors, MergedModule, Part, average_weights, merge
from grasp_lora.hf.adapter_io import LoadedAdapter, check_fits, read_adapter
from grasp_lora.hf.peft_merges import peft_merge
from grasp_lora.hf.probe import row_losses
from grasp_lora.recipes.context import Context
from grasp_lora.recipes.folders import finish_stage, stage_is_done, stage_key, write_merged
from grasp_lora.recipes.merge import merge_adapters
from grasp_lora.recipes.weights import with_learned_weights
from grasp_lora.runs import read_json, write_json

BUDGET = 40
"""Weights that LoRAHub tries, as published."""
BOUND = 1.5
L1 = 0.05
"""Price of the sum of the weights' sizes over their number, in nats, as published."""


class NotApplicable(ValueError):
    """A method cannot run on these adapters or on this machine; says why."""


def started(
    context: Context, start: Mapping[str, Any], adapters: Mapping[str, Any], folder: Path
) -> tuple[Path | None, int]:
    """Return (adapter folder, None for the bare backbone; rows read to find it).

    Args:
        context: data, backbone and settings.
        start: `{"adapter": "source" | "target" | None}`; `{"merge": {kind, weights, rank}}`, as
            `merge` of the settings; `{"peft": kind, "density": d}`; or `{"lorahub": true}`.
        adapters: folders of `source` and `target`.
        folder: receives what is made.

    Raises:
        NotApplicable: this start does not suit the adapters.
    """
    if "adapter" in start:
        role = start["adapter"]
        return (None if role is None else Path(adapters[role])), 0
    folders = {role: Path(adapters[role]) for role in ("source", "target")}
    if "merge" in start:
        return _merged(context, start["merge"], folders, folder)
    loaded = [_read(context, path) for path in folders.values()]
    if "peft" in start:
        return _by_peft(context, start, loaded, folder), 0
    return _lorahub(context, loaded, folder)


def _merged(
    context: Context, asked: Mapping[str, Any], folders: dict[str, Path], folder: Path
) -> tuple[Path, int]:
    section = context.config.merge.model_copy(update={"rank": None} | dict(asked))
    config = context.config.model_copy(update={"merge": section})
    weighted = with_learned_weights(replace(context, config=config), folders, folder / "weights")
    read = 0
    if section.weights == "auto":
        found = read_json(folder / "weights" / "weights.json")
        read = len(found["rows"]) * len(found["losses"])
    try:
        merged = merge_adapters(weighted, list(folders.values()), folder / "start", context=context)
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    return merged, read


def _by_peft(
    context: Context, start: Mapping[str, Any], loaded: Sequence[LoadedAdapter], folder: Path
) -> Path:
    out, key = folder / "start", stage_key(context.config, start=dict(start))
    if stage_is_done(out, key, overwrite=False):
        return out
    alone = [merge("cat", [one.adapter], [1.0]) for one in loaded]
    model, weights = context.backbone.model, average_weights(len(alone))
    try:
        merged = peft_merge(
            model, alone, start["peft"], weights, start["density"], context.config.seed
        )
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    write_merged(out, merged, context.backbone, {"kind": start["peft"], "weights": weights})
    finish_stage(out, key, {})
    return out


def _lorahub(context: Context, loaded: Sequence[LoadedAdapter], folder: Path) -> tuple[Path, int]:
    """Return the merge whose weights nevergrad finds, by the train rows' loss and an L1 price.

    As LoRAHub (arXiv 2307.13269) does it, with the answers' loss of a causal model: the factors are
    summed, not the deltas, so products of two adapters' factors are in it.
    """
    out, key = folder / "start", stage_key(context.config, data=context.data.digest())
    rows = context.rows("target", ["train"])
    read = BUDGET * len(rows.encoded)
    if stage_is_done(out, key, overwrite=False):
        return out, read
    try:
        import nevergrad
    except ImportError:
        raise NotApplicable("LoRAHub needs nevergrad; run: pip install nevergrad") from None
    batches = rows.batches(range(len(rows.encoded)))

    def cost(weights: Sequence[float]) -> float:
        merged = summed([one.adapter for one in loaded], weights)
        with context.live(merged, "merged") as live:
            live.model.eval()
            losses = row_losses(live.model, batches, len(rows.encoded))
        price = L1 * sum(abs(weight) for weight in weights) / len(weights)
        return sum(losses) / len(losses) + price

    wanted = nevergrad.p.Array(init=[0.0] * len(loaded)).set_bounds(-BOUND, BOUND)
    wanted.random_state.seed(context.config.seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=wanted, budget=BUDGET)
    tried: list[tuple[float, list[float]]] = []
    with context.narrator.bar("weights", BUDGET) as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optimizer's own settings
        for number in range(BUDGET):
            candidate = optimizer.ask()
            weights = [float(value) for value in candidate.value]
            tried.append((cost(weights), weights))
            optimizer.tell(candidate, tried[-1][0])
            done(number + 1)
    best = [float(value) for value in optimizer.provide_recommendation().value]
    merged = summed([one.adapter for one in loaded], best)
    write_merged(out, merged, context.backbone, {"kind": "lorahub", "weights": best})
    write_json(out / "tried.json", {"weights": best, "tried": tried})
    finish_stage(out, key, {})
    return out, read


def summed(
    adapters: Sequence[Mapping[str, LoraFactors]], weights: Sequence[float]
) -> dict[str, MergedModule]:
    """Return `(sum w_i B_i) (sum w_i A_i)` times the adapters' scaling, for every module.

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


def _read(context: Context, folder: Path) -> LoadedAdapter:
    loaded = read_adapter(folder)
    check_fits(loaded, context.backbone.model, str(folder))
    return loaded
