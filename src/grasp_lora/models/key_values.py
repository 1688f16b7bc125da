"""The cached keys and values of read tokens: how transformers names them, and an empty cache.

Older releases of transformers call the argument and the output field `past_key_values`, newer ones
`cache`. Code that comes with a model may have the older name under either.
"""

from typing import Any

from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from grasp_lora.models.modules import bare_model, forward_accepts

_NAMES = ("cache", "past_key_values")

CACHE_NAME = next(name for name in _NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
"""Name of the cache in the installed transformers: in `generate`, and in a model's output."""


def cache_argument(model: nn.Module) -> str | None:
    """Return the argument of the base model's forward that takes a cache, or None."""
    return next((name for name in _NAMES if forward_accepts(model, name)), None)


def output_cache(output: Any) -> Cache | None:
    """Return the cache in a model's output, or None if there is none."""
    return getattr(output, CACHE_NAME, None)


def empty_cache(model: nn.Module) -> DynamicCache:
    """Return a cache with one empty layer for each layer that the model's config describes.

    Raises:
        AttributeError, KeyError, ValueError: the config does not describe its layers.
    """
    bare: Any = bare_model(model)
    return DynamicCache(config=bare.config)
