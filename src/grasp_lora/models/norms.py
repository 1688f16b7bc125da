"""Replace root-mean-square norms by torch's fused kernel: faster in bfloat16 on a CPU.

transformers computes these norms in five passes over the activations, three of them in float32.
`torch.nn.functional.rms_norm` is one kernel with its own backward pass. It rounds to bfloat16 once
and Llama's module rounds twice, so the kernel is closer to float32.

In old releases of torch the function is no kernel and rounds as the modules do. Then nothing
changes.

Gemma's modules scale by 1 + weight in float32. The kernel does not support that for bfloat16
inputs, so these modules are left unchanged.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_TOLERANCE = 2**-6
"""Relative tolerance: two roundings to bfloat16, each by up to 2^-9, in both computations."""


def use_fused_norms(model: PreTrainedModel) -> int:
    """Let a model's norms use torch's fused kernel; return the number of changed modules.

    Changed are modules of a class named `...RMSNorm` whose output on random inputs equals the
    kernel's. Nothing changes unless the model is in bfloat16 on a CPU and torch has the kernel.
    """
    fits = model.device.type == "cpu" and model.dtype == torch.bfloat16
    if not fits or not has_fused_kernel():
        return 0
    replaceable = [module for module in model.modules() if _equals_kernel(module)]
    for module in replaceable:
        module.forward = MethodType(_fused, module)
    return len(replaceable)


def has_fused_kernel() -> bool:
    """Return whether `rms_norm` of the installed torch is one kernel."""
    return hasattr(torch.ops.aten, "_fused_rms_norm")


def _equals_kernel(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None
    if not named or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, len(weight), generator=generator).to(weight.dtype)
    with torch.no_grad():
        own, fused = module(inputs), _fused(module, inputs)
    return own.dtype == fused.dtype and torch.allclose(own, fused, rtol=_TOLERANCE, atol=0.0)


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        epsilon = getattr(module, name, None)
        if isinstance(epsilon, float):
            return epsilon
    return None


def _fused(module: nn.Module, hidden_states: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return F.rms_norm(hidden_states, weight.shape, weight, _epsilon(module))
