"""Recorded runs of real pairs: made, kept as small files, and put into tables.

    python -m benchmarks.recorded run en-es en-ar --minutes 120
    python -m benchmarks.recorded tables --out docs/results

`run` trains the two adapters of each pair once (`configs/results/PAIR-*.yaml`, the source adapter
for one epoch), then goes through `planned` with `grasp-lora compare` and writes the result of every
finished run, without places of this machine, to docs/results/records/PAIR.parquet (see
`benchmarks.records`). A run that is recorded there is not run again, on whatever machine it was.
`tables` writes comparison.md and pictures from what is recorded. With `--adapters-seed 1337` the
adapters are trained with another seed, on the same rows, and what begins from them is kept in the
collection other-adapters. `--collection` names the collection that other runs are kept in, and that
the other commands read; `relatives` plans the rows of the method's relatives, and `reference-task`
those that begin from a source adapter moved by a reference task (configs/reference-task.yaml).

`relatives` prints a table of each pair's relatives, each beside the method that it is a change of.
`against REFERENCE METHOD ...` prints paired differences of methods to any other, as the tables hold
them to the best baseline; `means METHOD ...` a score of each pair and method, over its seeds;
`empty` how often methods answer with nothing, and how a score goes with that;
`late` what late merges chose, seed by seed, and what a ratio on top of them changed; `speed` how
many times a grid's seconds a method needs, seed by seed, where one machine and one version of the
code ran all of both.
`keep QUEUE TABLE` copies the finished runs of a comparison's folder; `restore TABLE QUEUE` puts
their `result.json` back below it.
"""

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import correlation, fmean
from types import MappingProxyType
from typing import Any, get_args

from benchmarks import common, records
from grasp_lora.base.files import jsonable, machine_names, read_json, write_json, write_text
from grasp_lora.config.run_config import RunConfig, load_config
from grasp_lora.config.sections import Role
from grasp_lora.core.evidence.groups import standard_error
from grasp_lora.plans.compare import RESULT_FILE, compare_methods, paired_with, summary
from grasp_lora.plans.launch import Pool
from grasp_lora.plans.methods import METHODS, Choice, job_name, method_of
from grasp_lora.plans.recipes import with_split_seed
from grasp_lora.plans.results import MethodOutcome, chosen
from grasp_lora.plans.single import merge_adapters, train_adapter
from grasp_lora.report.comparison import comparison_markdown
from grasp_lora.report.pictures import plot_comparison

CONFIGS = common.ROOT / "configs" / "results"
REFERENCE = common.ROOT / "configs" / "reference-task.yaml"
REFERENCE_FILES = "../shared/data/summarization/{}.jsonl"
"""The reference task in a language."""
OTHER_ADAPTERS = "other-adapters"
"""The collection of what begins from adapters of another seed."""
RELATIVES = "relatives"
"""The collection of the method's relatives, beside what they are to be held against."""
SIZE_MB = 0.25
"""What the row in fewer bytes is fitted into, in megabytes."""
REFERENCE_TASK = "reference-task"
"""The collection of what begins from a source adapter that a reference task has moved."""
TABLES_BELOW = "<!-- below: python -m benchmarks.recorded tables -->"
SEEDS = (42, 1337, 9001)
UNPRUNED = "average-finetuned"
SOURCE_EPOCHS = 1
"""The source adapter sees its rows once, whatever `train.source.epochs` says."""

_COARSE = ("grid-0.2", "grid-0.4", "grid-0.6", "grid-0.8")
_FINE = ("grid-0.1", "grid-0.3", "grid-0.5", "grid-0.7")
_MAIN = (UNPRUNED, "grasp-restart", "source-finetuned")
_METHOD = ("grasp-continue", "late-merge", "grasp-late")
_LABELLED = tuple(name for name in METHODS if name.endswith("-labelled"))
_BESIDE_OF: Mapping[str, str | None] = MappingProxyType(
    {
        UNPRUNED: None,
        "grid-0.4": UNPRUNED,
        **dict.fromkeys(
            ("magnitude-0.4", "obs-0.4", "taylor-0.4", "taylor-smoothed-0.4"), "grid-0.4"
        ),
        "grid-0.5": UNPRUNED,
        **dict.fromkeys(("2-of-4", "4-of-8"), "grid-0.5"),
        **dict.fromkeys(("ranks-0.4", "ranks-taylor-0.4"), "grid-0.4"),
        **dict.fromkeys(("layer-swap-finetuned", "ties-delta-finetuned", "layer-swap"), UNPRUNED),
        f"{UNPRUNED}-small": UNPRUNED,
        "grasp-restart": UNPRUNED,
        **dict.fromkeys(
            ("grasp-policy", "grasp-obs", "grasp-taylor", "grasp-taylor-smoothed", "grasp-2-of-4"),
            "grasp-restart",
        ),
        "source": None,
        "source-finetuned": None,
        f"{REFERENCE_TASK}, source": "source",
        f"{REFERENCE_TASK}, source-finetuned": "source-finetuned",
    }
)
"""Relative -> the method that differs from it in that one thing, which it is held against.

Those whose names have a comma are methods of another collection.
"""
_RIVALS = ("shrunk-0.75", "shrunk-0.5", "weights-75-25", "weights-25-75", "weight-decay")


SCORE: Mapping[str, str] = {"qa": "token_f1", "summarization": "rougeL"}
"""Task -> the score beside the loss in the tables of relatives."""


def planned(collection: str = records.RUNS) -> list[tuple[str, int]]:
    """Return (method, seed) in the order of what is most wanted.

    First the curve after training and the method beside it, seed by seed, then what fills the
    comparison. What is only chosen among other runs is not run: see `outcomes_in`.

    Args:
        collection: `RELATIVES` and `REFERENCE_TASK` have plans of their own: their rows with one
            seed, then with the others.
    """
    if collection == RELATIVES:
        return [(name, seed) for seed in SEEDS for name in _BESIDE_OF if name in METHODS]
    if collection == REFERENCE_TASK:
        return [(name, seed) for seed in SEEDS for name in ("source", "source-finetuned")]
    order: list[tuple[str, int]] = []
    for seed in SEEDS:
        order += [(name, seed) for name in (UNPRUNED, *_COARSE, *_MAIN[1:], *_METHOD)]
        if seed == SEEDS[0]:
            fixed = (name for name, one in METHODS.items() if one.seeds == "none")
            order += [(name, seed) for name in (*fixed, *_RIVALS, *_FINE, "learned-weights")]
    order += [(name, seed) for seed in SEEDS for name in _LABELLED]
    order += [(name, seed) for seed in SEEDS[1:] for name in _FINE]
    ran = {name: one for name, one in METHODS.items() if not isinstance(one.build, Choice)}
    order += [(name, SEEDS[0]) for name in ran]
    order += [(name, seed) for seed in SEEDS for name, one in ran.items() if one.seeds == "all"]
    return list(dict.fromkeys(order))


def config_of(pair: str) -> RunConfig:
    """Return the committed settings of a pair.

    Raises:
        ValueError: there is no such pair, or more than one file for it.
    """
    files = sorted(CONFIGS.glob(f"{pair}-*.yaml"))
    if len(files) != 1:
        raise ValueError(f"{len(files)} files are named {CONFIGS.name}/{pair}-*.yaml, wanted one")
    return load_config(files[0])


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").exists()


def with_adapters(config: RunConfig, work: Path, pair: str) -> RunConfig:
    """Return settings with two trained adapters; pairs with the same source rows share theirs."""
    settings = config.with_training("source", epochs=SOURCE_EPOCHS)
    folders: dict[str, Path] = {}
    for role in get_args(Role):
        rows, training = getattr(settings.data, role), settings.training(role)
        # Without defaults, a setting that comes new changes no name.
        parts = (settings.model, settings.lora, training, rows)
        made_of = [one.model_dump(mode="json", exclude_defaults=True) for one in parts]
        whole = f"{made_of} {settings.data.max_length} {settings.seed}"
        digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
        language = "" if role == "source" else f"-{pair}"
        folders[role] = work / f"{role}{language}-{Path(config.model.name).name}-{digest}"
        if not _holds_adapter(folders[role]):
            train_adapter(settings, role, folders[role])
    return config.model_copy(update={"adapters": config.adapters.model_copy(update=folders)})


def with_reference_task(config: RunConfig, work: Path, pair: str) -> RunConfig:
    """Return settings whose source adapter a reference task has moved to the target language.

    It is the source adapter, plus an adapter of the reference task in the target language, minus
    one of the same task in the source language (AdaMergeX), on the exact deltas.

    Args:
        config: settings with two trained adapters.
        work: receives the adapters.
        pair: names the result.
    """
    name, folders, source = Path(config.model.name).name, list[Path](), config.adapters.source
    for language in (config.data.target.language, config.data.source.language):
        changes = [f"model={config.model.name}", f"adapters.source={source}"]
        changes.append(f"data.target.language={language}")
        changes.append(f"data.target.files={REFERENCE_FILES.format(language)}")
        folders.append(work / f"reference-{language}-{name}")
        if not _holds_adapter(folders[-1]):
            train_adapter(load_config(REFERENCE, changes), "target", folders[-1])
    moved = work / f"source-{pair}-{name}-moved"
    if not _holds_adapter(moved):
        merge_adapters(config, [source, *folders], moved, weights=(1.0, 1.0, -1.0))
    given = config.adapters.model_copy(update={"source": moved})
    return config.model_copy(update={"adapters": given})


def run(pair: str, options: argparse.Namespace, until: float) -> None:
    """Do what is planned and not recorded, until a time of `time.monotonic`."""
    config, queue = config_of(pair), options.work / pair / "compare"
    table, collection = options.records / f"{pair}.parquet", options.collection
    if options.adapters_seed is not None:
        config = with_split_seed(config).model_copy(update={"seed": options.adapters_seed})
        queue = queue.with_name(f"compare-{options.adapters_seed}")
        collection = OTHER_ADAPTERS
    elif collection != records.RUNS:
        queue = queue.with_name(f"compare-{collection}")
    config = with_adapters(config, options.work, pair)
    if collection == REFERENCE_TASK:
        config = with_reference_task(config, options.work, pair)
    if collection == RELATIVES:
        config = config.model_copy(update={"budget_mb": SIZE_MB})
    while time.monotonic() <= until:
        known = records.jobs(table, collection)
        missing = [
            (method, seed)
            for method, seed in planned(options.collection)
            if not options.only or method in options.only
            if seed in options.seeds
            if job_name(method, seed) not in known
        ]
        if not missing:
            return
        seed = missing[0][1]
        now = [method for method, of in missing[: options.jobs] if of == seed]
        found = compare_methods(config, queue, now, (seed,), Pool(options.jobs, options.threads))
        keep(queue, table, collection)
        keep_refused(found, seed, table, collection)
        if found["failed"]:
            raise SystemExit(f"{pair}: {found['failed']}")


_BESIDE = ("key", "seconds", "peak_memory_bytes", "machine")
"""What a result's file holds beside the result; the first two in those of earlier versions."""


def keep_refused(found: Mapping[str, Any], seed: int, table: Path, collection: str) -> None:
    """Add the methods that a comparison with one seed names as not applicable to a table."""
    refused = {
        job_name(name, seed): [{"not_applicable": why}]
        for name, why in found["not_applicable"].items()
    }
    records.append(table, refused, collection, skip_known=True)


def keep(
    queue: Path,
    table: Path,
    collection: str = records.RUNS,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Add every finished run of a comparison to a table; return how many are new.

    The perplexity of a test row is left out: it is the exponent of the row's loss.

    Args:
        queue: the comparison's folder.
        table: receives the runs.
        collection: that they belong to.
        more: facts that every new record has too.
    """
    known = records.jobs(table, collection)
    new: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(queue.glob(f"*/{RESULT_FILE}")):
        found, job = read_json(file), file.parent.name
        result = dict(found["result"])
        if "scores" not in result or "chosen" in result or job in known:
            continue
        result.pop("adapter", None)
        for one in result.get("rows", {}).values():
            one["values"].pop("perplexity", None)
        record = {"job": job} | result
        record |= {name: found[name] for name in _BESIDE if name in found}
        # Those of the machine that it ran on, which need not be this one.
        made = found["provenance"]
        versions = made["packages"] | {"python": made["python"]}
        new[job] = [jsonable(record | {"versions": versions} | dict(more))]
    return records.append(table, new, collection, skip_known=True)


def restore(table: Path, queue: Path, collection: str = records.RUNS) -> int:
    """Write the results of `keep` back, where a comparison has none; return how many."""
    count = 0
    for record in runs_in(table, collection):
        place = queue / record["job"] / RESULT_FILE
        if place.exists():
            continue
        whole = {name: record[name] for name in _BESIDE if name in record}
        versions = dict(record["versions"])
        whole["provenance"] = {"python": versions.pop("python"), "packages": versions}
        about = {"job", "versions", *whole}
        result = {name: value for name, value in record.items() if name not in about}
        write_json(place, whole | {"result": result | {"adapter": None}})
        count += 1
    return count


def runs_in(table: Path, collection: str = records.RUNS) -> list[dict[str, Any]]:
    """Return the recorded runs of a pair, in the order of their names."""
    found = records.read_runs(table, collection).values()
    return [record for record in found if "not_applicable" not in record]


def final_runs(table: Path, collection: str = records.RUNS) -> list[dict[str, Any]]:
    """Return the fine-tuning runs of a pair, as its tables need them.

    Each has `name` (ratio-R for a fixed ratio, the method's name for the rest), `fixed` (whether it
    is a point of the plain grid), `seed`, `ratio`, `dev` (step, loss), `best_step`, `zeros`,
    `losses` (of micro-dev and dev rows), `verdict`, and `test`, metric -> value of each test row.
    """
    found: list[dict[str, Any]] = []
    for record in runs_in(table, collection):
        method, _, seed = record["job"].rpartition("-s")
        if not record["dev"] or not method:
            continue
        fixed = method == UNPRUNED or method.startswith("grid-0")
        found.append(
            {
                "name": f"ratio-{record['ratio']}" if fixed else method,
                "fixed": fixed,
                "seed": int(seed),
                "ratio": record["ratio"],
                "dev": record["dev"],
                "best_step": record["best"]["step"],
                "zeros": record["zeros"],
                "losses": record.get("losses"),
                "verdict": record.get("verdict"),
                "test": record["rows"]["test"]["values"],
            }
        )
    return found


def outcomes_in(table: Path, collection: str = records.RUNS) -> dict[str, MethodOutcome]:
    """Return the recorded runs of a pair as outcomes of a comparison, in the order of its tables.

    A method that chooses among other runs has an outcome where all of them are recorded.
    """
    found: dict[str, MethodOutcome] = {}
    for job, record in records.read_runs(table, collection).items():
        if "empty" not in record and config_of(table.stem).data.task == "summarization":
            record["empty"] = _without_a_letter(record)
        machines = (record["machine"],) if record.get("machine") else ()
        found[job] = MethodOutcome(record, record.get("peak_memory_bytes"), machines=machines)
    for name, method in METHODS.items():
        for seed in SEEDS if isinstance(method.build, Choice) else ():
            choice = method.build
            assert isinstance(choice, Choice), "it was asked above"
            nearest = choice.nearest and job_name(choice.nearest, seed)
            among = tuple(job_name(other, seed) for other in choice.among)
            if all(job in found for job in (*among, *([nearest] if nearest else []))):
                built = choice.of(job_name(name, seed), among, nearest)
                found[built.job] = chosen(built, found)
    return _with_all_that_is_paid(
        {job: one for name in METHODS for job, one in found.items() if method_of(job) == name}
    )


_PAID_TOO: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("late-merge", "grasp-late"), ("source-finetuned",)),
    "source-finetuned-labelled": ("source-finetuned",),
    "source-finetuned-3x-labelled": ("source-finetuned-3x",),
    "average-finetuned-labelled": ("average-finetuned",),
    "late-merge-labelled": ("source-finetuned", "source-finetuned-labelled"),
}
"""Method -> others that its price holds and its own record does not."""


def _with_all_that_is_paid(found: dict[str, MethodOutcome]) -> dict[str, MethodOutcome]:
    """Return outcomes that name the machines, and the peak, of all that their price holds."""
    whole = dict(found)
    for job, outcome in found.items():
        name = method_of(job)
        others = [found.get(f"{one}{job.removeprefix(name)}") for one in _PAID_TOO.get(name, ())]
        parts = [outcome, *(one for one in others if one is not None)]
        peaks = [one.peak_memory_bytes for one in parts if one.peak_memory_bytes is not None]
        machines = tuple(machine for one in parts for machine in one.machines)
        whole[job] = replace(outcome, peak_memory_bytes=max(peaks, default=None), machines=machines)
    return whole


def _without_a_letter(record: Mapping[str, Any]) -> dict[str, int]:
    """Return test set -> headlines that share no letter with their reference: empty ones.

    For records from before empty answers were counted.
    """
    sets = record.get("rows", {})
    return {name: sum(value == 0 for value in one["values"]["chrf"]) for name, one in sets.items()}


def compared(table: Path, collection: str = records.RUNS) -> dict[str, Any]:
    """Return the comparison of a pair's recorded runs: a row for every method and seed."""
    return summary(config_of(table.stem), outcomes_in(table, collection))


def tables(folder: Path, collection: str, out: Path) -> None:
    """Write pictures, and the tables of comparison.md, of all recorded pairs.

    What stands in comparison.md above `TABLES_BELOW` is kept.
    """
    documents: list[str] = []
    for table in records.tables_with(folder, collection):
        pair, found = table.stem, compared(table, collection)
        plot_comparison(found, out / "comparison" / pair)
        text = comparison_markdown(found).replace("\n## ", "\n### ")
        text = text.replace(f"# Comparison {found['pair']}", f"## {pair}", 1)
        for name in ("pareto.png", "ratios.png", "cost.png"):
            text = text.replace(f"({name})", f"(comparison/{pair}/{name})")
        documents.append(text)
    file = out / "comparison.md"
    above = file.read_text().split(TABLES_BELOW)[0] if file.exists() else "# The comparison\n\n"
    write_text(file, above + TABLES_BELOW + "\n\n" + "\n".join(documents))


def against(
    folder: Path,
    collection: str,
    reference: str,
    methods: Sequence[str],
    theirs: str | None = None,
) -> list[str]:
    """Return lines of paired differences on the test rows, pair by pair, with 95 % intervals.

    Args:
        folder: holds a table of recorded runs for every pair.
        collection: of those runs.
        reference: what all are held against.
        methods: that are held against it.
        theirs: the collection of the methods' runs, if it is another than the reference's.
    """
    lines: list[str] = []
    for table in records.tables_with(folder, collection):
        results: dict[str, dict[int, Any]] = {}
        for place, wanted in ((collection, (reference,)), (theirs or collection, methods)):
            for job, outcome in outcomes_in(table, place).items():
                method = method_of(job)
                if method in wanted and outcome.result and "rows" in outcome.result:
                    name = method if place == collection else f"{method} in {place}"
                    results.setdefault(name, {})[_seed_of(job)] = outcome.result
        if reference not in results:
            continue
        found = paired_with(config_of(table.stem), results, reference)
        for method, sets in found.items():
            shown = (
                f"{metric} {one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
                for metric, one in sets.get("test", {}).items()
                if one["low"] is not None
            )
            lines.append(f"{table.stem}: {method} against {reference}: {'; '.join(shown)}")
    return lines


def _seed_of(job: str) -> int:
    return SEEDS[0] if job == method_of(job) else int(job.rpartition("-s")[2])


def relatives(folder: Path, collection: str) -> list[str]:
    """Return tables, pair by pair, of the relatives beside what they are a change of.

    A score is the mean over seeds; a difference is that of the same test rows and seeds, with its
    95 % interval, and negative where the relative's loss is lower.
    """
    lines: list[str] = []
    for table in records.tables_with(folder, collection):
        config = config_of(table.stem)
        score = SCORE[config.data.task]
        found: dict[str, dict[int, Any]] = {}
        for place, about in ((collection, ""), (REFERENCE_TASK, f"{REFERENCE_TASK}, ")):
            for job, outcome in outcomes_in(table, place).items():
                if outcome.result and "rows" in outcome.result:
                    runs_of = found.setdefault(about + method_of(job), {})
                    runs_of[_seed_of(job)] = outcome.result
        titles = ["method", "seeds", "pruned", "test loss", "beside", "difference in loss"]
        titles += [score, f"difference in {score}", "seconds"]
        lines += [f"### {table.stem}", "", f"| {' | '.join(titles)} |"]
        lines.append(f"|---|---:|---:|---:|---|{'---:|' * (len(titles) - 5)}")
        for name, other in _BESIDE_OF.items():
            if name not in found:
                continue
            runs = list(found[name].values())
            cells = [f"`{name}`", str(len(runs)), f"{fmean(one['zeros'] or 0 for one in runs):.2f}"]
            loss, mean = (
                fmean(one["scores"]["test"][what] for one in runs) for what in ("loss", score)
            )
            gaps = ["–", "–"]
            shared = found[name].keys() & found.get(other or "", {}).keys()
            if other and shared:
                both = {one: {s: found[one][s] for s in sorted(shared)} for one in (name, other)}
                tests = paired_with(config, both, other)[name]["test"]
                gaps = [_gap(tests["loss"], 3), _gap(tests[score], 1)]
            cells += [f"{loss:.3f}", f"`{other}`" if other else "–", gaps[0], f"{mean:.1f}"]
            cells += [gaps[1], f"{fmean(one['price']['seconds'] for one in runs):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _gap(test: Mapping[str, Any], digits: int) -> str:
    shown = f"{test['difference']:+.{digits}f}"
    if test["low"] is None:
        return shown
    return f"{shown} [{test['low']:+.{digits}f}, {test['high']:+.{digits}f}]"


def means(
    folder: Path, collection: str, metric: str, methods: Sequence[str], seeds: Sequence[int] = SEEDS
) -> list[str]:
    """Return a table, pair by pair, of a test score's mean over seeds; how many in brackets."""
    wanted = {job_name(name, seed) for name in methods for seed in seeds}
    lines = [f"| pair | {' | '.join(methods)} |", f"|---|{'---:|' * len(methods)}"]
    for table in records.tables_with(folder, collection):
        outcomes = outcomes_in(table, collection)
        cells: list[str] = []
        for name in methods:
            found = [
                outcome.result["scores"]["test"].get(metric)
                for job, outcome in outcomes.items()
                if method_of(job) == name and job in wanted
                if outcome.result and "scores" in outcome.result
            ]
            values = [value for value in found if value is not None]
            digits = 3 if metric == "loss" else 1
            mean = f"{fmean(values):.{digits}f} ({len(values)})" if values else "–"
            cells.append(mean)
        if any(cell != "–" for cell in cells):
            lines.append(f"| {table.stem} | {' | '.join(cells)} |")
    return lines


def late(folder: Path, collection: str) -> list[str]:
    """Return a table of late merges: the target adapter's share, and what a ratio on top changed.

    Differences are those of the test rows, with the standard error of their mean.
    """
    titles = ["pair", "seed", "share of the target adapter", "test loss", "ratio on top", "verdict"]
    titles += ["difference in loss", "in exact match"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for table in records.tables_with(folder, collection):
        found = {record["job"]: record for record in runs_in(table, collection)}
        for seed in SEEDS:
            plain, pruned = (found.get(f"{name}-s{seed}") for name in ("late-merge", "grasp-late"))
            if plain is None:
                continue
            cells = [table.stem, str(seed), f"{plain['weights'][1]:g}"]
            cells.append(f"{plain['scores']['test']['loss']:.3f}")
            cells += ["–"] * 4 if pruned is None else _on_top(plain, pruned)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _on_top(plain: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[str]:
    ours, theirs = (one["rows"]["test"]["values"] for one in (pruned, plain))
    gaps = [a - b for a, b in zip(ours["loss"], theirs["loss"], strict=True)]
    exact = "–"
    if "exact_match" in ours:
        exact = f"{fmean(ours['exact_match']) - fmean(theirs['exact_match']):+.0f}"
    gap = f"{fmean(gaps):+.4f} ± {standard_error(gaps):.4f}"
    return [f"{pruned['ratio']:.2f}", pruned["verdict"], gap, exact]


def _points(grid: str) -> tuple[str, ...]:
    choice = METHODS[grid].build
    assert isinstance(choice, Choice), f"{grid} chooses among others"
    return choice.among


def speed(folder: Path, collection: str, grid: str, methods: Sequence[str]) -> list[str]:
    """Return a table of a grid's seconds and tokens over a method's, of one seed and machine.

    Runs that another machine made, in part, or other versions of the code, are left out; so is a
    grid that lacks a point.
    """
    titles = ["pair", "seed", "machine", "method", "seconds", f"{grid}, seconds"]
    titles += ["times as fast", "tokens saved, times"]
    lines = [f"| {' | '.join(titles)} |", "|---|---:|---|---|---:|---:|---:|---:|"]
    for table in records.tables_with(folder, collection):
        found = {record["job"]: record for record in runs_in(table, collection)}
        for seed in SEEDS:
            points = [found.get(job_name(need, seed)) for need in _points(grid)]
            for method in methods:
                ours = found.get(job_name(method, seed))
                if ours is None or None in points:
                    continue
                whole = [one for one in points if one is not None]
                other = any(one["versions"] != ours["versions"] for one in whole)
                if other or len(machine_names([*whole, ours])) > 1:
                    continue
                sums = {w: sum(one["price"][w] for one in whole) for w in ("seconds", "tokens")}
                seconds, tokens = (ours["price"][what] for what in sums)
                cells = [table.stem, str(seed), *machine_names([ours]), method]
                cells += [f"{seconds:.0f}", f"{sums['seconds']:.0f}"]
                cells += [f"{sums['seconds'] / seconds:.1f}", f"{sums['tokens'] / tokens:.1f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def answering(folder: Path, collection: str, metric: str, methods: Sequence[str]) -> list[str]:
    """Return a table, pair by pair, of empty answers of the test set, and of a score without them.

    A line behind the table holds correlations over all runs of the pair: of the score with the
    share of empty answers, and with the loss.
    """
    titles = ["pair", "method", "runs", "empty, in per cent", metric, "of the others alone", "loss"]
    lines = [f"| {' | '.join(titles)} |", f"|---|---|{'---:|' * (len(titles) - 2)}"]
    behind: list[str] = []
    for table in records.tables_with(folder, collection):
        seen: dict[str, list[tuple[float, float, float]]] = {}
        for job, outcome in outcomes_in(table, collection).items():
            result = outcome.result or {}
            if "chosen" not in result and "test" in (result.get("empty") or {}):
                scores, count = result["scores"]["test"], len(result["rows"]["test"]["ids"])
                row = (result["empty"]["test"] / count, scores[metric], scores["loss"])
                seen.setdefault(method_of(job), []).append(row)
        for name in (one for one in seen if not methods or one in methods):
            share, score, loss = (fmean(column) for column in zip(*seen[name], strict=True))
            others = [one[1] / (1 - one[0]) for one in seen[name] if one[0] < 1]
            cells = [f"{100 * share:.0f}", f"{score:.1f}", f"{fmean(others):.1f}", f"{loss:.3f}"]
            lines.append(f"| {table.stem} | {name} | {len(seen[name])} | {' | '.join(cells)} |")
        columns = list(zip(*(one for ones in seen.values() for one in ones), strict=True))
        if columns and all(len(set(column)) > 1 for column in columns):
            empty, score, loss = columns
            pairs = (f"{correlation(score, other):+.2f}" for other in (empty, loss))
            behind.append("{}: {} runs, {} with empty {}, with loss {}".format(
                table.stem, len(empty), metric, *pairs))  # fmt: skip
    return [*lines, *behind]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="what", required=True)
    running = commands.add_parser("run", help="make what is planned and not recorded")
    running.add_argument("pairs", nargs="+")
    running.add_argument("--work", type=Path, default=Path("runs/recorded"), help="may be large")
    running.add_argument("--minutes", type=float, default=1e9, help="start nothing later")
    running.add_argument("--only", nargs="+", default=[], choices=list(METHODS))
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    running.add_argument("--adapters-seed", type=int, help="of both adapters; default: the file's")
    running.add_argument("--jobs", type=int, default=1, help="processes at once")
    running.add_argument("--threads", type=int, default=1, help="of every run")
    running.add_argument("--records", type=Path, default=records.FOLDER, help="of the tables")
    running.add_argument("--collection", default=records.RUNS, help="that the runs belong to")
    reading = {
        "tables": "write the tables of what is recorded",
        "against": "print paired differences to a method",
        "means": "print a score's means over seeds",
        "relatives": "print tables of the method's relatives",
        "late": "print what late merges chose",
        "speed": "print a grid's seconds over a method's",
        "empty": "print how often methods answer with nothing",
    }
    readers = {name: commands.add_parser(name, help=help) for name, help in reading.items()}
    for reader in readers.values():
        reader.add_argument("--records", type=Path, default=records.FOLDER, help="of the tables")
        reader.add_argument("--collection", default=records.RUNS, help="what is read of them")
    readers["relatives"].set_defaults(collection=RELATIVES)
    readers["tables"].add_argument("--out", type=Path, required=True)
    readers["against"].add_argument("reference", choices=list(METHODS))
    for name in ("against", "means", "speed"):
        readers[name].add_argument("methods", nargs="+", choices=list(METHODS))
    readers["against"].add_argument("--methods-in", help="the methods' collection, if another")
    readers["means"].add_argument("--metric", default="loss")
    readers["means"].add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    choices = {name: one.build for name, one in METHODS.items() if isinstance(one.build, Choice)}
    grids = [name for name, choice in choices.items() if choice.judged]
    readers["speed"].add_argument("--grid", default="grid", choices=grids)
    readers["empty"].add_argument("methods", nargs="*", help="all without any")
    readers["empty"].add_argument("--metric", default="rougeL")
    for name in ("keep", "restore"):
        copying = commands.add_parser(name)
        copying.add_argument("source", type=Path)
        copying.add_argument("out", type=Path)
        copying.add_argument("--collection", default=records.RUNS, help="that the runs belong to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is asked."""
    options = parsed(argv)
    if options.what == "run":
        common.ready(options)
        until = time.monotonic() + 60 * options.minutes
        for pair in options.pairs:
            run(pair, options, until)
    elif options.what in ("keep", "restore"):
        copy = {"keep": keep, "restore": restore}[options.what]
        count = copy(options.source, options.out, options.collection)
        print(f"{options.out}: {count} runs written")
    elif options.what == "tables":
        tables(options.records, options.collection, options.out)
    else:
        print("\n".join(printed(options)))


def printed(options: argparse.Namespace) -> list[str]:
    """Return the lines that are asked for."""
    places = (options.records, options.collection)
    match options.what:
        case "against":
            return against(*places, options.reference, options.methods, options.methods_in)
        case "means":
            return means(*places, options.metric, options.methods, options.seeds)
        case "relatives":
            return relatives(*places)
        case "speed":
            return speed(*places, options.grid, options.methods)
        case "empty":
            return answering(*places, options.metric, options.methods)
        case _:
            return late(*places)


if __name__ == "__main__":
    main()
