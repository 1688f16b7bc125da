"""Test gains that are measured on other examples than the choice."""

import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from grasp_lora.core.evidence.crossfit import (
    Gain,
    critical_value,
    gain_of_best,
    pooled_gain,
    split_halves,
    standard_error,
    within_one_error_of_best,
)


def noisy(seed, names, rows=16, gains=None):
    """Return name -> losses around 2; an example is equally hard under every name."""
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.randn(rows, generator=generator, dtype=torch.float64)
    noise = 0.2 * torch.randn(len(names), rows, generator=generator, dtype=torch.float64)
    gain = {} if gains is None else gains
    return {
        name: (2 - gain.get(name, 0.0) + hardness + own).tolist()
        for name, own in zip(names, noise, strict=True)
    }


def compared(losses, references="r"):
    challengers = {name: values for name, values in losses.items() if name not in references}
    return challengers, {name: losses[name] for name in references}


def test_choosing_the_best_of_many_equal_ones_is_seldom_called_a_gain():
    shown = naive = 0
    for seed in range(200):
        challengers, references = compared(noisy(seed, "abcdefghr"))
        shown += gain_of_best(challengers, references).shown
        best = min(challengers.values(), key=statistics.fmean)
        naive += stats.ttest_rel(references["r"], best, alternative="greater").pvalue < 0.05
    assert shown <= 0.07 * 200
    assert naive > 2 * shown, "without the halves, selection bias counts as a gain"


def test_a_gain_is_found_and_its_size_is_not_flattered():
    losses = [noisy(seed, "abcdr", gains={"b": 0.5}) for seed in range(40)]
    found = [gain_of_best(*compared(one)) for one in losses]
    assert statistics.fmean(one.shown for one in found) > 0.9
    assert statistics.fmean(one.gain for one in found) == pytest.approx(0.5, abs=0.06)


def test_a_loss_that_is_not_finite_loses():
    losses = {"good": [1.0, 1.1, 0.9, 1.0, 1.2], "bad": [0.0, math.nan, 0.0, 0.0, 0.0]}
    found = gain_of_best(losses, {"r": [2.0] * 5})
    assert found.gain == pytest.approx(statistics.fmean(2 - x for x in losses["good"]), abs=0.1)
    assert gain_of_best({"bad": losses["bad"]}, {"r": [2.0] * 5}) is None


def test_too_few_examples_are_no_evidence_and_groups_must_agree():
    assert gain_of_best({"a": [1.0] * 3}, {"r": [2.0] * 3}) is None
    assert gain_of_best({"a": [1.0] * 4}, {"r": [2.0] * 4}) == Gain(1.0, 0.0, 2)
    with pytest.raises(
        ValueError, match=r"got 1 challengers and 1 references with \[4, 5\] examples"
    ):
        gain_of_best({"a": [1.0] * 4}, {"r": [2.0] * 5})
    with pytest.raises(ValueError, match="got 0 challengers"):
        gain_of_best({}, {"r": [2.0] * 5})


def test_a_gain_without_spread_is_shown_unless_it_is_rounding():
    assert Gain(0.1, 0.0, 8).shown
    assert Gain(0.1, 0.0, 8).z is None
    assert not Gain(1e-12, 0.0, 8).shown
    assert not Gain(-0.1, 0.01, 8).shown
    assert Gain(0.3, 0.1, 8).z == pytest.approx(3)


@pytest.mark.parametrize("rows", [4, 8, 16, 33, 100])
def test_the_level_is_that_of_students_t(rows):
    exact = stats.t.ppf(0.95, rows - 1)
    assert critical_value(rows) == pytest.approx(exact, rel=0.02)


def test_halves_are_disjoint_whole_and_the_same_each_time():
    rows = list(range(7))
    found = list(split_halves(rows))
    assert found == list(split_halves(rows))
    assert len(found) == 10
    for chosen_on, tested_on in found:
        assert chosen_on | tested_on == set(rows)
        assert not chosen_on & tested_on
    assert [pair[::-1] for pair in found[::2]] == found[1::2]
    assert len({frozenset(chosen) for chosen, _ in found}) > 4, "the splits differ"


def test_pooled_errors_are_those_of_halves_correlated_at_a_quarter():
    first, second = [1.0, 2.0, 4.0], [0.0, 1.0, 5.0]
    found = pooled_gain([first, second])
    assert found.gain == pytest.approx((7 / 3 + 2) / 2)
    mean_error = (standard_error(first) + standard_error(second)) / 2
    assert found.error == pytest.approx(math.sqrt(0.625) * mean_error)
    assert found.rows == 3
    assert pooled_gain([]) is None


def test_as_good_as_the_best_is_within_one_standard_error_of_the_differences():
    generator = np.random.default_rng(5)
    common = generator.normal(size=40)
    losses = {
        "best": common.tolist(),
        # above by 0.5 and 2 standard errors of the differences
        "near": (common + shifted(generator, 0.5)).tolist(),
        "far": (common + shifted(generator, 2.0)).tolist(),
        "same": common.tolist(),
        "broken": [math.nan, *common[1:].tolist()],
    }
    assert within_one_error_of_best(losses) == ["best", "near", "same"]
    assert within_one_error_of_best({"broken": losses["broken"]}) == []
    # A level of each example that all names share makes no difference.
    level = generator.normal(size=40) * 10
    moved = {n: (np.array(v) + level).tolist() for n, v in losses.items()}
    assert within_one_error_of_best(moved) == ["best", "near", "same"]


def shifted(generator, errors):
    noise = generator.normal(size=40)
    noise -= noise.mean()
    return noise + errors * noise.std(ddof=1) / math.sqrt(40)


def test_losses_on_different_examples_cannot_be_compared():
    with pytest.raises(ValueError, match="same examples"):
        within_one_error_of_best({"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(ValueError, match="at least 2"):
        within_one_error_of_best({"a": [1.0]})
