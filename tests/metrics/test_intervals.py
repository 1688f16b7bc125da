import itertools
import random
import tracemalloc

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from grasp_lora.metrics import Options, compare_means
from grasp_lora.metrics.intervals import PairedDifference, interval, paired_difference


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def counted(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    return np.stack([scores, np.ones_like(scores)], axis=-1)


def alone(scores) -> list[str]:
    return [f"row {i}" for i in range(len(scores))]


def contexts(sizes) -> list[str]:
    return [f"context {i}" for i, size in enumerate(sizes) for _ in range(size)]


def clustered(rng: np.random.Generator, groups: int = 60, size: int = 6) -> np.ndarray:
    """Rows around 50; two thirds of their variance (150 of 225) is shared within a context."""
    shared = rng.normal(0, 150**0.5, groups).repeat(size)
    return 50 + shared + rng.normal(0, 75**0.5, groups * size)


def test_interval_of_a_mean_is_the_textbook_one_for_many_independent_rows():
    scores = np.random.default_rng(0).normal(50, 10, 2000)
    found = interval(counted(scores), alone(scores), mean, resamples=4000)
    half = 1.96 * scores.std(ddof=1) / len(scores) ** 0.5
    assert found == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.03)


def test_interval_agrees_with_resampling_written_out_group_by_group():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 5, 40)
    scores, groups = rng.random(sizes.sum()) * 100, contexts(sizes)
    members = [np.flatnonzero(np.array(groups) == g) for g in dict.fromkeys(groups)]
    draws = [
        scores[np.concatenate([members[i] for i in rng.integers(0, 40, 40)])].mean()
        for _ in range(4000)
    ]
    expected = np.quantile(draws, [0.05, 0.95])
    found = interval(counted(scores), groups, mean, resamples=4000, confidence=0.9)
    assert found == pytest.approx(expected, abs=0.4)


def test_interval_by_group_covers_the_truth_and_the_one_by_row_does_not():
    rng = np.random.default_rng(2)
    groups = contexts([6] * 60)
    hits = np.zeros(2)
    for trial in range(400):
        scores = counted(clustered(rng))
        for way, of in enumerate([groups, alone(scores)]):
            low, high = interval(scores, of, mean, resamples=400, seed=trial) or (1, 0)
            hits[way] += low <= 50 <= high
    by_group, by_row = hits / 400
    assert 0.91 <= by_group <= 0.98
    assert by_row < 0.75


def test_equal_seeds_give_equal_intervals_and_the_order_of_the_rows_does_not_matter():
    scores = clustered(np.random.default_rng(3))
    groups = contexts([6] * 60)
    first = interval(counted(scores), groups, mean, resamples=200, seed=7)
    assert interval(counted(scores), groups, mean, resamples=200, seed=7) == first
    assert interval(counted(scores), groups, mean, resamples=200, seed=8) != first
    order = np.random.default_rng(4).permutation(len(scores))
    shuffled = [groups[i] for i in order]
    again = interval(counted(scores[order]), shuffled, mean, resamples=200, seed=7)
    assert again == pytest.approx(first)


def test_global_random_states_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist()
    interval(counted([1, 2, 3]), alone(range(3)), mean, resamples=50)
    paired_difference(counted([1, 2, 3]), counted([3, 2, 2]), alone(range(3)), mean, resamples=50)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch):
    a, b = clustered(np.random.default_rng(5)), clustered(np.random.default_rng(6))
    groups = contexts([6] * 60)
    whole = paired_difference(counted(a), counted(b), groups, mean, resamples=300)
    monkeypatch.setattr("grasp_lora.metrics.intervals._BATCH_BYTES", 60 * 8 * 7)
    small = paired_difference(counted(a), counted(b), groups, mean, resamples=300)
    assert vars(small) == pytest.approx(vars(whole))


def test_ten_thousand_groups_take_little_memory():
    a = np.random.default_rng(7).random((10_000, 20))
    b = np.random.default_rng(8).random((10_000, 20))
    tracemalloc.start()
    try:
        paired_difference(a, b, alone(a), mean, resamples=1000)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < 150  # MiB; the statistics of all drawn rows would be 1600


@pytest.mark.parametrize("score", [0.0, 0.1, 100 / 3, 100.0])
@pytest.mark.parametrize("sizes", [[1, 1], [3, 1], [2] * 30])
def test_where_all_rows_score_alike_the_interval_is_the_score(score, sizes):
    scores = np.full(sum(sizes), score)
    value = float(mean(counted(scores).sum(axis=0)))
    assert interval(counted(scores), contexts(sizes), mean, resamples=100) == (value, value)


def test_two_groups_span_their_own_scores():
    assert interval(counted([0, 100]), ["a", "b"], mean) == (0, 100)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_fewer_than_two_groups_have_no_interval(rows):
    assert interval(counted(range(rows)), ["same"] * rows, mean) is None


def test_no_resamples_give_no_interval():
    assert interval(counted([1, 2]), ["a", "b"], mean, resamples=0) is None


def test_scores_that_are_not_finite_give_no_interval_and_no_warning():
    def overflowing(sums):
        return np.exp(mean(sums))

    a, b = counted([1500.0, 1.0, 2.0]), counted([1.0, 2.0, 3.0])
    assert interval(a, alone(a), overflowing) is None  # exp(501), but a drawn set has exp(1500)
    found = paired_difference(a, b, alone(a), overflowing)
    assert (found.low, found.high) == (None, None)
    assert paired_difference(a * [2, 1], b, alone(a), overflowing).p_value is None
    turned = paired_difference(a, counted([1.0, 1500.0, 3.0]), alone(a), overflowing)
    assert turned.p_value is None  # swapping brings both 1500 to one system


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["a"]}, r"statistics of shape \(2, 2\) with 1 groups"),
        ({"statistics": np.zeros(2)}, r"statistics of shape \(2,\) with 2 groups"),
        ({"resamples": 1}, "0 .no intervals. or at least 2, got 1"),
        ({"resamples": -3}, "got -3"),
        ({"confidence": 95}, "between 0 and 1, like 0.95, got 95"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    given = {"statistics": counted([1, 2]), "groups": ["a", "b"], "value": mean} | change
    with pytest.raises(ValueError, match=message):
        interval(**given)


def test_permutation_p_of_three_groups_is_the_one_worked_out_by_hand():
    # Sums of A - B by group: 3 (of two rows: 1 + 2), 2, 1. The eight ways of signs give
    # 6, 4, 2, 0, 0, -2, -4, -6. The 6 seen: one of eight is as high, twice that is 0.25.
    a, b = counted([2, 3, 4, 5]), counted([1, 1, 2, 4])
    found = paired_difference(a, b, ["x", "x", "y", "z"], mean)
    assert found.difference == 6 / 4
    assert found.p_value == 0.25
    # Groups 3, 2, -1 sum to 4: as high are 4 and 6, two of eight.
    assert paired_difference(a, counted([1, 1, 2, 6]), ["x", "x", "y", "z"], mean).p_value == 0.5
    # Rows taken one by one: 1, 2, 2, 1. Of 16 ways only all four up reach 6: 2 / 16.
    assert paired_difference(a, b, alone(a), mean).p_value == 0.125


def test_small_p_values_agree_with_all_swaps_written_out_for_a_score_that_is_no_mean():
    rng = np.random.default_rng(9)
    a, b = rng.integers(1, 9, (8, 2)).astype(float), rng.integers(1, 9, (8, 2)).astype(float)

    def ratio(sums):
        return 100 * sums[..., 0] / (sums[..., 0] + sums[..., 1])

    seen = ratio(a.sum(0)) - ratio(b.sum(0))
    apart = []
    for swaps in itertools.product([False, True], repeat=8):
        swapped = np.array(swaps)[:, None]
        first, second = np.where(swapped, b, a), np.where(swapped, a, b)
        apart.append(ratio(first.sum(0)) - ratio(second.sum(0)))
    far = sum(abs(x) >= abs(seen) - 1e-9 for x in apart) / len(apart)
    exact = paired_difference(a, b, alone(a), ratio, resamples=256)
    assert exact.p_value == pytest.approx(far)
    assert paired_difference(a, b, alone(a), ratio, resamples=256, seed=3).p_value == exact.p_value
    # One resample fewer than there are ways, and the p-value is estimated.
    drawn = paired_difference(a, b, alone(a), ratio, resamples=255)
    assert drawn.p_value == pytest.approx(far, abs=0.1)


@pytest.mark.parametrize("resamples", [2, 1000])
@pytest.mark.parametrize("sizes", [[1], [4], [2, 2], [2] * 30])
def test_identical_systems_differ_by_nothing_with_p_1(sizes, resamples):
    scores = counted(np.random.default_rng(10).random(sum(sizes)))
    found = paired_difference(scores, scores, contexts(sizes), mean, resamples=resamples)
    ends = (None, None) if len(sizes) == 1 else (0, 0)
    assert found == PairedDifference(0, *ends, 1)


def test_ties_are_counted_as_ties_in_spite_of_rounding():
    # Losses in tenths of a nat, so that swaps can be counted in whole numbers: a swap raises the
    # loss of A as much as it lowers that of B.
    a, b = np.array([50, 53, 50, 51, 54, 53]), np.array([53, 53, 52, 54, 51, 50])
    tokens = np.array([1, 2, 1, 3, 1, 3])
    moved = [np.dot(swaps, (b - a) * tokens) for swaps in itertools.product([0, 1], repeat=len(a))]
    exact = min(1, 2 * min(np.mean(np.array(moved) <= 0), np.mean(np.array(moved) >= 0)))
    of_a, of_b = (np.stack([tenths / 10 * tokens, tokens], axis=-1) for tenths in (a, b))
    found = paired_difference(of_a, of_b, alone(a), lambda sums: np.exp(mean(sums)), resamples=64)
    assert found.p_value == exact == 1


def test_a_constant_lead_has_an_interval_without_width():
    a = counted(np.linspace(0, 90, 12))
    found = paired_difference(a + [[10, 0]], a, alone(a), mean)
    assert (found.low, found.high) == (found.difference, found.difference)
    assert found.difference == pytest.approx(10)
    assert found.p_value == pytest.approx(2 / 1001)  # the least that 1000 resamples can show


def test_no_resamples_leave_the_difference_alone():
    found = paired_difference(counted([1, 2]), counted([0, 0]), ["a", "b"], mean, resamples=0)
    assert found == PairedDifference(1.5, None, None, None)


def test_the_paired_interval_is_narrower_than_the_two_systems_own():
    rng = np.random.default_rng(11)
    hard = clustered(rng)
    a, b = counted(hard + rng.normal(1, 1, 360)), counted(hard + rng.normal(0, 1, 360))
    groups = contexts([6] * 60)
    found = paired_difference(a, b, groups, mean)
    low, high = interval(a, groups, mean) or (0, 0)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < (high - low) / 5
    assert found.low < 1 < found.high
    back = paired_difference(b, a, groups, mean)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )


def test_systems_that_are_alike_are_told_apart_in_about_5_percent_of_cases():
    rng = np.random.default_rng(12)
    groups = contexts([6] * 30)
    told = {"by group": 0, "by row": 0}
    for trial in range(300):
        a, b = counted(clustered(rng, groups=30)), counted(clustered(rng, groups=30))
        for way, of in (("by group", groups), ("by row", alone(a))):
            p = paired_difference(a, b, of, mean, resamples=199, seed=trial).p_value
            told[way] += p is not None and p <= 0.05
    # 300 cases at 5 %: standard error 1.3 points.
    assert 0.015 <= told["by group"] / 300 <= 0.09
    assert told["by row"] / 300 > 0.15


def test_a_real_difference_is_found():
    rng = np.random.default_rng(13)
    base = clustered(rng)
    a, b = counted(base + rng.normal(2, 3, 360)), counted(base)
    found = paired_difference(a, b, contexts([6] * 60), mean)
    assert found.p_value is not None
    assert found.p_value < 0.01
    assert found.low is not None
    assert found.low > 0


def test_p_values_and_intervals_agree_with_sacrebleu():
    rng = random.Random(0)
    words = "قرأ الطالب كتاباً جديداً 学生 读 书 the student reads a new book today".split()
    truth = [[rng.choice(words) for _ in range(8)] for _ in range(60)]

    def spoiled(sentence, share):
        return " ".join(w if rng.random() > share else rng.choice(words) for w in sentence)

    a, b = [spoiled(t, 0.25) for t in truth], [spoiled(t, 0.33) for t in truth]
    references = [[" ".join(t) for t in truth]]
    metric = CHRF()
    statistics = [
        np.array(metric._extract_corpus_statistics(system, references), dtype=float)
        for system in (a, b)
    ]

    def chrf(sums):
        flat = sums.reshape(-1, sums.shape[-1])
        scores = [metric._compute_score_from_stats(list(row)).score for row in flat]
        return np.array(scores).reshape(sums.shape[:-1])

    ours = paired_difference(*statistics, alone(a), chrf, resamples=2000)
    test = PairedTest([("a", a), ("b", b)], {"chrf": CHRF()}, references, "ar", 2000, 2000)
    [_, scores] = test()
    theirs_a, theirs_b = scores["chrF2"]
    assert ours.difference == pytest.approx(theirs_a.score - theirs_b.score)
    assert 0.01 < theirs_b.p_value < 0.5
    assert ours.p_value == pytest.approx(theirs_b.p_value, abs=0.04)
    low, high = interval(statistics[0], alone(a), chrf, resamples=2000) or (0, 0)
    assert (high - low) / 2 == pytest.approx(theirs_a.ci, rel=0.1)
    assert (high + low) / 2 == pytest.approx(theirs_a.mean, abs=0.5)


def test_means_are_compared_over_groups_of_rows():
    generator = np.random.default_rng(3)
    a, b = generator.random(40), generator.random(40)
    groups = [f"g{i // 4}" for i in range(40)]
    found = compare_means(a, b, groups, Options("qa", "en", resamples=4000, seed=1))
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    # the bootstrap's spread over ten groups is that of their means
    spread = (a - b).reshape(10, 4).mean(1).std() / np.sqrt(10)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    same = compare_means(a, a, groups, Options("qa", "en", resamples=200, seed=1))
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)
