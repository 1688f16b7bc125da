"""Test that each finding appears where it should, and only there, on constructed cases."""

import dataclasses
import statistics

import pytest
import torch
from scipy import stats

from grasp_lora.core.controller.rounds import ControllerConfig, begin, conclude
from grasp_lora.core.evidence import findings

CONFIG = ControllerConfig()


def normal(seed, count, mean=0.0, deviation=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (mean + deviation * torch.randn(count, generator=generator).double()).tolist()


def test_a_search_without_a_round_never_fired():
    found = findings.never_fired("never-fired")
    assert found.name == "never-fired"
    assert "raise train.search.epochs" in found.says
    assert findings.never_fired("flat") is None


@pytest.mark.parametrize(
    ("ratio", "verdict", "low", "said"),
    [
        (0.8, "learned", 0.0, "raise controller.high (now 0.8)"),
        (0.785, "learned", 0.0, "raise controller.high"),
        (0.77, "learned", 0.0, None),
        (0.8, "flat", 0.0, None),
        (0.0, "learned", 0.0, None),
        (0.1, "learned", 0.1, "lower controller.low (now 0.1)"),
        (0.13, "learned", 0.1, None),
    ],
)
def test_a_learned_ratio_at_an_end_of_the_range_is_at_bound(ratio, verdict, low, said):
    found = findings.at_bound(ratio, verdict, ControllerConfig(low=low))
    assert (found is None) == (said is None)
    if found is not None:
        assert said in found.says
        assert found.evidence["ratio"] == ratio


def rounds_at(mask_ratios, committed=None):
    """Return one record per mask ratio, with that mask in force."""
    state, _ = conclude(
        begin(CONFIG), CONFIG, (0.0, 0.4), None, [[1.0, 1.0], [1.0, 1.0]], [0, 1], 1
    )
    record = state.records[0]
    flags = committed or [True] * len(mask_ratios)
    return [
        dataclasses.replace(record, mask_ratio=ratio, committed=flag)
        for ratio, flag in zip(mask_ratios, flags, strict=True)
    ]


def test_commits_that_exchange_more_than_the_ratio_asks_for_are_thrashing():
    records = rounds_at([0.1, 0.2, 0.2, 0.3])
    assert findings.thrashing(records, [100, 100, 0, 100], 1000) is None
    found = findings.thrashing(records, [100, 350, 250, 350], 1000)
    assert found.evidence["mean_excess_share"] == pytest.approx(0.25)
    assert found.evidence["commits"] == 4
    assert "exchanged 25%" in found.says


def test_thrashing_needs_two_commits_after_the_first_mask():
    assert findings.thrashing(rounds_at([0.4, 0.4]), [400, 900], 1000) is None
    idle = rounds_at([0.4, 0.4, 0.4], [True, False, False])
    assert findings.thrashing(idle, [400, 0, 0], 1000) is None
    assert findings.thrashing([], [], 1000) is None


def test_a_reward_whose_trials_mostly_tie_is_coarse():
    def losses(*rounds, ratios=(0.0, 0.1, 0.2)):
        records = rounds_at([0.0] * len(rounds))
        return [
            dataclasses.replace(r, losses=one, candidates=ratios)
            for r, one in zip(records, rounds, strict=True)
        ]

    found = findings.coarse_reward(losses((0.5, 0.5, 0.5), (0.25, 0.5, 0.5)))
    assert found.evidence == {"tied_pairs": 4, "pairs": 6}
    assert "4 of 6 pairs" in found.says
    assert findings.coarse_reward(losses((0.5, 0.51, 0.5))) is None, "one of three is no majority"
    assert findings.coarse_reward(losses((None, None, 0.5))) is None
    assert findings.coarse_reward([]) is None
    twice = losses((0.5, 0.5, 0.6), (0.5, 0.5, 0.6), ratios=(0.0, 0.0, 0.1))
    assert findings.coarse_reward(twice) is None, "one ratio, tried twice"


def test_a_final_run_that_never_improved_is_overfitting():
    assert findings.overfitting(0, 65).evidence == {"best_step": 0, "steps": 65}
    assert findings.overfitting(13, 65) is None
    assert findings.overfitting(0, 0) is None, "nothing was trained"


def test_a_pruned_adapter_that_is_worse_on_dev_is_over_pruned():
    whole = normal(0, 50, 2.0)
    noise = normal(1, 50, 0.0, 0.1)
    worse = [a + 0.2 + b for a, b in zip(whole, noise, strict=True)]
    found = findings.over_pruned(worse, whole)
    assert found.evidence["loss_more"] == pytest.approx(0.2, abs=0.05)
    assert (found.evidence["rows"], found.evidence["groups"]) == (50, 50)
    assert findings.over_pruned(whole, worse) is None
    assert findings.over_pruned(whole, whole) is None


def test_equal_adapters_are_called_over_pruned_once_in_twenty():
    fired = 0
    for seed in range(400):
        whole = normal(seed, 20, 2.0)
        same = [a + b for a, b in zip(whole, normal(seed + 5000, 20, 0.0, 0.3), strict=True)]
        exact = stats.ttest_rel(same, whole, alternative="greater").pvalue < 0.05
        assert (findings.over_pruned(same, whole) is not None) == exact
        fired += exact
    assert 0.02 * 400 <= fired <= 0.08 * 400


def shared_by_fives(seed, contexts=10):
    """Return noise on the examples of contexts, half of it shared within one, and the contexts."""
    own, shared = normal(seed, 5 * contexts), normal(seed + 5000, contexts)
    noise = [(a + shared[i // 5]) / 2**0.5 for i, a in enumerate(own)]
    return noise, [str(i // 5) for i in range(5 * contexts)]


def test_examples_of_one_context_are_no_independent_evidence():
    fired = {"over-pruned": 0, "not-worth-merging": 0, "undertrained": 0, "by row": 0}
    for seed in range(400):
        noise, groups = shared_by_fives(seed)
        level, other = [0.0] * 50, shared_by_fives(seed + 10000)[0]
        fired["over-pruned"] += findings.over_pruned(noise, level, groups) is not None
        fired["by row"] += findings.over_pruned(noise, level) is not None
        alone = {"a": level, "b": other}
        fired["not-worth-merging"] += findings.not_worth_merging(noise, alone, groups) is not None
        runs = {"a": [noise, level], "b": [other, level]}
        kept = {"a": groups, "b": groups}
        fired["undertrained"] += findings.undertrained(runs, kept) is not None
    assert fired.pop("by row") > 0.13 * 400
    assert all(0.02 * 400 <= count <= 0.08 * 400 for count in fired.values()), fired


def test_the_contexts_of_a_run_without_any_are_its_examples():
    noise, groups = shared_by_fives(0)
    runs = {"old": [[x + 2 for x in noise], noise], "new": [[x + 2 for x in noise], noise]}
    found = findings.undertrained(runs, {"new": groups})
    assert found.evidence["runs"] in ("old; new", "new; old")


def test_losses_of_different_examples_are_refused_and_infinite_ones_no_evidence():
    with pytest.raises(ValueError, match="got 3 and 2"):
        findings.over_pruned([1.0, 1.0, 1.0], [1.0, 1.0])
    assert findings.over_pruned([1.0, float("inf")], [0.0, 0.0]) is None
    assert findings.over_pruned([2.0], [1.0]) is None
    assert findings.over_pruned([], []) is None


def test_the_best_single_adapter_is_named_where_the_merge_does_not_pay():
    final = normal(0, 50, 2.0)
    better = {
        "target adapter": [x - 0.1 for x in final],
        "source adapter": [x - 0.4 for x in final],
        "third": [x + 1 for x in final],
    }
    found = findings.not_worth_merging(final, better)
    assert found.evidence["better"] == "source adapter"
    assert found.evidence["loss_more"] == pytest.approx(0.4)
    assert findings.not_worth_merging(final, {"third": better["third"]}) is None
    assert findings.not_worth_merging(final, {}) is None


def searched(micro_gain, dev_gain, seed, micro=16, dev=50, rounds=6):
    """Return rounds at 0, 0.4 and 0.7 on 12 random examples, with these mean gains at 0.4."""
    generator = torch.Generator().manual_seed(seed)
    own = 0.3 * torch.randn(micro + dev, generator=generator).double()
    config = ControllerConfig(rounds=rounds)
    state = begin(config)
    for step in range(rounds):
        rows = sorted(torch.randperm(micro + dev, generator=generator)[:12].tolist())
        gains = [(micro_gain if r < micro else dev_gain) + float(own[r]) for r in rows]
        losses = [[2.0] * 12, [2.0 - gain for gain in gains], [3.0] * 12]
        state, _ = conclude(state, config, (0.0, 0.4, 0.7), None, losses, rows, step)
    return state.records


def test_a_micro_dev_set_that_sees_another_ratio_is_unrepresentative():
    found = findings.unrepresentative(searched(-0.6, 0.4, 0), 0.4, range(16))
    assert found.evidence["difference"] == pytest.approx(-1.0, abs=0.35)
    seen = found.evidence["seen_four_times_in_five_from"]
    groups = found.evidence["micro_dev_groups"], found.evidence["dev_groups"]
    assert groups[0] <= 16
    assert groups[1] <= 50
    # Welch's degrees of freedom lie between those of the smaller kind and those of both.
    least, most = (stats.t.ppf(0.975, n) + 0.84 for n in (sum(groups) - 2, min(groups) - 1))
    assert least <= seen / found.evidence["standard_error"] <= most


def test_a_representative_micro_dev_set_seldom_fires():
    fired = sum(
        findings.unrepresentative(searched(0.4, 0.4, seed), 0.4, range(16)) is not None
        for seed in range(200)
    )
    assert fired <= 0.08 * 200


def test_kinds_are_compared_by_contexts_as_welch_does():
    ratios, count = (0.0, 0.4), 40
    gains = normal(7, count)
    gains[:16] = [gain - 1 for gain in gains[:16]]
    groups = [str(i // 2) for i in range(count)]
    losses = [[0.0] * count, [-gain for gain in gains]]
    state, _ = conclude(begin(CONFIG), CONFIG, ratios, None, losses, range(count), 1)
    found = findings.unrepresentative(state.records, 0.4, range(16), groups)
    means = [(gains[i] + gains[i + 1]) / 2 for i in range(0, count, 2)]
    exact = stats.ttest_ind(means[:8], means[8:], equal_var=False)
    assert (found is not None) == (exact.pvalue < 0.05)
    assert found.evidence["difference"] == pytest.approx(
        statistics.fmean(means[:8]) - statistics.fmean(means[8:])
    )
    error = found.evidence["difference"] / exact.statistic
    assert found.evidence["standard_error"] == pytest.approx(error)
    few = [str(i // 6) for i in range(count)]
    assert findings.unrepresentative(state.records, 0.4, range(16), few) is None


def test_its_power_is_what_its_documentation_says():
    # A difference of 0.8 standard deviations (0.3) is found about four times in five.
    fired = statistics.fmean(
        findings.unrepresentative(searched(0.64, 0.4, seed, rounds=11), 0.4, range(16)) is not None
        for seed in range(150)
    )
    assert 0.65 < fired < 0.92


def test_without_examples_of_both_kinds_there_is_no_finding():
    records = searched(-5.0, 0.4, 0)
    assert findings.unrepresentative(records, 0.4, range(66)) is None
    assert findings.unrepresentative(records, 0.4, ()) is None
    assert findings.unrepresentative((), 0.4, range(16)) is None
    assert findings.unrepresentative(records, 0.99, range(16)) is None, "no trial near it"


def test_systems_that_often_answer_with_nothing_are_named_worst_first():
    counts = {"a": (4, 100), "b": (5, 100), "c": (3, 10), "d": (0, 0), "e": (0, 10)}
    found = findings.empty_answers(counts)
    assert found.evidence == {"systems": "c 3 of 10; b 5 of 100"}
    assert "evaluate.min_new_tokens: 1" in found.says
    assert findings.empty_answers({"a": (4, 100), "d": (0, 0)}) is None
    assert findings.empty_answers({}) is None
