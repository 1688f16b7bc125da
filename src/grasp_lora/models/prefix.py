"""A beginning that all examples share, read once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grasp_lora.models.example_losses import LAYERS_WITHOUT_CACHE
from grasp_lora.models.key_values import cache_argument, empty_cache
from grasp_lora.models.modules import forward_accepts, is_encoder_decoder


def can_read_prefix(model: nn.Module) -> bool:
    """Return whether `PrefixReader` supports a model.

    Every layer that caches must be an attention layer that holds each token by its position. A
    sliding window may have any length.
    """
    arguments = ("position_ids", "logits_to_keep")
    if is_encoder_decoder(model) or not cache_argument(model):
        return False
    if not all(forward_accepts(model, name) for name in arguments):
        return False
    try:
        layers = empty_cache(model).layers
    except (AttributeError, KeyError, ValueError):  # the config does not describe its layers
        return False
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds or isinstance(layer, LAYERS_WITHOUT_CACHE) for layer in layers)


class PrefixReader(nn.Module):
    """Reads batches whose examples all begin with the same tokens; those are read only once.

    A batch is given whole and padded on the left. Its first columns, as many as the prefix has
    tokens, are not read: their keys and values are those of the prefix, moved to the right by the
    padding of each example. So nothing is between the prefix and the rest of an example, every
    token has the place in the batch that it has without this class, and a sliding window sees the
    same tokens.

    Args:
        model: a causal LM that `can_read_prefix` accepts.
        ids: tokens that every example begins with; each has at least one more before its answer.
    """

    def __init__(self, model: nn.Module, ids: Sequence[int]):
        super().__init__()
        self.model = model
        self._ids = torch.tensor([list(ids)])
        self._read: DynamicCache | None = None

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        use_cache: bool = True,
    ) -> Any:
        """Return the model's output for the columns behind the first ones, with its cache.

        Args:
            input_ids: [B, L], padded on the left, and maybe behind the answers.
            attention_mask: [B, L], 0 on padding.
            position_ids: [B, L].
            logits_to_keep: [K], the columns whose logits are wanted; all are behind the first ones.
            use_cache: ignored; a cache is always used.
        """
        del use_cache
        count = self._ids.shape[1]
        cached: dict[str, Any] = {str(cache_argument(self.model)): self._cache_of(attention_mask)}
        return self.model(
            input_ids=input_ids[:, count:],
            attention_mask=attention_mask,
            position_ids=position_ids[:, count:],
            logits_to_keep=logits_to_keep - count,
            use_cache=True,
            **cached,
        )

    def _cache_of(self, mask: Tensor) -> DynamicCache:
        """Return the keys and values of the first columns of a batch with this mask."""
        count = self._ids.shape[1]
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # not what is behind an answer
        # The columns of padding get any keys, because the mask hides them.
        place = (torch.arange(count, device=mask.device) - padding).clamp(min=0)
        cache = _unbounded_cache(self.model)
        for index, layer in enumerate(self._prefix_cache().layers):
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                read: tuple[Any, Any] = layer.keys, layer.values
                keys, values = (one[0][:, place.to(one.device)].transpose(0, 1) for one in read)
                cache.update(keys, values, index)
        return cache

    def _prefix_cache(self) -> DynamicCache:
        if self._read is None:
            cache = _unbounded_cache(self.model)
            cached: dict[str, Any] = {str(cache_argument(self.model)): cache, "use_cache": True}
            ids = self._ids.to(next(self.model.parameters()).device)
            self.model(input_ids=ids, logits_to_keep=1, **cached)
            self._read = cache
        return self._read


def _unbounded_cache(model: nn.Module) -> DynamicCache:
    """Return an empty cache in which layers with a sliding window keep all tokens.

    What the window hides is left to the mask. So tokens can be moved, and taken away again.
    """
    cache = empty_cache(model)
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache
