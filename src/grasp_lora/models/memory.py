"""Estimate the memory of a training run from a model's config alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from grasp_lora.models.modules import linear_modules, linear_shape, model_class

# Bytes per quantized weight: 4-bit values with a float32 scale for each 64 of them, or int8.
_QUANTIZED_BYTES: Mapping[str, float] = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}

# Bytes per adapter entry, in float32: value, gradient, two Adam moments, and stashed value.
_ADAPTER_BYTES = 5 * 4

_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """A memory estimate in bytes, without generation caches and allocator overhead.

    Attributes:
        weights: the frozen base model.
        adapter: LoRA factors with gradients and optimizer state.
        activations: values of one batch that the backward pass needs, including the logits.
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
    """Return a memory estimate for LoRA of rank `rank` on all linear modules.

    The model is built on the meta device, which takes no memory. The activations are the input and
    output of every linear module for each token. With gradient checkpointing they are those of one
    layer, and one hidden state for each layer. Float32 logits and their gradient are counted at
    every position. That is an upper bound, as training computes the logits of answers only.

    Args:
        config: the model's config.
        dtype: number format of weights and activations.
        quantization: "none", "8bit" or "4bit", for the weights of linear modules.
        gradient_checkpointing: whether activations are recomputed.
        trust_remote_code: run the model's own code.
        rank: LoRA rank.
        batch_size: examples per forward pass.
        length: tokens per example.
    """
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
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
