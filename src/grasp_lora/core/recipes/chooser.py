"""Choose a recipe within a budget: ask for trials, be told their losses, decide.

Everything here is a pure function of what was told, so an interrupted choice goes on from the
trials that are done. A trial fine-tunes a start on the train examples and measures the held
examples, dev and micro-dev together, after every epoch. The decision is by the losses of the held
examples, in pairs and over contexts. The choice is our departure from arXiv 2601.06702.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from grasp_lora.core.evidence.crossfit import finite_only, gain_of_best, within_one_error_of_best
from grasp_lora.core.evidence.groups import Gain, mean_gain
from grasp_lora.core.recipes.gain import Expected, expected, expected_of_labels
from grasp_lora.core.recipes.recipe import Recipe

Prefer = Literal["best", "small", "simple"]
FIRST: Mapping[str, float] = {"source": 3.0, "average": 1.0}
"""Start -> multiple of the configured step size that is tried first. The source adapter has far to
go, an average is near and overshoots at a larger step."""
STEPS = (1.0, 3.0, 10.0)
"""Multiples of the configured step size, in order."""
_SHOTS = "few-shot-"
PATIENCE = 2
"""Epochs without a lower loss of the held examples after which a trial stops."""
BESIDE = Recipe("fresh", 3.0, rows="labelled")
"""What goes into the result where the source adapter is ahead and the budget has room: a new
adapter, for `EPOCHS_UNHELD` passes. What trainings from different starts get wrong is not the same,
so their mean is better than they are on average."""
EPOCHS_UNHELD = 2
"""Passes over all labels where no held example tells when to stop. In the recorded runs of four
languages the source adapter at this step was best after 1 to 4 passes; 2 lost 0.17 nats at most."""


@dataclass(frozen=True)
class Prices:
    """What readings cost, in tokens.

    Attributes:
        plain: a plain fine-tuning run as configured; the unit of the budget.
        train: one pass over the train examples.
        held: one reading of the held examples.
        labelled: one pass over all labelled examples.
    """

    plain: float
    train: float
    held: float
    labelled: float

    def trial(self, epochs: int) -> float:
        """Return the tokens of a trial: its passes, and a measurement before and after each."""
        return epochs * self.train + (epochs + 1) * self.held


@dataclass(frozen=True)
class Task:
    """What is to be chosen.

    Attributes:
        starts: keys of `recipe.STARTS` that can be fine-tuned here, the most promising first.
        prices: what readings cost.
        budget: tokens that may be spent, the trainings on all labels included.
        spent: tokens that are spent beside trials and trainings on all labels.
        epochs: the longest trial.
        groups: group of each held example.
        trained: number of train examples.
        labels: number of all labelled examples.
    """

    starts: tuple[str, ...]
    prices: Prices
    budget: float
    spent: float
    epochs: int
    groups: tuple[Hashable, ...]
    trained: int
    labels: int


@dataclass(frozen=True)
class Trial:
    """A fine-tuning on the train examples.

    Attributes:
        recipe: start and step size.
        epochs: passes over the train examples, at most; it stops after `PATIENCE` passes without
            a lower loss.
    """

    recipe: Recipe
    epochs: int


@dataclass(frozen=True)
class Told:
    """The outcome of a trial.

    Attributes:
        trial: what was asked for.
        losses: loss of each held example in nats, [evaluations, examples]: before the first epoch
            and after each that was done. Empty where the trial could not run.
        refused: why it could not run.
    """

    trial: Trial
    losses: tuple[tuple[float, ...], ...]
    refused: str | None = None

    @property
    def best(self) -> int:
        """The epochs after which the mean loss is lowest; 0 is the start itself."""
        means = [fmean(one) for one in self.losses]
        finite = [place for place, mean in enumerate(means) if math.isfinite(mean)]
        return min(finite, key=means.__getitem__) if finite else 0

    def tokens(self, prices: Prices) -> float:
        """Return what the trial cost."""
        return prices.trial(len(self.losses) - 1) if self.losses else 0.0


@dataclass(frozen=True)
class Finalist:
    """An adapter that goes into the result.

    Attributes:
        recipe: how it is made; not trained where the start itself is meant.
        epochs: passes over all labelled examples; 0 where nothing is trained.
        judged: loss of each held example, of the same recipe on the train examples alone. Empty
            where no trial judged it.
    """

    recipe: Recipe
    epochs: int
    judged: tuple[float, ...]


@dataclass(frozen=True)
class Decision:
    """What is shipped, and why.

    Attributes:
        finalists: what the result is the mean of; one is shipped as it is.
        simple: name of the best system that needs no training, and that the gain is over; None if
            there is none with finite losses.
        measured: what the choice saves over `simple`, on held examples that it was not made on, in
            nats, before the training on all labels; None with fewer than four groups, and where a
            simple system is shipped.
        gain: what the shipped adapter is expected to save over `simple`; None with `measured`.
        why: the decision in words.
    """

    finalists: tuple[Finalist, ...]
    simple: str | None
    measured: Gain | None
    gain: Expected | None
    why: str


def without_held(task: Task) -> Decision:
    """Return what is shipped where there are no held examples, so nothing can be chosen.

    It is the source adapter, fine-tuned on all labels at its step of `FIRST`.

    Raises:
        ValueError: the budget is too small for that.
    """
    epochs = min(EPOCHS_UNHELD, task.epochs)
    least = task.spent + epochs * task.prices.labelled
    if task.budget < least:
        runs = (task.budget / task.prices.plain, least / task.prices.plain)
        raise ValueError(
            f"budget: {runs[0]:.3g} plain runs is too small to train on all labels; the least that "
            f"works here is {_up(runs[1])}"
        )
    recipe = Recipe("source", FIRST["source"], rows="labelled")
    why = (
        "No dev or micro-dev rows, so nothing is chosen: the source adapter, fine-tuned on all "
        f"labels for {epochs} epochs, is shipped; the gain is not estimated, and there is no "
        "verdict on the prune ratio."
    )
    return Decision((Finalist(recipe, epochs, ()),), None, None, None, why)


def least_budget(task: Task) -> float:
    """Return the smallest budget that works, in tokens: one trial of one epoch, then all labels."""
    return task.spent + task.prices.trial(1) + task.prices.labelled


_SIMPLE = (
    "No trial has a lower loss on the held examples than what needs no training, nor one that is "
    "so near that training on all labels would make it better."
)
_ONE = "It has the lowest loss on the held examples, and every other start is far behind."
_FIRST = (
    "It has the lowest loss on the held examples. Another start is not far behind, but one adapter "
    "is asked for, or the budget has no room for a second one."
)
_MEAN = (
    "No start is far behind on the held examples, so none is picked: the mean of their adapters is "
    "shipped."
)
_BESIDE = (
    " A new adapter, trained on all labels, goes into a mean with it: in recorded runs such a mean "
    "was better. No held example judges this."
)


def ask(task: Task, told: Sequence[Told]) -> tuple[Trial, ...]:
    """Return the trials to do next; none when the decision can be made.

    First every start is tried at its step of `FIRST`. What is left of the budget goes to the start
    with the lowest loss: to a larger step where its loss still fell at the last epoch, to a smaller
    one where it fell for one epoch at most. A training on all labels, as long as the best trial,
    is always kept in reserve; a further step leaves room for that of `BESIDE` too.

    Args:
        task: what is to be chosen.
        told: the outcomes of all trials that were asked for before.

    Raises:
        ValueError: the budget is below `least_budget`.
    """
    prices = task.prices
    if task.budget < least_budget(task):
        runs = (task.budget / prices.plain, least_budget(task) / prices.plain)
        raise ValueError(
            f"budget: {runs[0]:.3g} plain runs is too small to try anything and train on all "
            f"labels; the least that works here is {_up(runs[1])}"
        )
    known = {one.trial.recipe for one in told}
    left = task.budget - spent_on(task, told)
    firsts = _affordable_starts(task)
    waiting = [r for r in (Recipe(s, FIRST[s]) for s in firsts) if r not in known]
    if waiting:
        return tuple(Trial(recipe, _longest(task, len(firsts))) for recipe in waiting)
    recipe = _next_step(told)
    if recipe is None or recipe in known:
        return ()
    reserve = prices.labelled * (max(one.best for one in told) + EPOCHS_UNHELD)
    epochs = int((left - reserve - prices.held) / (prices.train + prices.held))
    return (Trial(recipe, min(task.epochs, epochs)),) if epochs >= 1 else ()


def spent_on(task: Task, told: Sequence[Told]) -> float:
    """Return the tokens that were spent so far."""
    return task.spent + sum(one.tokens(task.prices) for one in told)


def _up(runs: float) -> str:
    return f"{math.ceil(runs * 100) / 100:g}"


def _affordable_starts(task: Task) -> tuple[str, ...]:
    """Return the starts that the budget can try for an epoch at least, in order."""
    counts = range(len(task.starts), 0, -1)
    return task.starts[: next((n for n in counts if _longest(task, n) >= 1), 1)]


def _longest(task: Task, starts: int) -> int:
    """Return the epochs of the first trials; a training on all labels as long fits beside them."""
    prices = task.prices
    room = task.budget - task.spent - starts * prices.held
    return min(task.epochs, int(room / (starts * (prices.train + prices.held) + prices.labelled)))


def _next_step(told: Sequence[Told]) -> Recipe | None:
    """Return the best start with the next step size, if its best epoch is at an end."""
    done = [one for one in told if one.losses]
    if not done:
        return None
    best = min(done, key=lambda one: fmean(one.losses[one.best]))
    step = best.trial.recipe.step
    assert step is not None, "a trial trains"
    place = STEPS.index(step)
    if best.best == len(best.losses) - 1:
        place += 1
    elif best.best <= 1:
        place -= 1
    else:
        return None
    return replace(best.trial.recipe, step=STEPS[place]) if 0 <= place < len(STEPS) else None


def decide(
    task: Task, told: Sequence[Told], simple: Mapping[str, Sequence[float]], prefer: Prefer = "best"
) -> Decision:
    """Return what is shipped.

    Args:
        task: what was to be chosen.
        told: the outcomes of all trials.
        simple: name -> loss of each held example, of what needs no training. Names that are keys of
            `recipe.STARTS` are starts.
        prefer: "simple" ships what needs no training if it is within one standard error, and one
            finalist otherwise.

    Raises:
        ValueError: nothing has a finite loss.
    """
    plain = finite_only(simple)
    tuned = _tuned(told)
    if not plain and not tuned:
        raise ValueError(
            "no trial and no simple system has a finite loss on the held examples: use model.dtype "
            "float32 if the model overflows in half precision, and check that the adapters belong "
            "to this backbone"
        )
    least = min(plain, key=lambda name: math.fsum(plain[name]), default=None)
    gain = None
    if least is not None and tuned:
        named = {str(place): one.judged for place, one in enumerate(tuned)}
        gain = gain_of_best(named, plain, task.groups)
    best = min(tuned, key=lambda one: math.fsum(one.judged), default=None)
    if best is None or (least is not None and _level(best, plain[least], task, prefer)):
        assert least is not None, "something has a finite loss"
        start = simple_recipe(least)
        only = (Finalist(start, 0, tuple(plain[least])),)
        return Decision(only, least, None, None, _SIMPLE)
    level: dict[Any, Finalist] = {}
    for one in sorted([*tuned, *_as_given(told)], key=lambda one: math.fsum(one.judged)):
        if one.recipe.start not in level and not _far_behind(one, best, told, task):
            level[one.recipe.start] = one
    finalists: list[Finalist] = []
    left = task.budget - spent_on(task, told)
    for one in level.values():
        price = one.epochs * task.prices.labelled
        if not finalists or (price <= left and prefer != "simple"):
            finalists.append(one)
            left -= price
    why = _MEAN if len(finalists) > 1 else _ONE if len(level) == 1 else _FIRST
    room = EPOCHS_UNHELD * task.prices.labelled <= left
    if prefer == "best" and room and _new_is_near(best, plain):
        finalists.append(Finalist(BESIDE, EPOCHS_UNHELD, ()))
        why += _BESIDE
    sure = None if gain is None else expected(gain, task.labels, task.trained)
    return Decision(tuple(finalists), least, gain, sure, why)


def _new_is_near(best: Finalist, simple: Mapping[str, Sequence[float]]) -> bool:
    """Return whether the fine-tuned source adapter is ahead, and a new adapter will be near it.

    The target adapter as given tells what can be learned from the train examples alone. The mean
    with an adapter that is far behind would be far behind too. Where the average is ahead, a new
    adapter gained nothing in four recorded runs.
    """
    if best.recipe.start != "source" or not {"source", "target"} <= simple.keys():
        return False
    return fmean(simple["target"]) <= _middle(simple["source"], best.judged)


def _middle(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the loss between those of an adapter before and after its training."""
    return (fmean(before) + fmean(after)) / 2


def _far_behind(one: Finalist, best: Finalist, told: Sequence[Told], task: Task) -> bool:
    """Return whether a trial is so far behind the best one that it would spoil a mean with it.

    It is where the held examples show it to be worse, at 5 %, and by more than half of what the
    best start gained by its training. A smaller distance says little of new examples: in one of
    four recorded pairs what was shown to be worse on the held examples was better on the test
    examples.
    """
    gaps = [loss - least for loss, least in zip(one.judged, best.judged, strict=True)]
    found = mean_gain(gaps, task.groups)
    if found is None or not found.shown:
        return False
    trial = next(t for t in told if replace(t.trial.recipe, rows="labelled") == best.recipe)
    return fmean(one.judged) > _middle(trial.losses[0], best.judged)


def _tuned(told: Sequence[Told]) -> list[Finalist]:
    """Return each trial that got better by training, at its best epoch."""
    found: list[Finalist] = []
    for one in told:
        if one.losses and one.best > 0 and all(map(math.isfinite, one.losses[one.best])):
            whole = replace(one.trial.recipe, rows="labelled")
            found.append(Finalist(whole, one.best, one.losses[one.best]))
    return found


def _as_given(told: Sequence[Told]) -> list[Finalist]:
    """Return each start that training made no better, untrained."""
    return [
        Finalist(simple_recipe(str(one.trial.recipe.start)), 0, one.losses[0])
        for one in told
        if one.losses and one.best == 0 and all(map(math.isfinite, one.losses[0]))
    ]


def _level(best: Finalist, simple: Sequence[float], task: Task, prefer: Prefer) -> bool:
    """Return whether a simple system is shipped in place of the best trained one.

    What is shipped is trained on all labels, which no held example can judge. So a trial that is
    not shown to be worse is expected to gain by it what recorded runs gained.
    """
    gaps = [loss - least for loss, least in zip(best.judged, simple, strict=True)]
    gap = fmean(gaps)
    if gap >= 0:
        found = mean_gain(gaps, task.groups)
        shown = found is None or found.shown
        if shown or gap >= expected_of_labels(task.labels, task.trained):
            return True
    both = {"trained": best.judged, "simple": simple}
    return prefer == "simple" and "simple" in within_one_error_of_best(both, task.groups)


def simple_recipe(name: str) -> Recipe:
    """Return the recipe that trains nothing of a name: a start, or "few-shot-K"."""
    if name.startswith(_SHOTS):
        return Recipe("backbone", None, shots=int(name.removeprefix(_SHOTS)))
    return Recipe(name, None)


def simple_name(recipe: Recipe) -> str:
    """Return the name of the simple system that a recipe starts from."""
    return f"{_SHOTS}{recipe.shots}" if recipe.shots else str(recipe.start)
