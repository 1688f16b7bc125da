"""What a model is made of: its linear modules, their shapes, and what its forward accepts."""

import difflib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

# Values read per weight by `base_fingerprint`: the two ends, and a walk over the whole tensor.
_END_VALUES = 8
_WALK_VALUES = 64


def bare_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a Linear (quantized ones too) or a Conv1D; None for the rest."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return None


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model by full name, as if it had never carried LoRA.

    PEFT wraps in place, so a model that was bare when it was loaded may carry LoRA layers now.
    """
    return {
        name: module.get_base_layer() if isinstance(module, LoraLayer) else module
        for name, module in bare_model(model).named_modules()
        if ".lora_" not in name and not name.endswith(".base_layer")
    }


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the Linear and Conv1D modules of the base by full name, the output layer left out.

    The output layer is no place for LoRA here: where it is tied to the input embedding, merging
    the adapter changes both.
    """
    output_layer = output_embeddings(model)
    return {
        name: module
        for name, module in base_modules(model).items()
        if module is not output_layer and linear_shape(module) is not None
    }


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, None where the model names none."""
    return bare_model(model).get_output_embeddings()  # type: ignore[operator]


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the input embedding."""
    return bare_model(model).get_input_embeddings().weight.shape[0]  # type: ignore[operator]


def resolve_targets(model: nn.Module, patterns: Sequence[str] | str) -> list[str]:
    """Return the full names of the modules that `patterns` means, in the model's order.

    A pattern is a full module name or the end of one after a dot (`q_proj`, `attn.c_attn`), as in
    PEFT's list form of `target_modules`; "all-linear" means every linear module but the output
    layer. Of a model that reads images or sound as well, only the text model's modules are meant:
    the others would be given adapters that text never trains.

    Raises:
        ValueError: a pattern matches no linear module, there is no pattern, or `check_experts`.
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
            raise ValueError(_unknown_target(pattern, modules))
    found = [name for name in modules if any(_matches(name, pattern) for pattern in wanted)]
    check_experts(found, model, "target_modules")
    return found


def check_experts(targets: Iterable[str], model: nn.Module, name: str) -> None:
    """Check that PEFT will put LoRA on the linear modules `targets` and on nothing else.

    In some mixtures of experts whose experts are one tensor, PEFT takes names like `up_proj` for
    those experts, as an adapter of the model's earlier form would mean them, although a dense
    layer or a shared expert has linear modules of that name. `name` stands first in messages.

    Raises:
        ValueError: it takes some of them for the experts.
    """
    bare: Any = bare_model(model)
    taken = [end for end in _last_parts(targets) if _means_experts(end, bare)]
    if taken:
        others = [
            end for end in _last_parts(linear_modules(model)) if not _means_experts(end, bare)
        ]
        raise ValueError(
            f"{name}: the experts of this model ({bare.config.model_type}) are fused into one "
            f"tensor, and PEFT takes {', '.join(taken)} for them, which plain LoRA factors cannot "
            f"carry; target some of its other linear modules only: {', '.join(others)}"
        )


def _means_experts(ending: str, model: nn.Module) -> bool:
    config = LoraConfig(target_modules=[ending])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # half of a pair that is fused
        return True
    return ending not in (config.target_modules or ())


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules within the text model of a multimodal one, else all of them."""
    bare: Any = bare_model(model)
    modules = linear_modules(model)
    if bare.config.get_text_config() is bare.config:
        return modules
    inside = set(base_modules(bare.get_decoder()).values())
    # transformers looks the decoder up by name; the one that embeds tokens is the text model.
    if bare.get_input_embeddings() not in inside:
        return modules
    return {name: module for name, module in modules.items() if module in inside}


def similar_names(name: str, modules: Sequence[str], count: int = 3) -> list[str]:
    """Return up to `count` module names that look like `name`, the nearest first."""
    return difflib.get_close_matches(name, modules, n=count, cutoff=0.5)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _unknown_target(pattern: str, modules: dict[str, nn.Module]) -> str:
    endings = _last_parts(modules)
    near = similar_names(pattern, endings) or similar_names(pattern, list(modules))
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"target_modules: {pattern!r} matches no linear module{hint} The last parts of this "
        f"model's linear modules are {', '.join(endings)}; 'all-linear' takes them all"
    )


def forward_accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the forward of the (bare) model names `argument` in its signature.

    Models that take no `position_ids` or no `logits_to_keep` exist; a `**kwargs` does not count,
    as it would swallow the argument.
    """
    return argument in inspect.signature(bare_model(model).forward).parameters


def copy_output_layer_inputs(model: nn.Module) -> RemovableHandle:
    """Give the output layer a fresh copy of its input on every call; return the hook's handle.

    A model that slices its hidden states before a *frozen* output layer hands it a view whose
    leading dimensions cannot be flattened; the product is then computed example by example, on a
    copy of the whole weight for each. The copy of a few rows made here avoids that (bfloat16
    generation on a CPU becomes many times faster); values are unchanged.

    Raises:
        ValueError: the model names no output layer.
    """
    layer = output_embeddings(model)
    if layer is None:
        raise ValueError(
            f"{type(bare_model(model)).__name__} names no output layer (get_output_embeddings() "
            "is None): call this for causal language models only"
        )
    return layer.register_forward_pre_hook(_fresh_input)


def _fresh_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def base_fingerprint(model: nn.Module) -> str | None:
    """Return a SHA-256 (hex) that names the base weights, without any LoRA, of a model.

    Taken over the names, the shapes and a sample of each weight (both ends and an even walk),
    rounded to bfloat16: float32 and bfloat16 loads of the same files agree. None where that does
    not hold: quantized weights, and float16 (rounding twice is not rounding once).
    """
    base = bare_model(model)
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
    walk = flat[:: max(1, flat.numel() // _WALK_VALUES)][:_WALK_VALUES]
    values = torch.cat([flat[:_END_VALUES], walk, flat[-_END_VALUES:]]).to(torch.bfloat16)
    return values.cpu().view(torch.int16).numpy().tobytes()
