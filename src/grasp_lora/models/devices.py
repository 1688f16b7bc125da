"""Choose the device and number format of a model, and the kernels it may use."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from grasp_lora.base.words import shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto" or for a name like "cuda:1".

    "auto" means CUDA if there is any, else the CPU. Each process of a multi-GPU launch gets its own
    GPU.

    Raises:
        ValueError: the name is not a device, or there is no such device here.
    """
    if wanted == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Launchers set LOCAL_RANK to the number of the process on this machine.
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"device {shown(wanted)} is unknown; use 'auto', 'cpu' or 'cuda'"
        ) from error
    if not _is_there(device):
        raise ValueError(f"device {shown(wanted)} is not available here; use 'auto' or 'cpu'")
    return device


def _is_there(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        number = device.index or 0
        return torch.cuda.is_available() and number < max(1, torch.cuda.device_count())
    if not torch.accelerator.is_available():
        return False
    kind = torch.accelerator.current_accelerator()
    return kind is not None and kind.type == device.type


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; "auto" is bfloat16 if `device` supports it natively, else float32."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def avoid_faulty_kernels(device: torch.device) -> None:
    """Disable, for this process, attention kernels that compute wrong gradients on `device`.

    cuDNN's backward pass of masked attention returns NaN if the length is 64 more than a multiple
    of 128 and the scores of a query are low (torch 2.11 and later on Hopper GPUs,
    https://github.com/pytorch/pytorch/issues/196678). torch's other kernels are correct there.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def use_repeatable_kernels(device: torch.device) -> None:
    """Make this process use deterministic kernels on a GPU, where torch has them.

    Without them, two runs of one seed on a GPU differ in their last digits, and a few epochs later
    in the epoch that is kept. Operations without such a kernel warn once and still run. The
    gradient of attention is one of these; see `repeatable_attention`.
    """
    if device.type == "cuda":
        # cuBLAS reads this variable on its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def repeatable_attention(
    device: torch.device, attempt: Callable[[], object], notice: Callable[[str], None]
) -> Iterator[None]:
    """Use deterministic kernels for the gradient of attention in the body, on a GPU.

    torch chooses these kernels only in its strict mode, which raises an error for operations
    without a deterministic kernel; `use_repeatable_kernels` only warns. The body runs in strict
    mode if `attempt` succeeds in it, else in the mode set before.

    Args:
        device: device of the body; on a CPU nothing changes.
        attempt: does the work of the body once, without side effects.
        notice: called with a message for the user if the model does not allow strict mode.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    refused = None
    torch.use_deterministic_algorithms(True)
    try:
        attempt()
    except (RuntimeError, FloatingPointError) as error:  # the body raises other errors itself
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
    # torch 2.10 and later report every instruction set; earlier ones only the vector width.
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
