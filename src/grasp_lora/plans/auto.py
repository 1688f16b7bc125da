"""A run that chooses its recipe: trials, then the finalists on all labels, then their mean.

`core.recipes.chooser` decides. This module turns what it asks for into stages, and what they
measured into what it is told. The plan grows from round to round, and each round depends on results
alone, so an interrupted run goes on from the trials that are done, with another budget too.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from grasp_lora.base.choice import lowest
from grasp_lora.base.files import RESULT, SMALL, read_json
from grasp_lora.base.words import shown_path
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.recipes.chooser import (
    PATIENCE,
    Decision,
    Finalist,
    Task,
    Told,
    Trial,
    ask,
    decide,
    simple_recipe,
    spent_on,
    without_held,
)
from grasp_lora.core.recipes.recipe import Recipe
from grasp_lora.plans.auto_plan import (
    HELD,
    SIMPLE,
    STARTS,
    AutoPlan,
    probe_tokens,
    recipe_words,
    shipped_words,
    simple_tokens,
    slug_of,
)
from grasp_lora.plans.executor import Options, state_of, work_off
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.run_plan import System
from grasp_lora.plans.session import Session
from grasp_lora.report.choice import asked_line, not_applicable
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Input, Sizes, Stage
from grasp_lora.training.trainer import Diverged
from grasp_lora.workbench.beside import beside_target
from grasp_lora.workbench.context import LABELLED
from grasp_lora.workbench.fit import epoch_steps
from grasp_lora.workbench.processes import decided_by_main
from grasp_lora.workbench.rows import RunData


class FinalDiffers(ValueError):
    """The folder holds another result than the one that is chosen now."""


@dataclass(frozen=True)
class Measured:
    """A simple system on the held examples.

    Attributes:
        losses: loss of each held example, in nats.
        path: the stage that measured them.
        tokens: what that read; 0 where a trial measured them.
    """

    losses: tuple[float, ...]
    path: str
    tokens: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """A run that has decided.

    Attributes:
        plan: all stages.
        adapters: "source" and "target" -> adapter.
        systems: rows of the result table, the result last; empty where there is nothing to test on.
        task: what was to be chosen.
        told: the outcomes of the trials.
        trials: recipe -> the stage of its trial.
        simple: simple system -> what was measured.
        refused: what cannot be used here, in words -> why.
        decision: what is shipped.
        config: the run's settings.
        labels: number of all labelled examples.
        spent: tokens of the choice: what was read, trained and retrained.
        probed: whether prune ratios were judged.
    """

    plan: Plan
    adapters: Mapping[str, Input]
    systems: tuple[System, ...]
    task: Task
    told: tuple[Told, ...]
    trials: Mapping[Recipe, str]
    simple: Mapping[str, Measured]
    refused: Mapping[str, str]
    decision: Decision
    config: RunConfig
    labels: int
    spent: float
    probed: bool

    @property
    def ships(self) -> str:
        """The result in words."""
        return shipped_words(self.decision.finalists, self.config, self.labels)


def chosen(task: Task, session: Session, sizes: Sizes, options: Options) -> Chosen:
    """Do trials within the budget, decide, and make the result.

    Args:
        task: what is to be chosen, see `first_asked`.
        session: examples, backbone and settings; results go below `config.output`.
        sizes: the sizes of all sets of examples, for prices.
        options: how stages are done.

    Raises:
        ValueError: nothing has a finite loss on the held examples.
        FinalDiffers: the folder holds another result, and `options.overwrite` is not set.
    """
    work = _Choosing(task, session, sizes, options)
    work.measure_simple()
    if not task.groups:
        decision = without_held(task)
        session.context.reporter.say(decision.why)
    else:
        decision = work.tried_and_decided()
    work.check_final(decision)
    return work.finished(work.retrained(decision))


def first_asked(task: Task) -> tuple[Trial, ...]:
    """Return the trials of the first round; none where there are no held examples.

    Raises:
        ValueError: the budget is too small.
    """
    if task.groups:
        return ask(task, ())
    without_held(task)
    return ()


def first_plan(config: RunConfig, data: RunData, asked: Sequence[Trial]) -> Plan:
    """Return the plan up to the first trials; later stages depend on their results."""
    build = AutoPlan(config, data)
    for name in SIMPLE:
        if not simple_recipe(name).shots:
            build.simple(name)
        elif build.held:
            build.measured(name)
    for trial in asked:
        build.plan.add(build.trial_stage(trial))
    return build.plan.build()


def tidy_choice(out: Path) -> None:
    """Remove what stages that could not be done have left in a finished run folder."""
    for folder in ("trials", "retrained", "evaluations", "starts"):
        for left in (out / folder).glob("*.work"):
            shutil.rmtree(left, ignore_errors=True)
        for lock in (out / folder).glob("*.lock"):
            lock.unlink(missing_ok=True)


@dataclass
class _Choosing:
    """A choice that is under way."""

    task: Task
    session: Session
    sizes: Sizes
    options: Options
    simple: dict[str, Measured] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    told: tuple[Told, ...] = ()
    trials: dict[Recipe, str] = field(default_factory=dict)
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.config, self.out = self.session.config, self.session.config.output
        self.build = AutoPlan(self.config, self.session.data)

    def work(self, options: Options | None = None) -> None:
        """Do all stages of the plan that are not done yet."""
        work_off(self.build.plan.build(), self.out, self.session, options or self.options)

    def refuse(self, says: str, why: str) -> None:
        """Note and say that something cannot be used here."""
        self.refused[says] = why
        self.session.context.reporter.say(f"{says}: {not_applicable(why)}")

    def measure_simple(self) -> None:
        """Score what needs no training, and measure its held examples.

        Answers after a long prompt take long, so of the prompts only the best one is scored.
        """
        held = bool(self.task.groups)
        for name in SIMPLE:
            prompt = simple_recipe(name).shots > 0
            stage = self.build.simple(name) if not prompt else None
            if prompt and held:
                stage = self.build.measured(name)
            if stage is not None:
                self._measure(name, stage, name not in STARTS and held)
        self._score_best_prompt()

    def _score_best_prompt(self) -> None:
        prompts = {n: fmean(one.losses) for n, one in self.simple.items() if simple_recipe(n).shots}
        best = lowest(prompts)
        if best is None or not self.build.scores_simple:
            return
        stage = self.build.simple(best)
        assert stage is not None, "simple systems are scored"
        self._measure(best, stage, held=False)
        if SIMPLE[best] not in self.refused:
            self.simple[best] = replace(self.simple[best], path=stage)

    def _measure(self, name: str, stage: str, held: bool) -> None:
        try:
            self.work()
        except NotApplicable as error:
            self.build.drop(stage)
            self.refuse(SIMPLE[name], str(error))
            return
        if held:
            tokens = simple_tokens(name, self.task.prices, self.sizes)
            self.simple[name] = Measured(_losses(self.out / stage), stage, tokens)
            self.spent += tokens

    def tried_and_decided(self) -> Decision:
        """Do the trials that the budget allows, and decide."""
        while asked := ask(self.task, self.told):
            spent = spent_on(self.task, self.told)
            most = sum(self.task.prices.trial(one.epochs) for one in asked)
            names = [slug_of(one.recipe) for one in asked]
            plain = self.task.prices.plain
            self.session.context.reporter.say(asked_line(names, spent / plain, most / plain))
            self.told = (*self.told, *(self._tried(trial) for trial in asked))
        for name in STARTS:
            self._measure_start(name)
        losses = {name: one.losses for name, one in self.simple.items()}
        return decide(self.task, self.told, losses, self.config.prefer)

    def _measure_start(self, name: str) -> None:
        """Measure a start where no trial has done so."""
        if name in self.simple or SIMPLE[name] in self.refused:
            return
        for one in self.told:
            if one.trial.recipe.start == name and one.losses:
                self.simple[name] = Measured(one.losses[0], self.trials[one.trial.recipe])
                return
        self._measure(name, self.build.measured(name), held=True)

    def _tried(self, trial: Trial) -> Told:
        """Do a trial and return its outcome.

        One that diverges is told as one whose epochs have no finite loss.
        """
        stage = self._stage_of(trial)
        name = self.trials[trial.recipe] = self.build.plan.add(stage)
        says, start = recipe_words(trial.recipe, self.config), str(trial.recipe.start)
        try:
            self.work()
        except NotApplicable as error:
            self.build.drop(name)
            self.refuse(says, str(error))
            return Told(trial, (), str(error))
        except Diverged as error:
            self.build.drop(name)
            self.refuse(says, error.why)
            self._measure_start(start)
            if start not in self.simple:
                return Told(trial, (), error.why)
            first = self.simple[start].losses
            lost = (tuple(math.nan for _ in first),) * self._epochs_begun(stage, error)
            return Told(trial, (first, *lost), error.why)
        rows = facts_of(self.out / name)["rows"][: trial.epochs + 1]
        return Told(trial, tuple(tuple(_known(loss) for loss in one) for one in rows))

    def _epochs_begun(self, stage: Stage, error: Diverged) -> int:
        context, training = self.session.context_of(stage), stage.config.training("finetune")
        steps = epoch_steps(context, training, "target", beside_target(stage.config))
        return max(1, math.ceil(error.steps / steps))

    def _stage_of(self, trial: Trial) -> Stage:
        """Return the stage of a trial, or a finished one that shows the same.

        Training does not depend on the number of epochs to come. So a longer trial of the same
        recipe shows what a shorter one would, and one that ran out of patience what a longer would.
        """

        def epochs() -> int:
            for count in self._epochs_tried(trial):
                stage = self.build.trial_stage(replace(trial, epochs=count))
                done = state_of(stage, self.out, self.session).state == "done"
                if done and _shows(facts_of(self.out / stage.name)["rows"], trial):
                    return count
            return trial.epochs

        return self.build.trial_stage(replace(trial, epochs=decided_by_main(epochs)))

    def _epochs_tried(self, trial: Trial) -> list[int]:
        """Return the lengths of trials of a recipe that may be there, the one asked for first."""
        before, after = f"{slug_of(trial.recipe)}-", "-epochs"
        there = [one.name for one in (self.out / "trials").glob(f"{before}*{after}")]
        counts = [name.removeprefix(before).removesuffix(after) for name in there]
        found = {int(count) for count in counts if count.isdigit()}
        return [trial.epochs, *sorted(found - {trial.epochs})]

    def check_final(self, decision: Decision) -> None:
        """Check that the folder holds no other result, before anything is trained for it.

        Raises:
            FinalDiffers: it does, and may not be replaced.
        """
        probed = self.build.probed(decision.finalists[0], self.trials)
        final = self.build.final_stage(decision.finalists, probed)
        small = self.build.small_stage(final)
        for name, stage in {RESULT: final, SMALL: small}.items():
            if stage is None:
                continue
            found = decided_by_main(lambda one=stage: state_of(one, self.out, self.session))
            if found.state == "differs" and not self.options.overwrite:
                raise FinalDiffers(
                    f"{shown_path(self.out / name)} would be another result: "
                    f"{'; '.join(found.why)}. It is kept as it is; pass --overwrite to replace it, "
                    "no finished trial is done again"
                )

    def retrained(self, decision: Decision) -> Decision:
        """Train the finalists on all labels; leave out those that diverge.

        What is there of an earlier result is replaced: `check_final` has allowed it, and all else
        was compared before.
        """
        kept: list[Finalist] = []
        for one in decision.finalists:
            name = self.build.whole(one) if one.epochs else None
            try:
                self.work(self.options.replacing())
            except Diverged as error:
                assert isinstance(name, str), "what diverges is trained here"
                self.build.drop(name)
                self.refuse(f"{recipe_words(one.recipe, self.config)}, on all labels", error.why)
            else:
                kept.append(one)
            self.spent += one.epochs * self.task.prices.labelled
        lost = len(decision.finalists) - len(kept)
        judged = any(one.judged for one in kept)
        if judged or (kept and not self.task.groups):
            why = f"{decision.why} {lost} that diverged on all labels left out." if lost else ""
            return replace(decision, finalists=tuple(kept), why=why or decision.why)
        if self.task.groups:
            losses = {name: one.losses for name, one in self.simple.items()}
            return decide(self.task, (), losses, self.config.prefer)
        why = "No dev or micro-dev rows, and training on all labels diverged: nothing is trained."
        return replace(decision, finalists=(Finalist(Recipe("source", None), 0, ()),), why=why)

    def finished(self, decision: Decision) -> Chosen:
        """Make the result, judge its ratios and score it."""
        probed = self.build.probed(decision.finalists[0], self.trials)
        self.build.final(decision.finalists, probed)
        self.work(self.options.replacing())
        context = self.session.context
        spent = self.spent + sum(one.tokens(self.task.prices) for one in self.told)
        spent += 0 if probed is None else probe_tokens(self.config, self.sizes)
        return Chosen(
            plan=self.build.plan.build(),
            adapters=self.build.adapters,
            systems=tuple(self.build.systems),
            task=self.task,
            told=self.told,
            trials=self.trials,
            simple={name: self.simple[name] for name in SIMPLE if name in self.simple},
            refused=self.refused,
            decision=decision,
            config=self.config,
            labels=sum(len(context.encoded("target", split)) for split in LABELLED),
            spent=spent,
            probed=probed is not None,
        )


def _shows(rows: Sequence[Sequence[float | None]], trial: Trial) -> bool:
    """Return whether the losses of a finished trial show what another of its recipe would."""
    found = Told(trial, tuple(tuple(_known(loss) for loss in one) for one in rows))
    done = len(rows) - 1
    # The adapter that is kept is that of the best epoch, which must be one of those asked for.
    return found.best <= trial.epochs if done >= trial.epochs else done - found.best >= PATIENCE


def _losses(folder: Path) -> tuple[float, ...]:
    """Return the losses of the held examples of an evaluation, in nats."""
    stored = read_json(folder / "losses.json")
    return tuple(_known(loss) for split in HELD for loss in stored.get(split, []))


def _known(loss: float | None) -> float:
    # JSON has null for a loss that is not finite.
    return math.nan if loss is None else loss
