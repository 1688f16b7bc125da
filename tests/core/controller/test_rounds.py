"""Test rounds: commits, lost trials, resuming from JSON, and the result of a whole search."""

import dataclasses
import json
import math

import pytest
import torch

from grasp_lora.core.controller.rounds import (
    ControllerConfig,
    begin,
    choose_ratio,
    conclude,
    draw_examples,
    needs_baseline,
    next_examples,
    propose,
    state_from_json,
    state_to_json,
)
from grasp_lora.core.evidence.history import curve_minimum, observations

PAPER = ControllerConfig(preset="paper")
STANDARD = ControllerConfig()


def constant_rows(means, rows=4):
    return [[mean] * rows for mean in means]


def one_round(state, config, candidates, means, baseline=2.0, step=10):
    return conclude(
        state, config, candidates, [baseline] * 4, constant_rows(means), [3, 1, 4, 5], step
    )


def test_a_paper_round_matches_numbers_worked_by_hand():
    config = ControllerConfig(preset="paper")
    state = dataclasses.replace(begin(config), ratio=0.55, sigma=0.2)
    after, record = one_round(state, config, (0.8, 0.4, 0.1), (1.8, 1.6, 2.3))
    assert record.rewards == pytest.approx((0.2, 0.4, -0.3))
    assert after.mu == pytest.approx(0.4 + 0.05 * (4 / 3 + 0.0075))
    assert after.sigma == pytest.approx(0.2 - 0.05 / 6 + 0.01)
    assert record.committed
    assert record.best == 0.4
    assert (record.ratio_before, record.ratio) == (0.55, pytest.approx(0.45))
    assert record.mask_ratio == record.ratio == after.ratio == after.mask_ratio
    assert (record.round, record.step, record.rows) == (0, 10, (3, 1, 4, 5))
    assert after.records == (record,)


def test_a_reward_of_zero_commits_and_one_below_does_not():
    _, record = one_round(begin(PAPER), PAPER, (0.45, 0.3), (2.0, 2.5))
    assert record.committed
    assert record.ratio == 0.45
    state, record = one_round(begin(PAPER), PAPER, (0.45, 0.3), (2.1, 2.5))
    assert not record.committed
    assert (record.ratio, record.mask_ratio, record.best) == (0.4, 0.0, 0.45)
    assert record.reason == "best reward below 0"
    assert state.mu != 0.4  # the policy also learns from trials with a negative reward


def test_a_trial_with_nan_loses_itself_and_nothing_else():
    with_nan, record = one_round(begin(PAPER), PAPER, (0.8, 0.5, 0.3), (math.nan, 1.9, 2.2))
    without, _ = one_round(begin(PAPER), PAPER, (0.5, 0.3), (1.9, 2.2))
    assert record.rewards[0] is None
    assert record.losses[0] is None
    assert (with_nan.mu, with_nan.sigma) == (without.mu, without.sigma)
    assert with_nan.ratio == without.ratio
    assert record.best == 0.5


def test_one_infinite_row_loses_the_trial():
    losses = [[1.0, 1.0], [0.1, math.inf]]
    _, record = conclude(begin(PAPER), PAPER, (0.4, 0.5), [2.0, 2.0], losses, [0, 1], 1)
    assert record.rewards == (1.0, None)
    assert record.per_row == ((1.0, 1.0), (0.1, None))


@pytest.mark.parametrize("config", [PAPER, STANDARD], ids=["paper", "standard"])
def test_a_round_without_a_finite_trial_changes_nothing(config):
    before = begin(config)
    after, record = one_round(before, config, (0.4, 0.5), (math.nan, math.inf))
    assert dataclasses.replace(after, records=()) == before
    assert record.best is None
    assert record.reason == "no trial was finite"
    after, record = one_round(before, config, (0.4, 0.5), (1.0, 2.0), baseline=math.nan)
    assert dataclasses.replace(after, records=()) == before
    assert record.reason == "the baseline loss is not finite"


def test_a_lone_finite_trial_still_anchors_and_widens_the_paper_policy():
    state = dataclasses.replace(begin(PAPER), ratio=0.2)
    after, _ = one_round(state, PAPER, (0.5, 0.6), (1.0, math.nan))
    assert after.mu == pytest.approx(0.4 - 0.05 * 0.05 * 0.2)
    assert after.sigma == pytest.approx(PAPER.sigma + 0.01)


def test_stratified_rounds_set_the_policy_to_the_lowest_point_they_saw():
    state = begin(STANDARD)
    generator = torch.Generator().manual_seed(0)
    for t in range(3):
        assert state.mu == 0.4
        candidates = propose(state, STANDARD, generator)
        means = [(c - 0.55) ** 2 for c in candidates]
        state, record = one_round(state, STANDARD, candidates, means, step=t)
        assert record.kind == "coverage"
        assert state.sigma == 0.1
    assert state.mu == pytest.approx(0.55, abs=0.05)
    assert record.mu == state.mu


def test_flat_stratified_rounds_leave_the_policy_at_its_prior():
    state = begin(STANDARD)
    for t in range(3):
        candidates = propose(state, STANDARD, torch.Generator().manual_seed(0))
        state, _ = one_round(state, STANDARD, candidates, [1.0] * 3, step=t)
    assert state.mu == pytest.approx(0.4)


def simulate(config, seed, curve, rounds=8, spread=0.15, noise=0.02):
    """Run a search on `curve` plus a random offset, slope and bend for each example."""
    generator = torch.Generator().manual_seed(seed)
    examples = torch.randn(66, 3, generator=generator) * torch.tensor([0.5, spread, spread])
    state = begin(config, rounds)
    for t in range(rounds):
        rows = draw_examples([str(i) for i in range(66)], config.rows, generator)
        mine = examples[list(rows)]

        def loss(ratio, mine=mine):
            own = mine[:, 0] + mine[:, 1] * ratio + mine[:, 2] * ratio**2
            own = own + noise * torch.randn(len(mine), generator=generator)
            return (own + 2.0 + curve(ratio)).tolist()

        candidates = propose(state, config, generator)
        losses = [loss(ratio) for ratio in candidates]
        state, _ = conclude(state, config, candidates, loss(state.ratio), losses, rows, 10 * t)
    return state


def test_the_standard_search_beats_random_choice_on_parabolas():
    regrets, random_regrets, verdicts = [], [], []
    for seed in range(20):
        best = 0.1 + 0.6 * (0.618 * seed % 1)
        grid = [i / 200 for i in range(161)]
        span = max((r - best) ** 2 for r in grid)
        choice = choose_ratio(simulate(STANDARD, seed, lambda r, b=best: (r - b) ** 2), STANDARD)
        regrets.append((choice.ratio - best) ** 2 / span)
        random_regrets.append(sum((r - best) ** 2 for r in grid) / len(grid) / span)
        verdicts.append(choice.verdict)
    assert sum(regrets) / 20 < 0.1 * sum(random_regrets) / 20
    assert verdicts.count("learned") >= 12


def test_pure_noise_is_called_flat():
    verdicts = [
        choose_ratio(simulate(STANDARD, 1000 + seed, lambda r: 0.0), STANDARD).verdict
        for seed in range(60)
    ]
    assert verdicts.count("flat") >= 54


def test_a_loss_that_only_rises_is_never_learned():
    for seed in range(10):
        choice = choose_ratio(simulate(STANDARD, seed, lambda r: 0.8 * r), STANDARD)
        assert choice.verdict == "flat"
        assert choice.ratio < 0.1


def test_the_paper_choice_is_the_candidate_with_the_largest_reward_of_all_rounds():
    state, _ = one_round(begin(PAPER), PAPER, (0.3, 0.5), (1.5, 1.9))
    state, _ = one_round(state, PAPER, (0.6, 0.7), (8.0, 8.5), baseline=9.0)  # the worst baseline
    assert choose_ratio(state, PAPER).ratio == 0.6


@pytest.mark.parametrize("config", [PAPER, STANDARD], ids=["paper", "standard"])
def test_a_search_without_rounds_says_it_never_fired(config):
    choice = choose_ratio(begin(config), config)
    assert choice.verdict == "never-fired"
    assert choice.ratio == config.start
    assert choice.gain is None


@pytest.mark.parametrize("config", [PAPER, STANDARD], ids=["paper", "standard"])
def test_a_search_of_lost_trials_only_keeps_its_ratio_and_is_flat(config):
    state, _ = one_round(begin(config), config, (0.3, 0.5), (math.nan, math.nan))
    choice = choose_ratio(state, config)
    assert (choice.verdict, choice.ratio, choice.z) == ("flat", config.start, None)


@pytest.mark.parametrize("preset", ["paper", "standard"])
def test_the_state_survives_json_exactly_and_the_search_goes_on_the_same(preset):
    config = ControllerConfig(preset=preset)
    state = simulate(config, 7, lambda r: (r - 0.3) ** 2, rounds=5)
    state, _ = one_round(state, config, (0.1, 1 / 3, 0.2), (math.nan, 0.1 + 0.2, math.inf))
    text = state_to_json(state)
    assert state_from_json(text) == state
    assert "NaN" not in text
    assert "Infinity" not in text
    drawn = [
        propose(each, config, torch.Generator().manual_seed(1))
        for each in (state, state_from_json(text))
    ]
    assert drawn[0] == drawn[1]
    assert choose_ratio(state_from_json(text), config) == choose_ratio(state, config)


def test_a_damaged_state_is_refused():
    values = json.loads(state_to_json(begin(PAPER)))
    del values["mu"]
    with pytest.raises(ValueError, match="not a saved ControllerState"):
        state_from_json(json.dumps(values))
    with pytest.raises(ValueError, match="must be JSON"):
        state_from_json("{")
    with pytest.raises(ValueError, match="not a saved ControllerState"):
        state_from_json("[]")


@pytest.mark.parametrize(
    ("candidates", "baseline", "losses", "rows", "message"),
    [
        ((), [1.0], [], [0], "0 lists for 0 candidates"),
        ((0.1, 0.2), [1.0], [[1.0]], [0], "1 lists for 2 candidates"),
        ((0.1,), [1.0, 2.0], [[1.0]], [0, 1], r"\[2, 1\] losses for 2 examples"),
        ((0.1,), [], [[]], [], "one loss per example"),
        ((0.1,), [1.0, 2.0], [[1.0, 2.0]], [3, 3], "example ids must differ"),
    ],
)
def test_a_round_with_missing_losses_is_refused(candidates, baseline, losses, rows, message):
    with pytest.raises(ValueError, match=message):
        conclude(begin(PAPER), PAPER, candidates, baseline, losses, rows, 1)


def test_the_horizon_is_the_planned_number_of_rounds_where_it_is_known():
    assert begin(STANDARD).horizon == 8
    assert begin(STANDARD, 40).horizon == 40
    assert begin(PAPER).horizon == 8


def test_only_the_paper_preset_asks_for_a_baseline():
    assert needs_baseline(PAPER)
    assert not needs_baseline(STANDARD)
    assert needs_baseline(ControllerConfig(baseline=True))


def unmeasured(config, candidates, losses, state=None):
    return conclude(
        state or begin(config), config, candidates, None, losses, range(len(losses[0])), 1
    )


def test_without_a_baseline_rewards_compare_with_the_lowest_ratio_tried():
    _, record = unmeasured(STANDARD, (0.4, 0.1, 0.7), [[1.0, 2.0], [2.0, 2.0], [3.0, 4.0]])
    assert record.rewards == pytest.approx((0.5, 0.0, -1.5))
    assert (record.baseline, record.baseline_rows) == (None, ())
    assert record.committed
    assert record.best == 0.4
    assert record.ratio == pytest.approx(0.1)


def test_without_a_baseline_the_policy_moves_as_it_would_with_one():
    state = dataclasses.replace(simulate(STANDARD, 3, lambda r: r, rounds=3), mu=0.4)
    candidates, losses = (0.5, 0.3, 0.35), [[1.0, 1.2], [0.8, 0.9], [0.9, 0.7]]
    without, _ = unmeasured(STANDARD, candidates, losses, state)
    with_one, _ = conclude(state, STANDARD, candidates, [7.0, 9.0], losses, range(2), 1)
    assert without.mu == pytest.approx(with_one.mu)
    assert without.sigma == pytest.approx(with_one.sigma)


def test_without_a_baseline_a_lost_lowest_trial_hands_over_to_the_next():
    _, record = unmeasured(STANDARD, (0.1, 0.4, 0.7), [[math.nan], [1.0], [1.5]])
    assert record.rewards == (None, 0.0, pytest.approx(-0.5))
    _, record = unmeasured(STANDARD, (0.1, 0.4), [[math.nan], [math.inf]])
    assert record.rewards == (None, None)
    assert record.reason == "no trial was finite"
    assert not record.committed


def test_without_a_baseline_one_candidate_or_equal_ones_change_no_policy():
    one = ControllerConfig(candidates=1)
    after, record = unmeasured(one, (0.3,), [[1.0, 1.1]])
    assert record.rewards == (0.0,)
    assert (after.mu, after.sigma) == (begin(one).mu, begin(one).sigma)
    later = simulate(STANDARD, 3, lambda r: r, rounds=3)
    after, record = unmeasured(STANDARD, (0.2, 0.3, 0.4), [[1.0, 1.0]] * 3, later)
    assert record.kind == "policy"
    assert record.rewards == (0.0, 0.0, 0.0)
    assert (after.mu, after.sigma) == (later.mu, later.sigma)


def test_a_missing_baseline_is_refused_if_the_settings_ask_for_one():
    with pytest.raises(ValueError, match="baseline is on"):
        unmeasured(PAPER, (0.4,), [[1.0]])


def test_a_state_without_baselines_survives_json():
    state, _ = unmeasured(STANDARD, (0.1, 0.4), [[1.0, 2.0], [1.5, 1.0]])
    assert state_from_json(state_to_json(state)) == state


def test_a_policy_round_tries_the_best_of_the_history_again():
    state = simulate(STANDARD, 5, lambda r: (r - 0.5) ** 2, rounds=3)
    drawn = propose(state, STANDARD, torch.Generator().manual_seed(1))
    assert drawn[2] == curve_minimum(observations(state.records), 3, STANDARD)
    assert drawn[0] + drawn[1] == pytest.approx(2 * state.mu)
    even = propose(state, ControllerConfig(candidates=2), torch.Generator().manual_seed(1))
    assert even[0] + even[1] == pytest.approx(2 * state.mu)


@pytest.mark.parametrize("incumbent_loss", [0.5, 1.9, math.nan])
def test_the_incumbent_moves_no_policy_and_the_drawn_pair_does(incumbent_loss):
    state = simulate(STANDARD, 5, lambda r: (r - 0.3) ** 2, rounds=3)
    drawn = propose(state, STANDARD, torch.Generator().manual_seed(0))
    q = (drawn[0] - state.mu) / state.sigma
    after, record = unmeasured(
        STANDARD, drawn, constant_rows((1.0, 1.2, incumbent_loss)), state=state
    )
    assert record.kind == "policy"
    # Advantages of the pair are 1 and -1, whatever the third trial was.
    assert after.mu == pytest.approx(state.mu + max(-0.1, min(0.1, state.sigma * q)))
    assert after.sigma == pytest.approx(state.sigma)


def test_the_pair_drawn_for_a_confirmation_moves_the_policy():
    config = ControllerConfig(candidates=4)
    state = simulate(config, 5, lambda r: (r - 0.3) ** 2, rounds=5)
    state = dataclasses.replace(state, horizon=8)
    drawn = propose(state, config, torch.Generator().manual_seed(0))
    after, record = unmeasured(config, drawn, constant_rows((3.0, 0.1, 1.2, 1.0)), state=state)
    assert record.kind == "confirmation"
    step = (drawn[3] - drawn[2]) / 2
    assert after.mu == pytest.approx(state.mu + max(-0.1, min(0.1, step)))


def test_no_example_is_drawn_twice_before_all_were_drawn_once():
    groups = [str(i) for i in range(66)]
    generator = torch.Generator().manual_seed(0)
    state, seen = begin(STANDARD), []
    for _ in range(7):
        rows = next_examples(state, groups, STANDARD, generator)
        seen += rows
        losses = [[1.0] * len(rows)] * 3
        state, _ = conclude(state, STANDARD, (0.0, 0.3, 0.6), None, losses, rows, 1)
    assert len(set(seen[:60])) == 60
    assert set(seen) == set(range(66))
