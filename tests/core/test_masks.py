"""Exact counts, ties and nesting of the masks."""

import math

import pytest
import torch

from grasp_lora.core.masks import keep_at, pruned_count, rank_entries, zero_fraction


def keep_by_sorting(scores, ratio):
    """Reference: prune from the end of the list sorted by (score down, position up)."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    pruned = set(order[len(flat) - int(ratio * len(flat) + 0.5) :])
    return torch.tensor([i not in pruned for i in range(len(flat))]).reshape(scores.shape)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.29, 0.5, 0.6, 0.999, 1.0])
def test_keep_at_equals_a_plain_sort_with_ties(ratio):
    scores = torch.randint(0, 6, (10, 10), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(keep_at(rank_entries(scores), ratio), keep_by_sorting(scores, ratio))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep_counts_exactly_when_all_scores_tie(ratio):
    keep = keep_at(rank_entries(torch.zeros(10, 10)), ratio)
    assert int(keep.sum()) == 100 - round(100 * ratio)
    assert torch.equal(keep.flatten(), torch.arange(100) < 100 - round(100 * ratio))


def test_masks_are_nested_in_the_ratio():
    scores = torch.rand(37, generator=torch.Generator().manual_seed(1))
    ranks = rank_entries(scores)
    masks = [keep_at(ranks, i / 50) for i in range(51)]
    assert all(bool((high <= low).all()) for low, high in zip(masks, masks[1:], strict=False))


def test_ratio_zero_keeps_all_and_ratio_one_keeps_none():
    ranks = rank_entries(torch.rand(3, 4, generator=torch.Generator().manual_seed(1)))
    assert bool(keep_at(ranks, 0.0).all())
    assert not bool(keep_at(ranks, 1.0).any())


def test_one_entry_goes_at_half():
    ranks = rank_entries(torch.tensor([3.0]))
    assert keep_at(ranks, 0.49).tolist() == [True]
    assert keep_at(ranks, 0.5).tolist() == [False]


def test_empty_and_scalar_tensors_have_masks():
    assert keep_at(rank_entries(torch.empty(0, 4)), 0.5).shape == (0, 4)
    assert keep_at(rank_entries(torch.tensor(1.0)), 1.0).tolist() is False


def test_ranks_are_int32_and_infinite_scores_are_ordered():
    ranks = rank_entries(torch.tensor([[1.0, math.inf], [-math.inf, 1.0]]))
    assert ranks.dtype == torch.int32
    assert ranks.tolist() == [[1, 0], [3, 2]]


def test_a_transposed_tensor_is_ranked_by_its_own_positions():
    scores = torch.zeros(2, 3).T
    assert rank_entries(scores).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="got NaN"):
        rank_entries(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, 40.0, math.nan])
def test_a_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(ValueError, match="write 40 % as 0.4"):
        pruned_count(10, ratio)


def test_pruned_count_rounds_half_up():
    assert [pruned_count(5, r) for r in (0.0, 0.1, 0.3, 0.5, 1.0)] == [0, 1, 2, 3, 5]


def test_zero_fraction_counts_over_all_tensors():
    assert zero_fraction([torch.zeros(3), torch.ones(2, 2), torch.empty(0)]) == 3 / 7
    assert zero_fraction(iter([])) == 0.0
