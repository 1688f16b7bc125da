"""Number formats of factors: every value against a plain reference, and the bytes they take."""

import pytest
import torch

from grasp_lora.core.packing import FORMATS, GROUP, packed, quantised, stored_bytes


def plain_values(row: list[float], bits: int) -> list[float]:
    """Return what a vector becomes, one number at a time."""
    most = 2 ** (bits - 1) - 1
    found: list[float] = []
    for start in range(0, len(row), GROUP):
        group = row[start : start + GROUP]
        scale = float(torch.tensor(max(map(abs, group)) / most).bfloat16())
        for value in group:
            code = 0 if scale == 0 else max(-most, min(most, round(value / scale)))
            found.append(float(torch.tensor(code * scale).bfloat16()))
    return found


def factors(rank=3, inputs=70, outputs=33, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inputs, generator=generator) * 0.1
    B = torch.randn(outputs, rank, generator=generator)
    A[1, :GROUP] = 0.0
    A[2, 5] = 40.0
    return A, B


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("sizes", [(3, 70, 33), (3, 64, 64), (3, 33, 1)])
def test_values_are_the_nearest_multiples_of_their_groups_scale(form, bits, sizes):
    A, B = factors(*sizes)
    found = packed(form, A, B).factors()
    assert [one.dtype for one in found] == [torch.bfloat16] * 2
    assert found[0].tolist() == [plain_values(row, bits) for row in A.tolist()]
    assert found[1].T.tolist() == [plain_values(row, bits) for row in B.T.tolist()]
    assert not found[0][1, :GROUP].any()


def test_codes_are_symmetric_and_no_error_is_above_half_a_step():
    A, _ = factors()
    for bits in (8, 4):
        codes, scales = quantised(A, bits)
        most = 2 ** (bits - 1) - 1
        assert int(codes.min()) >= -most
        assert int(codes.max()) == most
        step = scales.float().repeat_interleave(GROUP, 1)[:, : A.shape[1]]
        # A scale is rounded to 8 bits, so the largest value of a group may lie beyond its codes.
        assert bool(((codes * step - A).abs() <= (0.5 + most / 256) * step + 1e-9).all())


def test_bf16_is_the_rounded_factor():
    A, B = factors()
    found = packed("bf16", A, B).factors()
    assert torch.equal(found[0], A.bfloat16())
    assert torch.equal(found[1], B.bfloat16())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", [(3, 70, 33), (1, 64, 32), (5, 7, 1)])
def test_the_bytes_told_are_those_of_the_tensors(form, sizes):
    rank, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(rank, inputs, generator=generator)
    B = torch.randn(outputs, rank, generator=generator)
    tensors = packed(form, A, B).tensors.values()
    assert sum(one.nbytes for one in tensors) == stored_bytes(form, *sizes)


def test_a_longer_example_in_numbers():
    # 8 components of 576 + 192 values: 2 bytes each; or 1 byte, or a half, and a scale for 32.
    assert stored_bytes("bf16", 8, 576, 192) == 8 * 768 * 2
    assert stored_bytes("int8", 8, 576, 192) == 8 * (768 + 2 * 24)
    assert stored_bytes("int4", 8, 576, 192) == 8 * (384 + 2 * 24)
