"""Merge adapters by PEFT's TIES and DARE, as baselines.

`ties` and `dare_linear` work on each factor separately. The `_svd` kinds work on the product B A,
which PEFT then factorises again.
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
    """Return PEFT's merge of adapters, as modules of one part without a source.

    Args:
        model: the base model without LoRA; PEFT attaches the adapters to it and removes them again.
        adapters: module name -> factors with scaling 1, each as `core.lora.merge` returns for one
            adapter.
        kind: one of `KINDS`, PEFT's `combination_type`.
        weights: weight of each adapter.
        density: fraction of entries that is kept, in (0, 1].
        seed: seed of DARE's random draws.

    Raises:
        ValueError: the adapters differ in modules or ranks, or PEFT refuses the merge.
    """
    pairs = [{name: (m.A, m.B) for name, m in modules.items()} for modules in adapters]
    ranks = [{name: a.shape[0] for name, (a, _) in modules.items()} for modules in pairs]
    if any(other != ranks[0] for other in ranks):
        raise ValueError(
            f"{kind} needs adapters with the same modules and ranks; these have "
            f"{' and '.join(_ranks_summary(one) for one in ranks)}"
        )
    if len(set(ranks[0].values())) > 1:
        # PEFT gives the merged adapter one rank for all modules.
        raise ValueError(
            f"{kind} needs one rank for all modules, these have {_ranks_summary(ranks[0])}"
        )
    peft_model = attach_adapter(model, pairs[0])
    try:
        names = ["default"]
        for number, modules in enumerate(pairs[1:], start=1):
            names.append(f"adapter{number}")
            peft_model.add_adapter(names[-1], lora_config(modules, model))
            for module, layer in adapter_modules(peft_model).items():
                a, b = modules[module]
                with torch.no_grad():
                    layer.lora_A[names[-1]].get_parameter("weight").copy_(a)
                    layer.lora_B[names[-1]].get_parameter("weight").copy_(b)
        rank = next(iter(ranks[0].values()))
        extra: dict[str, Any] = {"svd_rank": rank} if kind.endswith("_svd") else {}
        with quiet_wrapping():
            torch.manual_seed(seed)
            peft_model.base_model.add_weighted_adapter(  # type: ignore[operator]
                names, list(weights), "merged", kind, density=density, **extra
            )
        return {
            module: MergedModule("cat", (_merged_part(layer),))
            for module, layer in adapter_modules(peft_model).items()
        }
    finally:
        peft_model.unload()  # type: ignore[operator]


def _merged_part(layer: Any) -> Part:
    a = layer.lora_A["merged"].weight.detach().float().cpu()
    b = layer.lora_B["merged"].weight.detach().float().cpu()
    return Part(None, a.clone(), b.clone() * layer.scaling["merged"])


def _ranks_summary(ranks: Mapping[str, int]) -> str:
    distinct = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
    return f"{len(ranks)} modules of rank {distinct}"
