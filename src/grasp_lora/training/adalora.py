"""AdaLoRA (arXiv 2303.10512), PEFT's implementation, as a baseline.

PEFT adds the orthogonality penalty to the loss that the model returns. Here the loss is computed
outside the model. The gradient of the penalty is therefore added to the parameters' gradients,
after clipping.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn
from transformers import TrainerCallback

from grasp_lora.adapters.attach import task_type
from grasp_lora.core.pruning.masks import without_dead_components
from grasp_lora.models.preserve import quiet_wrapping
from grasp_lora.training.live import LiveAdapter

ORTHOGONALITY = 0.5
"""Weight of the orthogonality penalty; PEFT's default."""


def attach_adalora(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    steps: int,
    seed: int,
) -> LiveAdapter:
    """Add a new AdaLoRA adapter to a base model and return it as a `LiveAdapter`.

    Ranks start at 1.5 times `rank`. Between one sixth and one half of the steps they are reduced,
    until their mean over the modules is `rank`.

    Args:
        model: the base model without LoRA; it stays frozen.
        targets: full names of the modules.
        rank: mean rank at the end.
        alpha: the scaling is alpha / initial rank.
        dropout: LoRA dropout.
        steps: optimizer steps of the training.
        seed: seed of the initial factors.

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
        task_type=task_type(model),
    )
    with quiet_wrapping():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    params = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    for param in params.values():
        param.data = param.data.float()
    return LiveAdapter(wrapped, params, (), {})


class AdaLoraCallback(TrainerCallback):
    """Adds the gradient of the orthogonality penalty, and reduces ranks after optimizer steps.

    Args:
        live: adapter from `attach_adalora`.
    """

    def __init__(self, live: LiveAdapter):
        self._live = live

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of the orthogonality penalty."""
        factors = [p for n, p in self._live.params.items() if "lora_A" in n or "lora_B" in n]
        with torch.enable_grad():
            penalty = ORTHOGONALITY * orthogonality_penalty(self._live.params)
            gradients = torch.autograd.grad(penalty, factors)
        for param, gradient in zip(factors, gradients, strict=True):
            param.grad = gradient if param.grad is None else param.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the components and remove those beyond the rank budget."""
        self._live.model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator, union-attr]


def orthogonality_penalty(params: Any) -> Tensor:
    """Return the mean Frobenius distance of A A^T and of B^T B from the identity, as a scalar."""
    distances: list[Tensor] = []
    for name, factor in params.items():
        if "lora_A" in name or "lora_B" in name:
            product = factor @ factor.T if "lora_A" in name else factor.T @ factor
            identity = torch.eye(len(product), device=product.device, dtype=product.dtype)
            distances.append(torch.linalg.matrix_norm(product - identity))
    return torch.stack(distances).mean()


def plain_lora_of(live: LiveAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (A, B) of the equivalent plain LoRA adapter, with scaling 1."""
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
