"""Attention as plain matrix products: faster than the fused kernel in bfloat16 on a CPU.

torch's fused CPU attention is slow in bfloat16, above all in the backward pass. For sequences of a
few hundred tokens the textbook form (scores, softmax, weighted values) takes half the time. It
computes one example at a time, so that the scores stay in the processor's cache. So examples that
stand in one row without padding are computed apart as well; see `packed_edges`. Longer sequences,
decoding, other dtypes and other devices use transformers' own `sdpa`.

Scores are rounded to bfloat16 before the softmax, as in transformers' `eager` attention. The fused
kernel keeps them in float32. The probabilities are stored for the backward pass: 2 bytes for each
head and pair of tokens.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grasp_lora.models.modules import is_encoder_decoder

ATTENTION_NAME = "sdpa_short_products"

MAX_LENGTH = 512
"""Longest sequence, in tokens, that uses products; the fused kernel is as fast at about 700."""

_CACHED_SCORES = 2_500_000
"""Most scores computed at a time, so that they stay in the processor's cache."""

_QUERIES_PER_SPAN = 128
"""Number of neighbouring queries that are multiplied by the same range of keys."""


def use_short_attention(model: PreTrainedModel) -> bool:
    """Switch a model to product attention if it runs in bfloat16 on a CPU; return whether it did.

    The model must use `sdpa` and look attention up in transformers' table of implementations.
    Models without that table name the kernels they support themselves. The attention of an
    encoder-decoder is left as it is.
    """
    fits = (
        not is_encoder_decoder(model)
        and model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and model.config._attn_implementation == "sdpa"
        and model._supports_attention_backend
    )
    if fits:
        model.set_attn_implementation(ATTENTION_NAME)
    return fits


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return (attention output [batch, length, heads, width], None), as transformers expects it.

    The parameters are those of transformers' attention interface.

    Args:
        module: the attention layer.
        query: [batch, heads, length, width].
        key: [batch, key heads, keys, width].
        value: shaped like `key`.
        attention_mask: [batch or 1, 1, length, keys], True where a query may see a key. None means
            the mask that `is_causal` selects.
        dropout: dropout probability of the attention probabilities.
        scaling: factor of the scores; None means 1 / sqrt(width).
        settings: further arguments for `sdpa`. `is_causal` says whether attention without a mask
            is causal; None reads it from the layer.
    """
    edges = packed_edges(settings.get("position_ids"), query)
    if edges and key.shape[2] == query.shape[2] and _fits_products(query):
        rest = settings | {"position_ids": None}
        parts: list[Tensor] = []
        for own in itertools.starmap(slice, itertools.pairwise(edges)):
            states = (query[:, :, own], key[:, :, own], value[:, :, own])
            part, _ = attention_forward(module, *states, None, dropout, scaling, **rest)
            parts.append(part)
        return torch.cat(parts, dim=1), None
    is_causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = settings.get("position_bias") is None and settings.get("cache") is None
    if plain and dropout == 0.0 and _is_short(query, key, attention_mask, causal):
        bias = _bias(attention_mask, query)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention_products(query, key, value, bias, scale), None
    output, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        **settings,
    )
    return output, None


def attention_products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale * query key^T + bias) value, as [batch, length, heads, width].

    Args:
        query: [batch, heads, length, width].
        key: [batch, key heads, length, width]; heads must be a multiple of key heads.
        value: shaped like `key`.
        bias: [batch or 1, 1, length, length], added to the scores; it gets no gradient.
        scale: factor of the scores.
    """
    result: Tensor = _Products.apply(query, key, value, bias, scale)  # type: ignore[assignment]
    return result


def packed_edges(position_ids: Tensor | None, query: Tensor) -> list[int]:
    """Return where the examples of a packed row begin, and its end; [] if it is no packed row.

    Args:
        position_ids: [1, length], beginning with 0 for every example. Padding on the left, whose
            positions are 0 too, makes no packed row.
        query: [1, heads, length, width].
    """
    length = query.shape[2]
    if position_ids is None or query.shape[0] != 1 or position_ids.shape != (1, length):
        return []
    places = position_ids[0]
    starts = (places == 0).nonzero().flatten()
    follows = torch.arange(length, device=places.device)
    begin = torch.zeros_like(places).index_put_((starts,), starts).cummax(0).values
    if len(starts) < 2 or starts[0] != 0 or bool((starts.diff() < 2).any()):
        return []
    if not torch.equal(places, follows - begin):
        return []
    return [*starts.tolist(), length]


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """Return whether a model in eval mode keeps the examples of a packed row apart, and fast.

    It must use this attention, which computes packed examples one by one. What an example is
    packed with must not change its logits by a bit, which finds out whether the model hands the
    positions on. Other attention would multiply examples with each other, at a mask's cost.
    """
    if model.config._attn_implementation != ATTENTION_NAME:
        return False
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    found = [
        model(input_ids=torch.tensor([[*first, 1, 2, 3]]), position_ids=positions).logits[:, 3:]
        for first in ((1, 2, 3), (3, 1, 1))
    ]
    return torch.equal(*found)


def _fits_products(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def _is_short(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> bool:
    length = query.shape[2]
    fits = _fits_products(query) and 1 < length <= MAX_LENGTH and key.shape[2] == length
    if mask is None:
        return fits and causal
    return fits and mask.dtype == torch.bool and mask.shape[1] == 1


def _bias(mask: Tensor | None, query: Tensor) -> Tensor:
    # The lowest number instead of minus infinity keeps a padding query that sees no key finite.
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        length = query.shape[2]
        return query.new_full((1, 1, length, length), lowest).triu_(1)
    return query.new_zeros(mask.shape).masked_fill_(~mask, lowest)


def _spans(bias: Tensor) -> list[tuple[slice, int]]:
    """Return (range of queries, number of leading keys they are multiplied by) pairs in order.

    With causal attention the first queries see only the first keys. The keys left out would have
    had probability zero. Attention that is not causal gives one range with all keys.
    """
    length = bias.shape[-1]
    parts = max(1, length // _QUERIES_PER_SPAN)
    edges = [length * part // parts for part in range(1, parts)]
    lowest = torch.finfo(bias.dtype).min
    if any(bool((bias[..., :edge, edge:] > lowest).any()) for edge in edges):
        return [(slice(0, length), length)]
    bounds = zip([0, *edges], [*edges, length], strict=True)
    return [(slice(start, stop), stop) for start, stop in bounds]


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, slice, slice]]:
    """Return (example, heads, key heads) for each block of scores that is computed at a time."""
    examples, heads, length, _ = query.shape
    groups = key.shape[1]
    shared = heads // groups
    step = max(1, min(groups, _CACHED_SCORES // (shared * length * length)))
    starts = range(0, groups, step)
    return [
        (b, slice(g * shared, min(g + step, groups) * shared), slice(g, min(g + step, groups)))
        for b in range(examples)
        for g in starts
    ]


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """Return [heads, rows, width] reshaped to [groups, heads per group * rows, width]."""
    return heads.reshape(groups, -1, heads.shape[-1])


class _Products(torch.autograd.Function):
    """Attention that computes all heads of one key head in one product, without copying keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        examples, heads, length, _ = query.shape
        groups, out_width = key.shape[1], value.shape[-1]
        output = query.new_empty(examples, length, heads, out_width)
        spans = _spans(bias)
        probs: list[Tensor] = []
        if any(ctx.needs_input_grad):
            sizes = [heads // groups * (rows.stop - rows.start) for rows, _ in spans]
            probs = [
                query.new_empty(examples, groups, size, n_keys)
                for size, (_, n_keys) in zip(sizes, spans, strict=True)
            ]
        for example, head_range, key_range in _blocks(query, key):
            mask_bias = bias[example if bias.shape[0] > 1 else 0]
            for index, (rows, n_keys) in enumerate(spans):
                queries = _grouped(
                    query[example, head_range, rows] * scale, key_range.stop - key_range.start
                )
                scores = torch.bmm(queries, key[example, key_range, :n_keys].transpose(1, 2))
                scores.view(-1, rows.stop - rows.start, n_keys).add_(mask_bias[:, rows, :n_keys])
                part = probs[index][example, key_range] if probs else scores
                torch.softmax(scores, -1, out=part)
                weighted = torch.bmm(part, value[example, key_range, :n_keys])
                weighted = weighted.view(-1, rows.stop - rows.start, out_width)
                output[example, rows, head_range] = weighted.transpose(0, 1)
        ctx.save_for_backward(query, key, value, *probs)
        ctx.spans, ctx.scale = spans, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value, *probs = ctx.saved_tensors
        query_grad, key_grad = torch.empty_like(query), torch.zeros_like(key)
        value_grad = torch.zeros_like(value)
        for example, head_range, key_range in _blocks(query, key):
            for part, (rows, n_keys) in zip(probs, ctx.spans, strict=True):
                groups, part = key_range.stop - key_range.start, part[example, key_range]
                output_grad = _grouped(gradient[example, rows, head_range].transpose(0, 1), groups)
                probs_grad = torch.bmm(
                    output_grad, value[example, key_range, :n_keys].transpose(1, 2)
                )
                scores_grad = torch.ops.aten._softmax_backward_data(
                    probs_grad, part, -1, part.dtype
                )
                query_part = torch.bmm(scores_grad, key[example, key_range, :n_keys]).mul_(
                    ctx.scale
                )
                query_grad[example, head_range, rows] = query_part.view(
                    -1, rows.stop - rows.start, query_part.shape[-1]
                )
                queries = _grouped(query[example, head_range, rows], groups)
                key_grad[example, key_range, :n_keys] += torch.bmm(
                    scores_grad.transpose(1, 2), queries
                ).mul_(ctx.scale)
                value_grad[example, key_range, :n_keys] += torch.bmm(
                    part.transpose(1, 2), output_grad
                )
        return query_grad, key_grad, value_grad, None, None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
