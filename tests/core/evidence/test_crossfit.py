"""Test gains that are measured on other examples than the choice."""

import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from grasp_lora.core.evidence.crossfit import (
    forward_splits,
    gain_of_best,
    within_one_error_of_best,
)
from grasp_lora.core.evidence.groups import Gain


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
    assert 0.02 * 200 <= shown <= 0.085 * 200
    assert naive > 2 * shown, "without other examples, selection bias counts as a gain"


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
    assert gain_of_best({"a": [1.0] * 4}, {"r": [2.0] * 4}) == Gain(1.0, 0.0, 3)
    assert gain_of_best({"a": [1.0] * 6}, {"r": [2.0] * 6}, list("aabbcc")) is None
    with pytest.raises(
        ValueError, match=r"got 1 challengers and 1 references with \[4, 5\] examples"
    ):
        gain_of_best({"a": [1.0] * 4}, {"r": [2.0] * 5})
    with pytest.raises(ValueError, match="got 0 challengers"):
        gain_of_best({}, {"r": [2.0] * 5})


def in_contexts(seed, names, contexts=12, rows=5):
    """Return name -> losses, and contexts; half of the noise is shared within a context."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(len(names), contexts, 1))
    own = random.normal(size=(len(names), contexts, rows))
    losses = (2 + math.sqrt(0.5) * (shared + own)).reshape(len(names), -1)
    groups = [str(i) for i in range(contexts) for _ in range(rows)]
    return dict(zip(names, losses.tolist(), strict=True)), groups


def test_examples_of_one_context_are_no_independent_evidence():
    by_context = by_row = 0
    for seed in range(400):
        losses, groups = in_contexts(seed, "abcdefr")
        sides = compared(losses)
        by_context += gain_of_best(*sides, groups).shown
        by_row += gain_of_best(*sides).shown
    assert 0.02 * 400 <= by_context <= 0.08 * 400
    assert by_row > 0.15 * 400


def test_a_reference_that_leads_the_others_is_the_one_to_beat():
    # Challenger and first reference are as good; the other references are a little worse, and
    # would be mistaken for the best by examples of their own half of the time.
    shown = 0
    for seed in range(400):
        gains = {"c": 0.1, "r": 0.1}
        sides = compared(noisy(seed, "cdrstuvwxyz", gains=gains), references="rstuvwxyz")
        shown += gain_of_best(*sides).shown
    assert shown <= 0.075 * 400


@pytest.mark.parametrize("steps", [None, 2])
def test_no_context_is_tested_under_a_choice_that_it_took_part_in(steps):
    groups = [str(i // 3) for i in range(21)]
    found = list(forward_splits(groups, steps))
    assert found == list(forward_splits(groups, steps))
    assert len(found) == (steps or 5), "of seven contexts two only choose"
    members = {name: {i for i, g in enumerate(groups) if g == name} for name in groups}
    before = set(found[0][0])
    assert len(before) == 6
    for chosen_on, tested_on in found:
        assert set(chosen_on) == before, "all that came before choose"
        assert not before & set(tested_on)
        for own in members.values():
            assert own <= set(tested_on) or not own & set(tested_on)
        before |= set(tested_on)
    assert before == set(range(21))


def test_three_contexts_cannot_be_split():
    with pytest.raises(ValueError, match="needs 4 groups, got 3"):
        list(forward_splits(["a", "b", "c", "c"]))


def test_with_one_challenger_the_gain_is_the_mean_over_what_did_not_only_choose():
    losses, groups = in_contexts(0, "ar")
    found = gain_of_best({"a": losses["a"]}, {"r": losses["r"]}, groups)
    tested = [row for _, rows in forward_splits(groups) for row in rows]
    gaps = np.array(losses["r"])[tested] - np.array(losses["a"])[tested]
    by_context = gaps.reshape(8, 5).mean(axis=1)
    assert (found.gain, found.groups) == (pytest.approx(gaps.mean()), 8)
    assert found.error == pytest.approx(stats.sem(by_context))


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


def test_one_error_is_that_over_contexts():
    losses, groups = in_contexts(3, "ab")
    gaps = np.array(losses["b"]) - np.array(losses["a"])
    by_context = gaps.reshape(12, 5).mean(axis=1)
    better = np.array(losses["b"]) - gaps.mean()  # level with a
    for errors, within in ((0.9, True), (1.1, False)):
        shifted = (better + errors * stats.sem(by_context)).tolist()
        names = within_one_error_of_best({"a": losses["a"], "b": shifted}, groups)
        assert ("b" in names) is within
    alone = ["one"] * 60
    assert within_one_error_of_best({"a": losses["a"], "b": shifted}, alone) == ["a", "b"]
