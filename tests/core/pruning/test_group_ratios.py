"""Test ratios per group: the overall fraction is kept, and the losses decide the shifts."""

import itertools

import pytest

from grasp_lora.core.pruning.group_ratios import (
    SHIFT,
    balanced_ratios,
    combined_ratios,
    group_trials,
)

SIZES = {"q": 300, "k": 100, "v": 600}


def overall(ratios, sizes):
    return sum(sizes[g] * ratios[g] for g in sizes) / sum(sizes.values())


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.4, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("shifts", [{}, {"q": 0.3}, {"q": 0.15, "v": -0.15}, {"k": -2.0, "v": 0.6}])
def test_the_overall_fraction_stays_and_ratios_follow_their_shifts(ratio, shifts):
    found = balanced_ratios(ratio, shifts, SIZES)
    assert list(found) == list(SIZES)
    assert overall(found, SIZES) == pytest.approx(ratio, abs=1e-9)
    assert all(0.0 <= value <= 1.0 for value in found.values())
    for one, other in itertools.permutations(SIZES, 2):
        if shifts.get(one, 0.0) >= shifts.get(other, 0.0):
            assert found[one] >= found[other] - 1e-9


def test_without_bounds_in_the_way_shifts_are_less_their_weighted_mean():
    found = balanced_ratios(0.5, {"q": 0.1, "v": -0.1}, SIZES)
    mean = (300 * 0.1 - 600 * 0.1) / 1000
    expected = {"q": 0.6 - mean, "k": 0.5 - mean, "v": 0.4 - mean}
    assert found == pytest.approx(expected)


def test_every_group_is_tried_on_both_sides_and_the_others_compensate():
    found = group_trials(0.5, SIZES)
    assert list(found) == [(g, s) for g in SIZES for s in (-SHIFT, SHIFT)]
    for (group, shift), ratios in found.items():
        assert ratios[group] == pytest.approx(0.5 + shift)
        assert overall(ratios, SIZES) == pytest.approx(0.5)
        others = {round(v, 9) for g, v in ratios.items() if g != group}
        assert len(others) == 1


@pytest.mark.parametrize("ratio", [0.02, 0.98])
@pytest.mark.parametrize("sizes", [SIZES, {"a": 10, "b": 990}])
def test_near_a_bound_trials_go_as_far_as_the_others_can_compensate(ratio, sizes):
    for ratios in group_trials(ratio, sizes).values():
        assert overall(ratios, sizes) == pytest.approx(ratio, abs=1e-9)
        assert all(-1e-9 <= value <= 1 + 1e-9 for value in ratios.values())


def test_of_two_groups_one_is_moved_and_fewer_are_refused():
    assert list(group_trials(0.4, {"a": 5, "b": 5})) == [("a", -SHIFT), ("a", SHIFT)]
    with pytest.raises(ValueError, match=r"at least two groups, got \['a'\]; set scope: global"):
        group_trials(0.4, {"a": 5})


def losses_of(gains, rows=6):
    """Return (group, shift) -> losses that are lower than 1 by the gain."""
    return {
        (group, shift): [1.0 - gains.get((group, shift), 0.0)] * rows
        for group in SIZES
        for shift in (-SHIFT, SHIFT)
    }


def test_shifts_that_lower_the_loss_are_combined():
    base = [1.0] * 6
    found = losses_of({("q", SHIFT): 0.2, ("q", -SHIFT): 0.1, ("v", -SHIFT): 0.3, ("k", SHIFT): -1})
    got = combined_ratios(0.5, found, base, range(6), SIZES)
    assert got == pytest.approx(balanced_ratios(0.5, {"q": SHIFT, "v": -SHIFT}, SIZES))


def test_without_a_better_shift_all_groups_have_one_ratio():
    got = combined_ratios(0.5, losses_of({("q", SHIFT): -0.1}), [1.0] * 6, range(6), SIZES)
    assert got == pytest.approx(dict.fromkeys(SIZES, 0.5))


def test_only_the_examples_to_choose_on_are_used():
    found = losses_of({})
    found["q", SHIFT] = [0.0, 0.0, 5.0, 5.0, 5.0, 5.0]
    base = [1.0] * 6
    assert combined_ratios(0.5, found, base, {0, 1}, SIZES)["q"] > 0.5
    assert combined_ratios(0.5, found, base, {2, 3}, SIZES) == pytest.approx(
        dict.fromkeys(SIZES, 0.5)
    )


def test_a_trial_with_nan_losses_is_not_chosen():
    found = losses_of({})
    found["q", SHIFT] = [float("nan")] * 6
    got = combined_ratios(0.5, found, [1.0] * 6, range(6), SIZES)
    assert got == pytest.approx(dict.fromkeys(SIZES, 0.5))
