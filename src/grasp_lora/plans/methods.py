"""The methods of a comparison. Each is a row of `METHODS` and adds its stages to one plan.

All methods start from the same two adapters and are scored on the same examples. A stage that two
methods need is in the plan once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from grasp_lora.config.run_config import RunConfig
from grasp_lora.core import ControllerConfig
from grasp_lora.core.pruning.n_of_m import N_OF_M
from grasp_lora.core.recipes.recipe import SHOTS, STARTS, Recipe
from grasp_lora.plans.parts import add_adapters, add_merge, small_stage
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.recipes import (
    Build,
    Built,
    Case,
    Times,
    by,
    changed_settings,
    made_by,
    settings_of,
    start_of,
    with_split_seed,
)
from grasp_lora.stages.stage import Input, Stage

RATIO_STEP = 0.1
GRID = tuple(round(RATIO_STEP * n, 1) for n in range(1, 9))
FOLDS = 5
TRIALS = 8
DRAWN = 3
"""Trials, out of `TRIALS`, that an Optuna search draws at random before its model chooses."""
SHARED_MERGE = ("adapters/merged", "adapters/weights")
"""Folders of the configured merge and of the probe of its weights, beside the adapters."""
SHIFT = 0.05


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        about: description for the tables.
        build: adds the stages of the method to a plan.
        changes: dotted setting -> value that differs; `Times` multiplies the configured value.
        seeds: `all`, `first` (one run with the first seed), or `none` (one run; nothing is random).
        role: `baseline` (what a user would do without pruning; the other methods are tested against
            the best baseline by dev loss), or `other`.
    """

    about: str
    build: Build
    changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: str = "first"
    role: str = "other"


def row(
    about: str, recipe: Recipe, changes: Mapping[str, Any] | None = None, **rest: str
) -> Method:
    """Return the method that a recipe is, with further changes of settings."""
    every = settings_of(recipe) | dict(changes or {})
    return Method(about, by(recipe), every, **rest)


def _random_masks(ratio: float) -> Build:
    """Return a build that fine-tunes the configured merge, pruned by masks drawn at random."""

    def build(case: Case) -> Built:
        adapter, made = start_of(case, "merged")
        assert adapter is not None, "the configured merge is an adapter"
        final = case.add("final", "prune", {"start": adapter}, ratio=ratio, random_masks=True)
        return case.scored(Built(case.job, final=final, paid=(*made, final), ratio_from=final))

    return build


def _at_ratio_of(method: str, shift: float | None, random_masks: bool = False) -> Build:
    """Return a build that fine-tunes the configured merge at a ratio learned by another method."""

    def build(case: Case) -> Built:
        search = case.other(method).search
        assert search is not None, f"{method} learns a ratio"
        adapter, made = start_of(case, "merged")
        assert adapter is not None, "the configured merge is an adapter"
        inputs = {"start": adapter, "ratio": search}
        final = case.add("final", "prune", inputs, shift=shift, random_masks=random_masks)
        return case.scored(Built(case.job, final=final, paid=(*made, final), ratio_from=final))

    return build


def _optuna(sampler: str, drawn: int | None) -> Build:
    """Return a build in which Optuna chooses the ratio by full fine-tuning runs."""

    def build(case: Case) -> Built:
        merged, made = start_of(case, "merged")
        assert merged is not None, "the configured merge is an adapter"
        trials: dict[str, Input] = {}
        for number in range(TRIALS):
            inputs = {"start": merged} | trials
            options = {"sampler": sampler, "drawn": drawn}
            trials[f"trial {number}"] = case.add(f"trial-{number}", "prune", inputs, **options)
        names = tuple(str(one) for one in trials.values())
        scores = case.add("scores", "evaluate", trials, labelled=True)
        return Built(case.job, scores, None, (*made, *names), chooses={"trials": names})

    return build


def _adalora(case: Case) -> Built:
    """Train an AdaLoRA adapter on the target rows."""
    options = {"role": "target", "adalora": True}
    trained = Stage(f"{case.job}/final", "train", case.config, options=options, title=case.job)
    final = case.plan.add(trained)
    return case.scored(Built(case.job, final=final, paid=(final,)))


def _on_all_labels(case: Case) -> Built:
    """Train a target adapter on all labelled examples, for epochs chosen by cross-validation."""
    folds: dict[str, Input] = {
        f"fold {n}": case.add(f"fold-{n}", "train", {}, role="target", folds=FOLDS, fold=n)
        for n in range(FOLDS)
    }
    final = case.add("final", "train", folds, role="target", folds=FOLDS)
    paid = (*(str(one) for one in folds.values()), final)
    # The adapter was trained on all labelled examples, so their losses would mean nothing.
    return case.scored(Built(case.job, final=final, paid=paid, unseen=False))


def _in_fewer_bytes(recipe: Recipe) -> Build:
    """Return a build that fits the adapter of a recipe into `budget_mb` megabytes."""

    def build(case: Case) -> Built:
        if case.config.budget_mb is None:
            return Built(case.job, refusal="no size is given; set budget_mb, like budget_mb: 0.5")
        whole = made_by(case, recipe)
        assert whole.final is not None, "a recipe that trains gives an adapter"
        small = case.plan.add(small_stage(case.config, whole.final, f"{case.job}/small"))
        return case.scored(replace(whole, final=small, paid=(*whole.paid, small)))

    return build


@dataclass(frozen=True)
class Choice:
    """A method that chooses among other runs with the same seed and adds no stages; a `Build`.

    Attributes:
        among: the methods whose runs it chooses among.
        judged: choose the run with the lowest loss on these splits. The cost is that of all runs.
        nearest: instead choose the run whose ratio is nearest to the ratio of this method. The cost
            is that of the chosen run.
    """

    among: tuple[str, ...]
    judged: tuple[str, ...] = ()
    nearest: str | None = None

    def __call__(self, case: Case) -> Built:
        """Return the method built for a case."""
        runs = [case.other(name) for name in self.among]
        wanted = None if self.nearest is None else case.other(self.nearest)
        paid = tuple(dict.fromkeys(stage for run in runs for stage in run.paid))
        return self.of(case.job, tuple(run.job for run in runs), wanted and wanted.job, paid)

    def of(
        self, job: str, runs: tuple[str, ...], wanted: str | None, paid: tuple[str, ...] = ()
    ) -> Built:
        """Return the choice among runs of these names."""
        how = {"judged": self.judged} if wanted is None else {"nearest": wanted}
        return Built(job, paid=paid if wanted is None else (), others=runs, chooses=how)


LEARNED = Recipe("merged", ratio="learned")
LATE = Recipe("source", merge="after")
searched: Build = by(LEARNED)
"""A build that searches the ratio of the configured merge and fine-tunes at that ratio."""

PAPER = {"controller": ControllerConfig(preset="paper"), "finetune.mask_schedule": "every-step"}
ADAPTIVE = {
    "finetune.mode": "restart",
    "finetune.mask_schedule": "every-step",
    "importance": "activation",
}
CONTINUED = {"finetune.mode": "continue"}
_GRID_NAMES = tuple(f"grid-{ratio}" for ratio in GRID)
_LINEAR, _UNSCALED = STARTS["linear"].says, STARTS["linear-unscaled"].says
_ADAPTIVE_STARTS = {"adaptive": "linear", "adaptive-unscaled": "linear-unscaled"}
RULES = ("magnitude", "taylor", "taylor-smoothed", "obs")
"""Rules of importance beside the configured one."""
N_OF_M_ROWS = {
    f"{kept}-of-{size}": {"structure": name, "scope": "global"}
    for name, (kept, size) in N_OF_M.items()
}
_RETRAINED = "retrained on all labelled rows for the epochs that dev rows chose"

METHODS: Mapping[str, Method] = {
    "zero-shot": row("backbone alone", Recipe("backbone", None), seeds="none"),
    **{
        f"few-shot-{shots}": row(
            f"backbone alone, {shots} solved examples in its prompt",
            Recipe("backbone", None, shots=shots),
            seeds="all",
        )
        for shots in SHOTS
    },
    "source": row("source adapter", Recipe("source", None), seeds="none"),
    "target": row("target adapter", Recipe("target", None), seeds="none"),
    "target-trained": row(
        "target adapter retrained with each seed", Recipe("fresh", None), seeds="all"
    ),
    "source-finetuned": row(
        "source adapter fine-tuned on the target rows",
        Recipe("source"),
        seeds="all",
        role="baseline",
    ),
    "source-finetuned-3x": row(
        "source adapter fine-tuned with three times the learning rate",
        Recipe("source", 3.0),
        seeds="all",
    ),
    "source-finetuned-3x-labelled": row(
        f"source adapter fine-tuned with three times the learning rate, {_RETRAINED}",
        Recipe("source", 3.0, rows="labelled"),
        seeds="all",
    ),
    "source-finetuned-labelled": row(
        f"source adapter fine-tuned, {_RETRAINED}", Recipe("source", rows="labelled"), seeds="all"
    ),
    "source-finetuned-joint": row(
        "source adapter fine-tuned on the target rows and as many source rows beside them",
        Recipe("source", joint=True),
        seeds="all",
    ),
    "target-all-labels": Method(
        "target adapter on all labelled rows, epochs by cross-validation",
        _on_all_labels,
        role="baseline",
    ),
    # The singular values of AdaLoRA start at 0 and move by about a step size each step: with the
    # step size of a LoRA adapter a few dozen steps get nowhere.
    "target-adalora": Method(
        "an AdaLoRA adapter trained on the target rows, with ten times the learning rate",
        _adalora,
        {"train.target.learning_rate": Times(10.0)},
    ),
    "average": row("average of the deltas, untrained", Recipe("average", None), seeds="none"),
    "average-finetuned": row(
        "average of the deltas, fine-tuned unpruned",
        Recipe("average"),
        seeds="all",
        role="baseline",
    ),
    "average-finetuned-small": Method(
        "average of the deltas, fine-tuned unpruned, in budget_mb megabytes",
        _in_fewer_bytes(Recipe("average")),
    ),
    "average-finetuned-3x": row(
        "average of the deltas, fine-tuned unpruned with three times the learning rate",
        Recipe("average", 3.0),
        seeds="all",
    ),
    "average-finetuned-labelled": row(
        f"average of the deltas, fine-tuned unpruned, {_RETRAINED}",
        Recipe("average", rows="labelled"),
        seeds="all",
    ),
    "mean-labelled": row(
        "mean of two: the source adapter (three times the learning rate) and the average, each "
        f"fine-tuned, {_RETRAINED}",
        Recipe(
            (Recipe("source", 3.0, rows="labelled"), Recipe("average", rows="labelled")), step=None
        ),
        seeds="all",
    ),
    "mean-new-labelled": row(
        f"mean of two: the source adapter (three times the learning rate), {_RETRAINED}, and a new "
        "adapter trained on all labelled rows",
        Recipe(
            (Recipe("source", 3.0, rows="labelled"), Recipe("fresh", 3.0, rows="labelled")),
            step=None,
        ),
        seeds="all",
    ),
    **{
        name: row(f"{STARTS[name].says}, fine-tuned unpruned", Recipe(name))
        for name in ("shrunk-0.75", "shrunk-0.5", "weights-75-25", "weights-25-75")
    },
    "weight-decay": row(
        "the average, fine-tuned unpruned under weight decay 30 (0.3 % of a weight a step)",
        Recipe("average"),
        {"train.finetune.weight_decay": 30.0},
    ),
    "sum": row("sum of the deltas, untrained", Recipe("sum", None), seeds="none"),
    "sum-finetuned": row("sum of the deltas, fine-tuned unpruned", Recipe("sum")),
    "linear": row(f"{_LINEAR}, untrained", Recipe("linear", None), seeds="none"),
    "linear-finetuned": row(f"{_LINEAR}, fine-tuned unpruned", Recipe("linear")),
    "linear-unscaled": row(
        f"{_UNSCALED}, untrained", Recipe("linear-unscaled", None), seeds="none"
    ),
    "linear-unscaled-finetuned": row(
        f"{_UNSCALED}, fine-tuned unpruned", Recipe("linear-unscaled"), seeds="all"
    ),
    "svd": row("low-rank average of the deltas, untrained", Recipe("svd", None), seeds="none"),
    "svd-finetuned": row(
        "low-rank average, fine-tuned unpruned", Recipe("svd"), {"mask_unit": "merged"}
    ),
    "learned-weights": row(
        "merge weights learned by probes, fine-tuned unpruned",
        Recipe("learned-weights"),
        role="baseline",
    ),
    **{
        f"{name}-finetuned": row(f"{STARTS[name].says}, fine-tuned", Recipe(name))
        for name in ("ties", "ties-svd", "dare-linear", "dare-linear-svd", "ties-delta")
    },
    "layer-swap": row(
        f"{STARTS['layer-swap'].says}, untrained", Recipe("layer-swap", None), seeds="none"
    ),
    "layer-swap-finetuned": row(f"{STARTS['layer-swap'].says}, fine-tuned", Recipe("layer-swap")),
    "lorahub": row(f"{STARTS['lorahub'].says}, untrained", Recipe("lorahub", None)),
    **{
        f"grid-{ratio}": row(f"pruned at {ratio}", Recipe("merged", ratio=ratio), seeds="all")
        for ratio in GRID
    },
    "grid": Method(
        "grid of ratios, chosen by micro-dev and dev loss",
        Choice(_GRID_NAMES, ("micro_dev", "dev")),
        seeds="all",
    ),
    "grid-few-rows": Method(
        "the same grid, chosen by micro-dev loss alone",
        Choice(_GRID_NAMES, ("micro_dev",)),
        seeds="all",
    ),
    **{
        f"{name}-{ratio}": row(
            f"Adaptive LoRA Merge at {ratio}: {STARTS[start].says}, pruned again after every step",
            Recipe(start, ratio=ratio),
            ADAPTIVE,
        )
        for name, start in _ADAPTIVE_STARTS.items()
        for ratio in GRID
    },
    **{
        name: Method(
            f"Adaptive LoRA Merge over the grid, {STARTS[start].says}, chosen by dev loss",
            Choice(tuple(f"{name}-{ratio}" for ratio in GRID), ("dev",)),
        )
        for name, start in _ADAPTIVE_STARTS.items()
    },
    "optuna-random": Method(
        f"{TRIALS} full runs at ratios drawn at random", _optuna("random", None)
    ),
    **{
        f"optuna-{sampler}": Method(
            f"Optuna {sampler.upper()}, {TRIALS} full runs, the first {DRAWN} at random",
            _optuna(sampler, DRAWN),
        )
        for sampler in ("tpe", "gp")
    },
    "grasp-paper": row(
        f"the published method: published controller, {_UNSCALED}",
        Recipe("linear-unscaled", ratio="learned"),
        PAPER,
        seeds="all",
    ),
    "grasp-paper-scaled": row(
        f"the published controller, {_LINEAR}", Recipe("linear", ratio="learned"), PAPER
    ),
    "grasp-restart": row("this library's controller, two runs", LEARNED, seeds="all"),
    "grasp-continue": row("this library's controller, one run", LEARNED, CONTINUED, seeds="all"),
    "grasp-continue-3x": row(
        "this library's controller, one run, with three times the learning rate",
        replace(LEARNED, step=3.0),
        CONTINUED,
        seeds="all",
    ),
    "grasp-labelled": row(
        "this library's controller, one run, which is then retrained on all labelled rows",
        replace(LEARNED, rows="labelled"),
        CONTINUED,
        seeds="all",
    ),
    **{
        f"grasp-{name}": row(
            f"this library's controller, two runs, {about}", replace(LEARNED, start=start), changes
        )
        for name, about, start, changes in (
            ("module-types", "a ratio for each type of module", "merged", {"scope": "module-type"}),
            ("layers", "a ratio for each layer", "merged", {"scope": "layer"}),
            ("adapters", "a ratio for each of the two adapters", "merged", {"scope": "adapter"}),
            (
                "policy",
                "ratios that differ by depth, module and adapter, learned in the same rounds",
                "merged",
                {"scope": "policy"},
            ),
            ("ranks", "whole components pruned", "merged", {"structure": "rank"}),
            ("weights", "merge weights learned first", "learned-weights", {}),
            *((rule, f"importance {rule}", "merged", {"importance": rule}) for rule in RULES),
            *(
                (name, f"{name.replace('-', ' ')} entries or nothing pruned", "merged", changes)
                for name, changes in N_OF_M_ROWS.items()
            ),
        )
    },
    "late-merge": row(
        "the fine-tuned source adapter merged with the target adapter by probes",
        LATE,
        seeds="all",
    ),
    "grasp-late": row(
        "the fine-tuned source adapter merged with the target adapter by probes, then pruned at a "
        "ratio learned without training",
        replace(LATE, ratio="learned"),
        seeds="all",
    ),
    "late-merge-labelled": row(
        "late-merge, its source adapter then retrained on all labelled rows",
        replace(LATE, rows="labelled"),
        seeds="all",
    ),
    **{
        f"recut-{schedule}": row(
            f"pruned at 0.4, masks cut again {about}",
            Recipe("merged", ratio=0.4),
            {"finetune.mask_schedule": schedule},
        )
        for schedule, about in (("every-step", "every step"), (8, "every 8 steps"))
    },
    **{
        f"{rule}-0.4": row(
            f"pruned at 0.4 by importance {rule}",
            Recipe("merged", ratio=0.4),
            {"importance": rule},
        )
        for rule in RULES
    },
    **{
        name: row(
            f"pruned to {name.replace('-', ' ')} entries", Recipe("merged", ratio=0.5), changes
        )
        for name, changes in N_OF_M_ROWS.items()
    },
    **{
        f"ranks{end}-0.4": row(
            f"0.4 of the components pruned{about}",
            Recipe("merged", ratio=0.4),
            {"structure": "rank", **changes},
        )
        for end, about, changes in (
            ("", "", {}),
            ("-taylor", " by importance taylor", {"importance": "taylor"}),
        )
    },
    "random-0.4": Method("pruned at 0.4 by masks drawn at random", _random_masks(0.4)),
    "random-masks": Method(
        "masks drawn at random, at the ratio of grasp-restart",
        _at_ratio_of("grasp-restart", 0.0, random_masks=True),
    ),
    "ratio-nearest": Method(
        "the grid point nearest to the ratio of grasp-restart",
        Choice(_GRID_NAMES, nearest="grasp-restart"),
        seeds="all",
    ),
    "ratio-lower": Method(
        "the ratio of grasp-restart less 0.05", _at_ratio_of("grasp-restart", -SHIFT)
    ),
    "ratio-higher": Method(
        "the ratio of grasp-restart and 0.05", _at_ratio_of("grasp-restart", SHIFT)
    ),
}
"""Name -> method, in the order of the tables."""


def job_name(method: str, seed: int) -> str:
    """Return the name of a method's run."""
    return method if METHODS[method].seeds == "none" else f"{method}-s{seed}"


def method_of(job: str) -> str:
    """Return the method of a run's name."""
    return job if job in METHODS else job.rpartition("-s")[0]


def build_methods(
    plan: PlanBuilder, config: RunConfig, seeds: tuple[int, ...], examples: int
) -> dict[str, Built]:
    """Add the stages of all methods to a plan; return run -> method, in the order of the tables.

    Args:
        plan: receives the adapters and their merge first, then the stages of the methods.
        config: the run's settings; its own seed divides the examples and trains the adapters.
        seeds: seeds of searches and fine-tuning; a method that is run once uses the first.
        examples: rows of an epoch, see `workbench.beside.target_epoch`.
    """
    config = with_split_seed(config)
    plain = changed_settings(config, {}, examples)
    adapters: dict[str, Input] = add_adapters(plan, plain)
    merged, probe = add_merge(plan, plain, adapters, *SHARED_MERGE)
    adapters["merged"] = merged
    built: dict[str, Built] = {}

    def build(name: str, seed: int) -> Built:
        method, job = METHODS[name], job_name(name, seed)
        if job not in built:
            changed = changed_settings(config, method.changes, examples)
            drawn = config.seed if method.seeds == "none" else seed
            one = changed.model_copy(update={"seed": drawn})
            case = Case(plan, one, job, adapters, probe, lambda other: build(other, seed))
            broken = changed.faults()
            # The method's changes may break a rule between settings, given this configuration.
            built[job] = Built(job, refusal="; ".join(broken)) if broken else method.build(case)
        return built[job]

    for place, seed in enumerate(seeds):
        for name, method in METHODS.items():
            if place == 0 or method.seeds == "all":
                build(name, seed)
    return {job: one for name in METHODS for job, one in built.items() if method_of(job) == name}
