"""Epoch orders keep a plain shuffle's steps; the forward passes of `size_forwards` are optimal."""

import itertools

import pytest
import torch

from grasp_lora.models.batches import EpochExamples, epoch_order, group_by_prefix, size_forwards


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
    class Row:
        def __init__(self, length):
            self.input_ids = (0,) * length

    rows = [Row(length) for length in lengths_of(9)]
    data = EpochExamples(rows, 7, 4)
    for epoch in (0, 3, 1):
        data.set_epoch(epoch)
        expected = epoch_order([len(r.input_ids) for r in rows], epoch, 7, 4)
        assert [data[i] for i in range(len(data))] == [rows[i] for i in expected]


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
