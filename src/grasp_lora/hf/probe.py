"""Losses of rows: the one definition of loss behind every reward, early stop and table.

The loss of a row is the mean cross-entropy over its answer tokens; the loss of a set is the mean
over its rows. It does not depend on how the rows are batched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from grasp_lora.hf.batches import right_sized

IGNORED = -100

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


def row_losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return [batch] mean cross-entropy over each row's answer tokens, in nats."""
    kept, targets = answer_logits(logits, labels)
    per_token = F.cross_entropy(
        kept.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    counts = (targets != IGNORED).sum(1)
    return per_token.sum(1) / counts


def world() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class Rows:
    """Encoded rows ready to be probed: what they are, and how they are collated.

    Attributes:
        encoded: the rows, each with `input_ids` and `group`.
        collate: turns a list of rows into one batch of tensors.
        batch_size: rows per forward, at most.
        forward_tokens: tokens that cost as much as one more forward, see `right_sized`.
    """

    encoded: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    batch_size: int
    forward_tokens: int = 64

    def batches(self, indices: Sequence[int]) -> list[tuple[list[int], Batch]]:
        """Return (positions within `indices`, batch) pairs, rows of like length together."""
        lengths = [len(self.encoded[i].input_ids) for i in indices]
        chunks = right_sized(lengths, self.batch_size, self.forward_tokens)
        return [(c, self.collate([self.encoded[indices[i]] for i in c])) for c in chunks]


@torch.no_grad()
def row_losses(
    model: nn.Module, batches: Sequence[tuple[list[int], Batch]], count: int
) -> list[float]:
    """Return the loss of each of `count` rows, in the rows' own order.

    Each process runs its share of the batches and the shares are summed, so every process returns
    the same list. The caller puts the model in eval mode.

    Args:
        model: called as `model(**batch)` without labels.
        batches: (row positions, batch) pairs as `Rows.batches` gives them.
        count: number of rows.
    """
    device = next(model.parameters()).device
    rank, size = world()
    total = torch.zeros(count, dtype=torch.float64)
    for positions, batch in batches[rank::size]:
        moved = {k: v.to(device) for k, v in batch.items()}
        labels = moved.pop("labels")
        losses = row_losses_of(model(**moved, use_cache=False).logits, labels)
        total[positions] = losses.double().cpu()
    if size > 1:
        shared = total.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(shared)
        total = shared.cpu()
    return total.tolist()
