"""Normalisation in one pass, where torch has it in one: bfloat16 on a CPU.

transformers writes root-mean-square norms out in five passes over the activations, three of them in
float32. `torch.nn.functional.rms_norm` is one kernel with a backward pass of its own. It rounds to
bfloat16 once where Llama's module rounds twice, so it is the nearer of the two to float32.

Gemma's modules scale by 1 + weight in float32, which that kernel does not take for bfloat16 inputs;
they stay as they are.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_TOLERANCE = 2**-6
"""Relative; two roundings to bfloat16, each by up to 2^-9, on either side."""


def use_fused_norms(model: PreTrainedModel) -> int:
    """Let norms run as torch's own kernel; return how many do.

    Changed are modules called `...RMSNorm` whose output on drawn rows is that of the kernel.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return 0
    same = [module for module in model.modules() if _is_plain(module)]
    for module in same:
        module.forward = MethodType(_fused, module)
    return len(same)


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None
    if not named or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, len(weight), generator=generator).to(weight.dtype)
    with torch.no_grad():
        own, fused = module(rows), _fused(module, rows)
    return own.dtype == fused.dtype and torch.allclose(own, fused, rtol=_TOLERANCE, atol=0.0)


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        found = getattr(module, name, None)
        if isinstance(found, float):
            return found
    return None


def _fused(module: nn.Module, hidden_states: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return F.rms_norm(hidden_states, weight.shape, weight, _epsilon(module))
