"""The comparison: every baseline beside the method, each a run of one queue.

Methods differ by the arguments of the same fine-tuning call wherever that is possible, start from
the same two adapters and are scored on the same rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from grasp_lora.base.files import machine_name, read_json, write_json, write_text
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import Section
from grasp_lora.core import ControllerConfig
from grasp_lora.core.evidence.findings import MANY_EMPTY
from grasp_lora.metrics import compare_means
from grasp_lora.plans.job import RESULT_FILE
from grasp_lora.plans.methods import (
    ADAPTERS,
    RATIO_STEP,
    TRIALS,
    adapters_job,
    checked_data,
    settings_of,
    with_split_seed,
)
from grasp_lora.plans.projection import run_projected
from grasp_lora.plans.queue import Job, Outcome, results_in
from grasp_lora.plans.starts import CONFIGURED
from grasp_lora.report.comparison import comparison_csv, comparison_markdown
from grasp_lora.report.pictures import plot_comparison
from grasp_lora.scoring.sets import metric_options
from grasp_lora.workbench.rows import RunData

SectionT = TypeVar("SectionT", bound=Section)

SEEDS = (42, 1337, 9001)
GRID = tuple(round(RATIO_STEP * n, 1) for n in range(1, 9))
AVERAGE = {"merge": {"kind": "cat", "weights": None}}
SUM = {"merge": {"kind": "cat", "weights": (1.0, 1.0)}}
PUBLISHED = {"merge": {"kind": "linear", "weights": (1.0, 1.0)}}
LEARNED = {"merge": {"kind": "cat", "weights": "auto"}}
SVD = {"merge": {"kind": "svd", "weights": None}}
PEFT_DENSITY = 0.5
DRAWN = 3
"""Runs of an Optuna search before its model has a say, of `TRIALS`."""
CHOOSING = ("best_of", "nearest_of")
"""Work that chooses among the results of other methods and runs nothing itself."""
NOT_PAIRED = {"bleu", "perplexity"}
"""Scores whose rows' own values mean little."""


@dataclass(frozen=True)
class Times:
    """A change of a setting that is a multiple of what is configured."""

    factor: float

    def of(self, value: float) -> float:
        """Return the multiple, without the digits that binary fractions add."""
        return float(f"{self.factor * value:.12g}")


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        about: what it is.
        work: function of `plans.methods`.
        inputs: what it is given beside the settings.
        changes: settings, dotted, that differ; `Times` is of the one that is configured.
        needs: methods of the same seed whose results it reads.
        seeds: `all`, `first` (one run), or `none` (nothing in it is drawn).
        role: `baseline` (what a user would do without pruning: the best of them by dev loss is what
            others are tested against), `oracle` (chosen by test scores; no method), or `other`.
    """

    about: str
    work: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seeds: str = "first"
    role: str = "other"


def _tuned(about: str, start: Mapping[str, Any], ratio: Any = 0.0, **more: Any) -> Method:
    inputs = {"start": start, "ratio": ratio} | more.pop("inputs", {})
    return Method(about, "finetuned", inputs, **more)


def _on_all_labels(judge: str, about: str, start: Mapping[str, Any]) -> Method:
    return _tuned(
        f"{about}; anew on all labelled rows for the epochs that dev rows chose",
        start,
        changes=LABELLED,
        needs=(judge,),
        inputs={"judged": True},
        seeds="all",
    )


LABELLED = {"finetune.rows": "labelled"}
FASTER = {"train.finetune.learning_rate": Times(3.0)}
"""Whether rivals look as they do only because a run was stopped too soon."""
PAPER = {"controller": ControllerConfig(preset="paper"), "finetune.mask_schedule": "every-step"}
AGAIN = {"finetune.mode": "restart", "finetune.mask_schedule": "every-step"}
ADAPTIVE = AGAIN | {"importance": "activation"}

METHODS: Mapping[str, Method] = {
    "zero-shot": Method("backbone alone", "fixed", {"start": {"adapter": None}}, seeds="none"),
    "source": Method("source adapter", "fixed", {"start": {"adapter": "source"}}, seeds="none"),
    "target": Method("target adapter", "fixed", {"start": {"adapter": "target"}}, seeds="none"),
    "target-trained": Method("target adapter trained anew with each seed", "trained", seeds="all"),
    "source-finetuned": _tuned(
        "source adapter fine-tuned on the target rows",
        {"adapter": "source"},
        seeds="all",
        role="baseline",
    ),
    "source-finetuned-3x": _tuned(
        "source adapter fine-tuned with three times the learning rate",
        {"adapter": "source"},
        changes=FASTER,
        seeds="all",
    ),
    "source-finetuned-labelled": _on_all_labels(
        "source-finetuned", "source adapter fine-tuned", {"adapter": "source"}
    ),
    "target-all-labels": Method(
        "target adapter on all labelled rows, epochs by cross-validation",
        "all_labels",
        role="baseline",
    ),
    # Its singular values start at 0 and move by about a step size each step: with that of a LoRA
    # adapter a few dozen steps get nowhere.
    "target-adalora": Method(
        "an AdaLoRA adapter trained on the target rows, with ten times the learning rate",
        "adalora",
        changes={"train.target.learning_rate": Times(10.0)},
    ),
    "average": Method(
        "average of the deltas, untrained", "fixed", {"start": AVERAGE}, seeds="none"
    ),
    "average-finetuned": _tuned(
        "average of the deltas, fine-tuned unpruned", AVERAGE, seeds="all", role="baseline"
    ),
    "average-finetuned-3x": _tuned(
        "average of the deltas, fine-tuned unpruned with three times the learning rate",
        AVERAGE,
        changes=FASTER,
        seeds="all",
    ),
    "average-finetuned-labelled": _on_all_labels(
        "average-finetuned", "average of the deltas, fine-tuned unpruned", AVERAGE
    ),
    **{
        name: _tuned(about, {"merge": {"kind": "cat", "weights": weights}})
        for name, weights, about in (
            ("shrunk-0.75", (0.375, 0.375), "the average shrunk by 0.75, fine-tuned unpruned"),
            ("shrunk-0.5", (0.25, 0.25), "the average shrunk by 0.5, fine-tuned unpruned"),
            ("weights-75-25", (0.75, 0.25), "weights 0.75 + 0.25, fine-tuned unpruned"),
            ("weights-25-75", (0.25, 0.75), "weights 0.25 + 0.75, fine-tuned unpruned"),
        )
    },
    "weight-decay": _tuned(
        "the average, fine-tuned unpruned under weight decay 30 (0.3 % of a weight a step)",
        AVERAGE,
        changes={"train.finetune.weight_decay": 30.0},
    ),
    "sum": Method("sum of the deltas, untrained", "fixed", {"start": SUM}, seeds="none"),
    "sum-finetuned": _tuned("sum of the deltas, fine-tuned unpruned", SUM),
    "linear": Method("the published merge, untrained", "fixed", {"start": PUBLISHED}, seeds="none"),
    "linear-finetuned": _tuned(
        "the published merge, fine-tuned unpruned (Adaptive LoRA Merge without pruning)", PUBLISHED
    ),
    "svd": Method(
        "low-rank average of the deltas, untrained", "fixed", {"start": SVD}, seeds="none"
    ),
    "svd-finetuned": _tuned(
        "low-rank average, fine-tuned unpruned", SVD, changes={"mask_unit": "merged"}
    ),
    "learned-weights": _tuned(
        "merge weights learned by probes, fine-tuned unpruned", LEARNED, role="baseline"
    ),
    **{
        f"{kind.replace('_', '-')}-finetuned": _tuned(
            f"PEFT's {kind} on the {'deltas' if kind.endswith('svd') else 'factors'}, fine-tuned",
            {"peft": kind, "density": PEFT_DENSITY},
        )
        for kind in ("ties", "ties_svd", "dare_linear", "dare_linear_svd")
    },
    "lorahub": Method(
        "LoRAHub: weights by nevergrad, untrained", "fixed", {"start": {"lorahub": True}}
    ),
    **{
        f"grid-{ratio}": _tuned(f"pruned at {ratio}", CONFIGURED, ratio, seeds="all")
        for ratio in GRID
    },
    "grid": Method(
        "grid of ratios, chosen by micro-dev and dev loss",
        "best_of",
        {"judged": ("micro_dev", "dev")},
        needs=tuple(f"grid-{ratio}" for ratio in GRID),
        seeds="all",
    ),
    "grid-few-rows": Method(
        "the same grid, chosen by micro-dev loss alone",
        "best_of",
        {"judged": ("micro_dev",)},
        needs=tuple(f"grid-{ratio}" for ratio in GRID),
        seeds="all",
    ),
    **{
        f"adaptive-{ratio}": _tuned(
            f"Adaptive LoRA Merge at {ratio}", PUBLISHED, ratio, changes=ADAPTIVE
        )
        for ratio in GRID
    },
    "adaptive": Method(
        "Adaptive LoRA Merge over the grid, chosen by dev loss",
        "best_of",
        {"judged": ("dev",)},
        needs=tuple(f"adaptive-{ratio}" for ratio in GRID),
    ),
    "optuna-random": Method(
        f"{TRIALS} full runs at ratios drawn at random", "optuna_search", {"sampler": "random"}
    ),
    **{
        f"optuna-{sampler}": Method(
            f"Optuna {sampler.upper()}, {TRIALS} full runs, the first {DRAWN} at random",
            "optuna_search",
            {"sampler": sampler, "drawn": DRAWN},
        )
        for sampler in ("tpe", "gp")
    },
    "grasp-paper": Method(
        "the published controller and merge", "grasp", {"start": PUBLISHED}, changes=PAPER
    ),
    "grasp-restart": Method(
        "this library's controller, two runs",
        "grasp",
        changes={"finetune.mode": "restart"},
        seeds="all",
    ),
    "grasp-continue": Method(
        "this library's controller, one run",
        "grasp",
        changes={"finetune.mode": "continue"},
        seeds="all",
    ),
    "grasp-continue-3x": Method(
        "this library's controller, one run, with three times the learning rate",
        "grasp",
        changes={"finetune.mode": "continue", "train.search.learning_rate": Times(3.0)} | FASTER,
        seeds="all",
    ),
    "grasp-labelled": Method(
        "this library's controller, one run, which is then made anew on all labelled rows",
        "grasp",
        changes={"finetune.mode": "continue"} | LABELLED,
        seeds="all",
    ),
    **{
        f"grasp-{name}": Method(
            f"this library's controller, two runs, {about}", "grasp", inputs, changes=changes
        )
        for name, about, inputs, changes in (
            ("module-types", "a ratio for each type of module", {}, {"scope": "module-type"}),
            ("layers", "a ratio for each layer", {}, {"scope": "layer"}),
            ("adapters", "a ratio for each of the two adapters", {}, {"scope": "adapter"}),
            ("ranks", "whole components pruned", {}, {"structure": "rank"}),
            ("weights", "merge weights learned first", {"start": LEARNED}, {}),
        )
    },
    **{
        name: Method(
            f"the fine-tuned source adapter merged with the target adapter by probes{about}",
            "late",
            {"prune": prune},
            changes={"merge.when": "after", "merge.weights": None},
            needs=("source-finetuned",),
            seeds="all",
        )
        for name, about, prune in (
            ("late-merge", "", False),
            ("grasp-late", ", then pruned at a ratio learned without training", True),
        )
    },
    "late-merge-labelled": Method(
        "late-merge, its source adapter then fine-tuned anew on all labelled rows",
        "late",
        {"prune": False},
        changes={"merge.when": "after", "merge.weights": None} | LABELLED,
        needs=("source-finetuned", "source-finetuned-labelled"),
        seeds="all",
    ),
    **{
        f"recut-{schedule}": _tuned(
            f"pruned at 0.4, masks cut anew {about}",
            CONFIGURED,
            0.4,
            changes={"finetune.mask_schedule": schedule},
        )
        for schedule, about in (("every-step", "every step"), (8, "every 8 steps"))
    },
    "random-0.4": _tuned(
        "pruned at 0.4 by masks drawn at random", CONFIGURED, 0.4, inputs={"random_masks": True}
    ),
    "random-masks": _tuned(
        "masks drawn at random, at the ratio of grasp-restart",
        CONFIGURED,
        {"of": "grasp-restart", "shift": 0.0},
        inputs={"random_masks": True},
        needs=("grasp-restart",),
    ),
    "ratio-nearest": Method(
        "the grid point nearest to the ratio of grasp-restart",
        "nearest_of",
        {"to": "grasp-restart"},
        needs=tuple(f"grid-{ratio}" for ratio in GRID) + ("grasp-restart",),
        seeds="all",
    ),
    "ratio-lower": _tuned(
        "the ratio of grasp-restart less 0.05",
        CONFIGURED,
        {"of": "grasp-restart", "shift": -0.05},
        needs=("grasp-restart",),
    ),
    "ratio-higher": _tuned(
        "the ratio of grasp-restart and 0.05",
        CONFIGURED,
        {"of": "grasp-restart", "shift": 0.05},
        needs=("grasp-restart",),
    ),
}
"""Name -> method, in the order of the tables."""


def compare_methods(
    config: RunConfig,
    out: Path,
    only: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    workers: int = 1,
    threads: int | None = None,
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
        workers, threads, overwrite: as for `run_queue`.
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
    jobs = jobs_of(config, data, with_needs(only or METHODS), seeds)
    _forget_what_was_not_installed(out, jobs)
    outcomes = run_projected(config, data, out, jobs, workers, threads, overwrite, quiet)
    # What an earlier start with other names left there belongs in the tables as well.
    names: dict[str, None] = {}
    for seed in _seeds_in(out) or seeds:  # none where nothing is drawn in what was run
        whole = jobs_of(config, data, list(METHODS), (seed,))
        names |= dict.fromkeys(job.name for job in whole)
        outcomes = results_in(out, whole) | outcomes
    found = summary(config, {name: outcomes[name] for name in names if name in outcomes})
    write_json(out / "comparison.json", found)
    write_text(out / "comparison.csv", comparison_csv(found))
    plot_comparison(found, out)
    write_text(out / "comparison.md", comparison_markdown(found))
    return found


def _forget_what_was_not_installed(folder: Path, jobs: Sequence[Job]) -> None:
    """Remove refusals for want of a package that is there now, so that those runs are made."""
    for job in jobs:
        file = folder / job.name / RESULT_FILE
        package = read_json(file)["result"].get("package") if file.exists() else None
        if package is not None and find_spec(package.partition(".")[0]) is not None:
            file.unlink()


def _seeds_in(folder: Path) -> list[int]:
    """Return the seeds that a comparison's folder has runs of, in the order of the defaults."""
    found = {place.name.rpartition("-s")[2] for place in folder.glob("*-s*") if place.is_dir()}
    seeds = {int(seed) for seed in found if seed.isdecimal()}
    return [*(seed for seed in SEEDS if seed in seeds), *sorted(seeds - {*SEEDS})]


def with_needs(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return the methods and all that they read, in the order of `METHODS`."""
    wanted = set(names)
    for name in reversed(list(METHODS)):
        if name in wanted:
            wanted |= set(METHODS[name].needs)
    return [name for name in METHODS if name in wanted]


def jobs_of(
    config: RunConfig, data: RunData, names: Sequence[str], seeds: Sequence[int]
) -> list[Job]:
    """Return the queue: the adapters, then seed by seed all methods."""
    config = with_split_seed(config)
    jobs = [adapters_job(changed_settings(config, {}), data)]
    for place, seed in enumerate(seeds):
        for name in names:
            method = METHODS[name]
            if place > 0 and method.seeds != "all":
                continue
            changed = changed_settings(config, method.changes)
            broken = changed.faults()
            drawn = config.seed if method.seeds == "none" else seed
            own = {"config": settings_of(changed.model_copy(update={"seed": drawn}))}
            needs = (ADAPTERS, *(job_name(need, seed) for need in method.needs))
            if method.work in CHOOSING:
                own, needs = {}, needs[1:]
            if broken:
                # A rule between settings that this method breaks with these adapters or this merge.
                refusal = {"why": "; ".join(broken)}
                jobs.append(Job(job_name(name, seed), "methods:refused", refusal))
                continue
            jobs.append(
                Job(
                    job_name(name, seed), f"methods:{method.work}", own | dict(method.inputs), needs
                )
            )
    return jobs


def job_name(method: str, seed: int) -> str:
    """Return the name of a method's run."""
    return method if METHODS[method].seeds == "none" else f"{method}-s{seed}"


def changed_settings(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return settings with dotted changes; a fine-tuning in one or two runs has the same epochs.

    In mode `restart` search and final run each have all epochs of a fine-tuning run, in mode
    `continue` they share them. All labelled rows are trained on by the methods that say so only:
    the others are judged by them. And only those that say so merge after fine-tuning.
    """
    total = config.training("finetune").epochs
    if config.finetune.mode == "continue":
        total += config.training("search").epochs
    mode = changes.get("finetune.mode", "restart")
    first = total if mode == "restart" else total - total // 2
    second = total if mode == "restart" else max(1, total // 2)
    plain: dict[str, Any] = {
        "finetune.mode": mode,
        "finetune.rows": "train",
        "merge.when": "before",
        "train.search.epochs": first,
        "train.finetune.epochs": second,
    }
    for key, value in (plain | dict(changes)).items():
        config = _changed(config, key.split("."), value)
    return config


def _changed(settings: SectionT, path: Sequence[str], value: Any) -> SectionT:
    """Return a copy of a section with one value changed, which may lie in a section below."""
    name, *below = path
    old = getattr(settings, name)
    if below:
        value = _changed(old, below, value)
    elif isinstance(value, Times):
        value = value.of(old)
    return settings.model_copy(update={name: value})


def summary(config: RunConfig, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return rows of all runs, the baseline that others are held against, and the paired tests.

    Args:
        config: names the pair and the task, and sets the intervals.
        outcomes: of the runs, in the order of the tables.
    """
    rows: list[dict[str, Any]] = []
    results: dict[str, dict[int, Mapping[str, Any]]] = {}
    not_applicable: dict[str, str] = {}
    for job, outcome in outcomes.items():
        if job == ADAPTERS:
            continue
        result, name = outcome.result, method_of(job)
        if result is None:
            continue
        if "not_applicable" in result:
            not_applicable[name] = result["not_applicable"]
            continue
        rows.append(_row(config, name, job, result, _charged(name, job, outcomes)))
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


def method_of(job: str) -> str:
    """Return the method of a run's name."""
    return job if job in METHODS else job.rpartition("-s")[0]


def _charged(name: str, job: str, outcomes: Mapping[str, Outcome]) -> list[Outcome]:
    """Return the runs that a run's price is made of."""
    method, own = METHODS[name], outcomes[job]
    needed = [f"{need}{job.removeprefix(name)}" for need in method.needs]
    charged = [own]
    if method.work == "nearest_of":
        charged = [outcomes.get((own.result or {})["chosen"])]
    elif method.work == "best_of":
        charged = [outcomes.get(need) for need in needed]
    elif method.work == "late" or method.inputs.get("judged"):
        charged += [outcomes.get(need) for need in needed]
    return [outcome for outcome in charged if outcome is not None]


def _still_falling(dev: Sequence[Sequence[float | None]]) -> bool:
    """Return whether the last of a fine-tuning's (step, dev loss) is lower than all before it."""
    losses = [loss for _, loss in dev]
    known = [loss for loss in losses[:-1] if loss is not None]
    return bool(known) and losses[-1] is not None and losses[-1] < min(known)


def _row(
    config: RunConfig,
    name: str,
    job: str,
    result: Mapping[str, Any],
    charged: Sequence[Outcome],
) -> dict[str, Any]:
    losses = result["losses"]
    judged = [x for split in losses.values() for x in split] if losses else []
    peaks = [one.peak_memory_bytes for one in charged if one.peak_memory_bytes is not None]
    machines = [one.machine for one in charged if one.machine]
    dev_loss = sum(judged) / len(judged) if judged else result.get("cross_validated")
    return {
        "method": name,
        "job": result.get("chosen", job),
        "seed": config.seed if METHODS[name].seeds == "none" else int(job.rpartition("-s")[2]),
        "ratio": result["ratio"],
        "verdict": result.get("verdict"),
        "scores": result["scores"],
        "intervals": result["intervals"],
        "empty": _empty_shares(result),
        "dev_loss": dev_loss,
        "still_falling": _still_falling(result.get("dev") or []),
        **result["price"],
        "peak_memory_bytes": max(peaks, default=None),
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
