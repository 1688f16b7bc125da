"""Stage `weights`: two adapters -> the merge weights that the same cheap probes find.

Our departure from arXiv 2601.06702, which adds the adapters up: a sum overshoots, and pruning then
gets the credit of a smaller scale. And it merges first: what was trained on the target rows is then
trained on them again, and overfits at once.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grasp_lora.base.files import read_json, write_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.evidence.crossfit import Gain, gain_of_best, within_one_error_of_best
from grasp_lora.core.lora import average_weights
from grasp_lora.stages.precheck import MERGE, ROWS, VARIANTS, Variant, measure, weights_of
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.folders import begin_stage, finish_stage, stage_is_done, stage_key
from grasp_lora.workbench.processes import is_main, wait_for_all

SHARES: Mapping[float, Variant] = {
    share: Variant("weights", (1 - share, share)) for share in (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
}
"""Share of the target adapter in a late merge -> what is measured; the two weights sum to 1."""
SHARE_ROWS = 48


def with_learned_weights(context: Context, adapters: Mapping[str, Path], out: Path) -> RunConfig:
    """Return the settings with weights for the merge, learned where they ask for that.

    Args:
        context: data, backbone and settings.
        adapters: folders of `source` and `target`.
        out: as for `learned_weights`.
    """
    config = context.config
    late = config.merge.when == "after"
    if config.merge.weights != "auto" and not (late and config.merge.weights is None):
        return config
    learn = late_weights if late else learned_weights
    weights = learn(context, adapters["source"], adapters["target"], out)
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
    variants = {name: one for name, one in VARIANTS.items() if one.group in ("merge", "weights")}
    with context.clock.span("probe"):
        ids, losses = measure(context, (source, target), variants, ROWS)
    others = {name: values for name, values in losses.items() if name != MERGE}
    gain = gain_of_best(others, {MERGE: losses[MERGE]})
    shown = gain is not None and gain.shown
    best = min(others, key=lambda name: sum(others[name])) if shown else MERGE
    weights = weights_of(best, usual)
    context.narrator.say(f"merge weights {list(weights)}: {best if shown else 'the average'}")
    found = {"weights": weights, "variant": best, "rows": ids, "losses": losses}
    _finish(out, key, found, gain, began)
    return weights


def late_weights(
    context: Context, tuned: Path, target: Path, out: Path, overwrite: bool = False
) -> tuple[float, float]:
    """Return the weights of a merge that nothing will be trained on, by the losses of `SHARES`.

    Of the shares that are not worse than the best by more than one standard error, the one nearest
    to one half is taken: the plain average, unless the rows say otherwise.

    Args:
        context: data and backbone.
        tuned: folder of the source adapter, fine-tuned on the target rows; share 0 is it alone.
        target: folder of the target adapter.
        out: receives `weights.json` with the losses and the evidence: what the best share saves
            over share 0 on rows that it was not chosen on.
        overwrite: replace a finished result made with other settings.

    Raises:
        ValueError: an adapter does not fit, or there are fewer than 4 rows to measure on.
    """
    key = stage_key(context.config, data=context.data.digest(), source=tuned, target=target)
    if stage_is_done(out, key, overwrite):
        first, second = read_json(out / "weights.json")["weights"]
        return first, second
    began = time.perf_counter()
    variants = {f"share {share:g}": variant for share, variant in SHARES.items()}
    with context.clock.span("probe"):
        ids, losses = measure(context, (tuned, target), variants, SHARE_ROWS)
    alone, *others = variants
    gain = gain_of_best({name: losses[name] for name in others}, {alone: losses[alone]})
    good = within_one_error_of_best(losses) or [alone]
    distance = {name: abs(share - 0.5) for name, share in zip(variants, SHARES, strict=True)}
    best = min(good, key=lambda name: distance[name])
    weights = variants[best].weights
    assert weights is not None, "every share has weights"
    context.narrator.say(f"merge weights {list(weights)}: {best} of the target adapter")
    found = {"weights": weights, "variant": best, "rows": ids, "losses": losses}
    _finish(out, key, found, gain, began)
    return weights


def _finish(
    out: Path, key: Mapping[str, Any], found: dict[str, Any], gain: Gain | None, began: float
) -> None:
    if is_main():
        evidence = None
        if gain is not None:
            evidence = {"gain": gain.gain, "standard_error": gain.error, "shown": gain.shown}
        begin_stage(out, key)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "weights.json", found | {"evidence": evidence})
        finish_stage(out, key, {"seconds": time.perf_counter() - began})
    wait_for_all()
