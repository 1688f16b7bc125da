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
    next_examples,
    propose,
)
from grasp_lora.core.evidence.verdict import gain_at, ratio_choice

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
    evidence = [gain_at(0.4, one_round(seed), CONFIG).mean for seed in range(60)]
    gains = [found.gain for found in evidence]
    errors = [found.error for found in evidence]
    assert statistics.fmean(gains) == pytest.approx(0.5, abs=0.04)
    assert 0.8 < statistics.fmean(errors) / statistics.stdev(gains) < 1.25


def test_the_gain_is_that_of_the_ratio_asked_for():
    (record,) = one_round(1)
    for place, ratio in ((1, 0.4), (2, 0.8)):
        gaps = [a - b for a, b in zip(record.per_row[0], record.per_row[place], strict=True)]
        found = gain_at(ratio, [record], CONFIG).mean
        assert found.gain == pytest.approx(statistics.fmean(gaps))
        assert found.error == pytest.approx(statistics.stdev(gaps) / 4)
    assert gain_at(0.6, [record], CONFIG) is None, "nothing was tried near it"
    assert gain_at(0.05, [record], CONFIG) is None, "it is as good as the lowest"


def test_without_two_groups_of_examples_there_is_no_evidence():
    assert gain_at(0.4, (), CONFIG) is None
    assert gain_at(0.4, one_round(0, rows=1), CONFIG) is None
    assert gain_at(0.4, one_round(0, rows=2), CONFIG) is not None
    assert gain_at(0.4, one_round(0, rows=4), CONFIG, ["a"] * 4) is None


def test_the_gain_is_the_plain_mean_however_wild_an_example_is():
    (record,) = one_round(2)
    wild = [list(losses) for losses in record.per_row]
    wild[1][3] += 100.0
    record = dataclasses.replace(record, per_row=tuple(map(tuple, wild)), baseline_rows=())
    gaps = [a - b for a, b in zip(wild[0], wild[1], strict=True)]
    assert gain_at(0.4, [record], CONFIG).mean.gain == pytest.approx(statistics.fmean(gaps))


def test_rounds_where_nothing_near_the_lowest_ratio_was_measured_give_no_evidence():
    (record,) = one_round(0)
    later = dataclasses.replace(record, candidates=(0.2, 0.4, 0.8))
    under_a_mask = dataclasses.replace(record, mask_ratio=0.3)
    with_low = gain_at(0.4, (under_a_mask,), CONFIG)
    assert gain_at(0.4, (under_a_mask, later), CONFIG) == with_low


def without_baseline(records):
    return [dataclasses.replace(r, baseline=None, baseline_rows=()) for r in records]


def test_the_lowest_ratio_of_a_round_serves_where_no_baseline_was_measured():
    rounds_ = one_round(0)
    assert gain_at(0.4, without_baseline(rounds_), CONFIG) == gain_at(0.4, rounds_, CONFIG)
    higher = dataclasses.replace(rounds_[0], candidates=(0.2, 0.4, 0.8))
    assert gain_at(0.4, without_baseline([higher]), CONFIG) is None


def test_trials_at_like_ratios_in_several_rounds_are_tested_together():
    rounds_ = []
    for seed in range(4):
        (record,) = one_round(seed, rows=8)
        rows = tuple(range(8 * seed, 8 * seed + 8))
        near = (0.0, 0.38 + 0.01 * seed, 0.8)
        rounds_.append(dataclasses.replace(record, rows=rows, candidates=near))
    alone, joined = (gain_at(0.4, found, CONFIG).mean for found in (rounds_[:1], rounds_))
    assert (alone.groups, joined.groups) == (8, 32)
    assert joined.error == pytest.approx(alone.error / 2, rel=0.5)  # four times the examples
    apart = [
        dataclasses.replace(r, candidates=(0.0, 0.2 + 0.2 * i, 0.8))
        for i, r in enumerate(rounds_[:2])
    ]
    assert gain_at(0.4, apart, CONFIG).mean.groups == 8


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


def test_a_trial_with_a_loss_that_is_not_finite_is_lost():
    (record,) = one_round(3)
    (other,) = one_round(4)

    def broken(place):
        per_row = [list(losses) for losses in record.per_row]
        per_row[place][0] = None
        losses = [None if i == place else mean for i, mean in enumerate(record.losses)]
        values = {"per_row": tuple(map(tuple, per_row)), "losses": tuple(losses)}
        return dataclasses.replace(record, baseline=None, baseline_rows=(), **values)

    (alone,) = without_baseline([other])
    known = gain_at(0.4, [alone], CONFIG).mean
    assert gain_at(0.4, [broken(1), alone], CONFIG).mean == known
    assert gain_at(0.4, [broken(0), alone], CONFIG).mean == known, "nothing near the lowest is left"


def test_the_gain_reported_is_that_of_the_ratio_reported():
    def valley(ratio):
        return 4 * (ratio - 0.35) ** 2

    for seed in range(5):
        choice = searched(valley, seed, spread=0.02)
        assert choice.verdict == "learned"
        # Trials within 0.07 of the ratio and of 0 count; the curve is steep at 0.
        assert choice.gain == pytest.approx(valley(0) - valley(choice.ratio), abs=0.12)
        assert choice.p_value <= 0.05


def test_a_ratio_at_the_lowest_is_never_called_learned():
    choice = searched(lambda ratio: ratio, 0)
    assert choice.ratio < 0.07
    assert (choice.verdict, choice.gain, choice.p_value) == ("flat", None, None)


def test_a_few_examples_that_are_badly_harmed_count_in_full():
    # Eleven of twelve examples gain 0.02 nats at the best, the twelfth loses 0.5: the mean falls.
    said = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        state = begin(CONFIG, 8)
        for step in range(8):
            drawn = sorted(torch.randperm(66, generator=generator)[:12].tolist())
            candidates = propose(state, CONFIG, generator)
            losses = []
            for ratio in candidates:
                deep = max(0.0, 1 - ((ratio - 0.4) / 0.4) ** 2)
                noise = 0.005 * torch.randn(12, generator=generator, dtype=torch.float64)
                gains = [-0.5 * deep if row % 12 == 0 else 0.02 * deep for row in drawn]
                losses.append([2 - g + float(n) for g, n in zip(gains, noise, strict=True)])
            state, _ = conclude(state, CONFIG, candidates, None, losses, drawn, step)
        said.append(choose_ratio(state, CONFIG))
    assert sum(one.verdict == "learned" for one in said) <= 1
    assert statistics.fmean(one.gain for one in said if one.gain is not None) < 0.005


def test_examples_of_one_context_are_no_independent_evidence_of_a_ratio():
    # A flat curve; what an example gains at a ratio is half its own, half its context's.
    by_context = by_row = 0
    groups = [str(row // 5) for row in range(50)]
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(10, generator=generator, dtype=torch.float64)
        own = torch.randn(50, generator=generator, dtype=torch.float64)
        slopes = shared.repeat_interleave(5) + own
        state = begin(CONFIG, 8)
        for step in range(8):
            drawn = next_examples(state, groups, CONFIG, generator)
            candidates = propose(state, CONFIG, generator)
            losses = [
                [2 + 0.1 * ratio * float(slopes[row]) for row in drawn] for ratio in candidates
            ]
            state, _ = conclude(state, CONFIG, candidates, None, losses, drawn, step)
        by_context += choose_ratio(state, CONFIG, groups).verdict == "learned"
        by_row += choose_ratio(state, CONFIG).verdict == "learned"
    assert by_context <= 0.09 * 150
    assert by_row > by_context
