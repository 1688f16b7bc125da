"""LoRA as two products that add to the layer's output in place: faster in bfloat16 on a CPU.

PEFT computes LoRA in float32 and adds it to the output of the frozen layer: five passes over
activations, four of them in float32. Here the factors, which stay in float32, are rounded to
bfloat16 for two products, and the second adds to the output as it is written. This is what
automatic mixed precision computes on a GPU. The output is rounded to bfloat16 in both ways, and
that error is far larger than what the factors add to it.
"""

from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

_ADAPTER = "default"


class _WithProduct(torch.autograd.Function):
    """The output of a frozen layer for x, and s d Aᵀ Bᵀ added to it; d is x after dropout.

    The frozen layer is computed inside: its output may be a view, and autograd lets no function
    change one. `dropped` is None where there is no dropout. The gradients of A and B have their
    own dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        frozen: nn.Linear,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        d = x if dropped is None else dropped
        a, b = A.to(x.dtype), B.to(x.dtype)
        output, hidden = _added(frozen(x), d, a, b, scaling)
        ctx.save_for_backward(_rows(d), hidden, a, b)
        ctx.frozen, ctx.scaling, ctx.dtypes = frozen, scaling, (A.dtype, B.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        d, hidden, a, b = ctx.saved_tensors
        of_x, of_dropped, _, of_a, of_b, _ = ctx.needs_input_grad
        shape = (*arriving[0].shape[:-1], d.shape[-1])
        gradient = _rows(arriving[0])
        scaled = gradient if ctx.scaling == 1 else gradient * ctx.scaling
        of_hidden = torch.mm(scaled, b)
        through_a = torch.mm(of_hidden, a) if of_dropped else None
        through = None
        if of_x:
            through = torch.mm(gradient, ctx.frozen.weight)
            if not of_dropped:
                through.addmm_(of_hidden, a)
        return (
            None if through is None else through.view(shape),
            None if through_a is None else through_a.view(shape),
            None,
            torch.mm(of_hidden.T, d).to(ctx.dtypes[0]) if of_a else None,
            torch.mm(scaled.T, hidden).to(ctx.dtypes[1]) if of_b else None,
            None,
        )


def _added(
    output: Tensor, d: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    hidden = torch.mm(_rows(d), a.T)
    _rows(output).addmm_(hidden, b.T, alpha=scaling)
    return output, hidden


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def use_added_products(model: nn.Module) -> int:
    """Let LoRA layers add their product in place; return the number of changed layers.

    Changed are layers of PEFT's plain LoRA over a frozen `torch.nn.Linear` in bfloat16 on a CPU. A
    layer computes as PEFT does wherever it is not in plain use: adapters disabled, merged, or
    several.
    """
    layers = [module for module in model.modules() if _fits(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _fits(module: nn.Module) -> bool:
    if type(module) is not LoraLinear or type(module.get_base_layer()) is not nn.Linear:
        return False
    weight = module.get_base_layer().weight
    frozen = not any(one.requires_grad for one in module.get_base_layer().parameters())
    plain = not module.lora_variant and not any(module.lora_bias.values())
    return frozen and plain and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def _forward(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    plain = not (layer.disable_adapters or layer.merged or args or kwargs)
    if not plain or layer.active_adapters != [_ADAPTER] or x.dtype != torch.bfloat16:
        return LoraLinear.forward(layer, x, *args, **kwargs)
    dropout = layer.lora_dropout[_ADAPTER]
    dropped = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
    # A parametrized weight is computed when it is read.
    A, B = (cast(Tensor, side[_ADAPTER].weight) for side in (layer.lora_A, layer.lora_B))
    scaling = layer.scaling[_ADAPTER]
    if torch.is_grad_enabled():
        return cast(Tensor, _WithProduct.apply(x, dropped, layer.base_layer, A, B, scaling))
    d = x if dropped is None else dropped
    return _added(layer.base_layer(x), d, A.to(x.dtype), B.to(x.dtype), scaling)[0]
