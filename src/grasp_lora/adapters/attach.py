"""Turn LoRA factors into a PEFT config and a trainable PeftModel."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_lora.adapters.products import use_added_products
from grasp_lora.base.files import ENCODER_DECODER_TASK
from grasp_lora.models.modules import (
    base_modules,
    check_experts,
    is_encoder_decoder,
    linear_shape,
    output_embeddings,
    similar_names,
)
from grasp_lora.models.preserve import quiet_wrapping

FactorPair: TypeAlias = tuple[Tensor, Tensor]
"""(A [rank, in], B [out, rank]) of one module."""

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def lora_config(
    modules: Mapping[str, FactorPair],
    model: nn.Module,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> LoraConfig:
    """Return the PEFT config of an adapter with exactly these modules and ranks.

    `r` is the most common rank, the smaller one in a tie. Other ranks are in `rank_pattern`, with
    their alphas in `alpha_pattern`, since PEFT divides alpha by each module's rank. Targets are
    full module names.

    Args:
        modules: full module name -> factors.
        model: the base model, with or without LoRA.
        scaling: LoRA scaling of every module.
        dropout: LoRA dropout.
    """
    ranks = {module: A.shape[0] for module, (A, _) in sorted(modules.items())}
    counts = Counter(ranks.values())
    common = min(counts, key=lambda rank: (-counts[rank], rank))
    other_ranks = {module: rank for module, rank in ranks.items() if rank != common}
    known = base_modules(model)
    return LoraConfig(
        r=common,
        lora_alpha=_alpha(scaling, common),  # type: ignore[arg-type]
        rank_pattern=other_ranks,
        alpha_pattern={module: _alpha(scaling, rank) for module, rank in other_ranks.items()},
        target_modules=list(ranks),
        fan_in_fan_out=any(isinstance(known[module], Conv1D) for module in ranks),
        lora_dropout=dropout,
        bias="none",
        task_type=task_type(model),
    )


def task_type(model: nn.Module) -> str:
    """Return PEFT's name for what a model does, as adapters record it."""
    return ENCODER_DECODER_TASK if is_encoder_decoder(model) else "CAUSAL_LM"


def _alpha(scaling: float, rank: int) -> int | float:
    alpha = scaling * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def attach_adapter(
    model: nn.Module,
    modules: Mapping[str, FactorPair],
    dropout: float = 0.0,
    base_name: str | None = None,
) -> PeftModel:
    """Add trainable LoRA factors to `model` in place and return the PeftModel.

    The factors are in float32 for every dtype of the base model, and the scaling is 1. In bfloat16
    on a CPU they are rounded for their products; see `adapters.products`. The base model is
    frozen. The global random state does not change. Write the final folder with `write_adapter`.

    Args:
        model: the base model without LoRA.
        modules: full module name -> initial factors.
        dropout: LoRA dropout.
        base_name: base model name in the PEFT config. None keeps the name the model was loaded by,
            which lets PEFT check the vocabulary when it saves.

    Raises:
        ValueError: `modules` is empty or does not fit the model, or the model has LoRA already.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(
            "the model already has LoRA layers; load the base model without them (or unload() it)"
        )
    check_modules(modules, model, "the adapter")
    config = lora_config(modules, model, dropout=dropout)
    with quiet_wrapping():
        peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    if base_name is not None:
        config.base_model_name_or_path = base_name
    layers = adapter_modules(peft_model)
    assert layers.keys() == modules.keys(), "PEFT wrapped modules that the config does not name"
    with torch.no_grad():
        for module, (A, B) in modules.items():
            layer = layers[module]
            layer.lora_A["default"].get_parameter("weight").copy_(A)
            layer.lora_B["default"].get_parameter("weight").copy_(B)
    use_added_products(peft_model)
    return peft_model


def adapter_modules(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Return full module name in the base model -> LoRA layer, in the base model's order."""
    base = peft_model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def check_modules(modules: Mapping[str, FactorPair], model: nn.Module, name: str) -> None:
    """Check that factors fit linear modules of the base model.

    Args:
        modules: full module name -> factors.
        model: the base model, with or without LoRA.
        name: name of the adapter; error messages begin with it.

    Raises:
        ValueError: there are no modules, or a module is missing, not linear, the output layer, of
            another shape, or refused by `check_experts`.
    """
    if not modules:
        raise ValueError(f"{name} has no modules; an adapter needs at least one")
    known = base_modules(model)
    output_layer = output_embeddings(model)
    for module, (A, B) in modules.items():
        if module not in known:
            raise ValueError(f"{name} {_missing_module(module, list(known))}")
        target = known[module]
        if target is output_layer:
            raise ValueError(
                f"{name} has LoRA on the output layer {module!r}, which may be tied to the input "
                "embedding; give one without that module"
            )
        shape = linear_shape(target)
        if shape is None:
            raise ValueError(
                f"{name} has LoRA on {module!r}, which is a {type(target).__name__} in this model; "
                "only Linear and Conv1D modules are supported"
            )
        if (A.shape[1], B.shape[0]) != shape or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{name}: {module!r} maps {shape[0]} inputs to {shape[1]} outputs in this model, "
                f"but A is {list(A.shape)} and B is {list(B.shape)} (expected [r, {shape[0]}] and "
                f"[{shape[1]}, r]); load the base model the adapter was trained on"
            )
    check_experts(modules, model, name)


def _missing_module(module: str, known: Sequence[str]) -> str:
    layer, depth = _layer_of(module), _depth(known)
    if layer is not None and depth is not None and layer >= depth:
        return (
            f"has layer {layer} ({module!r}), but this model has {depth} layers (0 to {depth - 1})"
            "; load the base model the adapter was trained on"
        )
    near = similar_names(module, known)
    hint = f" (similar: {', '.join(near)})" if near else ""
    return (
        f"names the module {module!r}, which this model does not have{hint}; load the base model "
        "the adapter was trained on"
    )


def _layer_of(module: str) -> int | None:
    match = _LAYER_NUMBER.search(module)
    return int(match[1]) if match else None


def _depth(known: Sequence[str]) -> int | None:
    layers = [layer for layer in map(_layer_of, known) if layer is not None]
    return max(layers) + 1 if layers else None
