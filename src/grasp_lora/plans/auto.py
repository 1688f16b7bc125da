"""A run that chooses its recipe: trials, then the finalists on all labels, then their mean.

`core.recipes.chooser` decides. This module turns what it asks for into stages, and what they
measured into what it is told. The plan grows from round to round, and each round depends on results
alone, so an interrupted run goes on from the trials that are done, with another budget too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.base.files import jsonable, read_json, write_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.recipes.chooser import (
    Decision,
    Task,
    Told,
    Trial,
    ask,
    decide,
    simple_recipe,
    spent_on,
)
from grasp_lora.plans.auto_plan import (
    HELD,
    SIMPLE,
    STARTS,
    AutoPlan,
    finalist_words,
    recipe_words,
    slug_of,
    task_of,
)
from grasp_lora.plans.executor import Options, work_off
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.run_plan import System
from grasp_lora.plans.session import Session
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Input, Sizes
from grasp_lora.training.trainer import Diverged
from grasp_lora.workbench.context import LABELLED
from grasp_lora.workbench.rows import RunData


@dataclass(frozen=True)
class Chosen:
    """A run that has decided.

    Attributes:
        plan: all stages.
        adapters: "source" and "target" -> adapter.
        systems: rows of the result table, the result last; empty where there is nothing to test on.
        task: what was to be chosen.
        told: the outcomes of the trials.
        simple: simple system -> loss of each held example, in nats.
        refused: simple system -> why it cannot be used here.
        decision: what is shipped.
        config: the run's settings.
        labels: number of all labelled examples.
        spent: tokens of the choice: what was read, trained and retrained.
    """

    plan: Plan
    adapters: Mapping[str, Input]
    systems: tuple[System, ...]
    task: Task
    told: tuple[Told, ...]
    simple: Mapping[str, tuple[float, ...]]
    refused: Mapping[str, str]
    decision: Decision
    config: RunConfig
    labels: int
    spent: float

    @property
    def ships(self) -> str:
        """The result in words."""
        parts = [finalist_words(one, self.config, self.labels) for one in self.decision.finalists]
        return parts[0] if len(parts) == 1 else f"mean of {len(parts)}: {'; '.join(parts)}"


def chosen(config: RunConfig, session: Session, sizes: Sizes, options: Options) -> Chosen:
    """Do trials within the budget, decide, and make the result.

    Args:
        config: the run's settings; results go below `config.output`.
        session: examples and backbone.
        sizes: the sizes of all sets of examples, for prices.
        options: how stages are done.

    Raises:
        ValueError: nothing has a finite loss on the held examples.
    """
    out, build = config.output, AutoPlan(config, session.data)
    held = [example.group for split in HELD for example in session.context.encoded("target", split)]
    task, told = task_of(config, sizes, held), ()
    least = ask(task, ())  # a budget that is too small is refused before any work
    assert least, "the least budget allows a trial"
    simple, refused = _simple_losses(build, out, session, options)
    while asked := ask(task, told):
        session.context.reporter.say(_asked_line(task, told, asked, config))
        told = (*told, *(_tried(build, trial, out, session, options) for trial in asked))
    simple |= {str(one.trial.recipe.start): one.losses[0] for one in told if one.losses}
    decision = decide(task, told, simple, config.prefer)
    build.final(decision.finalists)
    plan = build.plan.build()
    work_off(plan, out, session, options)
    labels = sum(len(session.context.encoded("target", split)) for split in LABELLED)
    epochs = sum(one.epochs for one in decision.finalists)
    spent = spent_on(task, told) + epochs * task.prices.labelled
    parts = (task, told, simple, refused, decision, config, labels, spent)
    return Chosen(plan, build.adapters, tuple(build.systems), *parts)


def first_plan(config: RunConfig, data: RunData) -> Plan:
    """Return the plan up to the first trials; later stages depend on their results."""
    build = AutoPlan(config, data)
    for name in SIMPLE:
        if not simple_recipe(name).shots:  # solved examples may not fit this model
            build.simple(name)
    return build.plan.build()


def publish_choice(out: Path, result: Chosen, config: RunConfig) -> None:
    """Write recipe.json and ratio.json into the run folder."""
    write_json(out / "recipe.json", jsonable(about_choice(result)))
    ratio = read_json(out / "ratio-probe" / "ratio.json")
    changed = config.changed_from_preset()
    preset = f"{config.preset}, changed" if changed else config.preset
    write_json(out / "ratio.json", ratio | {"preset": preset, "changed_from_preset": changed})


def about_choice(result: Chosen) -> dict[str, Any]:
    """Return the content of recipe.json."""
    task, decision = result.task, result.decision
    judged = [fmean(one.judged) for one in decision.finalists]
    simple = None if decision.simple is None else _about_simple(decision.simple, result)
    gain = decision.gain
    kept = {one.recipe.start: one.recipe.step for one in decision.finalists}
    return {
        "ships": result.ships,
        "trained": any(one.epochs for one in decision.finalists),
        "why": decision.why,
        "finalists": [
            {"recipe": slug_of(one.recipe), "epochs": one.epochs, "dev_loss": fmean(one.judged)}
            for one in decision.finalists
        ],
        "dev_loss": fmean(judged),
        "simple": simple,
        "gain": None if gain is None else {"gain": gain.gain, "interval": (gain.low, gain.high)},
        "measured": None if decision.measured is None else asdict(decision.measured),
        "tried": [
            _about_trial(one, result.config)
            | {"shipped": kept.get(one.trial.recipe.start, 0) == one.trial.recipe.step}
            for one in result.told
        ],
        "simple_systems": [_about_simple(name, result) for name in result.simple],
        "price": {
            "tokens": round(result.spent),
            "plain_runs": result.spent / task.prices.plain,
            "budget": result.config.budget,
        },
    }


def _about_simple(name: str, result: Chosen) -> dict[str, Any]:
    loss = fmean(result.simple[name])
    return {"name": SIMPLE[name], "dev_loss": loss, "path": f"evaluations/{name}"}


def _about_trial(told: Told, config: RunConfig) -> dict[str, Any]:
    recipe, means = told.trial.recipe, [fmean(one) for one in told.losses]
    return {
        "recipe": slug_of(recipe),
        "says": recipe_words(recipe, config),
        "path": f"trials/{slug_of(recipe)}",
        "epochs": told.best if means else None,
        "dev_loss": means[told.best] if means else None,
        "curve": means,
        "refused": told.refused,
    }


def _tried(build: AutoPlan, trial: Trial, out: Path, session: Session, options: Options) -> Told:
    """Do a trial and return its outcome; one that diverges is told as such."""
    name = build.trial(trial)
    try:
        work_off(build.plan.build(), out, session, options)
    except (Diverged, NotApplicable) as error:
        build.drop(name)
        return Told(trial, (), str(error))
    rows = facts_of(out / name)["rows"]
    return Told(trial, tuple(tuple(_known(loss) for loss in one) for one in rows))


def _simple_losses(
    build: AutoPlan, out: Path, session: Session, options: Options
) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Score what needs no training; return its losses of the held examples, and why some cannot."""
    losses: dict[str, tuple[float, ...]] = {}
    refused: dict[str, str] = {}
    for name in SIMPLE:
        stage = build.simple(name)
        if stage is None:
            continue
        try:
            work_off(build.plan.build(), out, session, options)
        except NotApplicable as error:
            build.drop(stage)
            refused[name] = str(error)
            continue
        if name not in STARTS:
            losses[name] = _losses(out / stage)
    return losses, refused


def _losses(folder: Path) -> tuple[float, ...]:
    """Return the losses of the held examples of an evaluation or a measurement, in nats."""
    measured = facts_of(folder).get("rows")
    if measured:
        return tuple(_known(loss) for loss in measured[0])
    stored = read_json(folder / "losses.json")
    return tuple(_known(loss) for split in HELD for loss in stored.get(split, []))


def _known(loss: float | None) -> float:
    # JSON has null for a loss that is not finite.
    return math.nan if loss is None else loss


def _asked_line(task: Task, told: Sequence[Told], asked: Sequence[Trial], config: RunConfig) -> str:
    paid = spent_on(task, told)
    most = sum(task.prices.trial(one.epochs) for one in asked)
    names = ", ".join(slug_of(one.recipe) for one in asked)
    runs = task.prices.plain
    return (
        f"budget {config.budget:g} plain runs ({task.budget:,.0f} tokens), spent "
        f"{paid / runs:.2f}; next: {names}, at most {most / runs:.2f}"
    )
