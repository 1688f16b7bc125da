"""How much memory a training run needs, estimated from a model's config alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from grasp_lora.models.modules import linear_modules, linear_shape

# Bytes of one quantized weight: 4-bit values and a float32 scale for each 64, or int8.
_QUANTIZED_BYTES: Mapping[str, float] = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}

# float32: the factor, its gradient, two Adam moments, and the value kept while it is pruned.
_ADAPTER_BYTES = 5 * 4

_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate in bytes; generation caches and the allocator's own loss are not in it.

    Attributes:
        weights: the frozen base model.
        adapter: LoRA factors with gradients and optimizer state.
        activations: what the backward pass needs of one batch, with the logits.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum in bytes."""
        return self.weights + self.adapter + self.activations

    def __str__(self) -> str:
        return (
            f"about {self.total / _GIB:.1f} GiB: weights {self.weights / _GIB:.1f}, adapter "
            f"{self.adapter / _GIB:.1f}, activations {self.activations / _GIB:.1f}"
        )


def plan_config_memory(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str = "none",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    rank: int = 16,
    batch_size: int = 1,
    length: int = 1024,
) -> MemoryPlan:
    """Return the plan for LoRA of `rank` on all linear modules, batches of `length` tokens.

    The model is built without memory (the meta device). Activations count the input and output of
    every linear module per token (with checkpointing: those of one layer, and one hidden state a
    layer), and float32 logits with their gradient at every position: an upper estimate, as the
    logits of answers alone are computed in training.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    shapes = [shape for m in linear_modules(model).values() if (shape := linear_shape(m))]
    text = config.get_text_config()
    tokens, layers = batch_size * length, text.num_hidden_layers
    per_token = sum(inputs + outputs for inputs, outputs in shapes) * dtype.itemsize
    if gradient_checkpointing:
        per_token = per_token // layers + layers * text.hidden_size * dtype.itemsize
    return MemoryPlan(
        weights=_weight_bytes(model, dtype, quantization),
        adapter=sum(rank * (inputs + outputs) for inputs, outputs in shapes) * _ADAPTER_BYTES,
        activations=tokens * (per_token + 2 * text.vocab_size * 4),
    )


def _weight_bytes(model: nn.Module, dtype: torch.dtype, quantization: str) -> int:
    total = sum(parameter.numel() for parameter in model.parameters())
    if quantization == "none":
        return total * dtype.itemsize
    linear = sum(m.get_parameter("weight").numel() for m in linear_modules(model).values())
    return int((total - linear) * dtype.itemsize + linear * _QUANTIZED_BYTES[quantization])
