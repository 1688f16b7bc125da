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
from grasp_lora.core.evidence.groups import Gain, critical_value
from grasp_lora.core.recipes.chooser import (
    Decision,
    Task,
    Told,
    Trial,
    ask,
    decide,
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
    build.simple()
    work_off(build.plan.build(), out, session, options)
    held = [example.group for split in HELD for example in session.context.encoded("target", split)]
    task, told = task_of(config, sizes, held), ()
    simple = {name: _losses(out / "evaluations" / name) for name in SIMPLE if name not in STARTS}
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
    probed = plan.cost(sizes)["ratio-probe"].tokens
    spent = _spent(task, told) + epochs * task.prices.labelled + probed
    parts = (task, told, simple, decision, config, labels, spent)
    return Chosen(plan, build.adapters, tuple(build.systems), *parts)


def first_plan(config: RunConfig, data: RunData) -> Plan:
    """Return the plan up to the first trials; later stages depend on their results."""
    build = AutoPlan(config, data)
    build.simple()
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
    judged = [fmean(one) for one in zip(*(o.judged for o in decision.finalists), strict=True)]
    simple = result.simple.get(decision.simple)
    gain = decision.gain
    return {
        "ships": result.ships,
        "why": decision.why,
        "finalists": [
            {"recipe": slug_of(one.recipe), "epochs": one.epochs, "dev_loss": fmean(one.judged)}
            for one in decision.finalists
        ],
        "dev_loss": fmean(judged),
        "simple": None
        if simple is None
        else {"name": SIMPLE[decision.simple], "dev_loss": fmean(simple)},
        "gain": None if gain is None else asdict(gain) | {"interval": interval_of(gain)},
        "tried": [_about_trial(one, result.config) for one in result.told],
        "simple_systems": {name: fmean(losses) for name, losses in result.simple.items()},
        "price": {
            "tokens": round(result.spent),
            "plain_runs": result.spent / task.prices.plain,
            "budget": result.config.budget,
        },
    }


def interval_of(gain: Gain) -> tuple[float, float]:
    """Return the 95 % interval of a gain, in nats."""
    half = critical_value(gain.groups - 1, 0.025) * gain.error
    return gain.gain - half, gain.gain + half


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
    except Diverged as error:
        return Told(trial, (), str(error))
    rows = facts_of(out / name)["rows"]
    return Told(trial, tuple(tuple(_known(loss) for loss in one) for one in rows))


def _losses(folder: Path) -> tuple[float, ...]:
    """Return the losses of the held examples of an evaluation, in nats."""
    stored = read_json(folder / "losses.json")
    return tuple(_known(loss) for split in HELD for loss in stored.get(split, []))


def _known(loss: float | None) -> float:
    # JSON has null for a loss that is not finite.
    return math.nan if loss is None else loss


def _spent(task: Task, told: Sequence[Told]) -> float:
    return task.spent + sum(one.tokens(task.prices) for one in told)


def _asked_line(task: Task, told: Sequence[Told], asked: Sequence[Trial], config: RunConfig) -> str:
    paid = _spent(task, told)
    most = sum(task.prices.trial(one.epochs) for one in asked)
    names = ", ".join(slug_of(one.recipe) for one in asked)
    runs = task.prices.plain
    return (
        f"budget {config.budget:g} plain runs ({task.budget:,.0f} tokens), spent "
        f"{paid / runs:.2f}; next: {names}, at most {most / runs:.2f}"
    )
