"""Test the loss curve over the history against references written out."""

import math
import statistics

import numpy as np
import pytest
import torch

from grasp_lora.core.controller.rounds import ControllerConfig, begin, conclude
from grasp_lora.core.evidence.history import (
    Observation,
    compressed,
    curve_minimum,
    fit_curve,
    grid,
    observations,
    observations_by_round,
    resampled_curves,
    weighted_minima,
    winsorised,
)

CONFIG = ControllerConfig()


def random_observations(rounds=3, candidates=3, rows=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Observation(
            float(torch.rand(1, generator=generator)) * 0.8,
            t,
            dict(enumerate(torch.randn(rows, generator=generator).tolist())),
        )
        for t in range(rounds)
        for _ in range(candidates)
    ]


def test_gaps_compare_candidates_row_by_row_within_the_round():
    losses = [[1.0, 11.0], [2.0, 13.0], [3.0, math.nan]]
    state, _ = conclude(begin(CONFIG), CONFIG, (0.1, 0.2, 0.3), [0, 0], losses, [7, 9], 1)
    (seen,) = observations_by_round(state.records)
    assert [o.ratio for o in seen] == [0.1, 0.2]
    assert seen[0].gaps == {7: -0.5, 9: -1.0}
    assert seen[1].gaps == {7: 0.5, 9: 1.0}


def test_a_round_with_one_finite_trial_says_nothing():
    losses = [[1.0, 1.0], [math.nan, 1.0]]
    state, _ = conclude(begin(CONFIG), CONFIG, (0.1, 0.2), [0, 0], losses, [0, 1], 1)
    assert observations(state.records) == ()


def test_winsorising_clips_outliers_only():
    values = [0.0, 1.0, 2.0, 3.0, 100.0]
    assert winsorised(values) == [0.0, 1.0, 2.0, 3.0, pytest.approx(2 + 4 * 1.4826)]
    assert winsorised([1.0, 1.0, 1.0, 50.0]) == [1.0, 1.0, 1.0, 50.0]


def test_one_outlier_example_is_clipped_before_it_is_averaged():
    rows = 9
    losses = [[0.1 * e for e in range(rows)], [0.11 * e for e in range(rows)]]
    losses[1][4] += 100.0
    state, _ = conclude(begin(CONFIG), CONFIG, (0.1, 0.2), [0.0] * rows, losses, range(rows), 1)
    assert all(abs(gap) < 1.0 for o in observations(state.records) for gap in o.gaps.values())


def round_of(*means, number=0, spread=0.0):
    return [
        Observation(0.1 * n, number, {5: mean - spread * n, 8: mean + spread * n})
        for n, mean in enumerate(means)
    ]


def test_steep_losses_count_as_logarithms_of_their_distance_to_the_best_of_their_round():
    rounds = [round_of(0.0, 0.1, 3.0, spread=0.05), round_of(0.2, 0.0, number=1)]
    scale = 4 * 0.2  # the distances are 0.1, 3.0 and 0.2
    seen = compressed(rounds)
    moved = [scale * math.log(1 + d / scale) for d in (0.1, 3.0, 0.2)]
    first = [0.0, *moved[:2]]
    assert [o.mean - seen[0].mean for o in seen[:3]] == pytest.approx(first)
    assert seen[3].mean - seen[4].mean == pytest.approx(moved[2])
    # Gaps of examples move in proportion: they were 3.0 -+ 0.1 above those of the best trial.
    apart = [seen[2].gaps[row] - seen[0].gaps[row] for row in (5, 8)]
    assert apart == pytest.approx([moved[1] * 2.9 / 3.0, moved[1] * 3.1 / 3.0])
    for some in (seen[:3], seen[3:]):
        assert all(sum(o.gaps[row] for o in some) == pytest.approx(0) for row in (5, 8))


def test_compressing_keeps_the_order_within_a_round_and_equal_trials_equal():
    means = [0.3, 0.0, 5.0, 0.0, 0.31]
    seen = compressed([round_of(*means, spread=0.01)])
    found = [o.mean for o in seen]
    assert sorted(range(5), key=lambda i: found[i]) == sorted(range(5), key=lambda i: means[i])
    assert found[1] == found[3]
    same = compressed([round_of(0.0, 0.0, 0.0)])
    assert [o.gaps for o in same] == [{5: 0.0, 8: 0.0}] * 3
    assert compressed([]) == ()


def test_compressing_does_not_depend_on_the_unit_and_infinity_leaves_all_as_it_is():
    small = compressed([round_of(0.0, 0.1, 3.0)])
    large = compressed([round_of(0.0, 1e3, 3e4)])
    assert [1e4 * o.mean for o in small] == pytest.approx([o.mean for o in large])
    kept = compressed([round_of(-1.0, 0.0, 1.0)], math.inf)
    assert [o.mean for o in kept] == [-1.0, 0.0, 1.0]


def test_a_cliff_does_not_hide_a_dip_before_it():
    # A gain of 0.04 nats at 0.2, then a loss of 5 nats; each round tries other ratios.
    def loss(ratio):
        return 0.04 * ((ratio - 0.2) / 0.2) ** 2 if ratio < 0.2 else 5 * ((ratio - 0.2) / 0.6) ** 2

    state = begin(CONFIG)
    for number, ratios in enumerate([(0.05, 0.4, 0.75), (0.15, 0.45, 0.7), (0.2, 0.3, 0.8)]):
        losses = [[loss(r) + 0.001 * ((7 * e + number) % 5) for e in range(8)] for r in ratios]
        state, _ = conclude(state, CONFIG, ratios, [0.0] * 8, losses, range(8), number + 1)
    assert curve_minimum(observations(state.records), 3, CONFIG) == pytest.approx(0.2, abs=0.05)


def test_the_curve_is_the_gaussian_process_posterior_mean():
    seen = random_observations()
    n, horizon = len(seen), 8
    own = [statistics.variance(o.gaps.values()) / 8 for o in seen]
    noise = [0.5 * v + 0.5 * statistics.fmean(own) for v in own]
    spread = statistics.fmean(o.mean**2 for o in seen)
    u2 = max(spread - statistics.fmean(noise), 0.1 * spread)

    def kernel(r1, t1, r2, t2):
        x = math.sqrt(3) * abs(r1 - r2) / 0.25
        return u2 * (1 + x) * math.exp(-x) * math.exp(-abs(t1 - t2) / horizon)

    K = torch.zeros(n, n, dtype=torch.float64)
    for i, a in enumerate(seen):
        for j, b in enumerate(seen):
            K[i, j] = kernel(a.ratio, a.round, b.ratio, b.round) + 10 * u2 * (a.round == b.round)
        K[i, i] += max(noise[i], 1e-3 * u2)
    cross = torch.tensor([kernel(0.3, 2, o.ratio, o.round) for o in seen], dtype=torch.float64)
    y = torch.tensor([o.mean for o in seen], dtype=torch.float64)
    value = fit_curve(seen, horizon).values(torch.tensor([0.3], dtype=torch.float64))
    assert float(value) == pytest.approx(float(cross @ torch.linalg.inv(K) @ y), rel=1e-9)


def test_the_lowest_point_does_not_depend_on_the_unit_of_the_loss():
    seen = random_observations()
    scaled = [Observation(o.ratio, o.round, {k: 1e-4 * v for k, v in o.gaps.items()}) for o in seen]
    assert curve_minimum(scaled, 8, CONFIG) == curve_minimum(seen, 8, CONFIG)


def test_all_gaps_zero_have_their_lowest_point_at_low():
    seen = [Observation(r, 0, {0: 0.0, 1: 0.0}) for r in (0.1, 0.4, 0.7)]
    assert curve_minimum(seen, 8, CONFIG) == CONFIG.low


def test_resampled_curves_draw_whole_groups_of_examples():
    seen = random_observations(rows=12)
    twins = [
        Observation(o.ratio, o.round, o.gaps | {row + 12: gap for row, gap in o.gaps.items()})
        for o in seen
    ]

    def spread(observed, groups):
        curves = resampled_curves(observed, 3, CONFIG, 300, groups)
        return float((curves - curves.mean(dim=1, keepdim=True)).std(dim=0).mean())

    # Every example has a copy in its group, so the groups are half as many as the examples.
    by_pair, by_row = spread(twins, [str(row % 12) for row in range(24)]), spread(twins, None)
    assert by_pair / by_row == pytest.approx(2**0.5, rel=0.1)


def test_the_minimum_under_weights_is_that_of_the_weighted_means():
    seen = random_observations(seed=5)
    groups = ["a", "b", "a", "c", "b", "c", "a", "d"]
    place = {name: n for n, name in enumerate("abcd")}
    weights = np.vstack([np.ones(4), np.random.default_rng(8).normal(size=(20, 4))])
    found = weighted_minima(seen, 4, CONFIG, weights, groups, place)
    assert float(grid(CONFIG)[found[0]]) == curve_minimum(seen, 4, CONFIG)
    curve = fit_curve(seen, 4)
    for row, lowest in zip(weights, found, strict=True):
        means = [statistics.fmean(row[place[groups[e]]] * gap for e, gap in o.gaps.items())
                 for o in seen]  # fmt: skip
        again = curve.weights(grid(CONFIG)) @ torch.tensor(means, dtype=torch.float64)
        assert int(again.argmin()) == lowest
