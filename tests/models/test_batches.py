"""Epoch orders keep a plain shuffle's steps; the forward passes of `size_forwards` are optimal."""

import itertools

import pytest
import torch

from grasp_lora.models.batches import (
    Beside,
    EpochExamples,
    Filler,
    epoch_order,
    group_by_prefix,
    in_turn,
    size_forwards,
    split_evenly,
)


class Row:
    def __init__(self, length):
        self.input_ids = (0,) * length


def lengths_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 60, (count,), generator=generator).tolist()


@pytest.mark.parametrize("order", ["by-step", "by-length"])
@pytest.mark.parametrize(("rows", "per_step"), [(1, 4), (7, 1), (8, 4), (50, 8), (51, 8), (5, 9)])
def test_every_epoch_goes_through_every_row_once(order, rows, per_step):
    lengths = lengths_of(rows)
    epochs = [epoch_order(lengths, e, 3, per_step, order) for e in range(4)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 48 or len(set(map(tuple, epochs))) == 4
    assert epochs[2] == epoch_order(lengths, 2, 3, per_step, order)
    assert rows < 48 or epochs[2] != epoch_order(lengths, 2, 4, per_step, order)


def test_the_rows_of_a_step_are_those_of_a_plain_shuffle():
    lengths = lengths_of(50)
    shuffle = epoch_order([1] * 50, 5, 9, 8)  # all alike: nothing to sort by
    ordered = epoch_order(lengths, 5, 9, 8)
    for start in range(0, 50, 8):
        step = ordered[start : start + 8]
        assert set(step) == set(shuffle[start : start + 8])
        assert [lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True)


@pytest.mark.parametrize("rows", [48, 50])
def test_steps_by_length_hold_rows_of_like_length_in_random_order(rows):
    lengths = lengths_of(rows, 2)

    def padded(order):
        steps = [order[i : i + 4] for i in range(0, rows, 4)]
        return sum(len(step) * max(lengths[i] for i in step) for step in steps)

    random, alike = (
        [epoch_order(lengths, e, 1, 4, order) for e in range(20)]
        for order in ("by-step", "by-length")
    )
    assert sum(map(padded, alike)) < 0.85 * sum(map(padded, random))
    first = [lengths[epoch[0]] for epoch in alike]
    assert len(set(first)) > 5, "steps are shuffled"
    if rows == 50:  # the short last step is not always the one of the shortest rows
        last = [lengths[epoch[-1]] for epoch in alike]
        assert max(last) > 30
        assert min(last) < 25


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="'sorted'"):
        epoch_order([1, 2], 0, 0, 1, "sorted")


def test_the_rows_come_in_the_order_of_the_epoch_announced():
    rows = [Row(length) for length in lengths_of(9)]
    data = EpochExamples(rows, 7, 4)
    for epoch in (0, 3, 1):
        data.set_epoch(epoch)
        expected = epoch_order([len(r.input_ids) for r in rows], epoch, 7, 4)
        assert [data[i] for i in range(len(data))] == [rows[i] for i in expected]


@pytest.mark.parametrize(("count", "per_epoch"), [(7, 3), (8, 4), (5, 5), (1, 1), (9, 2), (4, 0)])
def test_rows_beside_come_in_turn_from_epoch_to_epoch(count, per_epoch):
    epochs = [in_turn(count, per_epoch, epoch, 3) for epoch in range(20)]
    assert all(len(set(epoch)) == per_epoch for epoch in epochs), "no row twice in an epoch"
    read = [place for epoch in epochs for place in epoch]
    # One pass after the other: no row comes again before all others have.
    for start in range(0, len(read) - count, count):
        assert sorted(read[start : start + count]) == list(range(count))
    assert epochs[4] == in_turn(count, per_epoch, 4, 3)


def test_another_seed_takes_the_rows_beside_in_another_order():
    assert in_turn(50, 20, 0, 0) != in_turn(50, 20, 0, 1)
    assert in_turn(50, 20, 0, 0) != sorted(in_turn(50, 20, 0, 0))


@pytest.mark.parametrize("order", ["by-step", "by-length"])
def test_an_epoch_reads_all_rows_and_those_beside_them_whose_turn_it_is(order):
    lengths = lengths_of(8 + 7 + 5)
    for epoch in range(9):
        places = epoch_order(lengths, epoch, 3, 4, order, [(7, 3), (5, 2)])
        first = [8 + place for place in in_turn(7, 3, epoch, 3)]
        second = [15 + place for place in in_turn(5, 2, epoch, 3)]
        assert sorted(places) == sorted([*range(8), *first, *second])
        for start in range(0, 13, 4):
            step = [lengths[i] for i in places[start : start + 4]]
            assert step == sorted(step, reverse=True)


def test_rows_beside_are_shuffled_among_the_others():
    shares = [
        sum(place >= 24 for place in epoch_order([9] * 48, epoch, 1, 4, beside=[(24, 24)])[:24])
        for epoch in range(40)
    ]
    # Of 48 shuffled rows the first half has 12 of 24 on average, with a deviation of 1.75.
    assert abs(sum(shares) / 40 - 12) < 1
    assert len(set(shares)) > 3


def test_examples_beside_follow_the_epoch_announced():
    rows = [Row(length) for length in lengths_of(4)]
    others = [Row(length) for length in lengths_of(6, 1)]
    data = EpochExamples(rows, 7, 4, beside=[Beside(others, 2)])
    seen = []
    for epoch in range(3):
        data.set_epoch(epoch)
        read = [data[i] for i in range(len(data))]
        assert len(read) == 6
        assert all(row in read for row in rows)
        seen += [row for row in read if row in others]
    assert all(seen.count(row) == 1 for row in others), "three epochs of two are all six"


def cost(lengths, cuts, forward_tokens):
    return sum(len(c) * max(lengths[i] for i in c) + forward_tokens for c in cuts)


@pytest.mark.parametrize("max_examples", [1, 2, 3, 8])
@pytest.mark.parametrize("forward_tokens", [0, 7, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_cuts_take_less_time(max_examples, forward_tokens, seed):
    lengths = lengths_of(7, seed)
    cuts = size_forwards(lengths, max_examples, forward_tokens)
    assert sorted(i for c in cuts for i in c) == list(range(7))
    assert all(len(c) <= max_examples for c in cuts)
    ordered = sorted(range(7), key=lambda i: -lengths[i])
    others = []
    for marks in itertools.product([False, True], repeat=6):
        edges = [0, *(i + 1 for i, cut in enumerate(marks) if cut), 7]
        parts = [ordered[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(p) <= max_examples for p in parts):
            others.append(cost(lengths, parts, forward_tokens))
    assert cost(lengths, cuts, forward_tokens) == min(others)


def test_no_rows_need_no_forward_and_one_row_needs_one():
    assert size_forwards([], 4, 64) == []
    assert size_forwards([9], 4, 64) == [[0]]


def families(seed, families=4, most=6):
    """Return shuffled examples (ids, prompt length): a few texts, each with several questions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        count = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, 3, (count,), generator=generator).tolist())

    found = []
    for _ in range(families):
        text = draw(20, 40)
        for _ in range(int(torch.randint(1, most, (), generator=generator))):
            ids = text + draw(3, 9)
            found.append((ids, len(ids) - 2))
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


@pytest.mark.parametrize("max_examples", [1, 3, 8])
@pytest.mark.parametrize("forward_tokens", [0, 30, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_shared_beginnings_are_common_worth_it_and_leave_no_row_out(
    max_examples, forward_tokens, seed
):
    rows = families(seed)
    shared, alone = group_by_prefix(rows, max_examples, forward_tokens)
    assert sorted([i for members, _ in shared for i in members] + alone) == list(range(len(rows)))
    for members, common in shared:
        assert 2 <= len(members) <= max_examples
        assert len({rows[i][0][:common] for i in members}) == 1
        assert all(common <= rows[i][1] for i in members)
        assert common * (len(members) - 1) > forward_tokens
    if max_examples == 1 or forward_tokens == 10_000:
        assert shared == []


def test_rows_of_one_text_are_found_wherever_they_stand():
    text, other = tuple(range(100, 140)), tuple(range(40))
    rows = [(text + (i, i + 1, 9), 42) for i in (5, 1, 7)] + [(other + (1, 2), 41)]
    rows = [rows[0], rows[3], rows[1], rows[2]]
    shared, alone = group_by_prefix(rows, 8, 64)
    assert [(sorted(members), common) for members, common in shared] == [([0, 2, 3], 40)]
    assert alone == [1]


def test_no_rows_share_nothing():
    assert group_by_prefix([], 8, 0) == ([], [])
    assert group_by_prefix([((1, 2, 3), 2)], 8, 0) == ([], [0])


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_consecutive_parts_of_about_equal_cost(parts):
    costs = [7.0, 1.0, 5.0, 2.0, 2.0, 9.0, 1.0, 3.0]
    found = split_evenly(costs, parts)
    assert [place for part in found for place in part] == list(range(len(costs)))
    for part in found:
        assert sum(costs[i] for i in part) <= sum(costs) / parts + max(costs)


def test_equal_costs_are_cut_into_equal_parts():
    assert split_evenly([2.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert split_evenly([3.0], 3) == [range(0, 0), range(0, 1), range(1, 1)]
    assert split_evenly([], 2) == [range(0, 0), range(0, 0)]


def test_an_epoch_is_filled_up_to_a_multiple_with_rows_that_teach_nothing():
    rows = [Row(length) for length in (5, 3, 8, 4, 6)]
    plain = EpochExamples(rows, seed=1, examples_per_step=4)
    filled = EpochExamples(rows, seed=1, examples_per_step=4, multiple=4)
    read = list(filled)
    assert (len(plain), len(filled)) == (5, 8)
    assert read[:5] == list(plain)
    assert [type(row) for row in read[5:]] == [Filler] * 3
