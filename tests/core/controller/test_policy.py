"""Test the two update rules and the ways to draw candidates, against hand-computed numbers."""

import math

import pytest
import torch

from grasp_lora.core.controller.policy import (
    Policy,
    confirmation_candidates,
    drawn_from_policy,
    initial_policy,
    round_kind,
    sampled_candidates,
    stratified_candidates,
    updated_policy,
)
from grasp_lora.core.controller.settings import ControllerConfig

PAPER = ControllerConfig(preset="paper")
STANDARD = ControllerConfig()


def test_paper_update_matches_a_round_worked_by_hand():
    # d = 0.04; offsets 0.4 (clipped at high), 0, -0.3 (clipped at low); advantages .1, .3, -.4
    # mu slope = (1 + 0 + 3) / 3; anchor = 0.05 * (0.4 - 0.55) = -0.0075
    # sigma slope = (.1 * 3 - .3 - .4 * 1.25) / 3 = -1/6
    after = updated_policy(Policy(0.4, 0.2), (0.8, 0.4, 0.1), (0.2, 0.4, -0.3), 0.55, PAPER)
    assert after.mu == pytest.approx(0.4 + 0.05 * (4 / 3 + 0.0075), abs=1e-12)
    assert after.sigma == pytest.approx(0.2 - 0.05 / 6 + 0.01, abs=1e-12)


def test_paper_update_stops_at_the_bounds():
    high = updated_policy(Policy(0.75, 0.01), (0.8, 0.7), (9.0, -9.0), 0.75, PAPER)
    low = updated_policy(Policy(0.15, 0.01), (0.2, 0.1), (-9.0, 9.0), 0.15, PAPER)
    assert (high.mu, low.mu) == (0.8, 0.1)
    shrunk = updated_policy(Policy(0.4, 0.1), (0.4, 0.6), (9.0, -9.0), 0.4, PAPER)
    assert shrunk.sigma == 1e-3


def test_paper_update_floors_the_variance_it_divides_by():
    # sigma^2 = 1e-6 is below the floor 1e-4: slope = (1 * .002 + 1 * .002) / 2 / 1e-4 = 20
    after = updated_policy(Policy(0.4, 1e-3), (0.402, 0.398), (1.0, -1.0), 0.4, PAPER)
    assert after.mu == pytest.approx(min(0.8, 0.4 + 0.05 * 20))
    gentle = updated_policy(Policy(0.4, 1e-3), (0.402, 0.398), (0.1, -0.1), 0.4, PAPER)
    assert gentle.mu == pytest.approx(0.4 + 0.05 * 2)


def test_paper_update_of_a_lone_trial_is_anchor_and_entropy_only():
    after = updated_policy(Policy(0.5, 0.2), (0.7,), (3.0,), 0.3, PAPER)
    assert after.mu == pytest.approx(0.5 - 0.05 * 0.05 * 0.2)
    assert after.sigma == pytest.approx(0.21)


def test_standard_update_is_a_natural_step_whatever_the_scale_of_the_loss():
    # advantages +-1, offsets +-0.05: mu += 0.05; log sigma += (.25 - 1) * (1 - 1) / 4 = 0
    for scale in (1e-4, 1.0, 1e4):
        after = updated_policy(Policy(0.4, 0.1), (0.45, 0.35), (scale, -scale), 0.4, STANDARD)
        assert after.mu == pytest.approx(0.45)
        assert after.sigma == pytest.approx(0.1)


def test_standard_update_widens_when_far_candidates_win_and_narrows_when_near_ones_do():
    # offsets 0.1, 0; advantages +-1: log sigma += (1 * 0 + (-1) * (-1)) / 2 / 2 = 1/4
    wide = updated_policy(Policy(0.4, 0.1), (0.5, 0.4), (1.0, -1.0), 0.4, STANDARD)
    near = updated_policy(Policy(0.4, 0.1), (0.5, 0.4), (-1.0, 1.0), 0.4, STANDARD)
    assert wide.sigma == pytest.approx(0.1 * math.exp(0.25))
    assert near.sigma == pytest.approx(0.1 * math.exp(-0.25))


def test_standard_update_is_bounded():
    far = updated_policy(Policy(0.4, 0.2), (0.8, 0.0), (1.0, -1.0), 0.4, STANDARD)
    assert far.mu == pytest.approx(0.5)
    wide = updated_policy(Policy(0.4, 0.19), (0.8, 0.4), (1.0, -1.0), 0.4, STANDARD)
    narrow = updated_policy(Policy(0.4, 0.041), (0.5, 0.4), (-1.0, 1.0), 0.4, STANDARD)
    assert (wide.sigma, narrow.sigma) == (0.2, 0.04)


@pytest.mark.parametrize("rewards", [(0.3, 0.3, 0.3), (0.3,)])
def test_standard_update_of_equal_rewards_changes_nothing(rewards):
    before = Policy(0.4, 0.1)
    assert updated_policy(before, (0.3, 0.4, 0.6)[: len(rewards)], rewards, 0.0, STANDARD) == before


def test_paper_candidates_are_clipped_normal_draws():
    drawn = sampled_candidates(Policy(0.4, 0.5), PAPER, torch.Generator().manual_seed(3))
    z = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert drawn == tuple((0.4 + 0.5 * z).clamp(0.1, 0.8).tolist())


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_standard_candidates_come_in_antithetic_pairs(count):
    config = ControllerConfig(candidates=count)
    drawn = sampled_candidates(Policy(0.4, 0.05), config, torch.Generator().manual_seed(0))
    assert len(drawn) == count
    pairs = zip(drawn[: count // 2 * 2 : 2], drawn[1 : count // 2 * 2 : 2], strict=True)
    assert all(one + two == pytest.approx(0.8) for one, two in pairs)
    assert len(set(drawn)) == count


def test_stratified_candidates_are_even_in_a_round_and_shift_between_rounds():
    config = ControllerConfig(low=0.1, high=0.7)
    assert stratified_candidates(0, config) == pytest.approx((0.1, 0.3, 0.5))
    assert stratified_candidates(1, config) == pytest.approx((0.2236, 0.4236, 0.6236))
    assert stratified_candidates(2, config) == pytest.approx((0.1472, 0.3472, 0.5472))


def test_stratified_rounds_come_first_and_every_fifth_and_confirmations_last():
    def kinds(horizon, config=STANDARD):
        letters = {"coverage": "c", "policy": "p", "confirmation": "="}
        return "".join(letters[round_kind(t, horizon, config)] for t in range(horizon))

    assert kinds(8) == "cccpc==="
    assert kinds(18) == "cccccppppcppppc==="
    assert kinds(50)[-7:] == "p======"
    assert [kinds(n) for n in (1, 3, 4, 5)] == ["c", "ccc", "ccc=", "ccc=="]
    assert kinds(8, ControllerConfig(candidates=1)) == "cccpcppp", "one candidate confirms nothing"
    assert kinds(8, PAPER) == "p" * 8


@pytest.mark.parametrize("candidates", [2, 3, 4])
def test_confirmation_measures_the_lowest_ratio_beside_the_incumbent(candidates):
    config = ControllerConfig(low=0.1, candidates=candidates)
    generator = torch.Generator().manual_seed(0)
    found = [confirmation_candidates(Policy(0.5, 0.1), config, generator, 0.37) for _ in range(200)]
    assert all(one[:2] == (0.1, 0.37) and len(one) == candidates for one in found)
    rest = torch.tensor([one[2:] for one in found])
    if candidates > 2:
        assert rest.mean() == pytest.approx(0.5, abs=0.03)
        assert rest.std() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "count", "incumbent", "drawn"),
    [
        ("coverage", 3, True, "..."),
        ("policy", 3, True, "dd."),
        ("policy", 3, False, "ddd"),
        ("policy", 4, True, "dddd"),
        ("policy", 1, True, "."),
        ("confirmation", 2, True, ".."),
        ("confirmation", 3, True, "..d"),
        ("confirmation", 5, True, "..ddd"),
        ("confirmation", 3, False, "ddd"),
    ],
)
def test_only_ratios_drawn_from_the_policy_count_as_samples(kind, count, incumbent, drawn):
    found = drawn_from_policy(kind, count, ControllerConfig(candidates=count), incumbent)
    assert found == tuple(letter == "d" for letter in drawn)
    assert drawn_from_policy("policy", count, PAPER, incumbent) == (True,) * count


def test_the_policy_starts_at_the_start_or_at_the_prior():
    assert initial_policy(PAPER) == Policy(0.4, PAPER.sigma)
    assert initial_policy(STANDARD) == Policy(0.4, 0.1)
    assert initial_policy(ControllerConfig(low=0.5)).mu == 0.5
