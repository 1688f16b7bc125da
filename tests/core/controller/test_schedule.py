"""Test when rounds are due and which examples they probe."""

from collections import Counter

import pytest
import torch

from grasp_lora.core.controller.schedule import draw_examples, is_due, planned_rounds
from grasp_lora.core.controller.settings import ControllerConfig


def due(total, config):
    return [step for step in range(total + 2) if is_due(step, total, config)]


def test_an_interval_counts_steps_and_skips_step_zero():
    config = ControllerConfig(interval=10)
    assert due(35, config) == [10, 20, 30]
    assert due(40, config) == [10, 20, 30, 40]
    assert planned_rounds(40, config) == 4


def test_rounds_are_spread_with_training_before_and_after():
    assert due(90, ControllerConfig(rounds=8)) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert due(7, ControllerConfig(rounds=3)) == [2, 4, 5]  # 1.75, 3.5, 5.25


@pytest.mark.parametrize("total", range(40))
@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_planned_rounds_are_those_that_fall_due(total, rounds):
    config = ControllerConfig(rounds=rounds)
    steps = due(total, config)
    assert len(steps) == planned_rounds(total, config)
    assert all(0 < step < total for step in steps)
    if total > rounds:
        assert len(steps) == rounds


def test_a_run_too_short_for_a_round_is_known_beforehand():
    assert planned_rounds(1, ControllerConfig()) == 0
    assert planned_rounds(0, ControllerConfig()) == 0
    assert planned_rounds(9, ControllerConfig(preset="paper")) == 0


def test_no_group_gives_two_examples_while_another_has_given_none():
    groups = ["a"] * 10 + ["b"] * 3 + ["c"]
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        assert set(Counter(groups[i] for i in draw_examples(groups, 3, generator)).values()) == {1}
        assert Counter(groups[i] for i in draw_examples(groups, 7, generator)) == {
            "a": 3,
            "b": 3,
            "c": 1,
        }


def test_drawn_examples_are_sorted_distinct_and_set_by_the_generator():
    groups = [str(i) for i in range(66)]
    draws = {draw_examples(groups, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)}
    assert len(draws) == 2
    assert all(rows == tuple(sorted(set(rows))) and len(rows) == 16 for rows in draws)


def test_every_example_is_drawn_some_time():
    groups = ["a", "a", "a", "b", "b"]
    generator = torch.Generator().manual_seed(0)
    assert {i for _ in range(60) for i in draw_examples(groups, 2, generator)} == {0, 1, 2, 3, 4}


def test_all_examples_are_drawn_when_there_are_too_few():
    assert draw_examples(["a", "a", "b"], 16, torch.Generator().manual_seed(0)) == (0, 1, 2)


def test_drawing_nothing_is_refused():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="at least 1 example, got 0"):
        draw_examples(["a"], 0, generator)
    with pytest.raises(ValueError, match="no example to probe"):
        draw_examples([], 3, generator)


def test_examples_probed_less_come_first_within_their_group():
    groups = ["a"] * 3 + ["b"] * 3
    probed = {0: 1, 1: 1, 3: 2, 5: 1}
    for seed in range(20):
        assert draw_examples(groups, 2, torch.Generator().manual_seed(seed), probed) == (2, 4)


def test_a_small_group_is_not_drawn_again_while_others_have_fresh_examples():
    groups = ["a", "b", "b", "c", "c"]
    for seed in range(20):
        drawn = draw_examples(groups, 2, torch.Generator().manual_seed(seed), {0: 1, 1: 1})
        assert 0 not in drawn
        assert {groups[row] for row in drawn} == {"b", "c"}


def test_drawing_without_any_history_is_a_plain_draw():
    groups = [str(i % 7) for i in range(30)]
    plain, drawn = (
        draw_examples(groups, 9, torch.Generator().manual_seed(4), probed) for probed in (None, {})
    )
    assert plain == drawn
