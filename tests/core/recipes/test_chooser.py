"""The choice within a budget: what holds whatever its policy."""

import pytest

from grasp_lora.core.recipes.chooser import (
    EPOCHS_UNHELD,
    FIRST,
    Prices,
    Task,
    Told,
    ask,
    decide,
    least_budget,
    spent_on,
    without_held,
)

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
