"""The comparison of the method with all baselines. Their stages form one plan."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import check_openable
from grasp_lora.base.choice import lowest
from grasp_lora.base.files import (
    damage,
    jsonable,
    machine_name,
    provenance,
    read_json,
    write_json,
    write_sealed,
    write_text,
)
from grasp_lora.base.words import shown, shown_path
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.core.evidence.findings import MANY_EMPTY
from grasp_lora.metrics import compare_means
from grasp_lora.models.devices import choose_device
from grasp_lora.plans.executor import (
    REFUSED_FILE,
    Outcome,
    refused_outcome,
    state_of,
    without_result,
)
from grasp_lora.plans.launch import HERE, Pool, plan_folder, work_off_many
from grasp_lora.plans.methods import METHODS, build_methods, method_of
from grasp_lora.plans.plan import Plan, PlanBuilder, part_of
from grasp_lora.plans.recipes import Built, with_split_seed
from grasp_lora.plans.results import MethodOutcome, mean_loss, method_outcomes
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.report.comparison import comparison_csv, comparison_markdown
from grasp_lora.report.pictures import plot_comparison
from grasp_lora.scoring.sets import metric_options, missing_metrics
from grasp_lora.stages.folder import work_folder
from grasp_lora.training.trainer import tracker_faults
from grasp_lora.workbench.beside import target_epoch
from grasp_lora.workbench.context import POOLS
from grasp_lora.workbench.merge_probes import check_pool, learns_weights
from grasp_lora.workbench.objective import objective_faults, say_code
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data

SEEDS = (42, 1337, 9001)
RESULT_FILE = "result.json"
COMPARISON_FILE = "comparison.json"
NOT_PAIRED = {"bleu", "perplexity"}
"""Metrics that are not tested in pairs: their values for single examples mean little."""


def compare_methods(
    config: RunConfig,
    out: Path,
    only: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    pool: Pool = HERE,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every method without a result, and write tables and pictures.

    Args:
        config: the run's settings. Its own seed divides the examples and trains the adapters.
        out: receives `comparison.md`, `.csv`, `.json`, pictures, and a folder for each run.
        only: names of the methods to run; empty runs all. Runs that they need are done as well. The
            tables have all methods with a result in the folder.
        seeds: seeds of searches and fine-tuning; methods that are run once use the first.
        pool: the processes that do the stages; by default this process does all of them.
        overwrite: replace results that were made from other inputs.
        quiet: print nothing.

    Returns:
        The content of `comparison.json`.

    Raises:
        ValueError: a name in `only` is unknown, or the settings or the examples cannot work; as
            `plan_folder`.
    """
    with plan_folder(out, pool, quiet):
        return _compared(config, out, only, tuple(seeds), (pool, overwrite, quiet))


def _compared(
    config: RunConfig,
    out: Path,
    only: Sequence[str],
    seeds: tuple[int, ...],
    how: tuple[Pool, bool, bool],
) -> dict[str, Any]:
    pool, overwrite, quiet = how
    data = checked_data(config, "method", only, METHODS, seeds, quiet)
    if not data.test_sets():
        raise ValueError(
            "there are no test rows to compare on: give data.target.rows.test, "
            "data.target.files.test or data.tests"
        )
    count = target_epoch(config, data)
    plan, built = plan_of(config, seeds, count)
    wanted = [job for job in built if not only or method_of(job) in only]
    asked = part_of(plan, tuple(stages_of(built, wanted)))
    session = Session(with_split_seed(config), data, quiet=quiet)
    sizes = sizes_of(config, data)
    asked_for = {method_of(job) for job in wanted} | _refused_before(out)
    stages = work_off_many(asked, out, session, sizes, pool, overwrite)
    outcomes = method_outcomes(_of_interest(built, asked_for, out), plan, out, stages, sizes)
    # The tables also have what earlier starts with other names or seeds have finished.
    for seed in _seeds_in(out) or list(seeds):
        other_plan, others = plan_of(config, (seed,), count)
        there = finished_stages(other_plan, out, session)
        others = _of_interest(others, asked_for, out)
        outcomes = method_outcomes(others, other_plan, out, there, sizes) | outcomes
    outcomes = _in_order(outcomes)
    _keep_results(outcomes, out)
    found = summary(config, outcomes)
    write_sealed(out / COMPARISON_FILE, jsonable(found), ())
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
    """Check what can be checked before any work, and return the examples.

    Raises:
        ValueError: a name is unknown, there are no seeds or equal ones, or the settings, the
            examples, a given adapter or the device cannot work.
    """
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no {kind} {shown(unknown[0])}; choose from {', '.join(known)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    say_code(config, Reporter(quiet).say)
    faults = config.faults() + config.missing_files()
    faults += missing_metrics(config) + objective_faults(config)
    faults += tracker_faults(config.report_to)
    faults += config.held_faults() if config.recipe == "auto" else []
    if faults:
        raise ConfigError(faults)
    choose_device(config.model.device)
    for folder in config.adapters.folders().values():
        if folder is not None:
            read_adapter(folder)
            check_openable(folder)
    data = load_run_data(config, Reporter(quiet).say)
    if learns_weights(config):
        pool = POOLS[config.controller.probe_rows]
        check_pool(sum(len(data.parts["target"].get(split, ())) for split in pool))
    return data


def plan_of(
    config: RunConfig, seeds: tuple[int, ...], examples: int
) -> tuple[Plan, dict[str, Built]]:
    """Return the plan of all methods and run -> stages, for a number of rows in an epoch.

    The plan has methods that are not asked for too, so the names of stages never depend on that.
    """
    builder = PlanBuilder()
    built = build_methods(builder, config, seeds, examples)
    return builder.build(), built


def _refused_before(out: Path) -> set[str]:
    """Return the methods that an earlier start in this folder recorded as not applicable.

    Raises:
        ValueError: the tables of that start are damaged.
    """
    file = out / COMPARISON_FILE
    if damage(file) and file.exists():
        raise ValueError(
            f"{shown_path(file)} is damaged, so it is not known which methods were not applicable; "
            "rename it, and ask for all methods that should be in the tables"
        )
    return set(read_json(file)["not_applicable"]) if file.exists() else set()


def _of_interest(
    built: Mapping[str, Built], asked_for: Collection[str], out: Path
) -> dict[str, Built]:
    """Return the runs that belong in the tables.

    A method that chooses among other runs, or that these settings rule out, belongs there only if
    it is asked for, or if an earlier start wrote its result.
    """

    def wanted(job: str) -> bool:
        if built[job].refusal is None and not built[job].others:
            return True
        return method_of(job) in asked_for or (out / job / RESULT_FILE).exists()

    return {job: one for job, one in built.items() if wanted(job)}


def stages_of(built: Mapping[str, Built], jobs: Sequence[str]) -> list[str]:
    """Return the scoring stages of runs, and those of the runs that they choose among."""
    found: list[str] = []
    for job in jobs:
        one = built[job]
        nearest = one.chooses.get("nearest")
        others = [*one.others, *([nearest] if nearest else [])]
        found += stages_of(built, others)
        found += [one.scores] if one.scores else []
    return list(dict.fromkeys(found))


def finished_stages(plan: Plan, place: Path, session: Session) -> dict[str, Outcome]:
    """Return stage -> outcome for the stages of a plan that are finished or not applicable.

    A result counts as finished only if it was made from the inputs of the plan.

    Raises:
        ValueError: a result is damaged, so that the tables would lack it.
    """
    found: dict[str, Outcome] = {}
    for name, stage in plan.stages.items():
        if not all(need in found for need in stage.needs()):
            continue
        lost = without_result(stage, place, found)
        if lost is not None:
            found[name] = lost
            continue
        there = state_of(stage, place, session)
        state = there.state
        if state == "damaged":
            raise ValueError(
                f"{shown_path(place / name)} is damaged: {there.why[0]}. Its method is not among "
                "those asked for: ask for it too, to have it made again, or rename the folder"
            )
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
        known = {} if damage(file) else read_json(file)
        if jsonable(whole) != {name: known.get(name) for name in whole}:
            write_json(file, whole | {"provenance": provenance()})


def summary(config: RunConfig, outcomes: Mapping[str, MethodOutcome]) -> dict[str, Any]:
    """Return the content of `comparison.json`: rows of all runs, reference baseline, paired tests.

    Args:
        config: names the languages and the task, and sets the intervals.
        outcomes: run -> outcome, in the order of the tables.
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
    """Return whether the last dev loss is lower than all before it; `dev` holds (step, loss)."""
    losses = [loss for _, loss in dev]
    known = [loss for loss in losses[:-1] if loss is not None]
    return bool(known) and losses[-1] is not None and losses[-1] < min(known)


def _row(config: RunConfig, job: str, outcome: MethodOutcome) -> dict[str, Any]:
    result, name = outcome.result, method_of(job)
    assert result is not None, "only runs with a result have a row"
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
    """Return test set -> fraction of its examples with an empty answer, if it was counted."""
    counts = result.get("empty") or {}
    return {test: count / len(result["rows"][test]["ids"]) for test, count in counts.items()}


def _often_empty(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return test set -> method -> mean fraction of empty answers, if at least `MANY_EMPTY`."""
    shares: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for test, share in row["empty"].items():
            shares.setdefault(test, {}).setdefault(row["method"], []).append(share)
    means = {t: {name: fmean(of) for name, of in one.items()} for t, one in shares.items()}
    return {
        t: {n: mean for n, mean in one.items() if mean >= MANY_EMPTY} for t, one in means.items()
    }


def _best_baseline(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the baseline with the lowest mean loss on labelled examples it was not trained on."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        if METHODS[row["method"]].role == "baseline" and row["dev_loss"] is not None:
            losses.setdefault(row["method"], []).append(row["dev_loss"])
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return lowest(means)


def paired_with(
    config: RunConfig, results: Mapping[str, Mapping[int, Mapping[str, Any]]], reference: str
) -> dict[str, Any]:
    """Return method -> test set -> metric -> its paired test against the reference.

    Runs with the same seed are paired. A method with a single run is paired with every seed of the
    other. The bootstrap draws whole contexts, with their examples of all seeds together. The means
    over examples are compared, also for metrics that are no such means (chrF).

    Args:
        config: settings of the intervals.
        results: method -> seed -> result.
        reference: the method that the others are compared with.
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
