"""The choice under a budget: against all combinations, one by one."""

import itertools
import math
import random
import statistics

import pytest

from grasp_lora.core.budget import (
    DROP,
    MOST_GROUPS,
    MOST_PROBES,
    OPTIONS,
    WHOLE,
    Option,
    Priced,
    Shape,
    added,
    adds_up,
    best_fit,
    cost_of,
    groups_of,
    least_bytes,
    options_of,
)
from grasp_lora.core.evidence.groups import Gain, standard_error

SHAPE = Shape(8, 64, 32)


def drawn_groups(seed, count=3):
    """Return groups whose options have random costs, the whole none; one option overflows."""
    chance = random.Random(seed)
    groups = {}
    for place in range(count):
        shapes = [Shape(chance.choice((2, 6, 8)), 32 * chance.randint(1, 9), 40)]
        groups[f"g{place}"] = [
            Priced(one, one.size(shapes), 0.0 if one == WHOLE else chance.random())
            for one in options_of(shapes)
        ]
    spoiled = groups["g0"][1]
    groups["g0"][1] = Priced(spoiled.option, spoiled.size, math.inf)
    return groups


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.1, 0.02])
def test_the_choice_is_the_best_of_all_combinations(seed, share):
    groups = drawn_groups(seed)
    budget = int(share * sum(own[0].size for own in groups.values()))
    fits = [
        one
        for one in itertools.product(*groups.values())
        if 0 < sum(priced.size for priced in one) <= budget
    ]
    wanted = min((sum(priced.cost for priced in one) for one in fits), default=math.inf)
    found = best_fit(groups, budget)
    if found is None:
        assert wanted == math.inf
        return
    taken = [
        next(one for one in groups[name] if one.option == option) for name, option in found.items()
    ]
    assert sum(one.size for one in taken) <= budget
    assert sum(one.cost for one in taken) == pytest.approx(wanted)
    if share == 1.0:
        assert set(found.values()) == {WHOLE}


def test_the_budget_is_kept_to_the_byte():
    groups = {"a": [Priced(WHOLE, 100, 0.0), Priced(DROP, 0, 1.0)]}
    groups["b"] = [Priced(WHOLE, 50, 0.0), Priced(DROP, 0, 0.5)]
    assert best_fit(groups, 150) == {"a": WHOLE, "b": WHOLE}
    assert best_fit(groups, 149) == {"a": WHOLE, "b": DROP}
    assert best_fit(groups, 100) == {"a": WHOLE, "b": DROP}
    assert best_fit(groups, 99) == {"a": DROP, "b": WHOLE}
    assert best_fit(groups, 49) is None, "an adapter without a module is none"


def test_an_adapter_that_only_harms_is_not_dropped_whole():
    groups = {"a": [Priced(Option(4, "int4"), 10, 2.0), Priced(DROP, 0, 0.0)]}
    assert best_fit(groups, 20) == {"a": Option(4, "int4")}


def test_seven_groups_of_large_adapters_are_chosen_at_once():
    groups = {}
    for place in range(MOST_GROUPS):
        shapes = [Shape(16, 576 + 40 * place, 192 + 64 * place)] * 30
        chance = random.Random(place)
        costs = {one: 0.0 if one == WHOLE else chance.random() for one in OPTIONS}
        groups[str(place)] = [Priced(one, one.size(shapes), costs[one]) for one in OPTIONS]
    budget = sum(own[0].size for own in groups.values()) // 4
    found = best_fit(groups, budget)
    assert found is not None
    paid = sum(
        one.cost for name, option in found.items() for one in groups[name] if one.option == option
    )
    alike = [
        sum(own[place].cost for own in groups.values())
        for place, one in enumerate(OPTIONS)
        if one != DROP and sum(own[place].size for own in groups.values()) <= budget
    ]
    assert paid < min(alike), "better than one option for all"


def test_options_divide_the_rank_and_say_their_bytes():
    assert [one.name for one in OPTIONS] == [
        *("r bf16", "r int8", "r int4"),
        *("r/2 bf16", "r/2 int8", "r/2 int4"),
        *("r/4 bf16", "r/4 int8", "r/4 int4"),
        "drop",
    ]
    assert [Option(4).rank(rank) for rank in (1, 4, 6, 8)] == [1, 1, 2, 2]
    assert Option(2).size([SHAPE, SHAPE]) == 2 * 4 * 96 * 2
    assert Option(4, "int8").size([SHAPE]) == 2 * (96 + 2 * 3)
    assert DROP.size([SHAPE]) == 0
    assert MOST_PROBES == 63


def test_an_option_that_equals_an_earlier_one_is_no_option():
    assert [one.name for one in options_of([Shape(1, 8, 8)])] == [
        *("r bf16", "r int8", "r int4", "drop"),
    ]
    assert len(options_of([Shape(2, 8, 8)])) == 7
    assert len(options_of([Shape(2, 8, 8), Shape(8, 8, 8)])) == 10


def names(layers, kinds):
    return [f"model.layers.{layer}.self_attn.{kind}" for layer in range(layers) for kind in kinds]


@pytest.mark.parametrize(
    ("layers", "kinds", "count", "first"),
    [
        (2, ("q_proj", "v_proj"), 4, "model.layers.0.self_attn.q_proj"),
        (6, ("q_proj", "v_proj"), 6, "layer 0"),
        (30, ("q_proj", "v_proj"), 6, "q_proj, first third"),
        (30, ("q", "k", "v"), 3, "q"),
        (30, ("q", "k", "v", "o", "gate", "up", "down"), 7, "q"),
        (30, tuple("abcdefghij"), 3, "first third"),
        (30, ("q",), 3, "q, first third"),
    ],
)
def test_modules_are_grouped_as_finely_as_the_probes_allow(layers, kinds, count, first):
    modules = names(layers, kinds)
    groups = groups_of(modules)
    assert len(groups) == count
    assert next(iter(groups)) == first
    assert sorted(itertools.chain(*groups.values())) == sorted(modules)


def test_thirds_are_those_of_the_layers_that_are_there():
    groups = groups_of([f"h.{layer}.attn" for layer in (4, 5, 6, 9, 10, 11, 20, 21, 22)])
    assert groups == {
        "attn, first third": ["h.4.attn", "h.5.attn", "h.6.attn"],
        "attn, middle third": ["h.9.attn", "h.10.attn", "h.11.attn"],
        "attn, last third": ["h.20.attn", "h.21.attn", "h.22.attn"],
    }


def test_the_least_is_one_group_at_its_cheapest():
    large, small = [Shape(8, 640, 640)], [Shape(8, 64, 32), Shape(8, 64, 32)]
    assert least_bytes({"large": large, "small": small}) == 2 * 2 * (48 + 2 * 3)


def test_what_is_added_is_paired_and_its_error_counts_groups():
    base, losses, groups = [1.0, 2.0, 3.0, 5.0], [1.5, 2.1, 3.0, 5.4], ["a", "a", "b", "c"]
    gaps = [0.5, 0.1, 0.0, 0.4]
    found = added(losses, base, groups)
    assert found.gain == pytest.approx(statistics.fmean(gaps))
    assert found.error == pytest.approx(standard_error(gaps, groups))
    assert added([math.nan, *losses[1:]], base, groups).gain == math.inf
    assert added(losses, base, ["a"] * 4) == Gain(pytest.approx(0.25), 0.0, 1)


def test_an_option_counts_with_one_error_and_never_as_a_gain():
    assert cost_of(Gain(0.2, 0.1, 5)) == pytest.approx(0.3)
    assert cost_of(Gain(-0.2, 0.1, 5)) == pytest.approx(0.1)
    assert cost_of(Gain(0.0, 0.0, 5)) == 0.0
    assert cost_of(Gain(math.inf, 0.0, 5)) == math.inf


def test_the_whole_is_held_against_the_sum_of_its_options():
    base, groups = [1.0, 2.0, 3.0], ["a", "b", "c"]
    singles = [[1.1, 2.1, 3.1], [1.0, 2.2, 3.4]]
    whole = [1.1 + 0.3, 2.3 + 0.1, 3.5 + 0.2]
    found = adds_up(whole, base, singles, groups)
    assert found.gain == pytest.approx(0.2)
    assert found.error == pytest.approx(standard_error([0.3, 0.1, 0.2]))
