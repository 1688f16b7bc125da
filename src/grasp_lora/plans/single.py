"""Plans of one stage, for the stage commands and for Python.

Each function returns its folder `out`. It raises ValueError if `out` holds a result made from other
inputs and `overwrite` is not set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.owner import owned_place
from grasp_lora.base.words import shown_path
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.plans.executor import Options, given_to, work_off
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.run import NO_DEV_EXAMPLES
from grasp_lora.plans.session import Session
from grasp_lora.scoring.sets import missing_metrics
from grasp_lora.stages.evaluate import NO_TEST_EXAMPLES
from grasp_lora.stages.stage import Input, Stage
from grasp_lora.training.trainer import tracker_faults
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.given import check_kind, say_other_bases
from grasp_lora.workbench.merge_probes import configured_weights
from grasp_lora.workbench.merged_folder import epochs_trained, say_unnamed
from grasp_lora.workbench.objective import objective_faults
from grasp_lora.workbench.processes import is_main, join, kept_by_main
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data
from grasp_lora.workbench.sizes import check_budget


def train_adapter(
    config: RunConfig,
    role: str,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
) -> Path:
    """Train a fresh adapter on the examples of `role`; the checkpoint with the best dev loss is
    kept.

    Args:
        config: `lora` gives the adapter's shape, `train` the training.
        role: "source" or "target".
        out: folder of the adapter, an ordinary PEFT folder.
        overwrite: replace another result.
        context: examples and backbone, if they are open already.

    Raises:
        ValueError: there are no examples of the role, or no layer matches `lora.target_modules`.
    """
    stage = Stage(out.name, "train", config, options={"role": role})
    return _done(out, [stage], overwrite, context)


def merge_adapters(
    config: RunConfig,
    folders: Sequence[Path],
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
    weights: Sequence[float] | None = None,
) -> Path:
    """Merge PEFT adapters of one backbone, as `config.merge` says. No examples are read.

    Args:
        config: the settings.
        folders: adapter folders, in the order of the weights.
        out: folder of the merged adapter, an ordinary PEFT folder. It also holds the factors of
            each source, because `search` and `finetune` mask the sources separately.
        overwrite: replace another result.
        context: examples and backbone, if they are open already.
        weights: a weight for each adapter; None takes `config.merge.weights`.

    Raises:
        FileNotFoundError, ValueError: a folder holds no adapter, an adapter does not fit this
            backbone, or the adapters cannot be merged exactly; the message names the reason.
    """
    adapters = [read_adapter(folder).adapter for folder in folders]
    kind, faults = config.merge.kind, config.merge.faults(weights)
    if faults:
        raise ValueError("; ".join(faults))
    given = configured_weights(config.merge.weights, adapters) if weights is None else weights
    # What the factors alone tell is told before the backbone is loaded.
    check_kind(kind, adapters, given)
    roles = ("source", "target", *(f"adapter {n}" for n in range(2, len(folders))))
    inputs: dict[str, Input] = dict(zip(roles, folders, strict=False))
    options = {} if weights is None else {"weights": list(weights)}
    stage = Stage(out.name, "merge", config, inputs, options)
    return _done(out, [stage], overwrite, context, named=folders)


def search_ratio(
    config: RunConfig,
    merged: Path,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
) -> Path:
    """Fine-tune the merged adapter while the controller learns the prune ratio.

    With `merge.when: after` nothing is trained: the same rounds probe the adapter as it is.

    Args:
        config: the settings.
        merged: folder of the merged adapter (any PEFT adapter folder will do).
        out: receives `ratio.json`, `rounds.jsonl` and `adapter/`.
        overwrite: replace another result.
        context: examples and backbone, if they are open already.

    Raises:
        ValueError: the run is too short for one round; the micro-dev set is empty or overlaps.
        Diverged: the training loss became NaN.
    """
    faults = objective_faults(config)
    if faults:
        raise ConfigError(faults)
    options = {"untrained": config.merge.when == "after"}
    stage = Stage(out.name, "search", config, {"merged": merged}, options)
    return _done(out, [stage], overwrite, context)


def prune_adapter(
    config: RunConfig,
    start: Path,
    ratio: float,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Prune an adapter at a fixed ratio, fine-tune it on the target examples, keep the best.

    With `finetune.rows: labelled` that run is kept beside the result, in `<out>-judged`, and the
    result is retrained on all labelled examples.

    Args:
        config: the settings.
        start: a merged folder, a search's `adapter/`, or any PEFT adapter folder.
        ratio: fraction of entries set to zero in every mask unit's tensors, in [0, 1].
        out: folder of the final adapter, an ordinary PEFT folder.
        overwrite: replace another result.
        context: examples and backbone, if they are open already.
        options: `spread`, `random_masks` and `untrained`, see `grasp_lora.stages.prune`.

    Raises:
        ValueError: the ratio is outside [0, 1], `start` is no adapter or does not fit this
            backbone, or `finetune.rows: labelled` is set while there are no dev examples to choose
            the epochs by, or while `start` is the end of a search.
        Diverged: the training loss became NaN.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"the ratio must be in [0, 1], got {ratio}; it is the fraction removed")
    options = {"ratio": ratio} | dict(options or {})
    inputs: dict[str, Input] = {"start": start}
    title = "final fine-tuning"
    if config.finetune.rows != "labelled" or options.get("untrained"):
        stage = Stage(out.name, "prune", config, inputs, options, title)
        return _done(out, [stage], overwrite, context)
    if config.finetune.mode == "continue" and epochs_trained(start):
        raise ValueError(
            f"finetune.rows: labelled trains from where the search began, and {shown_path(start)} "
            "is where it ended: give the merged adapter as the start with finetune.mode: restart"
        )
    judged = Stage(f"{out.name}-judged", "prune", config, inputs, options, title)
    whole = Stage(out.name, "prune", config, inputs | {"judged": judged.name}, options, title)
    return _done(out, [judged, whole], overwrite, context)


def shrink_adapter(
    config: RunConfig,
    adapter: Path,
    budget_mb: float,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
) -> Path:
    """Fit a finished adapter into a number of bytes; see `grasp_lora.stages.shrink`.

    Args:
        config: the settings; their micro-dev and dev examples choose.
        adapter: a PEFT adapter folder.
        budget_mb: most megabytes (10^6 bytes) of `quantized.safetensors`, its header aside.
        out: folder of the smaller adapter, an ordinary PEFT folder with two more files.
        overwrite: replace another result.
        context: examples and backbone, if they are open already.

    Raises:
        ValueError: the budget is too small, the folder holds no adapter that fits this backbone,
            or there are fewer than 4 examples.
    """
    check_budget(budget_mb, read_adapter(adapter).adapter)
    stage = Stage(out.name, "shrink", config, {"adapter": adapter}, {"budget_mb": budget_mb})
    return _done(out, [stage], overwrite, context, named=[adapter])


def evaluate_adapter(
    config: RunConfig,
    adapter: Path | None,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
    title: str = "evaluate",
) -> Path:
    """Answer the test examples and score the answers.

    Args:
        config: the settings.
        adapter: a PEFT adapter folder; None scores the bare backbone.
        out: receives `scores.json`, `predictions.jsonl` and `provenance.json`.
        overwrite: replace another result.
        context: examples and backbone, if they are open already.
        title: what the progress bar says.

    Raises:
        ValueError: there are no test examples, a metric cannot be computed here, or the adapter
            does not fit this backbone.
    """
    inputs: dict[str, Input] = {} if adapter is None else {"adapter": adapter}
    stage = Stage(out.name, "evaluate", config, inputs, title=title)
    return _done(out, [stage], overwrite, context)


def _done(
    out: Path,
    stages: Sequence[Stage],
    overwrite: bool,
    context: Context | None,
    named: Sequence[Path] = (),
) -> Path:
    """Do these stages in the folder above `out`, and return `out`.

    The user is told which of the adapters `named` name another base model.
    """
    config, kind = stages[-1].config, stages[-1].kind
    join(config)
    evaluates = kind == "evaluate"
    trains = kind in ("train", "search", "prune")
    faults = missing_metrics(config) if evaluates and context is None else []
    faults += tracker_faults(config.report_to) if trains else []
    if faults:
        raise ConfigError(faults)
    say = Reporter(not is_main()).say if context is None else context.reporter.say
    with kept_by_main(owned_place(out, say)):
        if context is not None:
            data = context.data
        elif kind == "merge":
            data = RunData({"target": {}})
        else:
            data = load_run_data(config, say, training=trains)
        if evaluates and not data.test_sets():
            raise ValueError(NO_TEST_EXAMPLES)
        labelled = config.finetune.rows == "labelled" and len(stages) > 1
        if labelled and not data.parts["target"].get("dev"):
            raise ValueError(NO_DEV_EXAMPLES)
        builder = PlanBuilder()
        for stage in stages:
            builder.add(stage)
        plan = builder.build()
        session = Session(config, data, context, training=trains, inputs=given_to(plan))
        if context is None and named and not (out / "stage.json").exists():
            say_other_bases(session.context, named)
        work_off(plan, out.parent, session, Options(overwrite=overwrite))
        if is_main():
            say_unnamed(out, say)
    return out
