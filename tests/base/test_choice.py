"""Test that a loss that is not finite is never the lowest."""

import math

import pytest

from grasp_lora.base.choice import lowest, not_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_never_the_lowest_wherever_it_stands(bad, place):
    losses = [("b", 2.0), ("c", 1.0)]
    losses.insert(place, ("bad", bad))
    assert lowest(dict(losses)) == "c"
    assert not_finite(dict(losses)) == ["bad"]


def test_of_equal_losses_the_first_is_taken_and_of_none_nothing():
    assert lowest({"a": 1.0, "b": 1.0}) == "a"
    assert lowest({"a": math.nan, "b": None}) is None
    assert lowest({}) is None
