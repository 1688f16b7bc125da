"""Make a `LiveAdapter` from a PeftModel that somebody else built and trains."""

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from grasp_lora.adapters.attach import adapter_modules, check_modules, task_type
from grasp_lora.adapters.merging import source_ranks
from grasp_lora.adapters.rules import refuse_settings
from grasp_lora.base.words import shown
from grasp_lora.models.modules import is_encoder_decoder
from grasp_lora.training.live import Block, LiveAdapter

MASK_UNITS = ("merged", "source")


def adopt_adapter(
    model: nn.Module, adapter: str | None = None, mask_unit: str = "merged"
) -> LiveAdapter:
    """Return the trainable LoRA adapter of a PeftModel as a `LiveAdapter`; it changes no weights.

    Args:
        model: the PeftModel; it may be compiled. Its other adapters stay as they are.
        adapter: name of the adapter; None means the active one.
        mask_unit: `merged` prunes each tensor as a whole, `source` the part of each source adapter
            separately, in a model of `grasp_lora.merge_adapters`.

    Raises:
        ValueError: the model is no PeftModel for causal language modelling, the adapter is not
            there, not active, not trained, not plain LoRA on linear layers, or merged into the base
            weights, or `mask_unit` does not fit it.
    """
    bare: Any = getattr(model, "_orig_mod", model)
    if not isinstance(bare, PeftModel):
        raise ValueError(
            f"the model is a {type(bare).__name__}, but the ratio search needs a PeftModel: make "
            "one with peft.get_peft_model(model, LoraConfig(...)) or grasp_lora.merge_adapters"
        )
    name = _chosen(bare, adapter)
    config, label = bare.peft_config[name], f"adapter {shown(name)}"
    if config.task_type not in (None, "CAUSAL_LM") or is_encoder_decoder(bare):
        kind = str(config.task_type or task_type(bare))
        raise ValueError(
            f"{label} is for {shown(kind)}; only causal language models "
            "(task_type='CAUSAL_LM') are supported"
        )
    refuse_settings(config.to_dict(), label)
    layers = {n: layer for n, layer in adapter_modules(bare).items() if _has(layer, name)}
    pairs = {n: _factors(n, layer, name, label) for n, layer in layers.items()}
    check_modules(pairs, bare, label)
    params: dict[str, nn.Parameter] = {}
    blocks: list[Block] = []
    ranks = _ranks(bare, name, mask_unit, label)
    for module, (a, b) in pairs.items():
        params |= {f"{module}.A": a, f"{module}.B": b}
        start = 0
        for source, rank in ranks.get(module, {None: a.shape[0]}).items():
            rows = slice(start, start + rank)
            blocks.append(Block(module, source, f"{module}.A", f"{module}.B", rows))
            start += rank
    return LiveAdapter(bare, params, tuple(blocks), layers, adapter=name)


def _chosen(model: PeftModel, adapter: str | None) -> str:
    """Return the name of the adapter, once it is there and active."""
    active, there = list(model.active_adapters), list(model.peft_config)
    if adapter is None and len(active) == 1:
        return active[0]
    if adapter is None:
        raise ValueError(
            f"{len(active)} adapters are active ({shown(active)}): say which one is searched, "
            "adapter=..."
        )
    if adapter not in there:
        raise ValueError(
            f"the model has no adapter {shown(adapter)}; its adapters are {shown(there)}"
        )
    if adapter not in active:
        raise ValueError(
            f"adapter {shown(adapter)} is not active (active: {shown(active)}), so it is not "
            f"trained: call model.set_adapter({shown(adapter)})"
        )
    return adapter


def _has(layer: LoraLayer, name: str) -> bool:
    return name in layer.lora_A or name in layer.lora_embedding_A


def _factors(module: str, layer: Any, name: str, label: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a layer.

    Raises:
        ValueError: the layer is an embedding, or its factors are merged or not trained.
    """
    if name in layer.lora_embedding_A:
        raise ValueError(
            f"{label} has LoRA on the embedding {shown(module)}; only linear layers can be pruned: "
            "leave it out of target_modules"
        )
    if name in layer.merged_adapters:
        raise ValueError(
            f"{label} is merged into the base weights; call model.unmerge_adapter() first"
        )
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not all(factor.requires_grad for factor in factors):
        raise ValueError(
            f"{label} is not trained (requires_grad is off on {shown(module)}): load it with "
            "is_trainable=True"
        )
    return factors


def _ranks(
    model: PeftModel, name: str, mask_unit: str, label: str
) -> dict[str, dict[int | None, int]]:
    """Return module -> source -> its rank where the sources are pruned apart; else nothing."""
    if mask_unit != "source":
        return {}
    ranks = source_ranks(model, name)
    if ranks is None:
        raise ValueError(
            f"mask_unit='source' prunes the parts of the source adapters separately, but {label} "
            "does not hold them side by side: merge with grasp_lora.merge_adapters(kind='cat'), or "
            "set mask_unit='merged'"
        )
    return {module: {**by_source} for module, by_source in ranks.items()}
