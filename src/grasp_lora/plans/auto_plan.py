"""The stages of a run that chooses its recipe, and what their parts cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.recipes.chooser import (
    PATIENCE,
    Finalist,
    Prices,
    Task,
    Trial,
    simple_name,
    simple_recipe,
)
from grasp_lora.core.recipes.recipe import SHOTS, Recipe
from grasp_lora.plans.parts import add_adapters
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.recipes import Case, changed_settings, settings_of, start_of
from grasp_lora.plans.run_plan import System
from grasp_lora.stages.costs import Rows, steps_cost, training_cost
from grasp_lora.stages.stage import Input, Sizes, Split, Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.beside import beside_target, target_epoch
from grasp_lora.workbench.context import LABELLED
from grasp_lora.workbench.rows import RunData

STARTS = ("source", "average")
"""Starts that are fine-tuned in trials."""
RATIO_PROBE, RANK_PROBE = "ratio-probe", "rank-probe"
HELD = ("dev", "micro_dev")
"""Splits of the target examples that trials are measured on, in this order."""
SIMPLE: Mapping[str, str] = {
    "backbone": "zero-shot",
    **{f"few-shot-{count}": f"few-shot, {count} examples in the prompt" for count in SHOTS},
    "source": "source adapter",
    "target": "target adapter",
    "average": "average of the adapters, untrained",
}
"""Simple system -> its name in tables."""


def task_of(config: RunConfig, sizes: Sizes, groups: Sequence[str]) -> Task:
    """Return what is to be chosen, and what it may cost.

    Args:
        config: the run's settings.
        sizes: the sizes of all sets of examples.
        groups: group of each held example.
    """
    prices = prices_of(config, sizes)
    examples = ("target", "train")
    solved = sum(simple_recipe(name).shots for name in SIMPLE) * sizes.length(examples)
    read = sum(name not in STARTS for name in SIMPLE) * prices.held
    choices = ("ratio", "rank") if config.prefer == "small" else ("ratio",)
    probes = [Stage(name, "probe", config, options={"choice": name}) for name in choices]
    probed = sum(KINDS[one.kind].cost(one, sizes).tokens for one in probes)
    return Task(
        starts=STARTS,
        prices=prices,
        budget=config.budget * prices.plain,
        spent=read + solved + probed,
        epochs=config.training("finetune").epochs,
        groups=tuple(groups),
        trained=sizes.examples(examples),
        labels=sizes.examples(*_of_target(LABELLED)),
    )


def prices_of(config: RunConfig, sizes: Sizes) -> Prices:
    """Return what readings cost, in tokens, from the sizes of the sets."""
    training, dev = config.training("finetune"), ("target", "dev")
    train = Rows((("target", "train"),), beside_target(config), config.seed)
    once = training.model_copy(update={"epochs": 1, "max_steps": None})
    return Prices(
        plain=training_cost(training, sizes, train, dev).tokens,
        train=steps_cost(once, sizes, train).tokens,
        held=sizes.reading(1, *_of_target(HELD)).tokens,
        labelled=steps_cost(once, sizes, replace(train, labelled=_of_target(LABELLED))).tokens,
    )


def _of_target(splits: Sequence[str]) -> tuple[Split, ...]:
    return tuple(("target", split) for split in splits)


class AutoPlan:
    """Stages of a run that chooses; each is added once.

    Args:
        config: the run's settings.
        data: the examples.
    """

    def __init__(self, config: RunConfig, data: RunData):
        self.config, self.plan = config, PlanBuilder()
        self.count = target_epoch(config, data)
        self.tests = bool(data.test_sets())
        self.adapters = add_adapters(self.plan, config)
        self.systems: list[System] = []

    def start(self, name: str) -> Input | None:
        """Return a start: an adapter, or a merge that is made here; None is the bare backbone."""
        case = Case(self.plan, self.config, "starts", self.adapters, None, _no_other)
        case = replace(case, job=f"starts/{name}")
        return start_of(case, name)[0]

    def simple(self, name: str) -> str | None:
        """Add the scoring of a system that needs no training; return the name of the stage.

        Its held examples are measured too, unless a trial begins from it and measures them. Without
        test examples adapters are measured alone: None is returned for the bare backbone.
        """
        recipe = simple_recipe(name)
        assert isinstance(recipe.start, str), "a simple system is no mean"
        if not self.tests:
            return self._measured(name, self.start(recipe.start))
        options = {"labelled": name not in STARTS, "shots": recipe.shots or None}
        return self._score(System(SIMPLE[name], name, self.start(recipe.start)), options)

    def _measured(self, name: str, adapter: Input | None) -> str | None:
        if adapter is None or name in STARTS:
            return None
        options = {"untrained": True, "micro_dev": True}
        stage = Stage(f"trials/{name}", "prune", self.config, {"start": adapter}, options)
        return self.plan.add(replace(stage, title=SIMPLE[name]))

    def drop(self, name: str) -> None:
        """Take out a stage that cannot be done."""
        self.plan.drop(name)
        self.systems = [one for one in self.systems if f"evaluations/{one.slug}" != name]

    def trial(self, trial: Trial) -> str:
        """Add a trial and return its name."""
        config = self._settings(trial.recipe, trial.epochs)
        config = config.with_training("finetune", patience=PATIENCE)
        start = self._start_of(trial.recipe)
        name = f"trials/{slug_of(trial.recipe)}"
        stage = Stage(name, "prune", config, {"start": start}, {"micro_dev": True})
        return self.plan.add(replace(stage, title=recipe_words(trial.recipe, self.config)))

    def whole(self, finalist: Finalist) -> Input:
        """Add the training of a finalist on all labelled examples; return the adapter."""
        start = self._start_of(finalist.recipe)
        if finalist.epochs == 0:
            return start
        config = self._settings(finalist.recipe, finalist.epochs)
        name = f"retrained/{slug_of(finalist.recipe)}"
        options = {"labelled": True}
        stage = Stage(name, "prune", config, {"start": start}, options)
        return self.plan.add(
            replace(stage, title=f"{recipe_words(finalist.recipe, self.config)}, all labels")
        )

    def final(self, finalists: Sequence[Finalist]) -> str:
        """Add the result: the mean of the finalists, or the prompt of the bare backbone."""
        first = finalists[0].recipe
        if first.start == "backbone":
            options = {"shots": first.shots or None}
            final = self.plan.add(Stage("final", "prompt", self.config, {}, options))
            scored = System("final", "final", None)
        else:
            inputs = {f"adapter {n}": self.whole(one) for n, one in enumerate(finalists)}
            if self.config.prefer == "small":
                inputs["rank"] = self.plan.add(self.rank_probe(self._probed(finalists[0])))
            final = self.plan.add(Stage("final", "merge", self.config, inputs, {"rule": "mean"}))
            self.plan.add(self.ratio_probe(self._probed(finalists[0])))
            options, scored = {}, System("final", "final", final)
        if self.tests:
            self._score(scored, options)
        return final

    def ratio_probe(self, adapter: Input) -> Stage:
        """Return the stage that prunes an adapter without training, and judges the ratios."""
        inputs, options = {"adapter": adapter}, {"choice": "ratio"}
        return Stage(RATIO_PROBE, "probe", self.config, inputs, options)

    def rank_probe(self, adapter: Input) -> Stage:
        """Return the stage that finds the smallest rank that will do."""
        inputs, options = {"adapter": adapter}, {"choice": "rank"}
        return Stage(RANK_PROBE, "probe", self.config, inputs, options)

    def _probed(self, finalist: Finalist) -> Input:
        """Return the adapter that ratios are probed on: one that no held example trained."""
        if finalist.epochs:
            return f"trials/{slug_of(finalist.recipe)}"
        return self._start_of(finalist.recipe)

    def _score(self, system: System, options: Mapping[str, Any]) -> str:
        inputs = {} if system.adapter is None else {"adapter": system.adapter}
        name, title = f"evaluations/{system.slug}", f"evaluate {system.name}"
        self.systems.append(system)
        return self.plan.add(Stage(name, "evaluate", self.config, inputs, dict(options), title))

    def _start_of(self, recipe: Recipe) -> Input:
        assert isinstance(recipe.start, str), "a trial starts from one adapter"
        start = self.start(recipe.start)
        assert start is not None, "the bare backbone has no adapter"
        return start

    def _settings(self, recipe: Recipe, epochs: int) -> RunConfig:
        changes = settings_of(replace(recipe, rows="train"))
        config = changed_settings(self.config, changes, self.count)
        return config.with_training("finetune", epochs=epochs, max_steps=None)


def _no_other(method: str) -> Any:
    raise AssertionError(f"a start needs no other method, such as {method}")


def slug_of(recipe: Recipe) -> str:
    """Return a name for folders."""
    return str(recipe.start) if recipe.step is None else f"{recipe.start}-{recipe.step:g}x"


def recipe_words(recipe: Recipe, config: RunConfig) -> str:
    """Return a recipe in words: its start, and its step size where it trains."""
    title = SIMPLE[simple_name(recipe)]
    if recipe.step is None:
        return title
    rate = config.training("finetune").learning_rate * recipe.step
    return f"{title.removesuffix(', untrained')} fine-tuned at {rate:.2g}"


def finalist_words(finalist: Finalist, config: RunConfig, labels: int) -> str:
    """Return a finalist in words: its recipe, and what it was trained on."""
    says = recipe_words(finalist.recipe, config)
    if not finalist.epochs:
        return says
    return f"{says} on all {labels} labels, unpruned"
