"""The chosen recipe beside fixed ones: measured on real pairs, kept, and put into tables.

    python -m benchmarks.recipes run en-ar en-zh --seeds 42,1337 --minutes 120
    python -m benchmarks.recipes tables --out docs/results

`run` trains the two adapters of each pair once, as `benchmarks.recorded` does. Then for each seed
it lets `grasp-lora run` choose (`recipe: auto`) and makes the fixed recipes of `FIXED`, all from
these adapters and on the same division of the examples. Every result is recorded at once in
docs/results/records/recipes/PAIR.parquet, in a collection for each seed of the adapters. What is
recorded there is not run again. The pairs of `NEW_PAIRS` were not looked at while the chooser was
made; they are refused without `--new`, so that they are run on purpose alone.
`tables` writes recipes.json, and tables and pictures of recipes.md (`benchmarks.recipes_report`).
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import common, recipes_report, recorded, records
from benchmarks.recipes_report import AUTO, NEW_PAIRS, collection_of
from grasp_lora.base.files import check_run, jsonable, machine_name, read_config, read_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.plans.auto_plan import SIMPLE, AutoPlan, prices_of
from grasp_lora.plans.compare import compare_methods, plan_of, stages_of
from grasp_lora.plans.methods import METHODS, Choice, job_name
from grasp_lora.plans.plan import Plan, part_of
from grasp_lora.plans.recipes import with_split_seed
from grasp_lora.plans.results import rows_of
from grasp_lora.plans.run import run as run_whole
from grasp_lora.plans.show import sizes_of
from grasp_lora.stages.stage import Sizes
from grasp_lora.workbench.beside import target_epoch
from grasp_lora.workbench.processes import machine
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import load_run_data

FIXED = (
    "average",
    "average-finetuned",
    "average-finetuned-labelled",
    "source-finetuned-3x",
    "source-finetuned-3x-labelled",
    "source-finetuned-labelled",
    "late-merge-labelled",
    "target-all-labels",
    "linear-unscaled-finetuned",
    "grasp-paper",
)
"""The fixed recipes that are run unless others are named."""
SHIPPED = "shipped"
"""The name of what a run chose, among the systems that it measured on the test rows."""


def job_of(recipe: str, seed: int) -> str:
    """Return the name of a recipe's run."""
    return f"{AUTO}-s{seed}" if recipe == AUTO else job_name(recipe, seed)


def missing_in(
    table: Path, collection: str, recipes: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, int]]:
    """Return (recipe, seed) of each run that is not recorded, seed by seed."""
    wanted: dict[str, tuple[str, int]] = {}
    for seed in seeds:
        for name in recipes:
            # A recipe that draws nothing has one run, which is done with the first seed.
            wanted.setdefault(job_of(name, seed), (name, seed))
    known = records.jobs(table, collection)
    return [one for job, one in wanted.items() if job not in known]


def run(pair: str, options: argparse.Namespace, until: float) -> list[str]:
    """Do what is not recorded, until a time of `time.monotonic`; return what failed."""
    config = _settings(pair, options.adapters_seed)
    table, collection = options.records / f"{pair}.parquet", collection_of(config.seed)
    missing = missing_in(table, collection, options.only, options.seeds)
    if not missing or time.monotonic() > until:
        return []
    work = options.work / pair
    queue = work / f"compare-{config.seed}"
    config = recorded.with_adapters(config, options.work, pair)
    sizes = sizes_of(config, load_run_data(config, Reporter(quiet=True).say))
    plain = {"plain_tokens": prices_of(config, sizes).plain}
    failed: list[str] = []
    for recipe, seed in missing:
        if time.monotonic() > until:
            break
        if recipe == AUTO:
            out = work / f"{AUTO}-{config.seed}-s{seed}"
            keep_auto(_chosen(config, seed, out), seed, table, collection, plain)
            continue
        found = compare_methods(config, queue, [recipe], (seed,))
        recorded.keep(queue, table, collection, plain)
        recorded.keep_refused(found, seed, table, collection)
        failed += [f"{pair}, {job}: {error}" for job, error in found["failed"].items()]
    return failed


def _settings(pair: str, adapters_seed: int | None) -> RunConfig:
    """Return a pair's settings without its further test sets, which no table of recipes shows."""
    config = with_split_seed(recorded.config_of(pair))
    config = config.model_copy(update={"data": config.data.model_copy(update={"tests": {}})})
    return config if adapters_seed is None else config.model_copy(update={"seed": adapters_seed})


def _chosen(config: RunConfig, seed: int, out: Path) -> Path:
    """Let a run choose, unless the folder holds that run finished; return the folder."""
    asked = config.model_copy(update={"recipe": AUTO, "seed": seed, "output": out})
    if check_run(out) and read_config(out) == asked.to_record():
        return out  # finished, and stopped before it was recorded
    return run_whole(asked)


def keep_auto(out: Path, seed: int, table: Path, collection: str, more: Mapping[str, Any]) -> None:
    """Add the run folder of a run that chose to a table."""
    told = of_choice(out)
    paths = systems_of(out, told["recipe"])
    simple, price = (told["recipe"]["simple"] or {}).get("name"), told["recipe"]["price"]
    record = told | {
        "scores": {"test": values_of(paths[SHIPPED])},
        "rows": {"test": losses_of(paths[SHIPPED])},
        "simple_losses": losses_of(paths[simple])["values"]["loss"] if simple in paths else None,
        "plain_runs": price["plain_runs"],
        "price": {"tokens": price["tokens"]},
    }
    new = {f"{AUTO}-s{seed}": [jsonable(record | dict(more))]}
    records.append(table, new, collection, skip_known=True)


def of_choice(out: Path) -> dict[str, Any]:
    """Return what is kept of any run that chose: its choice, its time, and what it ran on."""
    return {
        "recipe": read_json(out / "recipe.json"),
        "seconds": read_json(out / "provenance.json")["time"]["wall_seconds"],
        "versions": common.versions(),
        "machine": machine(),
    }


def systems_of(out: Path, choice: Mapping[str, Any]) -> dict[str, Path]:
    """Return the evaluations of a run that chose: of systems without training and `SHIPPED`.

    Args:
        out: the run folder.
        choice: the content of its `recipe.json`.
    """
    places = {one["name"]: out / one["path"] for one in choice["simple_systems"]}
    places[SHIPPED] = out / "evaluations" / "final"
    return {name: place for name, place in places.items() if (place / "scores.json").exists()}


def values_of(place: Path) -> dict[str, float]:
    """Return metric -> score on the test rows, of an evaluation."""
    scores = read_json(place / "scores.json")["sets"]["test"]["scores"]
    return {metric: one["value"] for metric, one in scores.items()}


def losses_of(place: Path) -> dict[str, Any]:
    """Return `ids`, `groups` and `values` (loss, in nats) of the test rows, of an evaluation."""
    return rows_of(place, ("loss",))["test"]


def projected(pairs: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Return a line for each pair on what is not recorded, and about how long that will take.

    Tokens are upper bounds: of fixed recipes without early stopping, of `recipe: auto` the budget.
    """
    lines: list[str] = []
    for pair in pairs:
        config = _settings(pair, options.adapters_seed)
        table, collection = options.records / f"{pair}.parquet", collection_of(config.seed)
        missing = missing_in(table, collection, options.only, options.seeds)
        tokens = _tokens(config, missing) if missing else 0
        rate, ran_on = _seconds_per_token(config.model.name, options.records)
        about = "no run of this model is recorded to tell the time by"
        if rate is not None:
            about = f"about {tokens * rate / 60:.0f} minutes at the rate of {ran_on}"
        lines.append(
            f"{pair}: {len(missing)} runs to do, {tokens / 1e6:.1f} million tokens, {about}"
        )
    return lines


def _tokens(config: RunConfig, missing: Sequence[tuple[str, int]]) -> float:
    """Return the tokens of runs, the scoring included; the adapters are not counted."""
    data = load_run_data(config, Reporter(quiet=True).say)
    sizes, count = sizes_of(config, data), target_epoch(config, data)
    choosing = AutoPlan(config, data)
    for name in SIMPLE:
        choosing.simple(name)
    scoring = _evaluated(choosing.plan.build(), sizes)
    total = 0.0
    for seed in dict.fromkeys(seed for _, seed in missing):
        names = [name for name, of in missing if of == seed and name != AUTO]
        plan, built = plan_of(config, (seed,), count)
        asked = tuple(stages_of(built, [job_name(name, seed) for name in names]))
        costs = part_of(plan, asked).cost(sizes)
        total += sum(one.tokens for stage, one in costs.items() if stage not in _ADAPTERS)
    auto = sum(name == AUTO for name, _ in missing)
    return total + auto * (config.budget * prices_of(config, sizes).plain + scoring)


_ADAPTERS = ("adapters/source", "adapters/target")


def _evaluated(plan: Plan, sizes: Sizes) -> float:
    kinds = {name: stage.kind for name, stage in plan.stages.items()}
    return sum(one.tokens for name, one in plan.cost(sizes).items() if kinds[name] == "evaluate")


def _seconds_per_token(model: str, folder: Path) -> tuple[float | None, str]:
    """Return the seconds that a token took in recorded runs of a model, and on which machine.

    Runs of this machine are taken if there are any, else those of all machines.
    """
    rates: dict[str, list[float]] = {}
    for table in (*folder.glob("*.parquet"), *records.FOLDER.glob("*.parquet")):
        if recorded.config_of(table.stem).model.name != model:
            continue
        for collection in records.collections(table) - {"former"}:
            for record in records.read_runs(table, collection).values():
                price = record.get("price") or {}
                if record.get("machine") and price.get("seconds") and price.get("tokens"):
                    name = machine_name(record["machine"])
                    rates.setdefault(name, []).append(price["seconds"] / price["tokens"])
    here = machine_name(machine())
    if here in rates:
        return median(rates[here]), "this machine"
    found = [rate for ones in rates.values() for rate in ones]
    return (median(found), "other machines") if found else (None, "")


REPLAYED = (
    *("source-finetuned", "source-finetuned-3x", "average-finetuned", "weights-75-25"),
    *("weights-25-75", "shrunk-0.75", "shrunk-0.5", "weight-decay", "learned-weights"),
    *("svd-finetuned", "linear-finetuned", "late-merge", "average", "source", "target"),
    "sum-finetuned",
)
"""Recipes that are trained on the train examples alone, so that dev losses can choose."""
FIRST_TRIALS = ("source-finetuned-3x", "average-finetuned")
"""The two trials that a run begins with, as rows of the main comparison."""


def replay(table: Path, seed: int = recorded.SEEDS[0]) -> dict[str, float]:
    """Return what a choice by the lowest held loss loses on the test rows, in nats.

    Args:
        table: recorded runs of the main comparison.
        seed: of the runs.

    Returns:
        "all" and "first trials" -> test loss of the chosen recipe less the lowest of all.
    """
    runs = records.read_runs(table)
    found: dict[str, tuple[float, float]] = {}
    for name in REPLAYED:
        record = runs[job_of(name, seed)]
        held = [x for split in ("dev", "micro_dev") for x in record["losses"][split]]
        found[name] = (fmean(held), record["scores"]["test"]["loss"])
    least = min(test for _, test in found.values())
    among = {"all": REPLAYED, "first trials": FIRST_TRIALS}
    return {
        label: found[min(names, key=lambda name: found[name][0])][1] - least
        for label, names in among.items()
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="what", required=True)
    running = commands.add_parser("run", help="make what is not recorded")
    running.add_argument("pairs", nargs="*", metavar="PAIR")
    running.add_argument("--seeds", type=_seeds, default=list(recorded.SEEDS), help="42,1337")
    running.add_argument("--adapters-seed", type=int, help="of both adapters; default: the file's")
    running.add_argument("--work", type=Path, default=Path("runs/recipes"), help="may be large")
    running.add_argument("--minutes", type=float, default=1e9, help="start nothing later")
    ran = [name for name, one in METHODS.items() if not isinstance(one.build, Choice)]
    running.add_argument("--only", nargs="+", default=[AUTO, *FIXED], choices=[AUTO, *ran])
    running.add_argument("--new", action="store_true", help="run new pairs; all if none is named")
    running.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    tables = commands.add_parser("tables", help="write recipes.json, tables and pictures")
    tables.add_argument("--out", type=Path, required=True)
    tables.add_argument("--main-records", type=Path, default=records.FOLDER, help="shown beside")
    replaying = commands.add_parser("replay", help="choose among the runs of the main comparison")
    replaying.add_argument("--main-records", type=Path, default=records.FOLDER)
    for one in (running, tables):
        one.add_argument("--records", type=Path, default=recipes_report.FOLDER)
    options = parser.parse_args(argv)
    if options.what == "run":
        options.pairs = options.pairs or (list(NEW_PAIRS) if options.new else [])
        held = [pair for pair in options.pairs if pair in NEW_PAIRS and not options.new]
        if held:
            parser.error(f"{held[0]} is a new pair, kept for the last measurement; give --new")
        if not options.pairs:
            parser.error("name a pair of configs/results, such as en-ar, or give --new")
    return options


def _seeds(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is asked."""
    options = parsed(argv)
    if options.what == "tables":
        recipes_report.write(options.records, options.main_records, options.out)
        return
    if options.what == "replay":
        for table in records.tables_with(options.main_records, records.RUNS):
            if table.stem != "embedded":
                gaps = "; ".join(f"{label} {gap:.3f}" for label, gap in replay(table).items())
                print(f"{table.stem}: {gaps}")
        return
    common.ready(options)
    common.versions()  # the code that is loaded is that of now, whatever is committed meanwhile
    until = time.monotonic() + 60 * options.minutes
    print("\n".join(projected(options.pairs, options)), flush=True)
    failed = [one for pair in options.pairs for one in run(pair, options, until)]
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
