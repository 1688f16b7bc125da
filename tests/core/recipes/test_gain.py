"""The expected gain: against the textbook intervals of its parts, and its level by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from grasp_lora.core.evidence.groups import Gain
from grasp_lora.core.recipes.gain import RETRAINED, RETRAINED_RATIO, expected

MEAN, SPREAD = float(np.mean(RETRAINED)), float(np.std(RETRAINED, ddof=1))


def test_without_a_retraining_it_is_the_interval_of_a_new_sample():
    found = expected(Gain(0.2, 0.05, 12), labels=50, trained=50)
    half = stats.t.ppf(0.975, 11) * math.sqrt(2) * 0.05
    assert found.gain == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))


def test_without_an_error_it_is_the_interval_of_a_new_pair():
    found = expected(Gain(0.2, 0.0, 12), labels=116, trained=50)
    half = stats.t.ppf(0.975, 3) * SPREAD * math.sqrt(1 + 1 / 4)
    assert found.gain == pytest.approx(0.2 + MEAN)
    assert (found.low, found.high) == pytest.approx((0.2 + MEAN - half, 0.2 + MEAN + half))


def test_more_labels_count_by_their_logarithm():
    once = expected(Gain(0.0, 0.0, 12), 116, 50).gain
    twice = expected(Gain(0.0, 0.0, 12), round(50 * RETRAINED_RATIO**2), 50).gain
    assert twice == pytest.approx(2 * once, rel=0.01)


def test_nothing_unknown_is_a_point():
    found = expected(Gain(0.1, 0.0, 5), 40, 40)
    assert found.low == found.gain == found.high == pytest.approx(0.1)


@pytest.mark.parametrize("error", [0.02, 0.1])
def test_the_interval_holds_the_gain_on_a_new_sample_of_a_new_pair_as_often_as_it_says(error):
    """Pairs are drawn from a normal law with the mean and spread of the recorded ones.

    The recorded pairs are a sample of that law too, so they are drawn anew in every trial.
    """
    random, trials, groups, held = np.random.default_rng(0), 4000, 16, 0
    for _ in range(trials):
        law = random.normal(MEAN, SPREAD, size=len(RETRAINED))
        more = random.normal(MEAN, SPREAD)
        measured = random.normal(0.1, error * math.sqrt(groups), size=groups)
        gain = Gain(float(measured.mean()), float(measured.std(ddof=1) / 4), groups)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grasp_lora.core.recipes.gain.RETRAINED", tuple(law))
            found = expected(gain, 116, 50)
        new = random.normal(0.1, error) + more
        held += found.low <= new <= found.high
    assert 0.93 <= held / trials <= 0.97
