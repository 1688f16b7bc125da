"""Test merges against the sum of deltas written out, and the refusal of bad input."""

import math

import pytest
import torch

from grasp_lora.core.lora import (
    MERGES,
    LoraFactors,
    average_weights,
    lora_scaling,
    merge,
    rank_errors,
    unscaled_weights,
)


def factors(seed: int, rank: int = 3, scaling: float = 4.0, size=(7, 5)) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    out, inner = size
    A = torch.randn(rank, inner, generator=generator)
    B = torch.randn(out, rank, generator=generator)
    return LoraFactors(A, B, scaling)


def product(module) -> torch.Tensor:
    return module.B @ module.A


@pytest.mark.parametrize("kind", sorted(MERGES))
@pytest.mark.parametrize("scaling", [4.0, 0.25, -2.0])
def test_merging_one_adapter_with_weight_one_gives_its_delta(kind, scaling):
    single = factors(0, scaling=scaling)
    merged = merge(kind, [{"q": single}], [1.0])
    expected = scaling * single.B @ single.A
    assert torch.allclose(product(merged["q"]), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (1.5, -0.7), (0.0, 2.0)])
def test_cat_is_the_weighted_sum_of_deltas(weights):
    one, two = factors(1, rank=2, scaling=4.0), factors(2, rank=4, scaling=0.5)
    merged = merge("cat", [{"q": one}, {"q": two}], weights)["q"]
    expected = weights[0] * 4.0 * one.B @ one.A + weights[1] * 0.5 * two.B @ two.A
    assert torch.allclose(product(merged), expected, atol=1e-4)
    assert merged.A.shape == (6, 5)


def test_cat_blocks_cover_the_rank_axis_in_adapter_order():
    adapters = [{"q": factors(1, rank=2)}, {"v": factors(2, rank=1)}, {"q": factors(3, rank=4)}]
    module = merge("cat", adapters, [1.0, 1.0, 1.0])["q"]
    assert module.block(0) == slice(0, 2)
    assert module.block(2) == slice(2, 6)
    assert torch.equal(module.A[module.block(2)], module.parts[1].A)
    assert torch.equal(module.B[:, module.block(2)], module.parts[1].B)
    with pytest.raises(ValueError, match="source 1 has no part"):
        module.block(1)


def test_linear_multiplies_summed_factors_so_it_has_cross_terms():
    one, two = factors(1, scaling=4.0), factors(2, scaling=1.0)
    module = merge("linear", [{"q": one}, {"q": two}], [0.5, -2.0])["q"]
    root_one, root_two = math.sqrt(2.0), math.sqrt(2.0)
    expected = (root_one * one.B - root_two * two.B) @ (root_one * one.A + root_two * two.A)
    assert torch.allclose(product(module), expected, atol=1e-4)
    with pytest.raises(ValueError, match="only a 'cat' merge"):
        module.block(0)


def test_svd_is_the_best_approximation_of_the_cat_delta():
    one, two = factors(1, rank=3, size=(9, 6)), factors(2, rank=2, size=(9, 6))
    adapters, weights = [{"q": one}, {"q": two}], [1.0, -0.5]
    module = merge("svd", adapters, weights, rank=2)["q"]
    delta = product(merge("cat", adapters, weights)["q"]).double()
    U, S, Vh = torch.linalg.svd(delta)
    expected = (U[:, :2] * S[:2]) @ Vh[:2]
    assert torch.allclose(product(module).double(), expected, atol=1e-4)
    assert module.A.shape == (2, 6)
    assert torch.allclose(module.A.norm(dim=1), module.B.norm(dim=0), atol=1e-4)
    assert module.parts[0].source is None


def test_svd_takes_the_largest_rank_unless_told_and_never_more_than_the_delta_can_have():
    adapters = [{"q": factors(1, rank=1)}, {"q": factors(2, rank=3)}]
    assert merge("svd", adapters, [1.0, 1.0])["q"].A.shape[0] == 3
    assert merge("svd", adapters, [1.0, 1.0], rank=99)["q"].A.shape[0] == 4
    wide = [{"q": factors(1, rank=9)}]
    assert merge("svd", wide, [1.0])["q"].A.shape[0] == 5


@pytest.mark.parametrize("kind", sorted(MERGES))
def test_a_zero_weight_leaves_only_the_other_adapter(kind):
    one, two = factors(1), factors(2)
    module = merge(kind, [{"q": one}, {"q": two}], [0.0, 1.0])["q"]
    assert torch.allclose(product(module), two.delta(), atol=1e-4)


def test_a_module_of_one_adapter_only_is_merged_from_that_adapter():
    one, two = factors(1), factors(2)
    merged = merge("linear", [{"q": one}, {"v": two}], [0.5, 0.25])
    assert list(merged) == ["q", "v"]
    assert torch.allclose(product(merged["v"]), 0.25 * two.delta(), atol=1e-4)
    assert merged["v"].parts[0].source == 1


def test_low_precision_adapters_are_merged_in_float32():
    half = factors(1)
    half = LoraFactors(half.A.bfloat16(), half.B.bfloat16(), half.scaling)
    module = merge("cat", [{"q": half}], [1.0])["q"]
    assert module.A.dtype == module.B.dtype == torch.float32
    expected = half.scaling * half.B.float() @ half.A.float()
    assert torch.allclose(product(module), expected, atol=1e-4)


def test_linear_refuses_differing_ranks_and_names_the_way_out():
    adapters = [{"q": factors(1, rank=2)}, {"q": factors(2, rank=3)}]
    with pytest.raises(ValueError, match=r"'q' has ranks \[2, 3\]; use kind 'cat' or 'svd'"):
        merge("linear", adapters, [1.0, 1.0])


@pytest.mark.parametrize("kind", sorted(MERGES))
def test_adapters_of_different_layer_sizes_are_refused_by_module(kind):
    adapters = [{"q": factors(1)}, {"q": factors(2, size=(7, 6))}]
    with pytest.raises(ValueError, match=r"module 'q': \[\(5, 7\), \(6, 7\)\]"):
        merge(kind, adapters, [1.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "adapters", "weights", "rank", "message"),
    [
        ("sum", [{"q": factors(0)}], [1.0], None, "unknown merge kind 'sum'"),
        ("cat", [], [], None, "at least one adapter"),
        ("cat", [{}], [1.0], None, "no LoRA module"),
        ("cat", [{"q": factors(0)}], [1.0, 2.0], None, "2 weights for 1 adapters"),
        ("cat", [{"q": factors(0)}], [math.nan], None, "finite numbers"),
        ("cat", [{"q": factors(0)}], [1.0], 4, "leave the rank out"),
        ("svd", [{"q": factors(0)}], [1.0], 0, "at least 1, got 0"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(kind, adapters, weights, rank, message):
    with pytest.raises(ValueError, match=message):
        merge(kind, adapters, weights, rank)


def test_a_factor_with_nan_is_refused_by_adapter_and_module():
    broken = factors(0)
    broken.B[0, 0] = math.nan
    with pytest.raises(ValueError, match="adapter 2 holds NaN or infinite values in module 'q'"):
        merge("cat", [{"q": factors(1)}, {"q": broken}], [1.0, 1.0])


def test_swapped_factors_are_refused():
    good = factors(0)
    with pytest.raises(ValueError, match=r"A \[rank, in\] and B \[out, rank\]"):
        LoraFactors(good.B, good.A, 1.0)
    with pytest.raises(ValueError, match="finite number, got inf"):
        LoraFactors(good.A, good.B, math.inf)


def test_scaling_divides_by_the_rank_or_its_root():
    assert lora_scaling(16, 32, use_rslora=False) == 2.0
    assert lora_scaling(16, 32, use_rslora=True) == 8.0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        lora_scaling(0, 32, use_rslora=False)


def test_average_weights_sum_to_one():
    assert average_weights(4) == (0.25, 0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="at least one adapter"):
        average_weights(0)


def test_a_linear_merge_by_unscaled_weights_is_the_plain_sum_of_the_factors():
    adapters = [
        {"a": factors(1, scaling=4.0), "b": factors(2, scaling=4.0)},
        {"a": factors(3, scaling=0.5), "b": factors(4, scaling=0.5)},
    ]
    weights = unscaled_weights(adapters)
    assert weights == (0.25, 2.0)
    merged = merge("linear", adapters, weights)
    for name in ("a", "b"):
        first, second = (one[name] for one in adapters)
        torch.testing.assert_close(merged[name].A, first.A + second.A)
        torch.testing.assert_close(merged[name].B, first.B + second.B)


@pytest.mark.parametrize("scalings", [(4.0, 2.0), (0.0, 0.0), ()])
def test_unscaled_weights_need_one_scaling_for_each_adapter(scalings):
    adapter = {str(n): factors(n, scaling=scaling) for n, scaling in enumerate(scalings)}
    with pytest.raises(ValueError, match=r"adapter 2 has the scalings .*give merge\.weights as"):
        unscaled_weights([{"a": factors(0)}, adapter])


def test_rank_errors_are_those_of_the_truncated_delta():
    generator = torch.Generator().manual_seed(0)
    factors = LoraFactors(
        torch.randn(5, 9, generator=generator), torch.randn(7, 5, generator=generator), 0.5
    )
    whole = factors.B.double() @ factors.A.double()
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    expected = [
        float((whole - (U[:, :k] * S[:k]) @ Vh[:k]).norm() / whole.norm()) for k in range(6)
    ]
    assert rank_errors(factors) == pytest.approx(expected, abs=1e-12)
    zeros = LoraFactors(torch.zeros(2, 9), torch.randn(7, 2, generator=generator), 1.0)
    assert rank_errors(zeros) == [0.0, 0.0, 0.0]
    wide = LoraFactors(
        torch.randn(5, 3, generator=generator), torch.randn(2, 5, generator=generator), 1.0
    )
    assert rank_errors(wide)[2:] == pytest.approx([0.0] * 4, abs=1e-12)
