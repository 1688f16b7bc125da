"""Test means, errors and tests over groups of examples, against scipy and the sandwich formula."""

import math

import numpy as np
import pytest
from scipy import stats

from grasp_lora.core.evidence.groups import (
    Gain,
    chance_of_choice,
    critical_value,
    mean_gain,
    standard_error,
)


@pytest.mark.parametrize("freedom", [1, 2, 3.7, 15, 65])
@pytest.mark.parametrize("level", [0.05, 0.025, 0.01])
def test_the_critical_value_is_that_of_students_t(freedom, level):
    assert critical_value(freedom, level) == pytest.approx(stats.t.ppf(1 - level, freedom))


def test_without_groups_the_error_is_the_usual_one():
    values = [0.3, -0.1, 0.8, 0.2, 0.4]
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error(values, list("abcde")) == pytest.approx(stats.sem(values))


def test_with_groups_of_one_size_the_error_is_that_of_the_means_of_groups():
    values = np.random.default_rng(0).normal(size=(7, 3))
    groups = [str(i) for i in range(7) for _ in range(3)]
    expected = stats.sem(values.mean(axis=1))
    assert standard_error(values.ravel().tolist(), groups) == pytest.approx(expected)
    order = np.random.default_rng(1).permutation(21)
    moved = standard_error(values.ravel()[order].tolist(), [groups[i] for i in order])
    assert moved == pytest.approx(expected), "the order of the examples does not matter"


def test_with_groups_of_several_sizes_the_error_is_the_sandwich_of_a_regression_on_a_constant():
    random = np.random.default_rng(2)
    groups = [g for g, size in zip("abcdef", (1, 5, 2, 3, 1, 4), strict=True) for _ in range(size)]
    values = random.normal(size=len(groups))
    # Least squares on a column of ones: (X'X)^-1 [sum of X_g' u_g u_g' X_g] (X'X)^-1 G / (G - 1).
    residuals = values - values.mean()
    members = [np.array(groups) == name for name in "abcdef"]
    meat = sum(residuals[own].sum() ** 2 for own in members)
    expected = math.sqrt(6 / 5 * meat) / len(groups)
    assert standard_error(values.tolist(), groups) == pytest.approx(expected)


def test_a_copy_of_every_example_in_its_group_adds_no_evidence():
    values, groups = [0.1, 0.5, 0.2, 0.4], ["a", "b", "c", "d"]
    once, twice = mean_gain(values, groups), mean_gain(values * 2, groups * 2)
    assert (twice.gain, twice.groups) == (pytest.approx(once.gain), 4)
    assert twice.error == pytest.approx(once.error)
    assert mean_gain(values * 2).error < 0.7 * once.error, "row by row, it would"


def test_a_gain_is_shown_where_the_one_sided_t_test_over_groups_says_so():
    random = np.random.default_rng(3)
    shown = 0
    for _ in range(200):
        values = random.normal(0.5, size=(5, 2))
        found = mean_gain(values.ravel().tolist(), [g for g in "abcde" for _ in range(2)])
        exact = stats.ttest_1samp(values.mean(axis=1), 0, alternative="greater").pvalue < 0.05
        assert found.shown == exact
        shown += exact
    assert 20 < shown < 180


def test_one_group_or_a_loss_that_is_not_finite_gives_no_gain():
    assert mean_gain([1.0, 1.1, 0.9], ["a", "a", "a"]) is None
    assert mean_gain([1.0, math.nan, 1.0]) is None
    assert mean_gain([1.0]) is None
    assert mean_gain([]) is None


def test_a_gain_without_spread_is_shown_unless_it_is_rounding():
    assert Gain(0.1, 0.0, 8).shown
    assert Gain(0.1, 0.0, 8).z is None
    assert not Gain(1e-12, 0.0, 8).shown
    assert not Gain(-0.1, 0.01, 8).shown
    assert Gain(0.3, 0.1, 8).z == pytest.approx(3)


def chances(candidates, groups, rows, icc, draws=600, effect=0.0):
    """Return the chance of the candidate with the largest mean, over draws of independent gains."""
    random = np.random.default_rng(4)
    names = [str(i) for i in range(groups) for _ in range(rows)]
    found = []
    for _ in range(draws):
        shared = random.normal(size=(candidates, groups, 1))
        own = random.normal(size=(candidates, groups, rows))
        gains = (math.sqrt(icc) * shared + math.sqrt(1 - icc) * own).reshape(candidates, -1)
        gains[0] += effect
        tried = [dict(enumerate(one.tolist())) for one in gains]
        best = tried[int(gains.mean(axis=1).argmax())]
        found.append(chance_of_choice(best, tried, names))
    return np.array(found)


@pytest.mark.parametrize(("rows", "icc"), [(1, 0.0), (5, 0.5)])
@pytest.mark.parametrize("groups", [5, 12])
def test_the_best_of_many_without_a_gain_seldom_looks_better_than_chance(groups, rows, icc):
    found = chances(8, groups, rows, icc)
    assert 0.015 < (found <= 0.05).mean() < 0.075  # standard error 0.009
    assert (found <= 0.5).mean() < 0.56


def test_the_best_of_many_with_a_gain_is_told():
    assert (chances(8, 16, 1, 0.0, draws=100, effect=1.3) <= 0.05).mean() > 0.8


def test_a_candidate_that_few_groups_saw_does_not_hide_a_gain_that_all_see():
    random = np.random.default_rng(5)
    seen = dict(enumerate((0.5 + 0.3 * random.normal(size=20)).tolist()))
    few = {0: 5.0, 1: 5.001}
    assert chance_of_choice(seen, [seen, few]) < 0.05
    assert chance_of_choice(seen, [seen, few]) == chance_of_choice(seen, [seen, few])


def by_mean(tried):
    """Return the rule that takes the largest mean of all that were tried, and nothing below 0."""

    def choose(weights, place):
        columns = np.array([[one[example] for example in place] for one in tried])
        means = weights @ columns.T
        return (means > 0) & (means == means.max(axis=1, keepdims=True))

    return choose


SIX = [dict(enumerate(np.random.default_rng(n).normal(size=9).tolist())) for n in range(6)]


def test_a_choice_is_held_against_what_it_takes_itself():
    random = np.random.default_rng(6)
    own = dict(enumerate((0.4 + random.normal(size=30)).tolist()))
    alone = chance_of_choice(own, [own], choose=lambda w, _: np.ones((len(w), 1), dtype=bool))
    exact = stats.ttest_1samp(list(own.values()), 0, alternative="greater").pvalue
    assert alone == pytest.approx(exact, abs=0.02), "with nothing to choose it is the t test"
    never = chance_of_choice(own, [own], choose=lambda w, _: np.zeros((len(w), 1), dtype=bool))
    assert never == pytest.approx(1 / 1000), "no draw claims anything"
    largest = chance_of_choice(SIX[0], SIX)
    assert chance_of_choice(SIX[0], SIX, choose=by_mean(SIX)) <= largest


def test_a_choice_that_is_redrawn_has_its_level():
    random = np.random.default_rng(7)
    found = []
    for _ in range(300):
        six = [dict(enumerate(one)) for one in random.normal(size=(6, 9)).tolist()]
        best = max(six, key=lambda one: sum(one.values()))
        found.append(chance_of_choice(best, six, choose=by_mean(six)))
    assert 0.02 < (np.array(found) <= 0.05).mean() < 0.09  # standard error 0.013


def test_a_choice_may_go_by_examples_without_gains():
    seen = []

    def first(weights, place):
        seen.append(dict(place))
        return np.ones((len(weights), 6), dtype=bool)

    chance_of_choice(SIX[0], SIX, [str(n) for n in range(12)], first, also=[11])
    assert sorted(seen[0]) == sorted([*map(str, range(9)), "11"])
