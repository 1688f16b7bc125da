"""How the final ratio is picked, and what counts as learned."""

import dataclasses

import pytest

from grasp_lora.core.rounds import ControllerConfig, begin, conclude
from grasp_lora.core.verdict import ratio_choice

CONFIG = ControllerConfig()
RATIOS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)


def records_with(curve, mus=(), ratios=RATIOS):
    """Return a noiseless coverage round over the ratios, then policy rounds with these centres."""
    losses = [[curve(ratio)] * 4 for ratio in ratios]
    state, _ = conclude(begin(CONFIG), CONFIG, ratios, [2.0] * 4, losses, range(4), 1)
    first = state.records[0]
    return (first, *(dataclasses.replace(first, kind="policy", mu=mu) for mu in mus))


def parabola(ratio):
    return 3 * (ratio - 0.4) ** 2


def test_the_late_centre_is_averaged_in_where_it_agrees():
    choice = ratio_choice(records_with(parabola, (0.0, 0.5, 0.5, 0.5)), 0.0, 8, CONFIG)
    assert choice.history_minimum == pytest.approx(0.4, abs=0.02)
    assert choice.late_mu == pytest.approx(0.5)
    assert choice.ratio == pytest.approx((choice.history_minimum + 0.5) / 2)


@pytest.mark.parametrize("mus", [(), (0.6, 0.6)])
def test_the_history_minimum_stands_without_a_late_centre_that_agrees(mus):
    choice = ratio_choice(records_with(parabola, mus), 0.0, 8, CONFIG)
    assert choice.ratio == choice.history_minimum


def test_a_gain_without_any_spread_over_the_rows_is_learned():
    choice = ratio_choice(records_with(parabola), 0.0, 8, CONFIG)
    assert choice.verdict == "learned"
    assert choice.gain == pytest.approx(3 * 0.16, rel=0.3)


def test_equal_losses_are_flat():
    choice = ratio_choice(records_with(lambda ratio: 0.1), 0.0, 8, CONFIG)
    assert choice.verdict == "flat"
