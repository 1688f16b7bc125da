"""Test the search of a profile: its rounds, its policy, and what it is tested on."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.policy import Policy, sampled_tilts, updated_policy
from grasp_lora.core.controller.profiles import (
    can_tilt,
    choose_profile,
    propose_profiles,
    with_profile,
)
from grasp_lora.core.controller.rounds import ControllerConfig, held_out_part
from grasp_lora.core.evidence.groups import mean_gain
from grasp_lora.core.evidence.history import finite_trials, fit_curve, observations
from grasp_lora.core.pruning.profile import MOST_TILT, Profile, limited

CONFIG = ControllerConfig()
GROUPS = [str(row) for row in range(66)]
TILTS = 2
LOW, ONE, BEST = range(3)


def searched(loss, seed=0, config=CONFIG, tilts=TILTS, until=None):
    """Run a search; `loss(profile, row)` is the loss of a row."""
    generator = torch.Generator().manual_seed(seed)
    state = rounds.begin(config, config.rounds, tilts)
    for turn in range(config.rounds if until is None else until):
        drawn = rounds.next_examples(state, GROUPS, config, generator)
        tried = propose_profiles(state, config, generator, GROUPS)
        losses = [[loss(profile, row) for row in drawn] for profile in tried]
        tilted = [profile.tilts for profile in tried] if tilts else ()
        levels = [profile.level for profile in tried]
        state, _ = rounds.conclude(state, config, levels, None, losses, drawn, turn, tilted)
    return state, generator


def noise(row, *numbers):
    return math.sin(100 * row + 37 * sum((i + 1) * n for i, n in enumerate(numbers)))


def tilted_bowl(profile, row, height=2.0, noisy=0.02):
    """The first tilt is best at 0.4, the second at 0, the level at 0.4."""
    first, second = profile.tilts or (0.0, 0.0)
    off = (profile.level - 0.4) ** 2 + ((first - 0.4) / 2) ** 2 + (second / 2) ** 2
    return 1 + height * off + noisy * noise(row, profile.level, first, second)


def flat(profile, row):
    return 1 + 0.05 * noise(row, profile.level, *profile.tilts)


def test_without_tilts_the_rounds_are_those_of_one_ratio():
    for turns in range(8):
        state, generator = searched(tilted_bowl, tilts=0, until=turns)
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        found = propose_profiles(state, CONFIG, generator, GROUPS)
        assert [profile.level for profile in found] == list(rounds.propose(state, CONFIG, twin))
        assert not any(profile.tilted for profile in found)
        assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize("turns", range(8))
def test_all_profiles_lie_within_the_bounds(turns):
    state, generator = searched(tilted_bowl, until=turns)
    for profile in propose_profiles(state, CONFIG, generator, GROUPS):
        assert CONFIG.low <= profile.level <= CONFIG.high
        assert len(profile.tilts) == TILTS
        assert profile.tilts == pytest.approx(
            limited(profile.level, profile.tilts, CONFIG.low, CONFIG.high)
        )


def test_stratified_rounds_have_the_levels_of_one_ratio_and_one_tilt_of_each_third():
    state, _ = searched(tilted_bowl, until=3)
    plain, _ = searched(tilted_bowl, tilts=0, until=3)
    for record, other in zip(state.records, plain.records, strict=True):
        assert record.candidates == other.candidates
        for tilt in range(TILTS):
            # where the level leaves all the room there is, a tilt of each third is seen
            shares = [own[tilt] for own in record.tilts]
            assert max(shares) > 0 > min(shares)


def test_tilts_of_a_pair_are_as_far_from_the_centre_on_either_side():
    policy = Policy(0.4, 0.05, (0.1, -0.05))
    drawn = sampled_tilts(policy, [0.4, 0.4], CONFIG, torch.Generator().manual_seed(1))
    for centre, pair in zip(policy.tilts, zip(*drawn, strict=True), strict=True):
        assert pair[0] - centre == pytest.approx(centre - pair[1])
        assert pair[0] != pair[1]


def test_the_policy_moves_its_tilts_by_the_natural_gradient():
    policy = Policy(0.4, 0.1, (0.1,))
    found = updated_policy(policy, [0.5, 0.3], [0.02, 0.0], 0.4, CONFIG, [(0.3,), (-0.1,)])
    # advantages +1 and -1; offsets of the tilt +0.2 and -0.2; both are one standard deviation
    assert found.tilts == pytest.approx((0.1 + 0.2,))
    assert (found.mu, found.sigma) == (pytest.approx(0.5), pytest.approx(0.1))
    plain = updated_policy(Policy(0.4, 0.1), [0.5, 0.3], [0.02, 0.0], 0.4, CONFIG)
    assert (plain.mu, plain.sigma) == pytest.approx((found.mu, found.sigma))
    assert plain.tilts == ()
    # the better one is a fifth of a standard deviation off in both, the other none
    wider = updated_policy(policy, [0.42, 0.4], [0.02, 0.0], 0.4, CONFIG, [(0.14,), (0.1,)])
    assert wider.sigma == pytest.approx(0.1 * math.exp(0.5 * (0.2**2 - 0) / 2))
    far = updated_policy(policy, [0.5, 0.3], [0.02, 0.0], 0.4, CONFIG, [(5.0,), (-5.0,)])
    assert far.tilts == (MOST_TILT,)


def test_a_confirmation_compares_the_lowest_ratio_one_ratio_and_a_profile_on_held_out_groups():
    state, generator = searched(tilted_bowl, until=6)
    choosing, tested = held_out_part(6, 8, GROUPS)
    assert not set(choosing) & set(tested)
    drawn = rounds.next_examples(state, GROUPS, CONFIG, generator)
    assert set(drawn) <= set(tested)
    found = propose_profiles(state, CONFIG, generator, GROUPS)
    assert found[LOW] == Profile(CONFIG.low, (0.0, 0.0))
    assert not found[ONE].tilted
    assert found[BEST].tilts[0] > 0.1

    def spoiled(record):
        """Make tilts look as bad as can be to the rows that test."""
        per_row = tuple(
            tuple(
                loss + 5 * (tilts[0] > 0) * (row not in choosing)
                for row, loss in zip(record.rows, losses, strict=True)
            )
            for tilts, losses in zip(record.tilts, record.per_row, strict=True)
        )
        return dataclasses.replace(record, per_row=per_row)

    other = dataclasses.replace(state, records=tuple(map(spoiled, state.records)))
    again = propose_profiles(other, CONFIG, torch.Generator().manual_seed(9), GROUPS)
    assert again[BEST] == found[BEST]


def test_each_confirmation_is_tested_on_groups_that_no_earlier_one_was_chosen_on():
    seen: set[int] = set()
    for index in (5, 6, 7):
        choosing, tested = held_out_part(index, 8, GROUPS)
        assert not seen & set(tested)
        assert seen <= set(choosing)
        seen |= set(tested)
    assert set(choosing) | set(tested) == set(range(66))


def test_a_clear_profile_is_found_and_shown():
    state, _ = searched(tilted_bowl)
    found = choose_profile(state, CONFIG, GROUPS)
    assert found.shown
    assert found.chosen.tilts[0] == pytest.approx(0.4, abs=0.16)
    assert abs(found.chosen.tilts[1]) <= 0.16
    assert found.chosen.level == pytest.approx(0.4, abs=0.1)


def test_the_gain_is_that_of_the_confirmations_on_their_own_groups():
    state, _ = searched(tilted_bowl)
    over_one, over_lowest, labels = [], [], []
    for record in state.records[-3:]:
        _, tested = held_out_part(record.round, 8, GROUPS)
        for place, row in enumerate(record.rows):
            if row in tested:
                losses = [own[place] for own in record.per_row]
                over_one.append(losses[ONE] - losses[BEST])
                over_lowest.append(losses[LOW] - losses[BEST])
                labels.append(GROUPS[row])
    found = choose_profile(state, CONFIG, GROUPS)
    assert found.gain == mean_gain(over_one, labels)
    assert found.over_lowest == mean_gain(over_lowest, labels)
    choice = with_profile(rounds.choose_ratio(state, CONFIG), found)
    assert (choice.ratio, choice.verdict) == (found.chosen.level, "learned")
    assert (choice.gain, choice.gain_error) == (found.over_lowest.gain, found.over_lowest.error)


def test_without_differences_tilts_are_rarely_taken():
    taken = 0
    for seed in range(20):

        def alike(profile, row, seed=seed):
            return 1 + 0.05 * noise(row + seed / 7, profile.level, *profile.tilts)

        state, _ = searched(alike, seed)
        taken += choose_profile(state, CONFIG, GROUPS).shown
    assert taken <= 3, "5 % of 20 is 1, and more than 3 has a chance of 1.6 %"


def test_tilts_whose_loss_is_not_finite_are_passed_over():
    def broken(profile, row):
        return math.nan if any(tilt > 0.2 for tilt in profile.tilts) else tilted_bowl(profile, row)

    state, _ = searched(broken)
    found = choose_profile(state, CONFIG, GROUPS)
    assert found.shown
    assert 0 < found.chosen.tilts[0] <= 0.2


def test_a_profile_is_not_taken_if_a_loss_of_its_test_is_not_finite():
    state, _ = searched(tilted_bowl)
    last = state.records[-1]
    lost = ((*last.per_row[BEST][:-1], None),)
    last = dataclasses.replace(last, per_row=(*last.per_row[:BEST], *lost))
    _, tested = held_out_part(7, 8, GROUPS)
    assert last.rows[-1] in tested
    found = choose_profile(
        dataclasses.replace(state, records=(*state.records[:-1], last)), CONFIG, GROUPS
    )
    assert (found.gain, found.shown) == (None, False)


def test_the_ratio_for_all_groups_is_judged_by_trials_without_tilts():
    state, _ = searched(tilted_bowl)
    for record in state.records:
        plain = [c for c, t in zip(record.candidates, record.tilts, strict=True) if not any(t)]
        assert [ratio for ratio, _ in finite_trials(record)] == plain
    assert len(finite_trials(state.records[-1])) == 2


def test_the_state_survives_json_exactly_and_the_search_goes_on_the_same():
    state, generator = searched(tilted_bowl, until=5)
    again = rounds.state_from_json(rounds.state_to_json(state))
    assert again == state
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    one = propose_profiles(state, CONFIG, generator, GROUPS)
    assert one == propose_profiles(again, CONFIG, twin, GROUPS)


def test_a_state_of_an_earlier_version_is_read():
    state, _ = searched(tilted_bowl, tilts=0, until=2)
    stored = json.loads(rounds.state_to_json(state))
    del stored["tilts"]
    for record in stored["records"]:
        del record["tilts"]
    assert rounds.state_from_json(json.dumps(stored)) == state


@pytest.mark.parametrize(
    ("settings", "horizon", "groups", "able"),
    [
        ({}, 8, GROUPS, True),
        ({}, 4, GROUPS, True),
        ({}, 3, GROUPS, False),
        ({"candidates": 2}, 8, GROUPS, False),
        ({"preset": "paper"}, 8, GROUPS, False),
        ({}, 8, ["a", "b", "c"] * 9, False),
    ],
)
def test_tilts_need_rounds_candidates_and_groups_to_test_them(settings, horizon, groups, able):
    assert can_tilt(ControllerConfig(**settings), horizon, groups) == able


def test_the_model_is_a_mean_over_corners_of_functions_of_their_ratio():
    """The prior covariance of two profiles, by sums over all pairs of corners."""
    state, _ = searched(tilted_bowl, until=3)
    seen = observations(state.records)
    curve = fit_curve(seen, 8)
    corners = list(itertools.product((-0.5, 0.5), repeat=TILTS))

    def matern(a, b):
        x = math.sqrt(3) * abs(a - b) / 0.25
        return (1 + x) * math.exp(-x)

    def covariance(one, other):
        total = 0.0
        for c, d in itertools.product(corners, corners):
            a = one.ratio + sum(t * p for t, p in zip(one.tilts, c, strict=True))
            b = other.ratio + sum(t * p for t, p in zip(other.tilts, d, strict=True))
            total += (1 + 4 * sum(p * q for p, q in zip(c, d, strict=True))) * matern(a, b)
        age = math.exp(-abs(one.round - other.round) / 8)
        return curve.variance * age * total / len(corners) ** 2

    for i, j in itertools.combinations(range(len(seen)), 2):
        shared = 10 * curve.variance * (seen[i].round == seen[j].round)
        expected = covariance(seen[i], seen[j]) + shared
        # between its nodes, 1/40 apart, a function is a straight line
        assert float(curve.covariance[i, j]) == pytest.approx(expected, abs=4e-3 * curve.variance)
