"""Where a model runs, and in which number format."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto" or for a name like "cuda:1".

    "auto" is CUDA where there is any, a GPU for each process of a launch, else the CPU.

    Raises:
        ValueError: the name is no device, or CUDA is asked for and not there.
    """
    if wanted == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Launchers number the processes of a machine; each gets a GPU of its own.
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device {wanted!r} is unknown; use 'auto', 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted!r} is not available here; use 'auto' or 'cpu'")
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype named, or for "auto" bfloat16 where `device` has it natively."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def avoid_faulty_kernels(device: torch.device) -> None:
    """Keep this process off attention kernels that give wrong gradients on `device`.

    cuDNN's backward pass of attention with a mask returns NaN where the length is 64 more than a
    multiple of 128 and a row's scores are low (torch 2.11 and later on Hopper GPUs,
    https://github.com/pytorch/pytorch/issues/196678). torch's other kernels give what it should.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def use_repeatable_kernels(device: torch.device) -> None:
    """Ask this process for kernels on `device` whose sums do not depend on the order of threads.

    Without that two runs of one seed on a GPU differ in their last digits, and a few epochs later
    in which of them is kept. What has no such kernel warns once and runs all the same; so does the
    gradient of attention, which `repeatable_attention` sees to.
    """
    if device.type == "cuda":
        # cuBLAS reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def repeatable_attention(
    device: torch.device, attempt: Callable[[], object], notice: Callable[[str], None]
) -> Iterator[None]:
    """Use kernels for the gradient of attention that repeat exactly, in the body, on a GPU.

    torch has them, but picks them only where it refuses whatever has no repeating kernel, not where
    it warns of that (`use_repeatable_kernels`). So the body runs under that rule if the model can.

    Args:
        device: what the body computes on; on a CPU nothing changes.
        attempt: does what the body does, once, and leaves no trace.
        notice: gets a line for the user where the model cannot.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    refused = None
    torch.use_deterministic_algorithms(True)
    try:
        attempt()
    except (RuntimeError, FloatingPointError) as error:  # another one is the body's to raise
        refused = str(error)
        torch.use_deterministic_algorithms(True, warn_only=before)
        if "deterministic" in refused:
            first = refused.split(". ")[0]
            notice(f"two runs of one seed may differ in their last digits on this GPU: {first}")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=before)


def _cpu_has_bfloat16() -> bool:
    # torch 2.10 and later report every instruction set; before, none but the vector width.
    report = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = report()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
