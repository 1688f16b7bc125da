"""Losses of examples: the definition of loss for all rewards, early stopping and tables.

The loss of an example is the mean cross-entropy over its answer tokens, in nats. The loss of a set
is the mean over its examples. It does not depend on how the examples are batched.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grasp_lora.models.batches import group_by_prefix, size_forwards, split_evenly
from grasp_lora.models.key_values import cache_argument, empty_cache
from grasp_lora.models.modules import forward_accepts, is_encoder_decoder
from grasp_lora.models.shards import is_sharded

IGNORED = -100
"""Label of a position without a loss."""

LAYERS_WITHOUT_CACHE: Any = getattr(cache_utils, "DummyLayer", ())
"""Stands for layers that hold nothing, where the installed transformers lists those at all."""

SHARED_PREFIX = "shared_ids"
"""Key of a batch's common prefix: ids [1, tokens] that all its examples begin with.

The batch's other tensors hold the examples without that prefix.
"""

Batch = Mapping[str, Tensor]


def answer_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits of the K positions that answers are in, and the labels they predict.

    K counts from the first position with a label to the end. The padding may be on either side.
    The decoder of an encoder-decoder has logits for all positions but the first.

    Args:
        logits: [batch, kept, vocab]. `kept` is K if the model has the argument `logits_to_keep` or
            is an encoder-decoder, else the whole length.
        labels: [batch, length], with `IGNORED` where there is no loss. That of the first position
            is not looked at, because nothing predicts it.

    Returns:
        logits [batch, K, vocab], labels [batch, K].
    """
    length = labels.shape[1]
    if logits.shape[1] == length:
        labelled = (labels[:, 1:] != IGNORED).any(0).nonzero()
        first = 1 + int(labelled[0]) if len(labelled) else length
        logits = logits[:, first - 1 : length - 1]
    return logits.float(), labels[:, length - logits.shape[1] :]


def losses_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's mean cross-entropy over its answer tokens, in nats, as [batch]."""
    kept, targets = answer_logits(logits, labels)
    per_token = F.cross_entropy(
        kept.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    counts = (targets != IGNORED).sum(1)
    return per_token.sum(1) / counts


def rank_and_size() -> tuple[int, int]:
    """Return (rank of this process, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def forward_tokens(device: torch.device) -> int:
    """Return the fixed time of a forward pass on a device, in the time of one token (about)."""
    return 64 if device.type == "cpu" else 1024


@dataclass(frozen=True)
class EncodedExamples:
    """Encoded examples, and the settings by which they are collated into batches.

    Attributes:
        encoded: the examples, each with `input_ids` and `group`.
        collate: turns a list of examples into one batch of tensors.
        batch_size: most examples per forward pass.
        forward_tokens: fixed time of a forward pass, in the time of one token; see `size_forwards`.
        share_prefix: let `example_losses` read the common prefix of similar examples once. Needs a
            model that `can_share_prefix` accepts.
    """

    encoded: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    batch_size: int
    forward_tokens: int = 64
    share_prefix: bool = False

    def batches(self, indices: Sequence[int]) -> list[tuple[list[int], Batch]]:
        """Return (positions in `indices`, batch) pairs; a batch has examples of similar length."""
        examples = [self.encoded[i] for i in indices]
        shared: list[tuple[list[int], int]] = []
        alone = list(range(len(examples)))
        if self.share_prefix:
            # The last prompt token is not shared: its logits predict the first answer token.
            parts = [(example.input_ids, example.prompt_length - 1) for example in examples]
            shared, alone = group_by_prefix(parts, self.batch_size, self.forward_tokens)
        lengths = [len(examples[i].input_ids) for i in alone]
        forwards = size_forwards(lengths, self.batch_size, self.forward_tokens)
        places = [[alone[i] for i in forward] for forward in forwards]
        batches = [(place, self.collate([examples[i] for i in place])) for place in places]
        return batches + [
            (place, self._collate_shared([examples[i] for i in place], count))
            for place, count in shared
        ]

    def _collate_shared(self, examples: Sequence[Any], count: int) -> Batch:
        """Return a batch of examples whose first `count` tokens are equal."""
        rests = [
            replace(e, input_ids=e.input_ids[count:], prompt_length=e.prompt_length - count)
            for e in examples
        ]
        return {**self.collate(rests), SHARED_PREFIX: torch.tensor([examples[0].input_ids[:count]])}


def can_share_prefix(model: nn.Module, longest: int) -> bool:
    """Return whether examples can continue from the cached keys and values of a common prefix.

    Every layer that caches must be an attention layer that holds each token by its position. A
    sliding window must be as long as the longest example, since padding separates the prefix from
    the rest.

    Args:
        model: a causal LM.
        longest: tokens of the longest example.
    """
    if is_encoder_decoder(model) or not forward_accepts(model, "position_ids"):
        return False
    if cache_argument(model) is None:
        return False
    try:
        layers = empty_cache(model).layers
    except (AttributeError, KeyError, ValueError):  # the config does not describe its layers
        return False
    return all(
        type(layer) is DynamicLayer
        or isinstance(layer, LAYERS_WITHOUT_CACHE)
        or (isinstance(layer, DynamicSlidingWindowLayer) and longest <= layer.sliding_window)
        for layer in layers
    )


State = Callable[[], AbstractContextManager[Any]]
"""Puts a model into the state in which it is measured, for the body."""


def example_losses(
    model: nn.Module, batches: Sequence[tuple[list[int], Batch]], count: int
) -> list[float]:
    """Return the loss of each of `count` examples, in nats, in the order of the examples.

    Each process runs its part of the batches, and every process returns all losses. The caller
    must put the model in eval mode.

    Args:
        model: a causal LM, called as `model(**batch)` without labels.
        batches: (positions, batch) pairs from `EncodedExamples.batches`.
        count: number of examples.
    """
    return losses_in_states(model, [nullcontext], batches, count)[0]


@torch.no_grad()
def losses_in_states(
    model: nn.Module,
    states: Sequence[State],
    batches: Sequence[tuple[list[int], Batch]],
    count: int,
) -> list[list[float]]:
    """Return the loss of each example in each state of a model, in nats: [states][count].

    The pairs of a state and a batch are divided among the processes by the tokens they read, and
    the losses are summed once, so every process returns all of them. A process enters only the
    states that it measures. A state must put the model in eval mode. With a model in shards a
    process that measures less than another makes up for the forward passes; see `models.shards`.

    Args:
        model: a causal LM, called as `model(**batch)` without labels.
        states: the states, entered in their order.
        batches: (positions, batch) pairs from `EncodedExamples.batches`; the same for all states.
        count: number of examples.
    """
    device = next(model.parameters()).device
    rank, size = rank_and_size()
    costs = [_tokens(batch) + forward_tokens(device) for _, batch in batches]
    parts = split_evenly(costs * len(states), size)
    own = parts[rank]
    total = torch.zeros(len(states), count, dtype=torch.float64)
    for number, state in enumerate(states):
        start = number * len(batches)
        part = [batches[i - start] for i in own if start <= i < start + len(batches)]
        if not part:
            continue
        with state():
            for positions, batch in part:
                moved = {k: v.to(device) for k, v in batch.items()}
                labels = moved.pop("labels")
                losses = losses_from_logits(_logits(model, moved), labels)
                total[number, positions] = losses.double().cpu()
    if is_sharded(model):
        forwards = [2 if SHARED_PREFIX in batch else 1 for _, batch in batches] * len(states)
        done = [sum(forwards[i] for i in part) for part in parts]
        for _ in range(max(done) - done[rank]):
            _logits(model, {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)})
    if size > 1:
        reduced = total.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(reduced)
        total = reduced.cpu()
    return total.tolist()


def _tokens(batch: Batch) -> int:
    """Return the tokens that a batch reads, padding included."""
    read = ("input_ids", "decoder_input_ids", SHARED_PREFIX)
    return sum(batch[name].numel() for name in read if name in batch)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if SHARED_PREFIX not in batch:
        return model(**batch, use_cache=False).logits
    prefix = batch.pop(SHARED_PREFIX)
    kept = {"logits_to_keep": 1} if "logits_to_keep" in batch else {}
    cache = empty_cache(model)
    cached: dict[str, Any] = {str(cache_argument(model)): cache, "use_cache": True}
    model(input_ids=prefix, **cached, **kept)
    examples, count = batch["input_ids"].shape[0], prefix.shape[1]
    cache.batch_repeat_interleave(examples)
    prefix_mask = batch["attention_mask"].new_ones(examples, count)
    batch["attention_mask"] = torch.cat([prefix_mask, batch["attention_mask"]], dim=1)
    batch["position_ids"] = batch["position_ids"] + count
    return model(**batch, **cached).logits
