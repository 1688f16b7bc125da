"""The whole job: two adapters in, one pruned adapter at a learned ratio out, with its report."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.clock import time_summary
from grasp_lora.base.files import (
    check_disk,
    check_run,
    finish_run,
    jsonable,
    open_run,
    peak_memory_bytes,
    provenance,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.models.backbones import resolve_targets
from grasp_lora.models.modules import linear_shape
from grasp_lora.report.pictures import plot_search
from grasp_lora.report.run import write_report
from grasp_lora.scoring.sets import compare_evaluations, missing_metrics
from grasp_lora.stages.evaluate import evaluate_adapter
from grasp_lora.stages.findings import add_run_findings
from grasp_lora.stages.finetune import finetune_at, judged_beside
from grasp_lora.stages.merge import merge_adapters
from grasp_lora.stages.search import check_search, search_ratio
from grasp_lora.stages.train import train_adapter
from grasp_lora.stages.weights import with_learned_weights
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.fit import checkpoint_bytes
from grasp_lora.workbench.folders import STAGE_FILE, read_ratio
from grasp_lora.workbench.given import check_given
from grasp_lora.workbench.objective import reward_faults
from grasp_lora.workbench.processes import decided_by_main, is_main, join, wait_for_all
from grasp_lora.workbench.reporter import Narrator
from grasp_lora.workbench.rows import Given, load_run_data
from grasp_lora.workbench.times import (
    carry_times,
    keep_times,
    open_clock,
    timed_stage,
    write_profile,
)

TUNED = ("source-finetuned", "source fine-tuned on target")
"""Folder and title of the source adapter fine-tuned alone, a baseline and half of a late merge."""


@dataclass(frozen=True)
class System:
    """One row of the result table.

    Attributes:
        name: what the table calls it.
        slug: folder name of its evaluation.
        adapter: its adapter folder, None for the bare backbone.
    """

    name: str
    slug: str
    adapter: Path | None


def run(
    config: RunConfig,
    overwrite: bool = False,
    quiet: bool = False,
    rows: Given | None = None,
    profile: bool = False,
) -> Path:
    """Run every stage that is not done yet and write the run's report.

    An interrupted run of the same configuration goes on where it stopped.

    Args:
        config: the run's settings; `config.output` is the run folder.
        overwrite: replace a finished run or one of another configuration.
        quiet: print nothing.
        rows: rows from Python (lists of mappings, a `datasets.Dataset`), role -> part -> rows, in
            place of `data.<role>.files`; the languages are still the configuration's.
        profile: write where the time went, stage by stage, and wait for a GPU at the edges of
            every part, without which its time is charged to whatever waits for it.

    Returns:
        The run folder, with `final/` (a PEFT adapter), `ratio.json`, `rounds.jsonl`,
        `scores.json`, `ratio.png`, `data.json`, `provenance.json` and the stages' own folders;
        for a profile `profile.json`, `profile.md` and `profile.png`.

    Raises:
        ValueError, FileNotFoundError: something cannot work; raised before any work is done.
        Diverged: a training loss became NaN.
    """
    clock = open_clock(config, profile)
    join(config)
    faults = (
        config.faults() + config.missing_files() + missing_metrics(config) + reward_faults(config)
    )
    if faults:
        raise ConfigError(faults)
    out, settings = config.output, config.to_dict()
    decided_by_main(lambda: check_run(out, settings, overwrite))
    given = {"source": config.adapters.source, "target": config.adapters.target}
    with clock.span("load"):
        for folder in given.values():
            if folder is not None:
                read_adapter(folder)
        data = load_run_data(config, Narrator(quiet or not is_main()).say, given=rows)
    context = open_context(config, quiet, data, clock=clock)
    _check_before_work(context, given)
    decided_by_main(lambda: _open(context, settings, overwrite))
    carry_times(context)
    scores = _stages(context, out, given)
    if is_main():
        write_json(out / "scores.json", scores)
        times = keep_times(context)
        write_json(out / "provenance.json", _provenance(context, time_summary(times)))
        write_report(out)
        if profile:
            write_profile(out, times)
        finish_run(out)
    wait_for_all()
    return out


def _stages(context: Context, out: Path, given: dict[str, Path | None]) -> dict[str, Any]:
    """Run the stages that are not done yet; return what `scores.json` says."""
    config = context.config
    late, labelled = config.merge.when == "after", config.finetune.rows == "labelled"
    adapters = {role: folder or _trained(context, role) for role, folder in given.items()}
    pair = dict(adapters)
    if late:
        tuned = _unpruned(context, adapters["source"], *TUNED)
        # What dev rows choose must not have been trained on them.
        pair["source"] = judged_beside(tuned) if labelled else tuned
    with timed_stage(context, out / "merged") as merged:
        weighted = with_learned_weights(context, pair, out / "weights")
        merge_adapters(weighted, list(pair.values()), merged, context=context)
    with timed_stage(context, out / "search") as search:
        search_ratio(config, merged, search, context=context)
    ratio, spread = read_ratio(search / "ratio.json", config)
    start = search / "adapter" if config.finetune.mode == "continue" and not late else merged
    how: dict[str, Any] = {"context": context, "spread": spread, "train": not late}
    if late and labelled:
        with timed_stage(context, out / "final-judged") as judged:
            finetune_at(config, start, ratio, judged, **how)
        with timed_stage(context, out / "merged-labelled") as start:
            merge_adapters(weighted, [tuned, pair["target"]], start, context=context)
        how["judged"] = judged
    with timed_stage(context, out / "final") as final:
        finetune_at(config, start, ratio, final, origin=merged, **how)
    if is_main():
        with context.clock.span("write"):
            publish_search(out, final)
    scores = _score_systems(context, out, adapters, merged, final)
    if is_main():
        baseline = {"source adapter, fine-tuned on target": out / "baselines" / TUNED[0]}
        # An adapter given by the user was chosen on rows of its own.
        trained = {} if given["target"] else {"target adapter": adapters["target"]}
        with context.clock.span("write"):
            add_run_findings(out, final, baseline | trained, scores["systems"])
    return scores


def _unpruned(context: Context, start: Path, slug: str, title: str) -> Path:
    """Fine-tune without pruning, for as long as the result is trained in all."""
    config = _as_long_alone(context.config)
    with timed_stage(context, context.config.output / "baselines" / slug) as folder:
        return finetune_at(config, start, 0.0, folder, context=context, title=title)


def _merged_first(context: Context, adapters: dict[str, Path]) -> Path:
    """Merge before anything is fine-tuned, by the weights configured or the average."""
    config, folder = context.config, context.config.output / "baselines" / "merged-first"
    given = None if config.merge.weights == "auto" else config.merge.weights
    first = config.merge.model_copy(update={"when": "before", "weights": given})
    config = config.model_copy(update={"merge": first})
    return merge_adapters(config, list(adapters.values()), folder, context=context)


def _trained(context: Context, role: str) -> Path:
    with timed_stage(context, context.config.output / "adapters" / role) as folder:
        return train_adapter(context.config, role, folder, context=context)


def _check_before_work(context: Context, given: dict[str, Path | None]) -> None:
    config, model = context.config, context.backbone.model
    loaded = check_given(context, [folder for folder in given.values() if folder is not None])
    entries = sum(f.A.numel() + f.B.numel() for one in loaded for f in one.adapter.values())
    fresh = len(given) - len(loaded)
    if fresh:
        targets = resolve_targets(model, config.lora.target_modules)
        modules = dict(model.named_modules())
        sizes = [sum(linear_shape(modules[name]) or ()) for name in targets]
        entries += fresh * config.lora.r * sum(sizes)
    for role, parts in context.data.parts.items():
        for split in parts:
            context.encoded(role, split)
    check_disk(config.output, checkpoint_bytes(entries))
    rounds = check_search(context)
    if not context.data.test_sets():
        context.narrator.say("no test rows (data.target.rows.test): nothing will be scored")
    context.narrator.say(
        f"backbone {context.backbone.public_name}, {context.backbone.dtype}; {rounds} rounds of"
        f" {config.controller.candidates} candidates planned"
    )


def _open(context: Context, settings: dict[str, Any], overwrite: bool) -> None:
    out, rows = context.config.output, jsonable(context.data.manifest())
    stored = out / "data.json"
    opened = check_run(out, settings, overwrite)
    if opened == "resumed" and stored.exists() and read_json(stored) != rows:
        raise ValueError(
            f"'{out}' holds an unfinished run on other rows (its data.json differs): a data file"
            " has changed since; set another output, or pass --overwrite to begin anew"
        )
    open_run(out, settings, overwrite)
    write_json(stored, rows)


def publish_search(out: Path, final: Path) -> None:
    """Write the run's own ratio.json (zeros of the exported tensors added), rounds and picture."""
    search = out / "search"
    ratio, stage = read_json(search / "ratio.json"), read_json(search / STAGE_FILE)
    finetuned = read_json(final / STAGE_FILE)
    write_json(out / "ratio.json", ratio | {"zeros": finetuned["zeros"]})
    rounds = read_jsonl(search / "rounds.jsonl")
    write_jsonl(out / "rounds.jsonl", rounds)
    plot_search(rounds, stage["log"], finetuned["evaluations"], ratio, out / "ratio.png")


def _score_systems(
    context: Context, out: Path, adapters: dict[str, Path], merged: Path, final: Path
) -> dict[str, Any]:
    config = context.config
    table = {
        "task": config.data.task,
        "language": config.data.target.language,
        "seed": config.seed,
        "unpruned": "merged" if config.merge.when == "after" else "merged-finetuned",
    }
    whole = read_json(final / STAGE_FILE).get("labelled")
    if whole is not None:
        table["labelled_rows"] = whole["rows"]
    sets = context.data.test_sets()
    if not sets:
        return table | {"systems": []}

    late = config.merge.when == "after"
    systems: list[System] = []
    if config.evaluate.baselines:
        tuned = _unpruned(context, adapters["source"], *TUNED)
        first = _merged_first(context, adapters) if late else merged
        plain = _unpruned(context, first, "merged-finetuned", "merged fine-tuned unpruned")
        whole = "fine-tuned source merged with target" if late else "merged, untrained"
        systems = [
            System("zero-shot", "zero-shot", None),
            System("source adapter", "source", adapters["source"]),
            System("source adapter, fine-tuned on target", TUNED[0], tuned),
            System("target adapter", "target", adapters["target"]),
            System(whole, "merged", merged),
            System("merged, fine-tuned unpruned", "merged-finetuned", plain),
        ]
    ratio = read_json(final / STAGE_FILE)["ratio"]
    after = ", not trained further" if late else ", fine-tuned"
    systems.append(System(f"final: merged, pruned at {ratio:.3f}{after}", "final", final))
    rows: list[dict[str, Any]] = []
    for system in systems:
        title = f"evaluate {system.name}"
        with timed_stage(context, out / "evaluations" / system.slug) as folder:
            evaluate_adapter(config, system.adapter, folder, context=context, title=title)
        stage = system.adapter / STAGE_FILE if system.adapter else None
        about = read_json(stage) if stage is not None and stage.exists() else {}
        rows.append(
            {"name": system.name, "slug": system.slug}
            | read_json(folder / "scores.json")
            | {"zeros": about.get("zeros", {}).get("exported"), "best": about.get("best")}
        )
    with context.clock.span("score"):
        compared = _against_final(context, out, systems)
    return table | {"systems": rows, "comparisons": compared}


def _against_final(context: Context, out: Path, systems: Sequence[System]) -> dict[str, Any]:
    """Pair the result with every other system: slug -> test set -> metric -> paired test."""
    folder, sets = out / "evaluations", context.data.test_sets()
    return {
        system.slug: compare_evaluations(
            context.config,
            folder / "final",
            folder / system.slug,
            sets,
            context.backbone.public_name,
        )
        for system in systems
        if system.slug != "final" and is_main()
    }


def _as_long_alone(config: RunConfig) -> RunConfig:
    """Return settings that give one fine-tuning run the epochs the result has had in all."""
    if config.finetune.mode == "restart":
        return config
    epochs = config.search.epochs + config.finetune.epochs
    longer = config.finetune.model_copy(update={"epochs": epochs})
    return config.model_copy(update={"finetune": longer})


def _provenance(context: Context, times: dict[str, Any]) -> dict[str, Any]:
    return provenance() | {
        "backbone": context.backbone.public_name,
        "base_fingerprint": context.backbone.fingerprint,
        "dtype": str(context.backbone.dtype),
        "device": str(context.backbone.device),
        # In bfloat16 products are summed in another order by another number of them.
        "threads": torch.get_num_threads(),
        "seed": context.config.seed,
        "config_hash": context.config.config_hash(),
        "time": times,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
