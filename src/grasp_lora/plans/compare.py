"""The comparison: every baseline beside the method, all of them stages of one plan."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import check_openable
from grasp_lora.base.files import (
    jsonable,
    machine_name,
    provenance,
    read_json,
    write_json,
    write_text,
)
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.core.evidence.findings import MANY_EMPTY
from grasp_lora.metrics import compare_means
from grasp_lora.plans.executor import (
    REFUSED_FILE,
    Outcome,
    refused_outcome,
    state_of,
    without_result,
)
from grasp_lora.plans.launch import HERE, Pool, work_off_many
from grasp_lora.plans.methods import (
    METHODS,
    Built,
    build_methods,
    method_of,
    with_split_seed,
)
from grasp_lora.plans.plan import Plan, PlanBuilder, part_of
from grasp_lora.plans.results import MethodOutcome, mean_loss, method_outcomes
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.report.comparison import comparison_csv, comparison_markdown
from grasp_lora.report.pictures import plot_comparison
from grasp_lora.scoring.sets import metric_options, missing_metrics
from grasp_lora.stages.folder import work_folder
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data

SEEDS = (42, 1337, 9001)
RESULT_FILE = "result.json"
COMPARISON_FILE = "comparison.json"
NOT_PAIRED = {"bleu", "perplexity"}
"""Scores whose rows' own values mean little."""


def compare_methods(
    config: RunConfig,
    out: Path,
    only: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    pool: Pool = HERE,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every method that has no result yet, and write tables and pictures.

    Args:
        config: the run's settings. Its own seed divides the rows and trains the adapters.
        out: receives `comparison.md`, `.csv`, `.json`, pictures, and a folder for each run.
        only: names of methods to run; none is all. What they need is run as well. The tables have
            all methods with a result in the folder.
        seeds: of searches and fine-tuning; methods that are run once take the first.
        pool: processes to do stages in; by default this one does them all.
        overwrite: replace results that other inputs made.
        quiet: print nothing.

    Returns:
        What `comparison.json` holds.

    Raises:
        ValueError: a method has no such name, or the settings or data cannot work.
    """
    data = checked_data(config, "method", only, METHODS, seeds, quiet)
    if not data.test_sets():
        raise ValueError(
            "there are no test rows to compare on: give data.target.rows.test, "
            "data.target.files.test or data.tests"
        )
    plan, built = plan_of(config, tuple(seeds))
    wanted = [job for job in built if not only or method_of(job) in only]
    asked = part_of(plan, tuple(stages_of(built, wanted)))
    session = Session(with_split_seed(config), data, quiet=quiet)
    sizes = sizes_of(config, data)
    stages = work_off_many(asked, out, session, sizes, pool, overwrite)
    asked_for = {method_of(job) for job in wanted} | _refused_before(out)
    outcomes = method_outcomes(_of_interest(built, asked_for, out), plan, out, stages, sizes)
    # What an earlier start with other names or seeds left there belongs in the tables as well.
    for seed in _seeds_in(out) or list(seeds):
        other_plan, others = plan_of(config, (seed,))
        there = finished_stages(other_plan, out, session)
        others = _of_interest(others, asked_for, out)
        outcomes = method_outcomes(others, other_plan, out, there, sizes) | outcomes
    outcomes = _in_order(outcomes)
    _keep_results(outcomes, out)
    found = summary(config, outcomes)
    write_json(out / COMPARISON_FILE, found)
    write_text(out / "comparison.csv", comparison_csv(found))
    plot_comparison(found, out)
    write_text(out / "comparison.md", comparison_markdown(found))
    return found


def checked_data(
    config: RunConfig,
    kind: str,
    only: Sequence[str],
    known: Collection[str],
    seeds: Sequence[int],
    quiet: bool,
) -> RunData:
    """Return the examples of many runs, once all that can be checked before any work is right.

    Raises:
        ValueError: a name is unknown, seeds are none or twice the same, or the settings, the data
            or a given adapter cannot work.
    """
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no {kind} {unknown[0]!r}; choose from {', '.join(known)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    faults = config.faults() + config.missing_files() + missing_metrics(config)
    if faults:
        raise ConfigError(faults)
    for _, folder in config.adapters:
        if folder is not None:
            read_adapter(folder)
            check_openable(folder)
    return load_run_data(config, Reporter(quiet).say)


def plan_of(config: RunConfig, seeds: tuple[int, ...]) -> tuple[Plan, dict[str, Built]]:
    """Return the plan of all methods, whichever are asked for: so names never depend on that."""
    builder = PlanBuilder()
    built = build_methods(builder, config, seeds)
    return builder.build(), built


def _refused_before(out: Path) -> set[str]:
    """Return the methods that an earlier start in the folder found not to be applicable."""
    file = out / COMPARISON_FILE
    return set(read_json(file)["not_applicable"]) if file.exists() else set()


def _of_interest(
    built: Mapping[str, Built], asked_for: Collection[str], out: Path
) -> dict[str, Built]:
    """Return the methods but for those that nobody asked for, now or in an earlier start, and that
    would be in the tables for nothing: they choose among others, or these settings rule them out.
    """

    def wanted(job: str) -> bool:
        if built[job].refusal is None and not built[job].others:
            return True
        return method_of(job) in asked_for or (out / job / RESULT_FILE).exists()

    return {job: one for job, one in built.items() if wanted(job)}


def stages_of(built: Mapping[str, Built], jobs: Sequence[str]) -> list[str]:
    """Return the stages that methods are read from, those they choose among included."""
    found: list[str] = []
    for job in jobs:
        one = built[job]
        nearest = one.chooses.get("nearest")
        others = [*one.others, *([nearest] if nearest else [])]
        found += stages_of(built, others)
        found += [one.scores] if one.scores else []
    return list(dict.fromkeys(found))


def finished_stages(plan: Plan, place: Path, session: Session) -> dict[str, Outcome]:
    """Return the stages that have a result in a folder, made from the inputs of the plan, and those
    that were found not to be applicable."""
    found: dict[str, Outcome] = {}
    for name, stage in plan.stages.items():
        if not all(need in found for need in stage.needs()):
            continue
        lost = without_result(stage, place, found)
        if lost is not None:
            found[name] = lost
            continue
        try:
            state = state_of(stage, place, session).state
        except ValueError:
            continue
        refused = work_folder(place / name) / REFUSED_FILE
        if state == "done":
            found[name] = Outcome(place / name)
        elif state == "begun" and refused.exists():
            found[name] = refused_outcome(place / name, refused.read_text(encoding="utf-8"))
    return found


def _seeds_in(folder: Path) -> list[int]:
    """Return the seeds that a comparison's folder has runs of, in the order of the defaults."""
    found = {place.name.rpartition("-s")[2] for place in folder.glob("*-s*") if place.is_dir()}
    seeds = {int(seed) for seed in found if seed.isdecimal()}
    return [*(seed for seed in SEEDS if seed in seeds), *sorted(seeds - {*SEEDS})]


def _in_order(outcomes: Mapping[str, MethodOutcome]) -> dict[str, MethodOutcome]:
    """Return the outcomes in the order of the tables."""
    return {job: one for name in METHODS for job, one in outcomes.items() if method_of(job) == name}


def _keep_results(outcomes: Mapping[str, MethodOutcome], out: Path) -> None:
    """Write `<job>/result.json` for every method with a result, unless it is there already."""
    for job, one in outcomes.items():
        if one.result is None or "not_applicable" in one.result:
            continue
        whole = {"result": one.result, "peak_memory_bytes": one.peak_memory_bytes}
        whole["machine"] = one.machines[0] if one.machines else None
        file = out / job / RESULT_FILE
        known = read_json(file) if file.exists() else {}
        if jsonable(whole) != {name: known.get(name) for name in whole}:
            write_json(file, whole | {"provenance": provenance()})


def summary(config: RunConfig, outcomes: Mapping[str, MethodOutcome]) -> dict[str, Any]:
    """Return rows of all runs, the baseline that others are held against, and the paired tests.

    Args:
        config: names the pair and the task, and sets the intervals.
        outcomes: of the runs, in the order of the tables.
    """
    rows: list[dict[str, Any]] = []
    results: dict[str, dict[int, Mapping[str, Any]]] = {}
    not_applicable: dict[str, str] = {}
    for job, outcome in outcomes.items():
        result, name = outcome.result, method_of(job)
        if result is None:
            continue
        if "not_applicable" in result:
            not_applicable[name] = result["not_applicable"]
            continue
        rows.append(_row(config, job, outcome))
        results.setdefault(name, {})[rows[-1]["seed"]] = result
    reference = _best_baseline(rows)
    failed = {name: one.error for name, one in outcomes.items() if one.result is None}
    return {
        "pair": f"{config.data.source.language if config.data.source else '?'}-"
        f"{config.data.target.language}",
        "task": config.data.task,
        "rows": rows,
        "methods": {name: METHODS[name].about for name in dict.fromkeys(r["method"] for r in rows)},
        "reference": reference,
        "paired": paired_with(config, results, reference) if reference else {},
        "often_empty": _often_empty(rows),
        "not_applicable": not_applicable,
        "failed": failed,
    }


def _still_falling(dev: Sequence[Sequence[float | None]]) -> bool:
    """Return whether the last of a fine-tuning's (step, dev loss) is lower than all before it."""
    losses = [loss for _, loss in dev]
    known = [loss for loss in losses[:-1] if loss is not None]
    return bool(known) and losses[-1] is not None and losses[-1] < min(known)


def _row(config: RunConfig, job: str, outcome: MethodOutcome) -> dict[str, Any]:
    result, name = outcome.result, method_of(job)
    assert result is not None, "a row is of a result"
    losses = result["losses"]
    judged = [x for split in losses.values() for x in split] if losses else []
    dev_loss = mean_loss(judged) if judged else result.get("cross_validated")
    machines = outcome.machines
    return {
        "method": name,
        "job": result.get("chosen", job),
        "left_out": result.get("left_out", []),
        "seed": config.seed if METHODS[name].seeds == "none" else int(job.rpartition("-s")[2]),
        "ratio": result["ratio"],
        "verdict": result.get("verdict"),
        "scores": result["scores"],
        "intervals": result["intervals"],
        "empty": _empty_shares(result),
        "dev_loss": dev_loss,
        "still_falling": _still_falling(result.get("dev") or []),
        **result["price"],
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "machine": machines[0] if machines else None,
        "machines": sorted({machine_name(one) for one in machines}),
        "dtype": result.get("dtype"),
        "adapter_bytes": result["bytes"],
        "zeros": result["zeros"],
    }


def _empty_shares(result: Mapping[str, Any]) -> dict[str, float]:
    """Return test set -> share of its rows that were answered with nothing, where it is known."""
    counts = result.get("empty") or {}
    return {test: count / len(result["rows"][test]["ids"]) for test, count in counts.items()}


def _often_empty(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return test set -> method -> mean share of empty answers, where that is much."""
    shares: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for test, share in row["empty"].items():
            shares.setdefault(test, {}).setdefault(row["method"], []).append(share)
    means = {t: {name: fmean(of) for name, of in one.items()} for t, one in shares.items()}
    return {
        t: {n: mean for n, mean in one.items() if mean >= MANY_EMPTY} for t, one in means.items()
    }


def _best_baseline(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the baseline with the lowest mean loss on labelled rows, none of them trained on."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        if METHODS[row["method"]].role == "baseline" and row["dev_loss"] is not None:
            losses.setdefault(row["method"], []).append(row["dev_loss"])
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return min(means, key=lambda name: means[name]) if means else None


def paired_with(
    config: RunConfig, results: Mapping[str, Mapping[int, Mapping[str, Any]]], reference: str
) -> dict[str, Any]:
    """Return method -> test set -> metric -> its paired test against the reference.

    Runs of the same seed are paired, or the one run of either side with every seed of the other;
    a context's rows of all seeds are drawn together. What is compared are means over rows, of
    scores that are not (chrF) too.

    Args:
        config: settings of the intervals.
        results: method -> seed -> result of its job.
        reference: one of the methods.
    """
    theirs = results[reference]
    found: dict[str, Any] = {}
    for method, ours in results.items():
        if method == reference:
            continue
        pairs = [
            (ours.get(seed) or _only(ours), theirs.get(seed) or _only(theirs))
            for seed in sorted({*ours, *theirs})
        ]
        whole = [(one["rows"], other["rows"]) for one, other in pairs if one and other]
        found[method] = {}
        for test in whole[0][0] if whole else ():
            options = metric_options(config, config.data.target.language)
            groups = [group for one, _ in whole for group in one[test]["groups"]]
            shared = set(whole[0][0][test]["values"]) & set(whole[0][1][test]["values"])
            found[method][test] = {
                metric: compare_means(
                    [value for one, _ in whole for value in one[test]["values"][metric]],
                    [value for _, other in whole for value in other[test]["values"][metric]],
                    groups,
                    options,
                )
                for metric in sorted(shared - NOT_PAIRED)
            }
    return found


def _only(runs: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next(iter(runs.values())) if len(runs) == 1 else None
