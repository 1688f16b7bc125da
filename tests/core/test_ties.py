"""TIES on deltas: by hand, entry by entry, and what its factors lose."""

import pytest
import torch

from grasp_lora.core.lora import LoraFactors
from grasp_lora.core.ties import ties, ties_delta


def test_trim_elect_and_mean_by_hand():
    one = torch.tensor([[4.0, -3.0, 0.5], [2.0, 0.1, -1.0]])
    other = torch.tensor([[2.0, 1.0, -6.0], [-5.0, 0.2, 0.3]])
    # Half of each is kept: 4, -3, 2 and 2, -6, -5.
    expected = torch.tensor([[3.0, -3.0, -6.0], [-5.0, 0.0, 0.0]])
    assert torch.equal(ties_delta([one, other], 0.5), expected)
    assert torch.equal(ties_delta([one], 1.0), one)


def by_loops(deltas, density):
    """Return the reference: the steps of the publication, entry by entry."""
    flat = [one.flatten().tolist() for one in deltas]
    kept = []
    for one in flat:
        order = sorted(range(len(one)), key=lambda i: (-abs(one[i]), i))
        top = set(order[: len(one) - int((1 - density) * len(one) + 0.5)])
        kept.append([value if i in top else 0.0 for i, value in enumerate(one)])
    out = []
    for values in zip(*kept, strict=True):
        sign = 1 if sum(values) >= 0 else -1
        same = [value for value in values if value * sign > 0]
        out.append(sum(same) / len(same) if same else 0.0)
    return torch.tensor(out).reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_three_deltas_are_merged_as_published(density):
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(6, 7, generator=generator) for _ in range(3)]
    assert torch.allclose(ties_delta(deltas, density), by_loops(deltas, density), atol=1e-6)


def test_the_factors_are_the_best_fit_and_the_loss_is_told():
    generator = torch.Generator().manual_seed(1)
    adapters = [
        {
            name: LoraFactors(
                torch.randn(rank, 9, generator=generator),
                torch.randn(8, rank, generator=generator),
                scaling,
            )
            for name in ("q", "v")
        }
        for rank, scaling in ((2, 0.5), (3, 2.0))
    ]
    merged, lost = ties(adapters, 0.3)
    missed = whole = 0.0
    for name, module in merged.items():
        delta = ties_delta([one[name].delta() for one in adapters], 0.3).double()
        values = torch.linalg.svdvals(delta)
        gap = float((module.B.double() @ module.A.double() - delta).square().sum())
        assert module.A.shape == (5, 9)
        assert gap == pytest.approx(float(values[5:].square().sum()), rel=1e-4)
        missed += gap
        whole += float(delta.square().sum())
    assert 0 < lost < 1
    assert lost == pytest.approx((missed / whole) ** 0.5, rel=1e-4)


def test_a_single_adapter_that_is_kept_whole_is_itself():
    generator = torch.Generator().manual_seed(2)
    one = LoraFactors(torch.randn(2, 5, generator=generator), torch.randn(4, 2), 3.0)
    merged, lost = ties([{"q": one}], 1.0)
    assert torch.allclose(merged["q"].B @ merged["q"].A, one.delta(), atol=1e-5)
    assert lost < 1e-6


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_a_density_that_is_no_fraction_is_refused(density):
    with pytest.raises(ValueError, match=r"a density .* in \(0, 1\]"):
        ties_delta([torch.ones(2, 2)], density)
