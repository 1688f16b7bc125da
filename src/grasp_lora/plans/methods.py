"""The methods of a comparison. Each is a row of `METHODS` and adds its stages to one plan.

All methods start from the same two adapters and are scored on the same examples. A stage that two
methods need is in the plan once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from grasp_lora.config.run_config import RunConfig
from grasp_lora.core import ControllerConfig
from grasp_lora.plans.parts import (
    add_adapters,
    add_final,
    add_merge,
    add_search,
    add_unpruned,
    passes_of_result,
    with_length,
)
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.stages.costs import passes_of
from grasp_lora.stages.stage import Input, Stage

RATIO_STEP = 0.1
GRID = tuple(round(RATIO_STEP * n, 1) for n in range(1, 9))
FOLDS = 5
TRIALS = 8
DRAWN = 3
"""Trials, out of `TRIALS`, that an Optuna search draws at random before its model chooses."""
SHARED_MERGE = ("adapters/merged", "adapters/weights")
"""Folders of the configured merge and of the probe of its weights, beside the adapters."""
PEFT_DENSITY = 0.5
SHIFT = 0.05


@dataclass(frozen=True)
class Built:
    """The stages that make the result of a method.

    Attributes:
        job: name of the method's run.
        scores: the stage that scores the result; None for a method that chooses among others.
        final: the stage that made the result, or the folder of a given adapter; None for the bare
            backbone.
        paid: stages that count as the method's cost. The two adapters do not: all methods have
            them.
        ratio_from: the stage whose facts hold the ratio; None for ratio 0.
        search: the search of a method that learns its ratio.
        probe: the probe of a method that learns merge weights.
        others: runs that a choosing method chooses among.
        chooses: how it chooses, see `grasp_lora.plans.results`.
        refusal: why the method cannot run with these settings.
    """

    job: str
    scores: str | None = None
    final: Input | None = None
    paid: tuple[str, ...] = ()
    ratio_from: str | None = None
    search: str | None = None
    probe: str | None = None
    others: tuple[str, ...] = ()
    chooses: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None


@dataclass(frozen=True)
class Case:
    """What a method is built from.

    Attributes:
        plan: receives the stages.
        config: settings with the method's changes and seed.
        job: name of the method's run; its stages lie in this folder.
        adapters: "source", "target" and "merged" (the configured merge) -> adapter.
        probe: the probe of the configured merge, if it has one.
        other: builds another method with the same seed and returns it.
    """

    plan: PlanBuilder
    config: RunConfig
    job: str
    adapters: Mapping[str, Input]
    probe: str | None
    other: Callable[[str], Built]

    @property
    def pair(self) -> dict[str, Input]:
        """The two adapters."""
        return {role: self.adapters[role] for role in ("source", "target")}

    def add(self, name: str, kind: str, inputs: Mapping[str, Input], /, **options: Any) -> str:
        """Add a stage in the method's folder and return its name in the plan."""
        # The parameters are positional-only, because an option may be called `kind`.
        return self.plan.add(Stage(f"{self.job}/{name}", kind, self.config, inputs, options))

    def scored(self, final: Input | None, labelled: bool = True, **parts: Any) -> Built:
        """Add the scoring of a result and return the method.

        Args:
            final: the adapter; None for the bare backbone.
            labelled: also measure the losses of the labelled examples; False for an adapter that
                was trained on them.
            parts: further fields of `Built`.
        """
        inputs = {} if final is None else {"adapter": final}
        scores = self.add("scores", "evaluate", inputs, labelled=labelled)
        return Built(self.job, scores, final, **parts)


Build = Callable[[Case], Built]


@dataclass(frozen=True)
class Times:
    """A change that multiplies the configured value of a setting by a factor."""

    factor: float

    def of(self, value: float) -> float:
        """Return the multiple, rounded to 12 digits to remove errors of binary fractions."""
        return float(f"{self.factor * value:.12g}")


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


def _start(case: Case, start: Any) -> tuple[Input | None, tuple[str, ...]]:
    """Return the adapter that a method starts from, and the stages that make it.

    Args:
        case: what the method is built from.
        start: "source", "target", "merged" (as configured), None (the bare backbone), settings of
            `merge` that differ, or the options of another rule to merge by.
    """
    if start is None or start in ("source", "target"):
        return (None if start is None else case.adapters[start]), ()
    if start == "merged":
        made = [case.adapters["merged"], *([case.probe] if case.probe else [])]
        return case.adapters["merged"], tuple(name for name in made if isinstance(name, str))
    if "rule" in start:
        merged = case.add("start", "merge", case.pair, **start)
        return merged, (merged,)
    plain = case.config.merge.model_dump() | {"rank": None} | dict(start)
    section = type(case.config.merge).model_validate(plain)
    config = case.config.model_copy(update={"merge": section})
    names = (f"{case.job}/start", f"{case.job}/weights")
    merged, probe = add_merge(case.plan, config, case.pair, *names)
    return merged, (merged, *([probe] if probe else []))


def fixed(start: Any) -> Build:
    """Return a build that scores a start without training."""

    def build(case: Case) -> Built:
        adapter, made = _start(case, start)
        return case.scored(adapter, paid=made)

    return build


def _finetuned(
    start: Any, ratio: float = 0.0, random_masks: bool = False, joint: bool = False
) -> Build:
    """Return a build that fine-tunes a start at a ratio, on all labelled examples if configured."""

    def build(case: Case) -> Built:
        adapter, made = _start(case, start)
        assert adapter is not None, "the bare backbone has nothing to fine-tune"
        if case.config.finetune.rows == "labelled":
            name, title = f"{case.job}/final", case.job
            final, judged = add_unpruned(case.plan, case.config, adapter, name, title)
            paid = (*made, judged, final)
            return case.scored(final, labelled=False, paid=paid, ratio_from=final)
        # An option None equals a missing one, so methods that do not prune share this stage.
        options = {"ratio": ratio or None, "random_masks": random_masks, "joint": joint}
        final = case.add("final", "prune", {"start": adapter}, **options)
        return case.scored(final, paid=(*made, final), ratio_from=final)

    return build


def _at_ratio_of(method: str, shift: float | None, random_masks: bool = False) -> Build:
    """Return a build that fine-tunes the configured merge at a ratio learned by another method."""

    def build(case: Case) -> Built:
        search = case.other(method).search
        assert search is not None, f"{method} learns a ratio"
        adapter, made = _start(case, "merged")
        assert adapter is not None, "the configured merge is an adapter"
        inputs = {"start": adapter, "ratio": search}
        final = case.add("final", "prune", inputs, shift=shift, random_masks=random_masks)
        return case.scored(final, paid=(*made, final), ratio_from=final)

    return build


def _grasp(start: Any = "merged") -> Build:
    """Return a build that searches the ratio of a start and fine-tunes at that ratio."""

    def build(case: Case) -> Built:
        merged, made = _start(case, start)
        assert merged is not None, "a search starts from an adapter"
        search = add_search(case.plan, case.config, merged, f"{case.job}/search")
        final = add_final(case.plan, case.config, merged, search, f"{case.job}/final")
        stages = case.plan.built(final)
        judged = stages.inputs.get("judged")
        paid = (*made, search, *([judged] if isinstance(judged, str) else []), final)
        labelled = case.config.finetune.rows == "train"
        return case.scored(final, labelled, paid=paid, ratio_from=final, search=search)

    return build


def _post_hoc(prune: bool) -> Build:
    """Return a build of a post-hoc merge, optionally pruned at a learned ratio.

    The source adapter is fine-tuned alone, then merged with the target adapter.
    """

    def build(case: Case) -> Built:
        config, source = case.config, case.adapters["source"]
        names = (f"{case.job}/tuned", case.job)
        whole, tuned = add_unpruned(case.plan, config, source, *names)
        pair = {"source": tuned, "target": case.adapters["target"]}
        below = (f"{case.job}/merged", f"{case.job}/weights")
        merged, probe = add_merge(case.plan, config, pair, *below)
        paid = [tuned, merged, *([probe] if probe else [])]
        if prune:
            search = add_search(case.plan, config, merged, f"{case.job}/search")
            final = add_final(case.plan, config, merged, search, f"{case.job}/final")
            paid += [search, final]
            return case.scored(
                final, paid=tuple(paid), ratio_from=final, search=search, probe=probe
            )
        if whole == tuned:
            return case.scored(merged, paid=tuple(paid), probe=probe)
        inputs: dict[str, Input] = {"source": whole, "target": pair["target"]}
        inputs |= {"weights": probe} if probe else {}
        final = case.add("merged-labelled", "merge", inputs)
        paid += [whole, final]
        return case.scored(final, labelled=False, paid=tuple(paid), probe=probe)

    return build


def _optuna(sampler: str, drawn: int | None) -> Build:
    """Return a build in which Optuna chooses the ratio by full fine-tuning runs."""

    def build(case: Case) -> Built:
        merged, made = _start(case, "merged")
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


def _trained(adalora: bool = False) -> Build:
    """Return a build that trains a target adapter, even if the user gives one."""

    def build(case: Case) -> Built:
        options = {"role": "target", "adalora": adalora}
        final = case.plan.add(
            Stage(f"{case.job}/final", "train", case.config, options=options, title=case.job)
        )
        return case.scored(final, paid=(final,))

    return build


def _on_all_labels(case: Case) -> Built:
    """Train a target adapter on all labelled examples, for epochs chosen by cross-validation."""
    folds: dict[str, Input] = {
        f"fold {n}": case.add(f"fold-{n}", "train", {}, role="target", folds=FOLDS, fold=n)
        for n in range(FOLDS)
    }
    final = case.add("final", "train", folds, role="target", folds=FOLDS)
    paid = (*(str(one) for one in folds.values()), final)
    # The adapter was trained on all labelled examples, so their losses would mean nothing.
    return case.scored(final, labelled=False, paid=paid)


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


searched: Build = _grasp()
"""A build that searches the ratio of the configured merge and fine-tunes at that ratio."""

AVERAGE: Mapping[str, Any] = {"kind": "cat", "weights": None}
SUM: Mapping[str, Any] = {"kind": "cat", "weights": (1.0, 1.0)}
LINEAR: Mapping[str, Any] = {"kind": "linear", "weights": (1.0, 1.0)}
UNSCALED: Mapping[str, Any] = {"kind": "linear", "weights": "unscaled"}
"""The merge that the published code computes: it drops the scaling of the adapters."""
LEARNED: Mapping[str, Any] = {"kind": "cat", "weights": "auto"}
SVD: Mapping[str, Any] = {"kind": "svd", "weights": None}
LABELLED = {"finetune.rows": "labelled"}
TRIPLE_STEP = {"train.finetune.learning_rate": Times(3.0)}
"""Shows whether a baseline is worse only because its training was too short."""
PAPER = {"controller": ControllerConfig(preset="paper"), "finetune.mask_schedule": "every-step"}
ADAPTIVE = {
    "finetune.mode": "restart",
    "finetune.mask_schedule": "every-step",
    "importance": "activation",
}
POST_HOC = {"merge.when": "after", "merge.weights": None}
CONTINUED = {"finetune.mode": "continue"}
_GRID_NAMES = tuple(f"grid-{ratio}" for ratio in GRID)
_LINEAR = "linear merge with weights 1 + 1 and the scaling alpha/r"
_UNSCALED = "linear merge as the published code computes it, without alpha/r (weights 1/scaling)"

METHODS: Mapping[str, Method] = {
    "zero-shot": Method("backbone alone", fixed(None), seeds="none"),
    "source": Method("source adapter", fixed("source"), seeds="none"),
    "target": Method("target adapter", fixed("target"), seeds="none"),
    "target-trained": Method("target adapter retrained with each seed", _trained(), seeds="all"),
    "source-finetuned": Method(
        "source adapter fine-tuned on the target rows",
        _finetuned("source"),
        seeds="all",
        role="baseline",
    ),
    "source-finetuned-3x": Method(
        "source adapter fine-tuned with three times the learning rate",
        _finetuned("source"),
        TRIPLE_STEP,
        seeds="all",
    ),
    "source-finetuned-labelled": Method(
        "source adapter fine-tuned, retrained on all labelled rows for the epochs that dev rows "
        "chose",
        _finetuned("source"),
        LABELLED,
        seeds="all",
    ),
    "source-finetuned-joint": Method(
        "source adapter fine-tuned on the target rows and as many source rows beside them",
        _finetuned("source", joint=True),
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
        _trained(adalora=True),
        {"train.target.learning_rate": Times(10.0)},
    ),
    "average": Method("average of the deltas, untrained", fixed(AVERAGE), seeds="none"),
    "average-finetuned": Method(
        "average of the deltas, fine-tuned unpruned",
        _finetuned(AVERAGE),
        seeds="all",
        role="baseline",
    ),
    "average-finetuned-3x": Method(
        "average of the deltas, fine-tuned unpruned with three times the learning rate",
        _finetuned(AVERAGE),
        TRIPLE_STEP,
        seeds="all",
    ),
    "average-finetuned-labelled": Method(
        "average of the deltas, fine-tuned unpruned, retrained on all labelled rows for the epochs "
        "that dev rows chose",
        _finetuned(AVERAGE),
        LABELLED,
        seeds="all",
    ),
    **{
        name: Method(about, _finetuned({"kind": "cat", "weights": weights}))
        for name, weights, about in (
            ("shrunk-0.75", (0.375, 0.375), "the average shrunk by 0.75, fine-tuned unpruned"),
            ("shrunk-0.5", (0.25, 0.25), "the average shrunk by 0.5, fine-tuned unpruned"),
            ("weights-75-25", (0.75, 0.25), "weights 0.75 + 0.25, fine-tuned unpruned"),
            ("weights-25-75", (0.25, 0.75), "weights 0.25 + 0.75, fine-tuned unpruned"),
        )
    },
    "weight-decay": Method(
        "the average, fine-tuned unpruned under weight decay 30 (0.3 % of a weight a step)",
        _finetuned(AVERAGE),
        {"train.finetune.weight_decay": 30.0},
    ),
    "sum": Method("sum of the deltas, untrained", fixed(SUM), seeds="none"),
    "sum-finetuned": Method("sum of the deltas, fine-tuned unpruned", _finetuned(SUM)),
    "linear": Method(f"{_LINEAR}, untrained", fixed(LINEAR), seeds="none"),
    "linear-finetuned": Method(f"{_LINEAR}, fine-tuned unpruned", _finetuned(LINEAR)),
    "linear-unscaled": Method(f"{_UNSCALED}, untrained", fixed(UNSCALED), seeds="none"),
    "linear-unscaled-finetuned": Method(
        f"{_UNSCALED}, fine-tuned unpruned", _finetuned(UNSCALED), seeds="all"
    ),
    "svd": Method("low-rank average of the deltas, untrained", fixed(SVD), seeds="none"),
    "svd-finetuned": Method(
        "low-rank average, fine-tuned unpruned", _finetuned(SVD), {"mask_unit": "merged"}
    ),
    "learned-weights": Method(
        "merge weights learned by probes, fine-tuned unpruned", _finetuned(LEARNED), role="baseline"
    ),
    **{
        f"{kind.replace('_', '-')}-finetuned": Method(
            f"PEFT's {kind} on the {'deltas' if kind.endswith('svd') else 'factors'}, fine-tuned",
            _finetuned({"rule": "peft", "kind": kind, "density": PEFT_DENSITY}),
        )
        for kind in ("ties", "ties_svd", "dare_linear", "dare_linear_svd")
    },
    "lorahub": Method("LoRAHub: weights by nevergrad, untrained", fixed({"rule": "lorahub"})),
    **{
        f"grid-{ratio}": Method(f"pruned at {ratio}", _finetuned("merged", ratio), seeds="all")
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
        f"{name}-{ratio}": Method(
            f"Adaptive LoRA Merge at {ratio}: {about}, pruned again after every step",
            _finetuned(start, ratio),
            ADAPTIVE,
        )
        for name, start, about in (
            ("adaptive", LINEAR, _LINEAR),
            ("adaptive-unscaled", UNSCALED, _UNSCALED),
        )
        for ratio in GRID
    },
    **{
        name: Method(
            f"Adaptive LoRA Merge over the grid, {about}, chosen by dev loss",
            Choice(tuple(f"{name}-{ratio}" for ratio in GRID), ("dev",)),
        )
        for name, about in (("adaptive", _LINEAR), ("adaptive-unscaled", _UNSCALED))
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
    "grasp-paper": Method(
        f"the published method: published controller, {_UNSCALED}",
        _grasp(UNSCALED),
        PAPER,
        seeds="all",
    ),
    "grasp-paper-scaled": Method(f"the published controller, {_LINEAR}", _grasp(LINEAR), PAPER),
    "grasp-restart": Method("this library's controller, two runs", _grasp(), seeds="all"),
    "grasp-continue": Method(
        "this library's controller, one run", _grasp(), CONTINUED, seeds="all"
    ),
    "grasp-continue-3x": Method(
        "this library's controller, one run, with three times the learning rate",
        _grasp(),
        CONTINUED | TRIPLE_STEP | {"train.search.learning_rate": Times(3.0)},
        seeds="all",
    ),
    "grasp-labelled": Method(
        "this library's controller, one run, which is then retrained on all labelled rows",
        _grasp(),
        CONTINUED | LABELLED,
        seeds="all",
    ),
    **{
        f"grasp-{name}": Method(
            f"this library's controller, two runs, {about}", _grasp(start), changes
        )
        for name, about, start, changes in (
            ("module-types", "a ratio for each type of module", "merged", {"scope": "module-type"}),
            ("layers", "a ratio for each layer", "merged", {"scope": "layer"}),
            ("adapters", "a ratio for each of the two adapters", "merged", {"scope": "adapter"}),
            ("ranks", "whole components pruned", "merged", {"structure": "rank"}),
            ("weights", "merge weights learned first", LEARNED, {}),
        )
    },
    "late-merge": Method(
        "the fine-tuned source adapter merged with the target adapter by probes",
        _post_hoc(prune=False),
        POST_HOC,
        seeds="all",
    ),
    "grasp-late": Method(
        "the fine-tuned source adapter merged with the target adapter by probes, then pruned at a "
        "ratio learned without training",
        _post_hoc(prune=True),
        POST_HOC,
        seeds="all",
    ),
    "late-merge-labelled": Method(
        "late-merge, its source adapter then retrained on all labelled rows",
        _post_hoc(prune=False),
        POST_HOC | LABELLED,
        seeds="all",
    ),
    **{
        f"recut-{schedule}": Method(
            f"pruned at 0.4, masks cut again {about}",
            _finetuned("merged", 0.4),
            {"finetune.mask_schedule": schedule},
        )
        for schedule, about in (("every-step", "every step"), (8, "every 8 steps"))
    },
    "random-0.4": Method(
        "pruned at 0.4 by masks drawn at random", _finetuned("merged", 0.4, random_masks=True)
    ),
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


def with_split_seed(config: RunConfig) -> RunConfig:
    """Return settings that divide the examples by the present seed, even if `seed` changes."""
    if config.data.split_seed is not None:
        return config
    data = config.data.model_copy(update={"split_seed": config.seed})
    return config.model_copy(update={"data": data})


def changed_settings(config: RunConfig, changes: Mapping[str, Any], examples: int) -> RunConfig:
    """Return settings with dotted changes, and with a fine-tuning as long as any other method's.

    In mode `restart` the search and the final run each have the whole length. In mode `continue`
    they share it: the search gets half of the epochs, the odd one included, or half of the steps of
    a single epoch. Unless `changes` says otherwise, a method trains on the train examples alone,
    because the other labelled examples judge it, and it merges before fine-tuning.

    Args:
        config: the run's settings.
        changes: dotted setting -> value; `Times` multiplies the configured value.
        examples: number of target train examples.
    """
    whole, mode = passes_of_result(config, examples), changes.get("finetune.mode", "restart")
    first = whole
    if mode == "continue":
        epochs = math.ceil(whole)
        first = Fraction(epochs - epochs // 2) if epochs > 1 else whole / 2
    config = with_length(config, "search", first, examples)
    if mode == "continue":
        whole -= passes_of(config.training("search"), examples)  # rounded to whole steps
    config = with_length(config, "finetune", whole, examples)
    plain: dict[str, Any] = {
        "finetune.mode": mode,
        "finetune.rows": "train",
        "merge.when": "before",
    }
    for key, value in (plain | dict(changes)).items():
        config = _changed(config, key, value)
    return config


def _changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    """Return settings with one value changed; `key` is dotted."""

    def changed(settings: Any, path: list[str]) -> Any:
        name, *below = path
        old = getattr(settings, name)
        if below:
            new = changed(old, below)
        else:
            new = value.of(old) if isinstance(value, Times) else value
        return settings.model_copy(update={name: new})

    return changed(config, key.split("."))


def build_methods(
    plan: PlanBuilder, config: RunConfig, seeds: tuple[int, ...], examples: int
) -> dict[str, Built]:
    """Add the stages of all methods to a plan; return run -> method, in the order of the tables.

    Args:
        plan: receives the adapters and their merge first, then the stages of the methods.
        config: the run's settings; its own seed divides the examples and trains the adapters.
        seeds: seeds of searches and fine-tuning; a method that is run once uses the first.
        examples: number of target train examples.
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
