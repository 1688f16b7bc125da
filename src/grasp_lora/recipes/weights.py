"""Stage `weights`: two adapters -> the merge weights that the same cheap probes find.

Our departure from arXiv 2601.06702, which adds the adapters up: a sum overshoots, and pruning then
gets the credit of a smaller scale.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from grasp_lora.config import RunConfig
from grasp_lora.core.crossfit import gain_of_best
from grasp_lora.core.lora import average_weights
from grasp_lora.recipes.context import Context
from grasp_lora.recipes.folders import finish_stage, stage_is_done, stage_key
from grasp_lora.recipes.precheck import MERGE, ROWS, VARIANTS, measure, weights_of
from grasp_lora.recipes.processes import is_main, wait_for_all
from grasp_lora.runs import read_json, write_json


def with_learned_weights(context: Context, adapters: Mapping[str, Path], out: Path) -> RunConfig:
    """Return the settings with weights for the merge, learned where they ask for that.

    Args:
        context: data, backbone and settings.
        adapters: folders of `source` and `target`.
        out: as for `learned_weights`.
    """
    config = context.config
    if config.merge.weights != "auto":
        return config
    weights = learned_weights(context, adapters["source"], adapters["target"], out)
    section = config.merge.model_copy(update={"weights": weights})
    return config.model_copy(update={"merge": section})


def learned_weights(
    context: Context, source: Path, target: Path, out: Path, overwrite: bool = False
) -> tuple[float, ...]:
    """Return merge weights: the average, unless others are shown to be better on other rows.

    Eleven merges that differ in weights and strength are measured untrained on 16 rows; the one
    with the lowest loss is taken if the choice on half of the rows holds on the other half.

    Args:
        context: data and backbone.
        source: folder of the source adapter.
        target: folder of the target adapter.
        out: receives `weights.json` with the losses and the evidence.
        overwrite: replace a finished result made with other settings.

    Raises:
        ValueError: an adapter does not fit, or there are fewer than 4 rows to measure on.
    """
    key = stage_key(context.config, data=context.data.digest(), source=source, target=target)
    if stage_is_done(out, key, overwrite):
        return tuple(read_json(out / "weights.json")["weights"])
    began = time.perf_counter()
    usual = average_weights(2)
    names = [name for name, variant in VARIANTS.items() if variant.group in ("merge", "weights")]
    with context.clock.span("probe"):
        ids, losses = measure(context, (source, target), names, ROWS)
    others = {name: values for name, values in losses.items() if name != MERGE}
    gain = gain_of_best(others, {MERGE: losses[MERGE]})
    shown = gain is not None and gain.shown
    best = min(others, key=lambda name: sum(others[name])) if shown else MERGE
    weights = weights_of(best, usual)
    context.narrator.say(f"merge weights {list(weights)}: {best if shown else 'the average'}")
    if is_main():
        found = {"weights": weights, "variant": best, "rows": ids, "losses": losses}
        evidence = None
        if gain is not None:
            evidence = {"gain": gain.gain, "standard_error": gain.error, "shown": gain.shown}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "weights.json", found | {"evidence": evidence})
        finish_stage(out, key, {"seconds": time.perf_counter() - began})
    wait_for_all()
    return weights
