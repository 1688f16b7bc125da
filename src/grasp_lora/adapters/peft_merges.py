"""Merges that PEFT has and we have not: TIES and DARE, on the factors or on the deltas.

They are baselines. PEFT trims each factor by itself in `ties`, and the product in `ties_svd`, which
it factors again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grasp_lora.adapters.attach import adapter_modules, attach_adapter, lora_config
from grasp_lora.core.lora import MergedModule, Part
from grasp_lora.models.preserve import quiet_wrapping

KINDS = ("ties", "ties_svd", "dare_linear", "dare_linear_svd")


def peft_merge(
    model: nn.Module,
    adapters: Sequence[Mapping[str, MergedModule]],
    kind: str,
    weights: Sequence[float],
    density: float,
    seed: int,
) -> dict[str, MergedModule]:
    """Return PEFT's merge of adapters, as one part without sources; the model is left bare.

    Args:
        model: the bare backbone; the adapters are attached to it for the merge.
        adapters: each a merge of one, as `core.lora.merge` gives it: its scaling is 1.
        kind: one of `KINDS`, PEFT's `combination_type`.
        weights: one for each adapter.
        density: fraction that is kept, in (0, 1].
        seed: of DARE's draws.

    Raises:
        ValueError: the adapters differ in modules or ranks, or PEFT refuses for another reason.
    """
    pairs = [{name: (m.A, m.B) for name, m in one.items()} for one in adapters]
    shapes = [{name: a.shape[0] for name, (a, _) in one.items()} for one in pairs]
    if any(one != shapes[0] for one in shapes):
        raise ValueError(
            f"{kind} needs adapters with the same modules and ranks; these have "
            f"{' and '.join(_summary(one) for one in shapes)}"
        )
    if len(set(shapes[0].values())) > 1:
        # PEFT makes the merged adapter with one rank for all modules.
        raise ValueError(f"{kind} needs one rank for all modules, these have {_summary(shapes[0])}")
    peft_model = attach_adapter(model, pairs[0])
    try:
        names = ["default"]
        for number, one in enumerate(pairs[1:], start=1):
            names.append(f"adapter{number}")
            peft_model.add_adapter(names[-1], lora_config(one, model))
            for module, layer in adapter_modules(peft_model).items():
                a, b = one[module]
                with torch.no_grad():
                    layer.lora_A[names[-1]].get_parameter("weight").copy_(a)
                    layer.lora_B[names[-1]].get_parameter("weight").copy_(b)
        rank = next(iter(shapes[0].values()))
        extra: dict[str, Any] = {"svd_rank": rank} if kind.endswith("_svd") else {}
        with quiet_wrapping():
            torch.manual_seed(seed)
            peft_model.base_model.add_weighted_adapter(  # type: ignore[operator]
                names, list(weights), "merged", kind, density=density, **extra
            )
        return {
            module: MergedModule("cat", (_part(layer),))
            for module, layer in adapter_modules(peft_model).items()
        }
    finally:
        peft_model.unload()  # type: ignore[operator]


def _part(layer: Any) -> Part:
    a = layer.lora_A["merged"].weight.detach().float().cpu()
    b = layer.lora_B["merged"].weight.detach().float().cpu()
    return Part(None, a.clone(), b.clone() * layer.scaling["merged"])


def _summary(ranks: Mapping[str, int]) -> str:
    counted = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
    return f"{len(ranks)} modules of rank {counted}"
