"""Attention by plain matrix attention_products, where that beats the fused kernel: bfloat16 on a CPU.

torch's fused attention for CPUs is slow in bfloat16, its backward pass above all. Below some
hundred tokens the textbook form (scores, softmax, values), an example at a time so that the scores
stay in the processor's cache, takes half the time. Everything else, long rows, decoding, other
dtypes and devices, goes to transformers' own `sdpa` as before.

Scores are rounded to bfloat16 before the softmax, as in transformers' `eager` attention; the fused
kernel keeps them in float32. The probabilities are kept for the backward pass: 2 bytes for each
head and pair of tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "sdpa_short_products"

MAX_LENGTH = 512
"""Tokens of a row up to which the products are used; both ways break even at about 700."""

_CACHED_SCORES = 2_500_000
"""Scores computed at once, so that they stay in the cache."""

_SPAN = 128
"""Queries that are cut to the same keys."""


def use_short_attention(model: PreTrainedModel) -> bool:
    """Let a model use the products where they are faster; return whether that changed anything.

    Only models that chose `sdpa` themselves and look their attention up in transformers' table are
    changed: others name the kernels they know.
    """
    fits = (
        model.device.type == "cpu"
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
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return [batch, length, heads, width] attention, in the form transformers asks for.

    Args:
        module: the attention layer.
        query: [batch, heads, length, width].
        key: [batch, key heads, keys, width].
        value: as `key`.
        attention_mask: True where attention goes, [batch or 1, 1, length, keys]; None is causal.
        dropout: of the probabilities.
        scaling: factor of the scores; None is 1 / sqrt(width).
        is_causal: what no mask means; None asks the layer.
        settings: passed on to `sdpa`.
    """
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
        is_causal=is_causal,
        **settings,
    )
    return output, None


def attention_products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale * query key^T + bias) value, [batch, length, heads, width].

    Args:
        query: [batch, heads, length, width].
        key: [batch, key heads, length, width]; the heads are a multiple of the key heads.
        value: as `key`.
        bias: added to the scores, [batch or 1, 1, length, length]; no gradient.
        scale: factor of the scores.
    """
    result: Tensor = _Products.apply(query, key, value, bias, scale)  # type: ignore[assignment]
    return result


def _is_short(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> bool:
    length = query.shape[2]
    fits = (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and 1 < length <= MAX_LENGTH
        and key.shape[2] == length
    )
    if mask is None:
        return fits and causal
    return fits and mask.dtype == torch.bool and mask.shape[1] == 1


def _bias(mask: Tensor | None, query: Tensor) -> Tensor:
    # The lowest number, not minus infinity: a row of padding that sees nothing stays finite.
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        length = query.shape[2]
        return query.new_full((1, 1, length, length), lowest).triu_(1)
    return query.new_zeros(mask.shape).masked_fill_(~mask, lowest)


def _spans(bias: Tensor) -> list[tuple[slice, int]]:
    """Return (queries, how many keys they can see at most), from the first query to the last.

    Where attention is causal the first queries see the first keys alone, and what is left out
    would have had no share.
    """
    length = bias.shape[-1]
    parts = max(1, length // _SPAN)
    edges = [length * part // parts for part in range(1, parts)]
    lowest = torch.finfo(bias.dtype).min
    if any(bool((bias[..., :edge, edge:] > lowest).any()) for edge in edges):
        return [(slice(0, length), length)]
    bounds = zip([0, *edges], [*edges, length], strict=True)
    return [(slice(start, stop), stop) for start, stop in bounds]


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, slice, slice]]:
    """Return (example, its heads, its key heads) of the parts computed at once."""
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


def _folded(heads: Tensor, groups: int) -> Tensor:
    """Return [heads, rows, width] as [groups, heads of a group x rows, width]."""
    return heads.reshape(groups, -1, heads.shape[-1])


class _Products(torch.autograd.Function):
    """The heads that share a key head are rows of one product, so that keys are never repeated."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        examples, heads, length, _ = query.shape
        groups, out_width = key.shape[1], value.shape[-1]
        output = query.new_empty(examples, length, heads, out_width)
        spans = _spans(bias)
        shares: list[Tensor] = []
        if any(ctx.needs_input_grad):
            counts = [heads // groups * (rows.stop - rows.start) for rows, _ in spans]
            shares = [
                query.new_empty(examples, groups, count, seen)
                for count, (_, seen) in zip(counts, spans, strict=True)
            ]
        for b, of, at in _blocks(query, key):
            added = bias[b if bias.shape[0] > 1 else 0]
            for number, (rows, seen) in enumerate(spans):
                asked = _folded(query[b, of, rows] * scale, at.stop - at.start)
                scores = torch.bmm(asked, key[b, at, :seen].transpose(1, 2))
                scores.view(-1, rows.stop - rows.start, seen).add_(added[:, rows, :seen])
                share = shares[number][b, at] if shares else scores
                torch.softmax(scores, -1, out=share)
                found = torch.bmm(share, value[b, at, :seen])
                found = found.view(-1, rows.stop - rows.start, out_width)
                output[b, rows, of] = found.transpose(0, 1)
        ctx.save_for_backward(query, key, value, *shares)
        ctx.spans, ctx.scale = spans, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value, *shares = ctx.saved_tensors
        of_query, of_key = torch.empty_like(query), torch.zeros_like(key)
        of_value = torch.zeros_like(value)
        for b, of, at in _blocks(query, key):
            for share, (rows, seen) in zip(shares, ctx.spans, strict=True):
                groups, share = at.stop - at.start, share[b, at]
                arriving = _folded(gradient[b, rows, of].transpose(0, 1), groups)
                of_share = torch.bmm(arriving, value[b, at, :seen].transpose(1, 2))
                of_score = torch.ops.aten._softmax_backward_data(of_share, share, -1, share.dtype)
                back = torch.bmm(of_score, key[b, at, :seen]).mul_(ctx.scale)
                of_query[b, of, rows] = back.view(-1, rows.stop - rows.start, back.shape[-1])
                asked = _folded(query[b, of, rows], groups)
                of_key[b, at, :seen] += torch.bmm(of_score.transpose(1, 2), asked).mul_(ctx.scale)
                of_value[b, at, :seen] += torch.bmm(share.transpose(1, 2), arriving)
        return of_query, of_key, of_value, None, None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
