"""Test importance scores against autograd."""

import pytest
import torch

from grasp_lora.core.pruning import importance
from grasp_lora.core.pruning.importance import IMPORTANCE, activation, is_blank, magnitude
from grasp_lora.core.pruning.second_order import Curvature


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
    gradients = torch.ones_like(A), torch.ones_like(B)
    measured = {
        "magnitude": None,
        "activation": norms,
        "taylor": gradients,
        "taylor-smoothed": tuple(torch.stack([one, one]) for one in gradients),
        "obs": Curvature.of(torch.eye(6)),
    }
    assert measured.keys() == IMPORTANCE.keys()
    for name, rule in IMPORTANCE.items():
        assert not any(score.requires_grad for score in rule(A, B, measured[name]))


def test_taylor_is_the_first_order_of_what_a_loss_changes_without_an_entry():
    A, B, norms = random_module()
    A, B = A.requires_grad_(), B.requires_grad_()
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))

    def loss(down, up):
        return ((up @ down @ inputs).sin() * 3).mean()

    loss(A, B).backward()
    scores = IMPORTANCE["taylor"](A, B, (A.grad, B.grad))
    small = 1e-3  # of the way to zero
    for factor, (score, one) in enumerate(zip(scores, (A, B), strict=True)):
        for place in ((0, 0), (2, 1)):
            moved = [A.detach().clone().double(), B.detach().clone().double()]
            moved[factor][place] *= 1 - small
            inputs = inputs.double()
            change = loss(*moved) - loss(A.detach().double(), B.detach().double())
            assert float(score[place]) == pytest.approx(abs(float(change)) / small, rel=2e-2)
        assert score.shape == one.shape


def test_smoothed_taylor_is_sensitivity_times_uncertainty():
    A, B, _ = random_module()
    of_A, of_B = torch.rand(2, *A.shape), torch.rand(2, *B.shape)
    score_A, score_B = IMPORTANCE["taylor-smoothed"](A, B, (of_A, of_B))
    assert torch.equal(score_A, of_A[0] * of_A[1])
    assert torch.equal(score_B, of_B[0] * of_B[1])


@pytest.mark.parametrize("rule", ["taylor", "taylor-smoothed", "obs"])
def test_rules_that_were_given_nothing_say_so_and_a_fresh_adapter_has_magnitudes(rule):
    A, B, _ = random_module()
    with pytest.raises(ValueError, match=f"importance '{rule}' needs what is measured"):
        IMPORTANCE[rule](A, B, None)
    pair = torch.zeros(2, *A.shape), torch.zeros(2, *B.shape)
    measured = {"taylor": (pair[0][0], pair[1][0]), "obs": Curvature.of(torch.eye(6))}
    scores = IMPORTANCE[rule](A, torch.zeros_like(B), measured.get(rule, pair))
    assert torch.equal(scores[0], A.abs())


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
