"""A prompt is better only by more than the error of its gain."""

import pytest

from grasp_lora.core.evidence.prompts import better_prompt

USED = [2.0, 3.0, 1.0, 2.5]
GROUPS = ["a", "a", "b", "c"]


def less(*gains: float) -> list[float]:
    return [loss - gain for loss, gain in zip(USED, gains, strict=True)]


def test_the_prompt_with_the_lowest_loss_is_told_with_its_gain_over_contexts():
    losses = {"used": USED, "one": less(0.5, 0.5, 0.4, 0.6), "two": less(0.1, 0.2, 0.1, 0.1)}
    found = better_prompt(losses, "used", GROUPS)
    assert found is not None
    name, gain = found
    assert name == "one"
    assert (gain.gain, gain.groups) == (pytest.approx(0.5), 3)
    assert 0 < gain.error < 0.1


@pytest.mark.parametrize(
    ("other", "groups"),
    [
        (less(-0.1, 0.0, 0.0, 0.0), GROUPS),  # worse
        (less(2.0, 0.0, -0.9, -0.9), GROUPS),  # by chance: the error is larger than the gain
        (less(0.5, 0.5, 0.5, 0.6), ["a"] * 4),  # a single context has no error
        ([float("nan")] * 4, GROUPS),
    ],
)
def test_no_other_prompt_is_told_without_a_gain_beyond_its_error(other, groups):
    assert better_prompt({"used": USED, "other": other}, "used", groups) is None


def test_a_prompt_in_force_without_a_finite_loss_is_compared_with_nothing():
    assert better_prompt({"used": [float("nan")] * 4, "other": USED}, "used", GROUPS) is None
