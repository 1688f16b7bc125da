"""AdaLoRA (arXiv 2303.10512) as PEFT has it, trained like every other adapter here: a baseline.

PEFT adds the orthogonality of the factors to a loss that the model returns; ours is computed
outside, so the term's gradient is added to the parameters' own, after clipping.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn
from transformers import TrainerCallback

from grasp_lora.core.pruning.masks import without_dead_components
from grasp_lora.models.preserve import quiet_wrapping
from grasp_lora.training.live import LiveAdapter

ORTHOGONALITY = 0.5
"""Weight of the term, PEFT's default."""


def attach_adalora(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    steps: int,
    seed: int,
) -> LiveAdapter:
    """Wrap a bare model with a fresh AdaLoRA adapter; return the handle that training needs.

    Ranks start at one and a half times `rank`, and are given up from a sixth to a half of the
    steps until `rank` a module is left on average.

    Args:
        model: the bare backbone; it stays frozen.
        targets: full names of the modules.
        rank: average rank at the end.
        alpha: scaling is alpha over the starting rank.
        dropout: of the adapter's input.
        steps: optimizer steps of the training.
        seed: of the starting factors.

    Raises:
        ValueError: there are too few steps for the schedule.
    """
    config = AdaLoraConfig(
        init_r=-(-3 * rank // 2),
        target_r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        tinit=steps // 6,
        tfinal=steps // 2,
        deltaT=max(1, steps // 50),
        total_step=steps,
        orth_reg_weight=ORTHOGONALITY,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    with quiet_wrapping():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    params = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    for param in params.values():
        param.data = param.data.float()
    return LiveAdapter(wrapped, params, (), {})


class AdaLoraCallback(TrainerCallback):
    """Adds the orthogonality's gradient and gives ranks up, after every optimizer step.

    Args:
        live: of `attach_adalora`.
    """

    def __init__(self, live: LiveAdapter):
        self._live = live

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of the orthogonality."""
        factors = [p for n, p in self._live.params.items() if "lora_A" in n or "lora_B" in n]
        with torch.enable_grad():
            price = ORTHOGONALITY * orthogonality_penalty(self._live.params)
            gradients = torch.autograd.grad(price, factors)
        for param, gradient in zip(factors, gradients, strict=True):
            param.grad = gradient if param.grad is None else param.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the components and give up those over the budget."""
        self._live.model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]


def orthogonality_penalty(params: Any) -> Tensor:
    """Return the mean Frobenius distance of A A^T and B^T B from the identity."""
    distances: list[Tensor] = []
    for name, factor in params.items():
        if "lora_A" in name or "lora_B" in name:
            product = factor @ factor.T if "lora_A" in name else factor.T @ factor
            identity = torch.eye(len(product), device=product.device, dtype=product.dtype)
            distances.append(torch.linalg.matrix_norm(product - identity))
    return torch.stack(distances).mean()


def plain_lora_of(live: LiveAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (A, B) of the plain LoRA adapter that adds the same, scaling 1."""
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    base = live.model.get_base_model()  # type: ignore[operator]
    for name, module in base.named_modules():
        if isinstance(module, SVDLinear):
            a, b, e = (
                getattr(module, side)["default"].detach().float().cpu()
                for side in ("lora_A", "lora_B", "lora_E")
            )
            scaling = module.scaling["default"] / (float(module.ranknum["default"].detach()) + 1e-5)
            down, up = without_dead_components(a * e, b * scaling)
            plain[name] = (down.clone(), up.clone())
    return plain
