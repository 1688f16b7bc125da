"""Recipes as stages: what a comparison and a run both build from `core.recipes`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.recipes.chooser import EPOCHS_UNHELD
from grasp_lora.core.recipes.recipe import STARTS, Recipe
from grasp_lora.plans.parts import (
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
        unseen: whether dev and micro-dev examples were kept from the training, so that their losses
            can be measured.
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
    unseen: bool = True
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

    def scored(self, built: Built, **options: Any) -> Built:
        """Add the scoring of a result and return the method.

        Args:
            built: the stages that make the result.
            options: further options of the scoring.
        """
        inputs = {} if built.final is None else {"adapter": built.final}
        scores = self.add("scores", "evaluate", inputs, labelled=built.unseen, **options)
        return replace(built, scores=scores)


Build = Callable[[Case], Built]


@dataclass(frozen=True)
class Times:
    """A change that multiplies the configured value of a setting by a factor."""

    factor: float

    def of(self, value: float) -> float:
        """Return the multiple, rounded to 12 digits to remove errors of binary fractions."""
        return float(f"{self.factor * value:.12g}")


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return dotted setting -> value of a recipe, for `changed_settings`."""
    found: dict[str, Any] = {}
    if recipe.rows != "train":
        found["finetune.rows"] = recipe.rows
    if recipe.merge == "after":
        found |= {"merge.when": "after", "merge.weights": None}
    if recipe.step not in (None, 1.0):
        found["train.finetune.learning_rate"] = Times(recipe.step)
        if recipe.ratio == "learned":
            found["train.search.learning_rate"] = Times(recipe.step)
    return found


def by(recipe: Recipe) -> Build:
    """Return a build of a recipe: its stages, and the scoring of its result."""

    def build(case: Case) -> Built:
        return case.scored(made_by(case, recipe), shots=recipe.shots or None)

    return build


def made_by(case: Case, recipe: Recipe) -> Built:
    """Add the stages that make the adapter of a recipe; nothing scores it.

    The settings of `case` have those of the recipe already, see `settings_of`.
    """
    if recipe.merge == "after":
        return _post_hoc(case, recipe.ratio == "learned")
    if recipe.start == "fresh" and recipe.rows == "labelled":
        like, epochs = case.adapters["target"], EPOCHS_UNHELD
        stage = new_adapter(f"{case.job}/final", case.config, like, epochs, case.job)
        final = case.plan.add(stage)
        return Built(case.job, final=final, paid=(final,), unseen=False)
    start, made = start_of(case, recipe.start)
    if not recipe.trained:
        return Built(case.job, final=start, paid=made, unseen=not _on_all_labels(recipe))
    assert start is not None, "the bare backbone has nothing to fine-tune"
    if recipe.ratio == "learned":
        return _learned(case, start, made)
    return _finetuned(case, recipe, start, made)


def new_adapter(name: str, config: RunConfig, like: Input, epochs: int, title: str) -> Stage:
    """Return the stage that trains a new adapter on all labelled examples.

    Args:
        name: of the stage.
        config: settings; the new adapter is trained as `train.finetune` says.
        like: the adapter whose modules, ranks and scaling the new one takes.
        epochs: passes over all labelled examples.
        title: of the stage.
    """
    training = config.training("finetune").model_copy(
        update={"epochs": epochs, "patience": None, "max_steps": None}
    )
    config = config.with_training("target", **training.model_dump())
    options = {"role": "target", "labelled": True}
    return Stage(name, "train", config, {"like": like}, options, title)


def _on_all_labels(recipe: Recipe) -> bool:
    """Return whether a recipe, or one that it is the mean of, trains on all labelled examples."""
    parts = recipe.start if isinstance(recipe.start, tuple) else ()
    return recipe.rows == "labelled" or any(_on_all_labels(part) for part in parts)


def start_of(case: Case, start: Any, name: str = "start") -> tuple[Input | None, tuple[str, ...]]:
    """Return the adapter that a recipe starts from (None: bare backbone), and its stages.

    Args:
        case: what the recipe is built from.
        start: a key of `STARTS`, or recipes, the mean of whose adapters is the start.
        name: name of a merge that is made for it, in the folder of the case.
    """
    if isinstance(start, tuple):
        return _mean_of(case, start, name)
    if start in ("source", "target"):
        return case.adapters[start], ()
    if start == "backbone":
        return None, ()
    if start == "merged":
        made = [case.adapters["merged"], *([case.probe] if case.probe else [])]
        return case.adapters["merged"], tuple(name for name in made if isinstance(name, str))
    if start == "fresh":
        trained = Stage(f"{case.job}/final", "train", case.config, options={"role": "target"})
        fresh = case.plan.add(replace(trained, title=case.job))
        return fresh, (fresh,)
    merge = STARTS[start].merge
    assert merge is not None, f"{start} is a merge"
    if "rule" in merge:
        merged = case.add(name, "merge", case.pair, **merge)
        return merged, (merged,)
    plain = case.config.merge.model_dump() | {"rank": None} | dict(merge)
    section = type(case.config.merge).model_validate(plain)
    config = case.config.model_copy(update={"merge": section})
    names = (f"{case.job}/{name}", f"{case.job}/weights")
    merged, probe = add_merge(case.plan, config, case.pair, *names)
    return merged, (merged, *([probe] if probe else []))


def _mean_of(case: Case, recipes: tuple[Recipe, ...], name: str) -> tuple[str, tuple[str, ...]]:
    """Return the mean of what recipes give, and the stages of all of them."""
    finals: dict[str, Input] = {}
    paid: tuple[str, ...] = ()
    for number, recipe in enumerate(recipes):
        config = case.config
        for key, value in settings_of(recipe).items():
            config = changed(config, key, value)
        part = replace(case, config=config, job=f"{case.job}/of-{number}")
        built = made_by(part, recipe)
        assert built.final is not None, "the bare backbone has no mean"
        finals[f"adapter {number}"] = built.final
        paid += built.paid
    mean = case.add(name, "merge", finals, rule="mean")
    return mean, (*dict.fromkeys(paid), mean)


def _finetuned(case: Case, recipe: Recipe, start: Input, made: tuple[str, ...]) -> Built:
    """Fine-tune a start at a ratio, on all labelled examples if configured."""
    if case.config.finetune.rows == "labelled":
        name, title = f"{case.job}/final", case.job
        final, judged = add_unpruned(case.plan, case.config, start, name, title, recipe.joint)
        paid = (*made, judged, final)
        return Built(case.job, final=final, paid=paid, ratio_from=final, unseen=False)
    # An option None equals a missing one, so recipes that do not prune share this stage.
    options = {"ratio": recipe.ratio or None, "joint": recipe.joint}
    final = case.add("final", "prune", {"start": start}, **options)
    return Built(case.job, final=final, paid=(*made, final), ratio_from=final)


def _learned(case: Case, start: Input, made: tuple[str, ...]) -> Built:
    """Search the ratio of a start and fine-tune at that ratio."""
    search = add_search(case.plan, case.config, start, f"{case.job}/search")
    final = add_final(case.plan, case.config, start, search, f"{case.job}/final")
    judged = case.plan.built(final).inputs.get("judged")
    paid = (*made, search, *([judged] if isinstance(judged, str) else []), final)
    unseen = case.config.finetune.rows == "train"
    return Built(case.job, final=final, paid=paid, ratio_from=final, search=search, unseen=unseen)


def _post_hoc(case: Case, prune: bool) -> Built:
    """Fine-tune the source adapter alone, merge it with the target adapter, prune if asked."""
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
        paid = (*paid, search, final)
        made = Built(case.job, final=final, paid=paid, ratio_from=final)
        return replace(made, search=search, probe=probe)
    if whole == tuned:
        return Built(case.job, final=merged, paid=tuple(paid), probe=probe)
    inputs: dict[str, Input] = {"source": whole, "target": pair["target"]}
    inputs |= {"weights": probe} if probe else {}
    final = case.add("merged-labelled", "merge", inputs)
    paid = (*paid, whole, final)
    return Built(case.job, final=final, paid=paid, probe=probe, unseen=False)


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
        examples: rows of an epoch, see `workbench.beside.target_epoch`.
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
        config = changed(config, key, value)
    return config


def changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    """Return settings with one value changed; `key` is dotted, `Times` multiplies the value."""

    def within(settings: Any, path: list[str]) -> Any:
        name, *below = path
        old = getattr(settings, name)
        if below:
            new = within(old, below)
        else:
            new = value.of(old) if isinstance(value, Times) else value
        return settings.model_copy(update={name: new})

    return within(config, key.split("."))
