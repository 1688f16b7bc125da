"""The stages of a run that chooses its recipe, and what their parts cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grasp_lora.base.files import RESULT, RESULT_STAGE, SMALL
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
from grasp_lora.core.recipes.recipe import STARTS as ALL_STARTS
from grasp_lora.plans.parts import add_adapters, small_stage, small_words
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.recipes import Case, changed_settings, new_adapter, settings_of, start_of
from grasp_lora.plans.run_plan import System
from grasp_lora.stages.costs import Rows, steps_cost, training_cost
from grasp_lora.stages.stage import Input, Sizes, Split, Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.beside import beside_target, target_epoch
from grasp_lora.workbench.context import LABELLED
from grasp_lora.workbench.merge_probes import LEAST_EXAMPLES
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
        groups: group of each held example; none where nothing can be chosen.
    """
    prices, spent = prices_of(config, sizes), 0.0
    if groups:
        spent = sum(simple_tokens(name, prices, sizes) for name in SIMPLE if name not in STARTS)
    if len(groups) >= LEAST_EXAMPLES:
        spent += probe_tokens(config, sizes)
    return Task(
        starts=STARTS,
        prices=prices,
        budget=config.budget * prices.plain,
        spent=spent,
        epochs=config.training("finetune").epochs,
        groups=tuple(groups),
        trained=sizes.examples(("target", "train")),
        labels=sizes.examples(*_of_target(LABELLED)),
    )


def simple_tokens(name: str, prices: Prices, sizes: Sizes) -> float:
    """Return the tokens of measuring a simple system on the held examples."""
    return prices.held + simple_recipe(name).shots * sizes.length(("target", "train"))


def probe_tokens(config: RunConfig, sizes: Sizes) -> float:
    """Return the tokens of the stages that judge prune ratios, and ranks where they are asked."""
    choices = ("ratio", "rank") if config.prefer == "small" else ("ratio",)
    probes = [Stage(choice, "probe", config, options={"choice": choice}) for choice in choices]
    return sum(KINDS[one.kind].cost(one, sizes).tokens for one in probes)


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
        self.held = sum(len(data.parts["target"].get(split, ())) for split in HELD)
        self.tests = bool(data.test_sets())
        self.adapters = add_adapters(self.plan, config)
        self.systems: list[System] = []

    @property
    def scores_simple(self) -> bool:
        """Whether systems that need no training are scored on test examples."""
        return self.tests and self.config.evaluate.baselines

    def start(self, name: str) -> Input | None:
        """Return a start: an adapter, or a merge that is made here; None is the bare backbone."""
        case = Case(self.plan, self.config, "starts", self.adapters, None, _no_other)
        return start_of(case, name, name)[0]

    def simple(self, name: str) -> str | None:
        """Add what a system that needs no training is read for; return the name of the stage.

        It is scored on the test examples where those are, unless no baselines are wanted. Its held
        examples are measured too, unless a trial begins from it and measures them. None is returned
        where there is nothing to read.
        """
        if not self.scores_simple:
            return None if name in STARTS or not self.held else self.measured(name)
        recipe = simple_recipe(name)
        assert isinstance(recipe.start, str), "a simple system is no mean"
        # Prompts are measured by themselves, because only the best of them is scored.
        labelled = name not in STARTS and self.held > 0 and not recipe.shots
        options = {"labelled": labelled, "shots": recipe.shots or None}
        return self._score(System(SIMPLE[name], name, self.start(recipe.start)), options)

    def measured(self, name: str) -> str:
        """Add the measuring of a simple system on the held examples alone."""
        recipe = simple_recipe(name)
        assert isinstance(recipe.start, str), "a simple system is no mean"
        adapter = self.start(recipe.start)
        inputs = {} if adapter is None else {"adapter": adapter}
        options = {"labelled": True, "unanswered": True, "shots": recipe.shots or None}
        title = f"measure {SIMPLE[name]}"
        return self.plan.add(
            Stage(f"trials/{name}", "evaluate", self.config, inputs, options, title)
        )

    def drop(self, name: str) -> None:
        """Take out a stage that cannot be done, and the merge that was made for it alone."""
        needs = self.plan.built(name).needs()
        self.plan.drop(name)
        self.systems = [one for one in self.systems if f"evaluations/{one.slug}" != name]
        others = {need for one in self.plan.build().stages.values() for need in one.needs()}
        for need in needs:
            if need.startswith("starts/") and need not in others:
                self.drop(need)

    def trial_stage(self, trial: Trial) -> Stage:
        """Return the stage of a trial."""
        config = self._settings(trial.recipe, trial.epochs)
        config = config.with_training("finetune", patience=PATIENCE)
        inputs = {"start": self._start_of(trial.recipe)}
        title = recipe_words(trial.recipe, self.config)
        return Stage(trial_name(trial), "prune", config, inputs, {"micro_dev": True}, title)

    def whole(self, finalist: Finalist) -> Input:
        """Add the training of a finalist on all labelled examples; return the adapter."""
        name = whole_name(finalist)
        if name is None:
            return self._start_of(finalist.recipe)
        config = self._settings(finalist.recipe, finalist.epochs)
        title = recipe_words(finalist.recipe, self.config)
        if finalist.recipe.start == "fresh":
            like, title = self.adapters["target"], f"{title}, all labels"
            return self.plan.add(new_adapter(name, config, like, finalist.epochs, title))
        start = self._start_of(finalist.recipe)
        inputs, options = {"start": start}, {"labelled": True}
        return self.plan.add(Stage(name, "prune", config, inputs, options, title))

    def final_stage(self, finalists: Sequence[Finalist], probed: Input | None) -> Stage:
        """Return the stage of the result: the mean of the finalists, or the backbone's prompt.

        Args:
            finalists: what the result is made of.
            probed: the adapter whose ranks are judged where a small one is wanted; None where they
                cannot be.
        """
        first = finalists[0].recipe
        if first.start == "backbone":
            options = {"shots": first.shots or None}
            return Stage(RESULT_STAGE, "prompt", self.config, {}, options)
        inputs: dict[str, Input] = {}
        for number, one in enumerate(finalists):
            inputs[f"adapter {number}"] = whole_name(one) or self._start_of(one.recipe)
        if probed is not None and self.config.prefer == "small":
            ranks = Stage(RANK_PROBE, "probe", self.config, {"adapter": probed}, {"choice": "rank"})
            inputs["rank"] = self.plan.add(ranks)
        # Neither the inputs' names nor missing ones are part of a key, so that it must say them.
        made_of = [whole_name(one) or one.recipe.start for one in finalists]
        options = {
            "rule": "mean",
            "made_of": [*made_of, *(["a smaller rank"] * ("rank" in inputs))],
        }
        return Stage(RESULT_STAGE, "merge", self.config, inputs, options)

    def small_stage(self, final: Stage) -> Stage | None:
        """Return the stage of the result in fewer bytes; None if none is asked for or possible.

        Args:
            final: the stage of the result; a prompt has no bytes to spare.
        """
        if self.config.budget_mb is None or final.kind == "prompt":
            return None
        return small_stage(self.config, final.name)

    def final(self, finalists: Sequence[Finalist], probed: Input | None) -> str:
        """Add the result, in fewer bytes too if asked, its scoring, and the judging of ratios.

        Args:
            finalists: what the result is made of.
            probed: the adapter whose ratios (and ranks) are judged; None where they cannot be.
        """
        stage = self.final_stage(finalists, probed)
        final, small = self.plan.add(stage), self.small_stage(stage)
        first = finalists[0].recipe
        if probed is not None:
            inputs, options = {"adapter": probed}, {"choice": "ratio"}
            self.plan.add(Stage(RATIO_PROBE, "probe", self.config, inputs, options))
        if small is not None:
            self.plan.add(small)
            if self.tests:
                self._score(System(small_words(self.config), SMALL, small.name), {})
        if self.tests:
            bare = first.start == "backbone"
            # A prompt that was scored as a simple system is scored again, in its own place.
            options = {"shots": first.shots or None, "shipped": bare}
            self._score(System(RESULT, RESULT, None if bare else final), options)
        return final

    def probed(self, finalist: Finalist, trials: Mapping[Recipe, str]) -> Input | None:
        """Return the adapter that ratios are probed on: one that no held example trained.

        Args:
            finalist: the first of the finalists.
            trials: recipe -> the stage of its trial.
        """
        if self.held < LEAST_EXAMPLES or finalist.recipe.start == "backbone":
            return None
        if finalist.epochs:
            return trials[replace(finalist.recipe, rows="train")]
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


def trial_name(trial: Trial) -> str:
    """Return the name of a trial's stage."""
    return f"trials/{slug_of(trial.recipe)}-{trial.epochs}-epochs"


def whole_name(finalist: Finalist) -> str | None:
    """Return the name of the training on all labelled examples; None where nothing is trained."""
    if not finalist.epochs:
        return None
    return f"retrained/{slug_of(finalist.recipe)}-{finalist.epochs}-epochs"


def recipe_words(recipe: Recipe, config: RunConfig) -> str:
    """Return a recipe in words: its start, and its step size where it trains."""
    name = simple_name(recipe)
    title = SIMPLE.get(name) or ALL_STARTS[name].says
    if recipe.step is None:
        return title
    rate = config.training("finetune").learning_rate * recipe.step
    if name == "fresh":
        return f"{title} trained at {_rate_words(rate)}"
    return f"{title.removesuffix(', untrained')} fine-tuned at {_rate_words(rate)}"


def _rate_words(rate: float) -> str:
    """Return a step size as people write it: 3e-4."""
    digits, power = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def shipped_words(finalists: Sequence[Finalist], config: RunConfig, labels: int) -> str:
    """Return the result in words: the recipes of its parts, and what they were trained on."""
    parts = [recipe_words(one.recipe, config) for one in finalists]
    trained = f" on all {labels} labels, unpruned" if any(one.epochs for one in finalists) else ""
    return f"mean of {len(parts)}{trained}: {'; '.join(parts)}" if parts[1:] else parts[0] + trained
