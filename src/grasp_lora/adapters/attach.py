"""Factors -> a PEFT configuration that holds exactly them, and a trainable PeftModel."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_lora.models.modules import (
    base_modules,
    check_experts,
    linear_shape,
    output_embeddings,
    similar_names,
)
from grasp_lora.models.preserve import quiet_wrapping

FactorPair: TypeAlias = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank] of one module."""

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def lora_config(
    modules: Mapping[str, FactorPair],
    model: nn.Module,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> LoraConfig:
    """Return the config of an adapter with exactly these modules, ranks and this scaling.

    The rank is the most common one (the smaller on a draw); the others stand in `rank_pattern`, and
    `alpha_pattern` mirrors it, since PEFT would divide the one alpha by each rank. Targets are full
    module names.
    """
    ranks = {module: A.shape[0] for module, (A, _) in sorted(modules.items())}
    counts = Counter(ranks.values())
    common = min(counts, key=lambda rank: (-counts[rank], rank))
    other = {module: rank for module, rank in ranks.items() if rank != common}
    known = base_modules(model)
    return LoraConfig(
        r=common,
        lora_alpha=_alpha(scaling, common),  # type: ignore[arg-type]
        rank_pattern=other,
        alpha_pattern={module: _alpha(scaling, rank) for module, rank in other.items()},
        target_modules=list(ranks),
        fan_in_fan_out=any(isinstance(known[module], Conv1D) for module in ranks),
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _alpha(scaling: float, rank: int) -> int | float:
    alpha = scaling * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def attach_adapter(
    model: nn.Module,
    modules: Mapping[str, FactorPair],
    dropout: float = 0.0,
    base_name: str | None = None,
) -> PeftModel:
    """Wrap `model` (in place, as PEFT does) with trainable LoRA factors equal to `modules`.

    The factors are float32 whatever the base is; the scaling is 1; the base is frozen. The global
    random state is left as it was. `base_name` None keeps the name the model was loaded by, with
    which PEFT can check a vocabulary when it saves; write the final folder with `write_adapter`.

    Raises:
        ValueError: `modules` is empty or does not fit the model, or the model has LoRA already.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(
            "the model carries LoRA layers already; load the bare base model (or unload() it)"
        )
    check_modules(modules, model, "the adapter")
    config = lora_config(modules, model, dropout=dropout)
    with quiet_wrapping():
        peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    if base_name is not None:
        config.base_model_name_or_path = base_name
    layers = adapter_modules(peft_model)
    assert layers.keys() == modules.keys(), "PEFT wrapped other modules than the config names"
    with torch.no_grad():
        for module, (A, B) in modules.items():
            layer = layers[module]
            layer.lora_A["default"].get_parameter("weight").copy_(A)
            layer.lora_B["default"].get_parameter("weight").copy_(B)
    return peft_model


def adapter_modules(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Return the LoRA layers by their full module name in the bare base model, in its order."""
    base = peft_model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def check_modules(modules: Mapping[str, FactorPair], model: nn.Module, name: str) -> None:
    """Check that factors belong on linear modules of the base `model`, shapes included.

    Raises:
        ValueError: there are no modules, or one is missing, not linear, the output layer, of
            another shape, or taken for an expert (`check_experts`).
    """
    if not modules:
        raise ValueError(f"{name} has no modules; an adapter needs at least one")
    known = base_modules(model)
    output_layer = output_embeddings(model)
    for module, (A, B) in modules.items():
        if module not in known:
            raise ValueError(f"{name} {_missing(module, list(known))}")
        target = known[module]
        if target is output_layer:
            raise ValueError(
                f"{name} has LoRA on the output layer {module!r}, which may be tied to the input "
                "embedding; train it without that module"
            )
        shape = linear_shape(target)
        if shape is None:
            raise ValueError(
                f"{name} has LoRA on {module!r}, a {type(target).__name__} here; only Linear and "
                "Conv1D modules are supported"
            )
        if (A.shape[1], B.shape[0]) != shape or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{name}: {module!r} maps {shape[0]} inputs to {shape[1]} outputs in this model, "
                f"but A is {list(A.shape)} and B is {list(B.shape)} (expected [r, {shape[0]}] and "
                f"[{shape[1]}, r]); load the base model the adapter was trained on"
            )
    check_experts(modules, model, name)


def _missing(module: str, known: Sequence[str]) -> str:
    layer, depth = _layer_of(module), _depth(known)
    if layer is not None and depth is not None and layer >= depth:
        return (
            f"has layer {layer} ({module!r}), but this model has {depth} layers (0 to {depth - 1})"
            "; load the base model the adapter was trained on"
        )
    near = similar_names(module, known)
    hint = f" (near: {', '.join(near)})" if near else ""
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
