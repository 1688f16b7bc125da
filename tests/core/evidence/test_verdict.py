"""Test the choice of the final ratio, and the verdict on its gain."""

import dataclasses
import statistics

import pytest
import torch

from grasp_lora.core.controller.rounds import (
    ControllerConfig,
    begin,
    choose_ratio,
    conclude,
    propose,
)
from grasp_lora.core.evidence.history import winsorised
from grasp_lora.core.evidence.verdict import cross_fitted_gain, ratio_choice

CONFIG = ControllerConfig()
RATIOS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)


def records_with(curve, mus=(), ratios=RATIOS):
    """Return a noiseless stratified round, then policy rounds with the centres `mus`."""
    losses = [[curve(ratio)] * 4 for ratio in ratios]
    state, _ = conclude(begin(CONFIG), CONFIG, ratios, [2.0] * 4, losses, range(4), 1)
    first = state.records[0]
    return (first, *(dataclasses.replace(first, kind="policy", mu=mu) for mu in mus))


def parabola(ratio):
    return 3 * (ratio - 0.4) ** 2


@pytest.mark.parametrize(("mus", "late"), [((), None), ((0.0, 0.5, 0.5, 0.5), 0.5)])
def test_the_ratio_is_the_history_minimum_wherever_the_policy_ended(mus, late):
    choice = ratio_choice(records_with(parabola, mus), 0.0, 8, CONFIG)
    assert choice.history_minimum == pytest.approx(0.4, abs=0.02)
    assert choice.ratio == choice.history_minimum
    assert choice.late_mu == (None if late is None else pytest.approx(late))


def test_a_gain_without_any_spread_over_the_rows_is_learned():
    choice = ratio_choice(records_with(parabola), 0.0, 8, CONFIG)
    assert choice.verdict == "learned"
    assert choice.gain == pytest.approx(3 * 0.16, rel=0.3)


def test_equal_losses_are_flat():
    choice = ratio_choice(records_with(lambda ratio: 0.1), 0.0, 8, CONFIG)
    assert choice.verdict == "flat"


def verdicts_of(curve, spread, seeds):
    """Return the verdicts of simulated searches of 6 rounds on 16 of 48 examples each."""
    config = ControllerConfig(rounds=6)
    said = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        slopes = torch.randn(48, generator=generator, dtype=torch.float64)
        state = begin(config, 6)
        for step in range(6):
            rows = sorted(torch.randperm(48, generator=generator)[:16].tolist())
            candidates = propose(state, config, generator)
            tried = [
                [1 + curve(c) + spread(c) * float(slopes[r]) for r in rows]
                for c in (state.mask_ratio, *candidates)
            ]
            state, _ = conclude(state, config, candidates, tried[0], tried[1:], rows, step)
        said.append(choose_ratio(state, config).verdict)
    return said


def test_a_plateau_before_a_cliff_is_not_called_learned():
    # Ratio 0 is seldom tried after the first round; the decay of old rounds must not harm it.
    def cliff(ratio):
        return 0.1 * ratio + 30 * max(0.0, ratio - 0.3) ** 2

    said = verdicts_of(cliff, lambda ratio: 0.1 * ratio, range(40))
    assert said.count("learned") <= 2


def test_a_clear_gain_before_a_cliff_is_still_learned():
    def valley(ratio):
        return 2 * (ratio - 0.25) ** 2 + 30 * max(0.0, ratio - 0.4) ** 2

    said = verdicts_of(valley, lambda ratio: 0.1 * ratio, range(20))
    assert said.count("learned") >= 15


def one_round(seed, rows=16, noise=0.3):
    """Return a round at ratios 0, 0.4 and 0.8 whose true gains over 0 are 0.5 and -1 nats."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(3, rows, generator=generator, dtype=torch.float64) * noise
    losses = (torch.tensor([[2.0], [1.5], [3.0]], dtype=torch.float64) + noisy).tolist()
    state = begin(CONFIG)
    state, _ = conclude(state, CONFIG, (0.0, 0.4, 0.8), losses[0], losses, range(rows), 1)
    return state.records


def test_the_gain_and_its_error_match_the_truth_over_repetitions():
    evidence = [cross_fitted_gain(one_round(seed), CONFIG) for seed in range(60)]
    gains = [found.gain for found in evidence]
    errors = [found.error for found in evidence]
    assert statistics.fmean(gains) == pytest.approx(0.5, abs=0.04)
    # Halves count as correlated, which makes the error up to sqrt(1.5) too large.
    assert 0.85 < statistics.fmean(errors) / statistics.stdev(gains) < 1.6


def test_without_two_examples_for_each_half_there_is_no_evidence():
    assert cross_fitted_gain((), CONFIG) is None
    assert cross_fitted_gain(one_round(0, rows=3), CONFIG) is None
    assert cross_fitted_gain(one_round(0, rows=4), CONFIG) is not None


def test_rounds_where_nothing_near_the_lowest_ratio_was_measured_give_no_evidence():
    (record,) = one_round(0)
    later = dataclasses.replace(record, candidates=(0.2, 0.4, 0.8))
    under_a_mask = dataclasses.replace(record, mask_ratio=0.3)
    with_low = cross_fitted_gain((under_a_mask,), CONFIG)
    assert cross_fitted_gain((under_a_mask, later), CONFIG) == with_low


def without_baseline(records):
    return [dataclasses.replace(r, baseline=None, baseline_rows=()) for r in records]


def test_the_lowest_ratio_of_a_round_serves_where_no_baseline_was_measured():
    assert cross_fitted_gain(without_baseline(one_round(0)), CONFIG) == cross_fitted_gain(
        one_round(0), CONFIG
    )
    (record,) = one_round(0)
    higher = dataclasses.replace(record, candidates=(0.2, 0.4, 0.8))
    assert cross_fitted_gain(without_baseline([higher]), CONFIG) is None


def test_trials_at_like_ratios_in_several_rounds_are_tested_together():
    rounds_ = []
    for seed in range(4):
        (record,) = one_round(seed, rows=8)
        rows = tuple(range(8 * seed, 8 * seed + 8))
        near = (0.0, 0.38 + 0.01 * seed, 0.8)
        rounds_.append(dataclasses.replace(record, rows=rows, candidates=near))
    one, all_of_them = (cross_fitted_gain(found, CONFIG) for found in (rounds_[:1], rounds_))
    alone, rows_alone = one.error, one.rows
    joined, rows_joined = all_of_them.error, all_of_them.rows
    assert (rows_alone, rows_joined) == (4, 16)
    assert joined == pytest.approx(alone / 2, rel=0.5)  # four times the examples
    apart = [
        dataclasses.replace(r, candidates=(0.0, 0.2 + 0.15 * i, 0.8))
        for i, r in enumerate(rounds_[:2])
    ]
    assert cross_fitted_gain(apart, CONFIG).rows < 8


def test_a_gain_on_the_halves_matches_a_plain_mean_with_a_single_candidate():
    (record,) = one_round(3)
    record = dataclasses.replace(
        record,
        candidates=record.candidates[:2],
        per_row=record.per_row[:2],
        baseline_rows=(),
    )
    gaps = winsorised([a - b for a, b in zip(*record.per_row, strict=True)])
    found = cross_fitted_gain([record], CONFIG)
    gain, error = found.gain, found.error
    assert gain == pytest.approx(statistics.fmean(gaps))  # the halves of a split hold all examples
    # A half has sqrt(2) times the error of all 16 examples; both halves have sqrt(1.25) times it.
    own = statistics.stdev(gaps) / 4
    assert error == pytest.approx(1.25**0.5 * own, rel=0.05)


def searched(curve, seed, spread=0.1, rows=40, config=CONFIG, noise=0.0):
    """Return the choice of a simulated search whose examples have random slopes."""
    generator = torch.Generator().manual_seed(seed)
    slopes = spread * torch.randn(rows, generator=generator, dtype=torch.float64)
    state = begin(config, 8)
    for step in range(8):
        drawn = sorted(torch.randperm(rows, generator=generator)[:12].tolist())
        candidates = propose(state, config, generator)
        losses = [
            [
                1
                + curve(c)
                + c * float(slopes[r])
                + noise * float(torch.randn((), generator=generator))
                for r in drawn
            ]
            for c in candidates
        ]
        state, _ = conclude(state, config, candidates, None, losses, drawn, step)
    return choose_ratio(state, config)


def test_the_interval_holds_the_ratio_and_grows_as_examples_disagree():
    narrow = searched(parabola, 0, spread=0.05)
    wide = searched(parabola, 0, spread=1.5)
    for choice in (narrow, wide):
        low, high = choice.interval
        assert CONFIG.low <= low <= choice.ratio <= high <= CONFIG.high
    assert wide.interval[1] - wide.interval[0] > 3 * (narrow.interval[1] - narrow.interval[0])


def test_a_flat_search_may_take_the_largest_ratio_that_is_as_good():
    largest = dataclasses.replace(CONFIG, when_flat="largest")

    def plateau(ratio):
        return 5 * max(0.0, ratio - 0.5) ** 2

    more = []
    for seed in range(10):
        usual = searched(plateau, seed, spread=0.02, noise=0.05)
        other = searched(plateau, seed, spread=0.02, noise=0.05, config=largest)
        assert usual.verdict == other.verdict == "flat"
        assert usual.ratio <= other.ratio < 0.7
        assert other.rule == "largest ratio within one standard error"
        more.append(other.ratio - usual.ratio)
    assert statistics.fmean(more) > 0.05


def test_a_learned_ratio_is_the_minimum_whatever_flat_ones_are():
    largest = dataclasses.replace(CONFIG, when_flat="largest")
    assert searched(parabola, 0).ratio == searched(parabola, 0, config=largest).ratio
