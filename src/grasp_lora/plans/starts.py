"""Where a fine-tuning run of a comparison starts: an adapter, or a merge of the two."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import LoadedAdapter, check_fits, read_adapter
from grasp_lora.adapters.peft_merges import peft_merge
from grasp_lora.base.files import read_json, write_json
from grasp_lora.core.lora import LoraFactors, MergedModule, Part, average_weights, merge
from grasp_lora.models.example_losses import example_losses
from grasp_lora.stages.merge import merge_adapters
from grasp_lora.stages.weights import with_learned_weights
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.folders import (
    STAGE_FILE,
    finish_stage,
    stage_is_done,
    stage_key,
    write_merged,
)

CONFIGURED: Mapping[str, Any] = {"merge": {}}
"""The merge as the settings have it, made once for all methods that begin there."""
BUDGET = 40
"""Weights that LoRAHub tries, as published."""
BOUND = 1.5
L1 = 0.05
"""Price of the sum of the weights' sizes over their number, in nats, as published."""


class NotApplicable(ValueError):
    """A method cannot run on these adapters or on this machine; says why.

    Args:
        why: what the tables say.
        package: what is not installed here, where that is the reason.
    """

    def __init__(self, why: str, package: str | None = None):
        super().__init__(why)
        self.package = package


@dataclass(frozen=True)
class Start:
    """Where a method begins, and what it took to make that from the two adapters.

    Attributes:
        adapter: its folder, None for the bare backbone.
        forwards: rows read to choose it.
        seconds: time of choosing and merging.
    """

    adapter: Path | None
    forwards: int = 0
    seconds: float = 0.0


def started(
    context: Context, start: Mapping[str, Any], adapters: Mapping[str, Any], folder: Path
) -> Start:
    """Return an adapter to begin with; makes it where it is not there yet.

    Args:
        context: data, backbone and settings.
        start: `{"adapter": "source" | "target" | None}`; `{"merge": {kind, weights, rank}}`, as
            `merge` of the settings, an empty one for the merge that is configured; `{"peft": kind,
            "density": d}`; or `{"lorahub": true}`.
        adapters: folders of `source`, `target` and their `merged`, and what `merging` took.
        folder: receives what is made.

    Raises:
        NotApplicable: this start does not suit the adapters.
    """
    if "adapter" in start:
        role = start["adapter"]
        return Start(None if role is None else Path(adapters[role]))
    if start == CONFIGURED:
        return Start(Path(adapters["merged"]), **adapters["merging"])
    folders = {role: Path(adapters[role]) for role in ("source", "target")}
    if "merge" in start:
        return _merged(context, start["merge"], folders, folder)
    loaded = [_read(context, path) for path in folders.values()]
    if "peft" in start:
        return _by_peft(context, start, loaded, folder)
    return _lorahub(context, loaded, folder)


def merging(weights: Path, merged: Path) -> dict[str, Any]:
    """Return what a merge took, as `Start` has it: its weights' stage, if there was one, and it."""
    price = {"forwards": 0, "seconds": read_json(merged / STAGE_FILE)["seconds"]}
    if (weights / STAGE_FILE).exists():
        found = read_json(weights / "weights.json")
        price["forwards"] = len(found["rows"]) * len(found["losses"])
        price["seconds"] += read_json(weights / STAGE_FILE)["seconds"]
    return price


def _merged(
    context: Context, asked: Mapping[str, Any], folders: dict[str, Path], folder: Path
) -> Start:
    plain = context.config.merge.model_dump() | {"rank": None} | dict(asked)
    section = type(context.config.merge).model_validate(plain)
    config = context.config.model_copy(update={"merge": section})
    weighted = with_learned_weights(replace(context, config=config), folders, folder / "weights")
    try:
        merged = merge_adapters(weighted, list(folders.values()), folder / "start", context=context)
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    return Start(merged, **merging(folder / "weights", merged))


def _by_peft(
    context: Context, start: Mapping[str, Any], loaded: Sequence[LoadedAdapter], folder: Path
) -> Start:
    out, key = folder / "start", stage_key(context.config, start=dict(start))
    if stage_is_done(out, key, overwrite=False):
        return Start(out, seconds=read_json(out / STAGE_FILE)["seconds"])
    began = time.perf_counter()
    alone = [merge("cat", [one.adapter], [1.0]) for one in loaded]
    model, weights = context.backbone.model, average_weights(len(alone))
    try:
        merged = peft_merge(
            model, alone, start["peft"], weights, start["density"], context.config.seed
        )
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    write_merged(out, merged, context.backbone, {"kind": start["peft"], "weights": weights})
    seconds = time.perf_counter() - began
    finish_stage(out, key, {"seconds": seconds})
    return Start(out, seconds=seconds)


def _lorahub(context: Context, loaded: Sequence[LoadedAdapter], folder: Path) -> Start:
    """Return the merge whose weights nevergrad finds, by the train rows' loss and an L1 price.

    As LoRAHub (arXiv 2307.13269) does it, with the answers' loss of a causal model: the factors are
    summed, not the deltas, so products of two adapters' factors are in it.
    """
    out, key = folder / "start", stage_key(context.config, data=context.data.digest())
    rows = context.rows("target", ["train"])
    read = BUDGET * len(rows.encoded)
    if stage_is_done(out, key, overwrite=False):
        return Start(out, read, read_json(out / STAGE_FILE)["seconds"])
    began = time.perf_counter()
    try:
        import nevergrad
    except ImportError:
        why = "LoRAHub needs nevergrad; run: pip install nevergrad"
        raise NotApplicable(why, package="nevergrad") from None
    batches = rows.batches(range(len(rows.encoded)))

    def cost(weights: Sequence[float]) -> float:
        merged = summed([one.adapter for one in loaded], weights)
        with context.live(merged, "merged") as live:
            live.model.eval()
            losses = example_losses(live.model, batches, len(rows.encoded))
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
    seconds = time.perf_counter() - began
    finish_stage(out, key, {"seconds": seconds})
    return Start(out, read, seconds)


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
