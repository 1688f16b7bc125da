"""Test exact counts, ties and nesting of the masks."""

import itertools
import math

import numpy as np
import pytest
import torch

from grasp_lora.core.pruning.masks import (
    STRUCTURES,
    Mask,
    NotANumber,
    keep_components,
    keep_masks,
    keep_of_every,
    pruned_count,
    without_dead_components,
    zero_fraction,
)


def keep_by_sorting(scores, ratio):
    """Return the reference mask: prune from the end of the list by falling score, then position."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    pruned = set(order[len(flat) - int(ratio * len(flat) + 0.5) :])
    return torch.tensor([i not in pruned for i in range(len(flat))]).reshape(scores.shape)


def keep_at(scores, ratio):
    return keep_masks(scores, [ratio])[0]


RATIOS = [0.0, 0.1, 0.25, 0.29, 0.5, 0.6, 0.999, 1.0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [1, 2, 6, 1000])
def test_masks_of_many_ratios_equal_a_plain_sort_with_ties(levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (10, 10), generator=generator).float()
    for ratio, keep in zip(RATIOS, keep_masks(scores, RATIOS), strict=True):
        assert torch.equal(keep, keep_by_sorting(scores, ratio))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_scores_of_other_dtypes_are_cut_alike(dtype):
    scores = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(4)).to(dtype)
    (keep,) = keep_masks(scores, [0.4])
    assert torch.equal(keep, keep_by_sorting(scores.float(), 0.4))


def test_the_same_ratio_twice_and_no_ratio_at_all():
    scores = torch.rand(9, generator=torch.Generator().manual_seed(3))
    one, other = keep_masks(scores, [0.4, 0.4])
    assert torch.equal(one, other)
    assert keep_masks(scores, []) == []


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep_counts_exactly_when_all_scores_tie(ratio):
    keep = keep_at(torch.zeros(10, 10), ratio)
    assert int(keep.sum()) == 100 - round(100 * ratio)
    assert torch.equal(keep.flatten(), torch.arange(100) < 100 - round(100 * ratio))


def test_masks_are_nested_in_the_ratio():
    scores = torch.randint(0, 9, (37,), generator=torch.Generator().manual_seed(1)).float()
    cut = keep_masks(scores, [i / 50 for i in range(51)])
    assert all(bool((high <= low).all()) for low, high in zip(cut, cut[1:], strict=False))


def test_ratio_zero_keeps_all_and_ratio_one_keeps_none():
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    assert bool(keep_at(scores, 0.0).all())
    assert not bool(keep_at(scores, 1.0).any())


def test_one_entry_goes_at_half():
    assert keep_at(torch.tensor([3.0]), 0.49).tolist() == [True]
    assert keep_at(torch.tensor([3.0]), 0.5).tolist() == [False]


def test_empty_and_scalar_tensors_have_masks():
    assert keep_at(torch.empty(0, 4), 0.5).shape == (0, 4)
    assert keep_at(torch.tensor(1.0), 1.0).tolist() is False


def test_infinite_scores_are_ordered():
    scores = torch.tensor([[1.0, math.inf], [-math.inf, 1.0]])
    assert keep_at(scores, 0.25).tolist() == [[True, True], [False, True]]
    assert keep_at(scores, 0.5).tolist() == [[True, True], [False, False]]
    assert keep_at(scores, 0.75).tolist() == [[False, True], [False, False]]


def test_a_transposed_tensor_is_cut_by_its_own_positions():
    scores = torch.zeros(2, 3).T
    assert keep_at(scores, 0.5).tolist() == [[True, True], [True, False], [False, False]]


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="got NaN"):
        keep_at(torch.tensor([1.0, math.nan]), 0.5)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (16, 16)])
def test_a_packed_mask_unpacks_to_its_original(shape):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    packed = Mask.of(keep)
    assert packed.bits.dtype == torch.uint8
    assert packed.bits.numel() == math.ceil(keep.numel() / 8)
    assert torch.equal(packed.keep(), keep)
    assert torch.equal(Mask.of(keep.T if keep.dim() == 2 else keep).keep().sum(), keep.sum())


def test_entry_i_is_bit_i_of_the_packed_mask():
    keep = torch.tensor([True, False, True] + [False] * 6 + [True])
    assert Mask.of(keep).bits.tolist() == [0b101, 0b10]


@pytest.mark.parametrize("ratio", [-0.01, 1.01, 40.0, math.nan])
def test_a_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(ValueError, match="write 40 % as 0.4"):
        pruned_count(10, ratio)


def test_pruned_count_rounds_half_up():
    assert [pruned_count(5, r) for r in (0.0, 0.1, 0.3, 0.5, 1.0)] == [0, 1, 2, 3, 5]


def test_zero_fraction_counts_over_all_tensors():
    assert zero_fraction([torch.zeros(3), torch.ones(2, 2), torch.empty(0)]) == 3 / 7
    assert zero_fraction(iter([])) == 0.0


def test_components_are_pruned_whole_the_least_important_first():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(5, 7, generator=generator), torch.rand(3, 5, generator=generator)
    worth = [float(a[i].sum() + b[:, i].sum()) for i in range(5)]
    for ratio, (keep_a, keep_b) in zip(RATIOS, keep_components(a, b, RATIOS), strict=True):
        gone = sorted(range(5), key=lambda i: worth[i])[: int(5 * ratio + 0.5)]
        assert keep_a.shape == a.shape
        assert keep_b.shape == b.shape
        for i in range(5):
            assert bool(keep_a[i].all()) == bool(keep_b[:, i].all()) == (i not in gone)
            assert bool(keep_a[i].any()) == (i not in gone)


def test_entries_are_cut_in_each_tensor_by_itself():
    a, b = torch.rand(2, 5), 10 * torch.rand(3, 2)
    ((keep_a, keep_b),) = STRUCTURES["entries"](a, b, [0.5])
    assert torch.equal(keep_a, keep_at(a, 0.5))
    assert torch.equal(keep_b, keep_at(b, 0.5))


@pytest.mark.parametrize("dead", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_dead_components_are_dropped_and_the_product_stays(dead):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
    for n, i in enumerate(dead):  # alternately zero in B and in A
        if n % 2:
            a[i] = 0
        else:
            b[:, i] = 0
    small_a, small_b = without_dead_components(a, b)
    assert torch.equal(small_b @ small_a, b @ a) or torch.allclose(small_b @ small_a, b @ a)
    assert small_a.shape[0] == small_b.shape[1] == max(1, 4 - len(dead))


@pytest.mark.parametrize("entries", [1, 7, 8, 16, 61])
@pytest.mark.parametrize("start", range(9))
def test_a_slice_that_starts_anywhere_is_packed_bit_by_bit(start, entries):
    whole = torch.rand(80, generator=torch.Generator().manual_seed(entries)) < 0.5
    keep = whole[start : start + entries]
    expected = np.packbits(keep.numpy(), bitorder="little")
    mask = Mask.of(keep)
    assert np.array_equal(mask.bits.numpy(), expected)
    assert torch.equal(mask.keep(), keep)
    place = torch.empty(20, dtype=torch.uint8)[3 : 3 + len(expected)]
    assert np.array_equal(Mask.of(keep, place).bits.numpy(), expected)
    assert torch.equal(Mask.of(whole[: start + 1].clone()[start:]).keep(), whole[start : start + 1])


def test_rows_and_columns_of_a_larger_mask_are_packed_alike():
    whole = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    for keep in (whole[1:3], whole[:, 2:5], whole.T[1:], whole[5]):
        assert torch.equal(Mask.of(keep).keep(), keep)


def kept_by_brute_force(row, kept, size):
    """Return the reference: of all choices of `kept` entries of a group, the best by its sum.

    The list of choices is in the order of positions, so of equal ones the earliest is taken.
    """
    out = []
    for start in range(0, len(row), size):
        group = row[start : start + size]
        count = min(kept, len(group))
        choices = itertools.combinations(range(len(group)), count)
        best = max(choices, key=lambda choice: sum(group[i] for i in choice))
        out += [i in best for i in range(len(group))]
    return out


@pytest.mark.parametrize("name", ["2:4", "4:8"])
@pytest.mark.parametrize(("rank", "wide", "out"), [(8, 16, 5), (3, 10, 4), (2, 1, 3), (9, 21, 2)])
def test_n_of_m_keeps_the_best_of_every_group_and_of_a_shorter_last_one(name, rank, wide, out):
    kept, size = (int(part) for part in name.split(":"))
    generator = torch.Generator().manual_seed(rank)
    # Few whole numbers: ties, and sums without rounding.
    a = torch.randint(0, 6, (rank, wide), generator=generator).float()
    b = torch.randint(0, 6, (out, rank), generator=generator).float()
    ((keep_a, keep_b),) = STRUCTURES[name](a, b, [0.5])
    for scores, keep in ((a, keep_a), (b, keep_b)):
        expected = [kept_by_brute_force(row, kept, size) for row in scores.tolist()]
        assert keep.tolist() == expected
        assert keep.dtype == torch.bool
        assert keep.shape == scores.shape


def test_n_of_m_knows_its_own_ratio_and_none():
    a, b = torch.rand(4, 8), torch.rand(3, 4)
    found = STRUCTURES["2:4"](a, b, [0.0, 0.24, 0.25, 0.5, 1.0])
    assert [float((~keep_a).float().mean()) for keep_a, _ in found] == [0, 0, 0.5, 0.5, 0.5]
    assert [float((~keep_b).float().mean()) for _, keep_b in found] == [0, 0, 0.5, 0.5, 0.5]
    ((keep_a, _),) = keep_of_every(1, 4)(a, b, [0.4])
    assert (keep_a.view(4, 2, 4).sum(-1) == 1).all()


def test_n_of_m_refuses_scores_that_are_no_numbers():
    with pytest.raises(NotANumber, match="got NaN"):
        STRUCTURES["2:4"](torch.tensor([[float("nan"), 1.0]]), torch.ones(1, 1), [0.5])
