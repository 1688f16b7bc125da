"""The choice within a budget: what holds whatever its policy."""

import math

import pytest
from scipy import stats

from grasp_lora.core.recipes.chooser import (
    BESIDE,
    EPOCHS_UNHELD,
    FIRST,
    Prefer,
    Prices,
    Task,
    Told,
    ask,
    decide,
    least_budget,
    spent_on,
    without_held,
)
from grasp_lora.core.recipes.gain import RETRAINED

PRICES = Prices(plain=1000.0, train=60.0, held=40.0, labelled=100.0)


def task(budget: float, **changes) -> Task:
    values = {"starts": ("source", "average"), "prices": PRICES, "budget": budget, "spent": 300.0}
    values |= {"epochs": 5, "groups": tuple("abcdefgh"), "trained": 8, "labels": 16}
    return Task(**values | changes)


def losses(start: str, epochs: int) -> tuple[tuple[float, ...], ...]:
    """Return losses that fall for two epochs and rise then, lower for the source."""
    base = 2.0 if start == "source" else 2.1
    curve = (1.0, 0.8, 0.7, 0.75, 0.8, 0.9)
    return tuple(tuple(base * c + 0.01 * n for n in range(8)) for c in curve[: epochs + 1])


def played(one: Task) -> tuple[list[Told], float]:
    """Return all outcomes of a choice, and what it spent with the training on all labels."""
    told: list[Told] = []
    while asked := ask(one, told):
        told += [Told(t, losses(str(t.recipe.start), t.epochs)) for t in asked]
    made = decide(one, told, {"source": losses("source", 0)[0]})
    whole = sum(final.epochs for final in made.finalists) * PRICES.labelled
    return told, spent_on(one, told) + whole


def test_a_budget_that_is_too_small_is_refused_with_the_least_that_works():
    least = least_budget(task(0.0))
    assert least == 300 + (60 + 2 * 40) + 100
    with pytest.raises(ValueError, match=r"budget: 0.539 plain runs .* works here is 0.54"):
        ask(task(least - 1), ())
    asked = ask(task(least), ())
    assert [one.epochs for one in asked] == [1]


@pytest.mark.parametrize("budget", [540, 700, 1000, 2000, 5000])
def test_the_budget_is_kept(budget):
    told, spent = played(task(float(budget)))
    assert told
    assert spent <= budget


def test_the_same_outcomes_give_the_same_choice():
    one, other = task(3000.0), task(3000.0)
    told, _ = played(one)
    assert played(other)[0] == told
    simple = {"source": losses("source", 0)[0]}
    assert decide(one, told, simple) == decide(other, tuple(told), dict(simple))
    for count in range(len(told) + 1):
        assert ask(one, told[:count]) == ask(one, list(told[:count]))


def test_no_recipe_is_tried_twice():
    told, _ = played(task(50000.0))
    recipes = [one.trial.recipe for one in told]
    assert len(set(recipes)) == len(recipes)


def test_without_held_examples_the_source_adapter_is_trained_on_all_labels():
    made = without_held(task(5000.0, groups=(), spent=0.0))
    (only,) = made.finalists
    assert (only.recipe.start, only.recipe.step, only.recipe.rows) == (
        *("source", FIRST["source"]),
        "labelled",
    )
    assert (only.epochs, only.judged, made.gain) == (EPOCHS_UNHELD, (), None)
    shorter = without_held(task(5000.0, groups=(), spent=0.0, epochs=1))
    assert shorter.finalists[0].epochs == 1
    with pytest.raises(ValueError, match=r"budget: 0.199 plain runs .* works here is 0.2"):
        without_held(task(199.0, groups=(), spent=0.0))


def flat(value: float, epochs: int, slope: float = 0.0) -> tuple[tuple[float, ...], ...]:
    """Return losses of eight examples, a group each, that change by `slope` an epoch."""
    return tuple(tuple(value + slope * e + 0.01 * n for n in range(8)) for e in range(epochs + 1))


def told_of(one: Task, curves) -> list[Told]:
    """Return the outcomes of a choice in which a recipe has the losses that `curves` gives."""
    told: list[Told] = []
    while asked := ask(one, told):
        told += [Told(t, tuple(curves(t.recipe)[: t.epochs + 1])) for t in asked]
    return told


def test_the_first_trials_are_each_start_at_its_own_step():
    asked = ask(task(5000.0), ())
    assert [(t.recipe.start, t.recipe.step) for t in asked] == list(FIRST.items())


def test_what_is_left_goes_to_a_larger_step_where_the_loss_still_fell():
    told = told_of(task(9000.0), lambda r: flat(2.0 if r.start == "source" else 2.5, 5, -0.1))
    assert [(t.trial.recipe.start, t.trial.recipe.step) for t in told] == [
        ("source", 3.0), ("average", 1.0), ("source", 10.0),
    ]  # fmt: skip


def test_what_is_left_goes_to_a_smaller_step_where_the_loss_rose_at_once():
    told = told_of(task(9000.0), lambda r: flat(2.0 if r.start == "source" else 2.5, 5, 0.1))
    assert [(t.trial.recipe.start, t.trial.recipe.step) for t in told][2] == ("source", 1.0)


def test_nothing_is_left_over_for_a_best_epoch_in_the_middle():
    told = told_of(task(90000.0), lambda r: losses(str(r.start), 5))
    assert len(told) == 2


def far(recipe) -> tuple[tuple[float, ...], ...]:
    """Return losses of which those of the average are far behind."""
    behind = 0.0 if recipe.start == "source" else 0.5
    return tuple(tuple(x + behind for x in row) for row in losses("source", 5))


def test_one_start_that_is_far_ahead_is_shipped_alone():
    one = task(9000.0)
    told = told_of(one, far)
    made = decide(one, told, {"source": losses("source", 0)[0], "target": (9.0,) * 8})
    assert [(f.recipe.start, f.recipe.step, f.epochs) for f in made.finalists] == [
        ("source", 3.0, 2)
    ]
    assert made.finalists[0].recipe.rows == "labelled"
    assert made.simple == "source"
    assert made.measured is not None
    assert made.measured.gain == pytest.approx(0.3 * 2.0)
    assert made.gain is not None
    assert made.gain.low < made.gain.gain < made.gain.high


def level(recipe) -> tuple[tuple[float, ...], ...]:
    """Return losses that two starts share but for noise of both signs."""
    sign = 1 if recipe.start == "source" else -1
    start = tuple(3.0 for _ in range(8))
    after = tuple(2.0 + sign * (0.1 if n % 2 else -0.101) for n in range(8))
    return (start, (2.5,) * 8, after, (2.6,) * 8, (2.6,) * 8, (2.6,) * 8)


def test_starts_that_are_level_are_averaged_while_the_budget_allows():
    one = task(9000.0)
    told = told_of(one, level)
    simple = {"target": (9.0,) * 8, "source": (3.0,) * 8}
    assert {f.recipe.start for f in decide(one, told, simple).finalists} == {"source", "average"}
    assert len(decide(one, told, simple, "simple").finalists) == 1
    poor = task(spent_on(one, told) + 250.0)  # one training of two epochs on all labels
    only = decide(poor, told, simple)
    assert len(only.finalists) == 1
    assert "no room for a second one" in only.why


def apart(gaps: list[float]) -> int:
    """Return how many starts are shipped where the average has these gaps to the source adapter.

    The source adapter goes from 3.0 to 2.0, so that the middle is at 2.5.
    """
    rows = {"source": (2.0,) * 8, "average": tuple(2.0 + gap for gap in gaps)}
    one = task(9000.0)
    curves = {start: ((3.0,) * 8, (2.9,) * 8, *[row] * 4) for start, row in rows.items()}
    told = told_of(one, lambda r: curves[r.start])
    return len(decide(one, told, {"target": (9.0,) * 8}).finalists)


@pytest.mark.parametrize(("gap", "count"), [(0.49, 2), (0.51, 1)])
def test_a_start_is_left_out_where_it_is_behind_by_half_of_what_training_gained(gap, count):
    assert apart([gap + 0.01 * (n - 3.5) for n in range(8)]) == count


@pytest.mark.parametrize(("wide", "count"), [(3.5, 2), (3.3, 1)])
def test_a_start_is_left_out_only_where_it_is_shown_to_be_worse_at_five_percent(wide, count):
    """Eight contexts with the gaps 0.8 - wide / 2 ... 0.8 + wide / 2."""
    gaps = [0.8 + wide * (n / 7 - 0.5) for n in range(8)]
    t = float(stats.ttest_1samp(gaps, 0.0).statistic)
    assert (t > stats.t.isf(0.05, 7)) == (count == 1)
    assert apart(gaps) == count


def test_a_start_that_training_made_no_better_goes_into_the_mean_as_it_is():
    def curves(recipe):
        return losses("source", 5) if recipe.start == "source" else flat(1.5, 5, 0.1)

    one = task(9000.0)
    told = told_of(one, curves)
    made = decide(one, told, {"source": losses("source", 0)[0], "average": flat(1.5, 0)[0]})
    assert [(f.recipe.start, f.recipe.step, f.epochs) for f in made.finalists] == [
        ("source", 3.0, 2), ("average", None, 0),
    ]  # fmt: skip
    assert made.finalists[1].judged == flat(1.5, 0)[0]


def beside(one: Task, target: float, prefer: Prefer = "best", start: str = "source") -> bool:
    """Return whether a new adapter is shipped beside what was chosen.

    The source adapter goes from 2.035 to 1.435. The best trial is that of `start`.
    """
    told = told_of(one, lambda r: losses("source" if r.start == start else "average", 5))
    simple = {"source": losses("source", 0)[0], "target": (target,) * 8}
    made = decide(one, told, simple, prefer)
    shipped = [f for f in made.finalists if f.recipe == BESIDE]
    assert ("new adapter" in made.why) == bool(shipped)
    assert all((f.epochs, f.judged) == (EPOCHS_UNHELD, ()) for f in shipped)
    return bool(shipped)


@pytest.mark.parametrize(("target", "shipped"), [(1.5, True), (1.73, True), (1.74, False)])
def test_a_new_adapter_goes_into_the_result_where_the_target_adapter_is_near(target, shipped):
    assert beside(task(9000.0), target) == shipped


def test_a_new_adapter_is_not_asked_for_where_one_adapter_or_a_small_one_is_wanted():
    assert not beside(task(9000.0), 1.5, "simple")
    assert not beside(task(9000.0), 1.5, "small")


def test_a_new_adapter_is_trained_only_where_the_source_adapter_is_ahead():
    assert not beside(task(9000.0), 1.5, start="average")


@pytest.mark.parametrize(("room", "shipped"), [(400.0, True), (399.0, False)])
def test_a_new_adapter_is_trained_where_the_budget_has_room(room, shipped):
    """Two passes over all labels for the source adapter, two for the new one: 400 tokens."""
    one = task(9000.0)
    told = told_of(one, far)
    simple = {"source": losses("source", 0)[0], "target": (1.5,) * 8}
    made = decide(task(spent_on(one, told) + room), told, simple)
    assert (BESIDE in [f.recipe for f in made.finalists]) == shipped


def test_a_mean_has_three_parts_where_the_budget_has_room():
    one = task(9000.0)
    told = told_of(one, level)
    made = decide(one, told, {"source": (3.0,) * 8, "target": (2.1,) * 8})
    assert [f.recipe.start for f in made.finalists] == ["source", "average", "fresh"]


def test_a_further_step_leaves_room_for_a_new_adapter():
    def curves(recipe):
        return flat(2.0 if recipe.start == "source" else 2.5, 5, -0.1)

    one = task(9000.0)
    first = [Told(t, curves(t.recipe)) for t in ask(one, ())]
    whole, epoch = (5 + EPOCHS_UNHELD) * PRICES.labelled, PRICES.train + PRICES.held
    for room, epochs in ((PRICES.held + epoch, [1]), (PRICES.held + epoch - 1, [])):
        left = task(spent_on(one, first) + whole + room)
        assert [t.epochs for t in ask(left, first)] == epochs


def test_what_needs_no_training_is_shipped_where_nothing_beats_it():
    one = task(9000.0)
    told = told_of(one, lambda r: losses(str(r.start), 5))
    made = decide(one, told, {"source": (3.0,) * 8, "few-shot-4": (0.5,) * 8})
    (only,) = made.finalists
    assert (only.recipe.start, only.recipe.shots, only.epochs) == ("backbone", 4, 0)
    assert made.simple == "few-shot-4"
    assert made.gain is None
    assert made.measured is None


def shipped_beside(gaps, **changes) -> int:
    """Return the epochs of what is shipped; few-shot examples lead the best trial by `gaps`."""
    one = task(9000.0, **changes)
    told = told_of(one, lambda r: losses(str(r.start), 5))
    best = min((t.losses[t.best] for t in told), key=sum)
    shots = tuple(x - gap for x, gap in zip(best, gaps, strict=True))
    return decide(one, told, {"few-shot-8": shots}).finalists[0].epochs


def test_the_gain_of_training_on_all_labels_counts_beside_what_needs_no_training():
    """`RETRAINED` is the gain of 116 labels in place of 50; here 16 are in place of 8."""
    expected = sum(RETRAINED) / len(RETRAINED) * math.log(2) / math.log(116 / 50)
    wide = [0.3 if n % 2 else -0.3 for n in range(8)]
    assert shipped_beside([expected - 0.001 + w for w in wide]) == 2
    assert shipped_beside([expected + 0.001 + w for w in wide]) == 0
    # No label is left over, so that nothing more is expected.
    assert shipped_beside([0.001 + w for w in wide], labels=8) == 0
    # A lead that is shown stays one, however small.
    assert shipped_beside([expected / 2] * 8) == 0


def test_level_with_what_needs_no_training_only_simple_ships_that():
    one = task(9000.0)
    told = told_of(one, lambda r: losses(str(r.start), 5))
    best = min((t.losses[t.best] for t in told), key=sum)
    near = tuple(x + (0.2 if n % 2 else -0.19) for n, x in enumerate(best))
    assert decide(one, told, {"average": near}).finalists[0].epochs == 2
    assert decide(one, told, {"average": near}, "simple").finalists[0].epochs == 0


def test_a_trial_that_is_lost_is_no_finalist():
    one = task(9000.0)
    asked = ask(one, ())
    told = [Told(asked[0], (), "diverged"), Told(asked[1], losses("average", asked[1].epochs))]
    made = decide(one, told, {"target": (9.0,) * 8})
    assert [f.recipe.start for f in made.finalists] == ["average"]


def test_nothing_finite_is_an_error():
    with pytest.raises(ValueError, match="has a finite loss on the held examples"):
        decide(task(9000.0), (), {"target": (float("nan"),) * 8})
