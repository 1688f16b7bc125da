"""Losses of rows: the one definition of loss behind every reward, early stop and table.

The loss of a row is the mean cross-entropy over its answer tokens; the loss of a set is the mean
over its rows. It does not depend on how the rows are batched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grasp_lora.models.batches import group_by_prefix, size_forwards
from grasp_lora.models.modules import bare_model, forward_accepts

IGNORED = -100
SHARED_PREFIX = "shared_ids"
"""Part of a batch: [1, tokens] that all its rows begin with and that the rest leaves out."""

Batch = Mapping[str, Tensor]


def answer_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits and the labels they predict, both cut to the answer positions.

    Args:
        logits: [batch, kept, vocab], where `kept` is either the number of answer positions (the
            model honoured `logits_to_keep`) or the whole length (it has no such argument).
        labels: [batch, length], answers at the right end, `IGNORED` elsewhere.

    Returns:
        logits [batch, K, vocab], labels [batch, K].
    """
    length = labels.shape[1]
    if logits.shape[1] == length:
        answers = int((labels != IGNORED).any(0).sum())
        logits = logits[:, length - answers - 1 : length - 1]
    return logits.float(), labels[:, length - logits.shape[1] :]


def losses_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return [batch] mean cross-entropy over each row's answer tokens, in nats."""
    kept, targets = answer_logits(logits, labels)
    per_token = F.cross_entropy(
        kept.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    counts = (targets != IGNORED).sum(1)
    return per_token.sum(1) / counts


def rank_and_size() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class EncodedExamples:
    """Encoded rows ready to be probed: what they are, and how they are collated.

    Attributes:
        encoded: the rows, each with `input_ids` and `group`.
        collate: turns a list of rows into one batch of tensors.
        batch_size: rows per forward, at most.
        forward_tokens: tokens that cost as much as one more forward, see `size_forwards`.
        share: batch rows that begin alike without their common beginning, which `example_losses` reads
            once. Needs a model that `can_share_prefix` allows.
    """

    encoded: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    batch_size: int
    forward_tokens: int = 64
    share_prefix: bool = False

    def batches(self, indices: Sequence[int]) -> list[tuple[list[int], Batch]]:
        """Return (positions within `indices`, batch) pairs, rows of like length together."""
        rows = [self.encoded[i] for i in indices]
        shared: list[tuple[list[int], int]] = []
        alone = list(range(len(rows)))
        if self.share_prefix:
            # The last token of a prompt is read with its answer: its logits are asked for.
            parts = [(row.input_ids, row.prompt_length - 1) for row in rows]
            shared, alone = group_by_prefix(parts, self.batch_size, self.forward_tokens)
        lengths = [len(rows[i].input_ids) for i in alone]
        chunks = size_forwards(lengths, self.batch_size, self.forward_tokens)
        places = [[alone[i] for i in chunk] for chunk in chunks]
        batches = [(place, self.collate([rows[i] for i in place])) for place in places]
        return batches + [(place, self._shared([rows[i] for i in place], n)) for place, n in shared]

    def _shared(self, rows: Sequence[Any], count: int) -> Batch:
        rests = [
            replace(r, input_ids=r.input_ids[count:], prompt_length=r.prompt_length - count)
            for r in rows
        ]
        return {**self.collate(rests), SHARED_PREFIX: torch.tensor([rows[0].input_ids[:count]])}


def can_share_prefix(model: nn.Module, longest: int) -> bool:
    """Return whether rows may go on from the keys and values of a common beginning.

    That takes attention layers whose cache holds every token by its position; a window must hold
    the whole row, as padding stands between the beginning and the rest.

    Args:
        model: a causal LM.
        longest: most tokens of a row.
    """
    if not all(forward_accepts(model, name) for name in ("position_ids", "past_key_values")):
        return False
    try:
        layers = _empty_cache(model).layers
    except (AttributeError, KeyError, ValueError):  # a config that names no layers we know
        return False
    return all(
        type(layer) is DynamicLayer
        or (isinstance(layer, DynamicSlidingWindowLayer) and longest <= layer.sliding_window)
        for layer in layers
    )


@torch.no_grad()
def example_losses(
    model: nn.Module, batches: Sequence[tuple[list[int], Batch]], count: int
) -> list[float]:
    """Return the loss of each of `count` rows, in the rows' own order.

    Each process runs its share of the batches and the shares are summed, so every process returns
    the same list. The caller puts the model in eval mode.

    Args:
        model: called as `model(**batch)` without labels.
        batches: (row positions, batch) pairs as `EncodedExamples.batches` gives them.
        count: number of rows.
    """
    device = next(model.parameters()).device
    rank, size = rank_and_size()
    total = torch.zeros(count, dtype=torch.float64)
    for positions, batch in batches[rank::size]:
        moved = {k: v.to(device) for k, v in batch.items()}
        labels = moved.pop("labels")
        losses = losses_from_logits(_logits(model, moved), labels)
        total[positions] = losses.double().cpu()
    if size > 1:
        shared = total.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(shared)
        total = shared.cpu()
    return total.tolist()


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if SHARED_PREFIX not in batch:
        return model(**batch, use_cache=False).logits
    shared = batch.pop(SHARED_PREFIX)
    kept = {"logits_to_keep": 1} if "logits_to_keep" in batch else {}
    cache = _empty_cache(model)
    model(input_ids=shared, past_key_values=cache, use_cache=True, **kept)
    rows, count = batch["input_ids"].shape[0], shared.shape[1]
    cache.batch_repeat_interleave(rows)
    seen = batch["attention_mask"].new_ones(rows, count)
    batch["attention_mask"] = torch.cat([seen, batch["attention_mask"]], dim=1)
    batch["position_ids"] = batch["position_ids"] + count
    return model(**batch, past_key_values=cache, use_cache=True).logits


def _empty_cache(model: nn.Module) -> DynamicCache:
    bare: Any = bare_model(model)
    return DynamicCache(config=bare.config)
