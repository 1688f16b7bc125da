"""Saliency and compensation of a pruned module, against least squares and brute force."""

import itertools

import pytest
import torch

from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.masks import keep_entries
from grasp_lora.core.pruning.second_order import (
    Curvature,
    compensated,
    output_error,
    saliency,
)


def random_layer(rank, wide, out, seed, tokens=300):
    """Return A, B and inputs [wide, tokens] that depend on each other."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = drawn(wide, tokens) + 0.5 * drawn(wide, 4) @ drawn(4, tokens)
    return drawn(rank, wide), drawn(out, rank), inputs


def least_error(A, B, keep_A, keep_B, moments):
    """Return the least error over the free entries of one factor, by least squares on the outputs.

    Exactly one of the factors has a pruned entry, and that factor is fitted whole.
    """
    root = torch.linalg.cholesky(moments.double())  # the error is that of B A root
    A, B = A.double(), B.double()
    if bool(keep_B.all()):  # vec(B A root) = (B kron root^T) vec(A)
        design, old, kept = torch.kron(B, root.T.contiguous()), A.reshape(-1), keep_A.reshape(-1)
    else:
        across = (A @ root).T.contiguous()
        design = torch.kron(torch.eye(len(B), dtype=torch.double), across)
        old, kept = B.reshape(-1), keep_B.reshape(-1)
    wanted = design @ old
    found = torch.linalg.lstsq(design[:, kept], wanted[:, None]).solution[:, 0]
    return float((wanted - design[:, kept] @ found).square().sum())


def test_the_saliency_of_each_entry_is_the_least_error_without_it_by_brute_force_on_4_x_4():
    A, B, inputs = random_layer(4, 4, 4, seed=0)
    curvature = Curvature.of(inputs @ inputs.T)
    scores = saliency(A, B, curvature)
    for factor, place in itertools.product((0, 1), itertools.product(range(4), range(4))):
        keep = [torch.ones(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)]
        keep[factor][place] = False
        brute = least_error(A, B, *keep, curvature.moments)
        assert float(scores[factor][place]) == pytest.approx(brute, rel=1e-3)


@pytest.mark.parametrize("factor", [0, 1])
def test_the_first_entry_to_go_is_that_of_brute_force(factor):
    for seed in range(10):
        A, B, inputs = random_layer(4, 4, 4, seed)
        curvature = Curvature.of(inputs @ inputs.T)
        errors = {}
        for place in itertools.product(range(4), range(4)):
            keep = [torch.ones(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)]
            keep[factor][place] = False
            errors[place] = least_error(A, B, *keep, curvature.moments)
        lowest = int(saliency(A, B, curvature)[factor].argmin())
        assert divmod(lowest, 4) == min(errors, key=lambda place: errors[place])


def test_b_alone_is_fitted_as_least_squares_does_it():
    A, B, inputs = random_layer(3, 6, 4, seed=1)
    curvature = Curvature.of(inputs @ inputs.T)
    keep_A = torch.ones(3, 6, dtype=torch.bool)
    keep_B = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) > 0.4
    new_A, new_B = compensated(A, B, keep_A, keep_B, curvature)
    # A is whole, so its fit may help too: the error is at most that of B alone.
    brute = least_error(A, B, keep_A, keep_B, curvature.moments)
    assert output_error((A, B), (new_A, new_B), curvature.moments) <= brute * (1 + 1e-6)
    assert not new_B[~keep_B].any()


def test_one_row_of_a_is_fitted_as_least_squares_does_it():
    A, B, inputs = random_layer(1, 8, 3, seed=3)
    curvature = Curvature.of(inputs @ inputs.T)
    keep_A, keep_B = torch.ones(1, 8, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)
    keep_A[0, [1, 4, 5]] = False
    new = compensated(A, B, keep_A, keep_B, curvature)
    brute = least_error(A, B, keep_A, keep_B, curvature.moments)
    # With one row, B can only be scaled, which the fit of A has done already.
    assert output_error((A, B), new, curvature.moments) == pytest.approx(brute, rel=1e-4)
    assert not new[0][~keep_A].any()


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8])
def test_the_error_after_pruning_is_the_least_of_all_rules(ratio):
    for seed in range(12):
        A, B, inputs = random_layer(8, 64, 48, seed)
        generator = torch.Generator().manual_seed(seed)
        gradients = tuple(torch.randn(f.shape, generator=generator) for f in (A, B))
        curvature = Curvature.of(inputs @ inputs.T)
        measured = {
            "magnitude": None,
            "activation": inputs.square().sum(1).sqrt(),
            "taylor": gradients,
            "taylor-smoothed": tuple(torch.stack([g.abs(), g.abs()]) for g in gradients),
            "obs": curvature,
        }
        assert measured.keys() == IMPORTANCE.keys()
        errors = {}
        for rule, data in measured.items():
            ((keep_A, keep_B),) = keep_entries(*IMPORTANCE[rule](A, B, data), [ratio])
            new = A * keep_A, B * keep_B
            errors[f"{rule}, values kept"] = output_error((A, B), new, curvature.moments)
            if rule == "obs":
                new = compensated(A, B, keep_A, keep_B, curvature)
                errors[rule] = output_error((A, B), new, curvature.moments)
        assert min(errors, key=lambda rule: errors[rule]) == "obs", seed


def test_fitting_never_costs_and_what_is_dead_stays_so():
    for seed in range(20):
        A, B, inputs = random_layer(4, 12, 6, seed)
        generator = torch.Generator().manual_seed(seed)
        keep_A = torch.rand(A.shape, generator=generator) > 0.5
        keep_B = torch.rand(B.shape, generator=generator) > 0.5
        keep_A[0] = False  # a whole component, and a row of B with nothing left
        keep_B[:, 0] = False
        keep_B[2] = False
        curvature = Curvature.of(inputs @ inputs.T)
        new_A, new_B = compensated(A, B, keep_A, keep_B, curvature)
        before = output_error((A, B), (A * keep_A, B * keep_B), curvature.moments)
        assert output_error((A, B), (new_A, new_B), curvature.moments) <= before * (1 + 1e-6)
        assert not new_A[~keep_A].any()
        assert not new_B[~keep_B].any()
        assert torch.isfinite(new_A).all()
        assert torch.isfinite(new_B).all()


def test_nothing_pruned_changes_nothing():
    A, B, inputs = random_layer(3, 9, 5, seed=4)
    kept = torch.ones(3, 9, dtype=torch.bool), torch.ones(5, 3, dtype=torch.bool)
    new = compensated(A, B, *kept, Curvature.of(inputs @ inputs.T))
    assert torch.allclose(new[1] @ new[0], B @ A, atol=1e-4)


def test_moments_that_are_no_numbers_are_refused_and_dead_inputs_are_not():
    with pytest.raises(ValueError, match="must be finite"):
        Curvature.of(torch.full((2, 2), float("nan")))
    assert torch.isfinite(Curvature.of(torch.zeros(3, 3)).inverse_diagonal).all()
    A, B, _ = random_layer(2, 3, 4, seed=5)
    with pytest.raises(ValueError, match=r"each pair of 3 input features, got \[2, 2\]"):
        IMPORTANCE["obs"](A, B, Curvature.of(torch.eye(2)))
