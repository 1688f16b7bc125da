"""Test profiles: the overall fraction is the level, and groups differ along their positions."""

import itertools
import random

import pytest
from scipy.optimize import brentq

from grasp_lora.core.pruning.profile import (
    MOST_TILT,
    Place,
    Profile,
    limited,
    profile_ratios,
    slopes_of,
)


def places_of(layers=3, kinds=("q_proj", "v_proj"), adapters=(0, 1), parts=None):
    """Return group -> place; sizes differ by kind and adapter."""
    named = parts or dict.fromkeys(kinds, "self_attn")
    return {
        f"{layer}.{kind}.{adapter}": Place(layer, named[kind], kind, adapter)
        for layer, kind, adapter in itertools.product(range(layers), kinds, adapters)
    }


def sizes_of(places):
    drawn = random.Random(7)
    return {group: drawn.randrange(50, 4000) for group in places}


def by_search(profile, slopes, low, high):
    """Return the ratios with an offset found by another root finder, group by group."""
    total = sum(slopes.sizes.values())

    def at(offset):
        return {
            group: min(
                high,
                max(
                    low,
                    profile.level
                    + offset
                    + sum(
                        t * p for t, p in zip(profile.tilts, slopes.positions[group], strict=True)
                    ),
                ),
            )
            for group in slopes.sizes
        }

    def above(offset):
        found = at(offset)
        return sum(slopes.sizes[g] * found[g] for g in found) / total - profile.level

    return at(brentq(above, -2, 2, xtol=1e-15))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.8), (0.1, 0.6)])
@pytest.mark.parametrize("level", [0.13, 0.4, 0.55])
@pytest.mark.parametrize(
    "tilts", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (-0.2, 0.4, 0.1), (0.6, -0.6, 0.6)]
)
def test_the_overall_fraction_is_the_level_and_ratios_are_those_of_a_search(
    level, tilts, low, high
):
    places = places_of()
    slopes, profile = slopes_of(places, sizes_of(places)), Profile(level, tilts)
    found = profile_ratios(profile, slopes, low, high)
    total = sum(slopes.sizes.values())
    assert sum(slopes.sizes[g] * found[g] for g in found) / total == pytest.approx(level, abs=1e-13)
    assert all(low <= ratio <= high for ratio in found.values())
    assert found == pytest.approx(by_search(profile, slopes, low, high), abs=1e-10)


@pytest.mark.parametrize("level", [0.0, 0.8])
def test_at_a_bound_all_groups_have_one_ratio(level):
    places = places_of()
    found = profile_ratios(
        Profile(level, (0.4, 0.2, 0.1)), slopes_of(places, sizes_of(places)), 0, 0.8
    )
    assert found == pytest.approx(dict.fromkeys(places, level), abs=1e-12)


def test_without_tilts_all_groups_have_the_level():
    places = places_of()
    found = profile_ratios(Profile(0.37), slopes_of(places, sizes_of(places)))
    assert found == pytest.approx(dict.fromkeys(places, 0.37), abs=1e-12)


def test_positions_go_from_the_first_to_the_last():
    slopes = slopes_of(places_of(layers=5), sizes_of(places_of(layers=5)))
    assert slopes.names == ("depth", "module", "adapter")
    assert [slopes.positions[f"{n}.q_proj.0"][0] for n in range(5)] == [-0.5, -0.25, 0, 0.25, 0.5]
    assert slopes.positions["2.q_proj.0"][1:] == (-0.5, -0.5)
    assert slopes.positions["2.v_proj.1"][1:] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("kinds", "first"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), {"q_proj", "k_proj"}),
        (("qkv", "o", "x"), {"qkv", "o"}),
    ],
)
def test_modules_of_one_part_are_halved_in_their_order(kinds, first):
    places = places_of(kinds=kinds)
    slopes = slopes_of(places, sizes_of(places))
    found = {places[group].kind for group, p in slopes.positions.items() if p[1] < 0}
    assert found == first


def test_attention_stands_against_all_other_parts_of_a_layer():
    parts = {"q_proj": "self_attn", "o_proj": "self_attn", "up": "mlp", "down": "mlp", "x": "more"}
    places = places_of(kinds=tuple(parts), parts=parts)
    slopes = slopes_of(places, sizes_of(places))
    assert {g for g, p in slopes.positions.items() if p[1] < 0} == {
        g for g, place in places.items() if place.part == "self_attn"
    }


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"layers": 1}, ("module", "adapter")),
        ({"kinds": ("q_proj",)}, ("depth", "adapter")),
        ({"adapters": (None,)}, ("depth", "module")),
        ({"layers": 1, "kinds": ("q_proj",), "adapters": (0,)}, ()),
    ],
)
def test_a_way_in_which_all_groups_are_alike_is_left_out(changes, names):
    places = places_of(**changes)
    slopes = slopes_of(places, sizes_of(places))
    assert slopes.names == names
    assert {len(position) for position in slopes.positions.values()} == {len(names)}
    found = profile_ratios(Profile(0.4, (0.1,) * len(names)), slopes)
    overall = sum(slopes.sizes[g] * found[g] for g in found) / sum(slopes.sizes.values())
    assert overall == pytest.approx(0.4, abs=1e-13)


def test_what_lies_outside_all_layers_is_in_the_middle():
    places = places_of() | {"projector": Place(None, "", "linear_1", 0)}
    slopes = slopes_of(places, sizes_of(places))
    assert slopes.positions["projector"] == (0.0, 0.0, -0.5)
    assert slopes.positions["0.q_proj.0"] == (-0.5, -0.5, -0.5)


@pytest.mark.parametrize(
    ("level", "tilts", "expected"),
    [
        (0.4, (0.3, -0.2), (0.3, -0.2)),
        (0.0, (0.3, -0.2), (0.0, 0.0)),
        (0.8, (0.3,), (0.0,)),
        (0.4, (5.0,), (MOST_TILT,)),
        (0.1, (0.3, -0.1), (0.15, -0.05)),
        (0.4, (), ()),
        (0.4, (0.0,), (0.0,)),
    ],
)
def test_tilts_are_as_large_as_their_level_leaves_room(level, tilts, expected):
    found = limited(level, tilts, 0.0, 0.8)
    assert found == pytest.approx(expected)
    ends = itertools.product((-0.5, 0.5), repeat=len(tilts))
    reached = [level + sum(t * e for t, e in zip(found, end, strict=True)) for end in ends]
    assert all(-1e-12 <= ratio <= 0.8 + 1e-12 for ratio in reached)
