"""LoRA as two products that add to the layer's output in place: faster in bfloat16 on a CPU.

PEFT computes LoRA in float32 and adds it to the output of the frozen layer: five passes over
activations, four of them in float32. Here the factors, which stay in float32, are rounded to
bfloat16 for two products, and the second adds to the output as it is written. This is what
automatic mixed precision computes on a GPU. The output is rounded to bfloat16 in both ways. The
price is that the factors are rounded too, the same way for all tokens. How much further gradients
are from those of float32 than PEFT's depends on the processor (`benchmarks.levers`).
"""

from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

_ADAPTER = "default"


class _WithProduct(torch.autograd.Function):
    """The output of a frozen layer for x, and s (x * kept) Aᵀ Bᵀ added to it.

    The frozen layer is computed inside: its output may be a view, and autograd lets no function
    change one. `kept` is None without dropout. The gradients of A and B have their own dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        frozen: nn.Linear,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        d = x if kept is None else x * kept
        a, b = A.to(x.dtype), B.to(x.dtype)
        output, hidden = _added(frozen(x), d, a, b, scaling)
        ctx.save_for_backward(_rows(d), hidden, a, b, kept)
        ctx.frozen, ctx.scaling, ctx.dtypes = frozen, scaling, (A.dtype, B.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        d, hidden, a, b, kept = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        gradient = _rows(arriving[0])
        scaled = gradient if ctx.scaling == 1 else gradient * ctx.scaling
        of_hidden = torch.mm(scaled, b)
        through = None
        if of_x:
            through = torch.mm(gradient, ctx.frozen.weight)
            if kept is None:
                through.addmm_(of_hidden, a)
            else:
                through.addcmul_(torch.mm(of_hidden, a), _rows(kept))
            through = through.view(*arriving[0].shape[:-1], -1)
        return (
            through,
            None,
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


def _kept(x: Tensor, p: float) -> Tensor:
    """Return what dropout multiplies inputs with: 0 with chance p, else 1 / (1 - p), as x.

    A draw of 64 bits decides on four entries, so p holds to 2^-17. torch draws one number for each
    entry, which takes as long as a twelfth of a training step.
    """
    drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    limit = round(p * 2**16)
    kept = drawn.view(torch.int16)[: x.numel()] >= limit - 2**15
    return kept.view(x.shape).to(x.dtype).mul_(1 / (1 - limit / 2**16))


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
    drops = layer.training and isinstance(dropout, nn.Dropout) and 0 < dropout.p < 1
    kept = _kept(x, cast(float, dropout.p)) if drops else None
    # A parametrized weight is computed when it is read.
    A, B = (cast(Tensor, side[_ADAPTER].weight) for side in (layer.lora_A, layer.lora_B))
    scaling = layer.scaling[_ADAPTER]
    if torch.is_grad_enabled():
        return cast(Tensor, _WithProduct.apply(x, kept, layer.base_layer, A, B, scaling))
    d = x if kept is None else x * kept
    return _added(layer.base_layer(x), d, A.to(x.dtype), B.to(x.dtype), scaling)[0]
