"""The device that "auto" means, and the kernels that are used or disabled."""

import math
import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from grasp_lora.models.devices import (
    avoid_faulty_kernels,
    choose_device,
    repeatable_attention,
    use_repeatable_kernels,
)


@pytest.mark.parametrize(("rank", "device"), [(None, "cuda"), ("0", "cuda:0"), ("3", "cuda:3")])
def test_auto_gives_each_process_of_a_launch_its_own_gpu(monkeypatch, rank, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose_device("auto") == torch.device(device)


def test_auto_is_the_cpu_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "mps", "xpu", "meta"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{wanted}' is not available here; use 'auto'"):
        choose_device(wanted)


def test_a_gpu_beyond_those_of_the_machine_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device 'cuda:2' is not available here"):
        choose_device("cuda:2")


def test_an_accelerator_that_is_here_is_taken(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert choose_device("mps") == torch.device("mps")
    with pytest.raises(ValueError, match="not available here"):
        choose_device("xpu")


@pytest.fixture
def cudnn_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("cudnn_attention")
def test_cudnn_attention_is_left_out_on_gpus_only():
    avoid_faulty_kernels(torch.device("cpu"))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    avoid_faulty_kernels(torch.device("cuda:1"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def determinism():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("determinism")
def test_kernels_that_repeat_exactly_are_asked_for_on_gpus_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_repeatable_kernels(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    use_repeatable_kernels(torch.device("cuda:1"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_repeatable_kernels(torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what the user chose stays"


def _warned_only() -> bool:
    assert torch.are_deterministic_algorithms_enabled()
    return torch.is_deterministic_algorithms_warn_only_enabled()


def _unrepeatable() -> None:
    """Run an operation without a deterministic kernel on any device."""
    torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)


@pytest.mark.usefixtures("determinism")
def test_what_has_no_repeating_kernel_is_refused_while_attention_must_repeat():
    use_repeatable_kernels(torch.device("cuda"))
    with repeatable_attention(torch.device("cuda"), lambda: None, pytest.fail):
        assert not _warned_only()
        with pytest.raises(RuntimeError, match="deterministic implementation"):
            _unrepeatable()
    assert _warned_only()
    with (
        pytest.raises(KeyError),
        repeatable_attention(torch.device("cuda"), lambda: None, pytest.fail),
    ):
        raise KeyError
    assert _warned_only(), "an error in the body leaves the rule as it was"


@pytest.mark.usefixtures("determinism")
def test_a_model_with_an_operation_that_cannot_repeat_is_trained_all_the_same():
    use_repeatable_kernels(torch.device("cuda"))
    told: list[str] = []
    with repeatable_attention(torch.device("cuda"), _unrepeatable, told.append):
        assert _warned_only()
    assert len(told) == 1
    assert "max_unpool" in told[0]
    assert "may differ" in told[0]


@pytest.mark.usefixtures("determinism")
@pytest.mark.parametrize("error", [FloatingPointError("nan"), RuntimeError("out of memory")])
def test_other_errors_are_left_for_the_body_to_raise(error):
    def attempt() -> None:
        raise error

    use_repeatable_kernels(torch.device("cuda"))
    with repeatable_attention(torch.device("cuda"), attempt, pytest.fail):
        assert _warned_only()


def test_on_a_cpu_nothing_is_tried():
    with repeatable_attention(torch.device("cpu"), pytest.fail, pytest.fail):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("cudnn_attention", "determinism")
def test_gradients_through_masked_attention_are_the_same_every_time():
    device = torch.device("cuda")
    avoid_faulty_kernels(device)
    use_repeatable_kernels(device)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 4, 320, 64, generator=generator).bfloat16().cuda() for _ in range(3)]
    mask = torch.ones(320, 320, dtype=torch.bool, device=device).tril()[None, None]
    found: list[list[torch.Tensor]] = []
    with repeatable_attention(device, lambda: None, pytest.fail):
        for _ in range(20):
            leaves = [part.clone().requires_grad_() for part in parts]
            scaled_dot_product_attention(*leaves, attn_mask=mask).square().sum().backward()
            found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("cudnn_attention")
@pytest.mark.parametrize("length", [256, 320])
def test_gradients_through_masked_attention_are_finite(length):
    avoid_faulty_kernels(torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (0.1 * torch.randn(1, 1, length, 64, generator=generator)).bfloat16() for _ in range(3)
    )
    query[..., 0], key[..., 0] = 1.0, -120 * math.sqrt(64)  # low scores: small sums of exponentials
    leaves = [t.cuda().requires_grad_() for t in (query, key, value)]
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    scaled_dot_product_attention(*leaves, attn_mask=mask).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
