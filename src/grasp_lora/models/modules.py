"""Look up parts of a model: its linear modules, their shapes, and its forward's arguments."""

import difflib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from grasp_lora.base.words import shown

# Values of a weight that `base_fingerprint` reads: at each end, and evenly spaced in between.
_END_VALUES = 8
_SPACED_VALUES = 64


def bare_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model reads a prompt by an encoder and writes by a decoder, such as T5."""
    config = getattr(bare_model(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def model_class(config: Any) -> Any:
    """Return the class by which transformers loads a model that writes text."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def both_sides(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments by which a model reads token ids, in both parts where it has two."""
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if is_encoder_decoder(model) else {})


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a Linear, quantized or not, or a Conv1D; else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return None


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return full name -> module of the base model, with each LoRA layer replaced by its base.

    PEFT adds LoRA layers in place, so a model loaded without them may have them later.
    """
    return {
        name: module.get_base_layer() if isinstance(module, LoraLayer) else module
        for name, module in bare_model(model).named_modules()
        if ".lora_" not in name and not name.endswith(".base_layer")
    }


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return full name -> Linear or Conv1D module of the base model, without the output layer.

    The output layer must not get LoRA: if it is tied to the input embedding, merging the adapter
    changes both.
    """
    output_layer = output_embeddings(model)
    return {
        name: module
        for name, module in base_modules(model).items()
        if module is not output_layer and linear_shape(module) is not None
    }


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that maps hidden states to logits, or None if the model names none.

    If the layer has LoRA, its base layer is returned.
    """
    layer = bare_model(model).get_output_embeddings()  # type: ignore[operator]
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the input embedding."""
    return bare_model(model).get_input_embeddings().weight.shape[0]  # type: ignore[operator]


def resolve_targets(model: nn.Module, patterns: Sequence[str] | str) -> list[str]:
    """Return the full names of the modules that match `patterns`, in the model's order.

    A pattern is a full module name or its end after a dot (`q_proj`, `attn.c_attn`), as in the list
    form of PEFT's `target_modules`. "all-linear" matches every linear module except the output
    layer. In a multimodal model only modules of the text model match, because text would not train
    adapters elsewhere.

    Raises:
        ValueError: there is no pattern, a pattern matches no linear module, or `check_experts`
            refuses a module.
    """
    modules = _text_modules(model)
    if patterns == "all-linear":
        check_experts(modules, model, "target_modules")
        return list(modules)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted:
        raise ValueError("target_modules is empty: name at least one module or use 'all-linear'")
    for pattern in wanted:
        if not any(_matches(name, pattern) for name in modules):
            check_experts([pattern], model, "target_modules")
            raise ValueError(_unknown_target(pattern, modules, model))
    found = [name for name in modules if any(_matches(name, pattern) for pattern in wanted)]
    check_experts(found, model, "target_modules")
    return found


def check_experts(targets: Iterable[str], model: nn.Module, name: str) -> None:
    """Check that PEFT will put LoRA on the linear modules `targets` and on nothing else.

    Some mixture-of-experts models store all experts in one tensor. PEFT then applies names like
    `up_proj` to the experts, as adapters of the model's earlier form require. A dense layer or a
    shared expert may have linear modules with the same name.

    Args:
        targets: full or last names of linear modules.
        model: the base model, with or without LoRA.
        name: setting or adapter that is checked; error messages begin with it.

    Raises:
        ValueError: PEFT would apply some of `targets` to the experts.
    """
    bare: Any = bare_model(model)
    refused = [end for end in _last_parts(targets) if _means_experts(end, bare)]
    if refused:
        allowed = [
            end for end in _last_parts(linear_modules(model)) if not _means_experts(end, bare)
        ]
        raise ValueError(
            f"{name}: the experts of this model ({bare.config.model_type}) are fused into one "
            f"tensor, and PEFT applies {', '.join(refused)} to them, which plain LoRA factors "
            f"cannot represent; target only other linear modules: {', '.join(allowed)}"
        )


def _means_experts(ending: str, model: nn.Module) -> bool:
    config = LoraConfig(target_modules=[ending])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it is one half of a fused pair
        return True
    return ending not in (config.target_modules or ())


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a multimodal model's text model, or of the whole model."""
    bare: Any = bare_model(model)
    modules = linear_modules(model)
    if bare.config.get_text_config() is bare.config:
        return modules
    inside = set(base_modules(bare.get_decoder()).values())
    # transformers finds the decoder by name; it is the text model only if it embeds the tokens.
    if bare.get_input_embeddings() not in inside:
        return modules
    return {name: module for name, module in modules.items() if module in inside}


def similar_names(name: str, modules: Sequence[str], count: int = 3) -> list[str]:
    """Return up to `count` of `modules` that are spelled like `name`, the most similar first."""
    return difflib.get_close_matches(name, modules, n=count, cutoff=0.5)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _unknown_target(pattern: str, modules: dict[str, nn.Module], model: nn.Module) -> str:
    ends = _last_parts(modules)
    allowed = [end for end in ends if not _means_experts(end, bare_model(model))]
    near = similar_names(pattern, allowed) or similar_names(pattern, list(modules))
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    whole = "; 'all-linear' selects them all" if allowed == ends else ""
    return (
        f"target_modules: {shown(pattern)} matches no linear module{hint} The names of this "
        f"model's linear modules end in {', '.join(allowed)}{whole}"
    )


def forward_accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the base model's forward has a parameter named `argument`.

    Some models have no `position_ids` or no `logits_to_keep`. A `**kwargs` parameter does not
    count, because the model may ignore what it receives there.
    """
    return argument in inspect.signature(bare_model(model).forward).parameters


def copy_output_layer_inputs(model: nn.Module) -> RemovableHandle:
    """Copy the output layer's input on every call; return the hook's handle.

    Models slice their hidden states before the output layer and pass it a view whose leading
    dimensions cannot be flattened. If the layer is frozen, torch then computes the product example
    by example, each with a copy of the whole weight. Copying the few hidden states avoids that and
    makes bfloat16 generation on a CPU many times faster. The values are unchanged.

    Raises:
        ValueError: the model names no output layer.
    """
    layer = output_embeddings(model)
    if layer is None:
        raise ValueError(
            f"{type(bare_model(model)).__name__} names no output layer (get_output_embeddings() "
            "is None); only causal language models are supported"
        )
    return layer.register_forward_pre_hook(_copy_input)


def _copy_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


_KEPT: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def keep_fingerprint(model: nn.Module) -> str | None:
    """Return the `base_fingerprint` of a model, and keep it, as its weights will be cut up."""
    found = base_fingerprint(model)
    _KEPT[bare_model(model)] = found
    return found


def base_fingerprint(model: nn.Module) -> str | None:
    """Return a SHA-256 (hex) of a model's base weights, ignoring LoRA; None if there is none.

    It covers the name, the shape and a sample of each weight: both ends and evenly spaced values.
    The sample is rounded to bfloat16, so that float32 and bfloat16 loads of the same files agree.
    Quantized and float16 weights would not agree (rounding twice differs from rounding once), so
    they have no fingerprint.
    """
    base = bare_model(model)
    if base in _KEPT:
        return _KEPT[base]
    if getattr(base, "is_quantized", False):
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(base)):
        if weight.dtype == torch.float16:
            return None
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_sample(weight))
    return digest.hexdigest()


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if ".lora_" not in name and weight.is_floating_point():
            yield name.replace(".base_layer.", "."), weight.detach()


def _sample(weight: Tensor) -> bytes:
    flat = weight.reshape(-1)
    spaced = flat[:: max(1, flat.numel() // _SPACED_VALUES)][:_SPACED_VALUES]
    values = torch.cat([flat[:_END_VALUES], spaced, flat[-_END_VALUES:]]).to(torch.bfloat16)
    return values.cpu().view(torch.int16).numpy().tobytes()
