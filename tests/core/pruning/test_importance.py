"""Test importance scores against autograd."""

import pytest
import torch

from grasp_lora.core.pruning import importance
from grasp_lora.core.pruning.importance import IMPORTANCE, activation, is_blank, magnitude


def random_module(rank=3, inner=6, out=8):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(rank, inner, generator=generator)
    B = torch.randn(out, rank, generator=generator)
    norms = torch.rand(inner, generator=generator) + 0.1
    return A, B, norms


def autograd_scores(A, B, norms):
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    ((B @ A).abs() * norms).sum().backward()
    return A.grad.abs(), B.grad.abs()


@pytest.mark.parametrize("chunk", [1, 13, 1 << 22])
def test_activation_is_the_gradient_of_the_activated_mass(chunk, monkeypatch):
    monkeypatch.setattr(importance, "CHUNK_ENTRIES", chunk)
    A, B, norms = random_module()
    for score, reference in zip(activation(A, B, norms), autograd_scores(A, B, norms), strict=True):
        assert torch.allclose(score, reference, atol=1e-5)


def test_activation_agrees_with_autograd_where_products_are_exactly_zero():
    A, B, norms = random_module()
    B[2] = 0
    A[:, 1] = 0
    for score, reference in zip(activation(A, B, norms), autograd_scores(A, B, norms), strict=True):
        assert torch.allclose(score, reference, atol=1e-5)


def test_magnitude_is_the_absolute_value_and_needs_no_norms():
    A, B, _ = random_module()
    score_A, score_B = magnitude(A, B, None)
    assert torch.equal(score_A, A.abs())
    assert torch.equal(score_B, B.abs())


def test_activation_falls_back_to_magnitude_for_a_fresh_adapter():
    A, B, norms = random_module()
    B.zero_()
    assert is_blank(B)
    assert not is_blank(A)
    score_A, score_B = activation(A, B, norms)
    assert torch.equal(score_A, A.abs())
    assert torch.equal(score_B, B)


def test_scores_carry_no_gradient():
    A, B, norms = random_module()
    A.requires_grad_()
    B.requires_grad_()
    for rule in IMPORTANCE.values():
        assert not any(score.requires_grad for score in rule(A, B, norms))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda norms: None, "needs the input norms, got None"),
        (lambda norms: norms[:-1], r"one per input feature, \[6\], got \[5\]"),
        (lambda norms: -norms, "finite and at least 0"),
        (lambda norms: norms * torch.nan, "finite and at least 0"),
    ],
)
def test_activation_refuses_norms_it_cannot_use(change, message):
    A, B, norms = random_module()
    with pytest.raises(ValueError, match=message):
        activation(A, B, change(norms))
