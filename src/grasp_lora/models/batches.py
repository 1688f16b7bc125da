"""Choose the examples that share a forward pass, so that little of it is padding.

A padding token takes as much time as a real one, so examples of similar length share a forward
pass. In training this happens within the limits of the training order: by default every optimizer
step has the examples of a plain shuffle. Without training there is no such limit.
"""

import functools
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

ORDERS = ("by-step", "by-length")

_JITTER = 0.1
"""Relative noise on lengths before examples are sorted by them, so that epochs differ."""

_SEED_STRIDE = 1_000_003
"""More than the epochs of any run, so that epochs under different run seeds never share a seed."""


@dataclass(frozen=True)
class Beside:
    """Examples that are trained on beside others, which every epoch reads whole.

    Attributes:
        examples: encoded examples, each with `input_ids`.
        per_epoch: how many of them an epoch reads, at most all; see `in_turn`.
    """

    examples: Sequence[Any]
    per_epoch: int


def in_turn(count: int, per_epoch: int, epoch: int, seed: int) -> list[int]:
    """Return the places of the `per_epoch` of `count` examples whose turn an epoch is.

    The seed puts the examples in an order. Every epoch goes on where the one before it ended, and
    the first example follows the last. So no example comes twice in an epoch, and none comes again
    before all others have.
    """
    assert per_epoch <= count, "an epoch reads no example twice"
    order = _drawn(count, seed)
    return [order[(epoch * per_epoch + i) % count] for i in range(per_epoch)]


@functools.lru_cache(maxsize=16)
def _drawn(count: int, seed: int) -> tuple[int, ...]:
    # No epoch has this seed: it lies before that of the run's first epoch.
    generator = torch.Generator().manual_seed(seed * _SEED_STRIDE - 1)
    return tuple(torch.randperm(count, generator=generator).tolist())


def epoch_order(
    lengths: Sequence[float],
    epoch: int,
    seed: int,
    examples_per_step: int,
    order: str = "by-step",
    beside: Sequence[tuple[int, int]] = (),
) -> list[int]:
    """Return the order in which an epoch reads the examples, as indices.

    Each `examples_per_step` consecutive examples make up one optimizer step. Within a step they are
    sorted from long to short, so that each of its forward passes has examples of similar length.

    Args:
        lengths: tokens of each example.
        epoch: number of the epoch; every epoch has its own order.
        seed: seed of the run.
        examples_per_step: examples per optimizer step, over all forward passes and processes.
        order: `by-step` draws the examples of a step at random, like a plain shuffle. `by-length`
            draws them from examples of similar length and shuffles the steps (our departure).
        beside: (examples, those of them that an epoch reads) of each set at the end of `lengths`
            that an epoch reads in turn; see `in_turn`. They are shuffled with the others.

    Raises:
        ValueError: `order` is unknown.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {list(ORDERS)}, got {order!r}")
    places = _read_in(epoch, len(lengths), beside, seed)
    lengths = [lengths[place] for place in places]
    generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + epoch)
    examples: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if order == "by-length":
        noise = torch.rand(len(lengths), generator=generator).tolist()
        examples.sort(key=lambda i: lengths[i] * (1 - _JITTER + 2 * _JITTER * noise[i]))
        steps = _shuffled_steps(examples, examples_per_step, generator)
    else:
        starts = range(0, len(examples), examples_per_step)
        steps = [examples[i : i + examples_per_step] for i in starts]
    return [places[i] for step in steps for i in sorted(step, key=lambda i: -lengths[i])]


def _read_in(epoch: int, count: int, beside: Sequence[tuple[int, int]], seed: int) -> list[int]:
    """Return the places, below `count`, of all examples that an epoch reads."""
    start = count - sum(there for there, _ in beside)
    places = list(range(start))
    for there, per_epoch in beside:
        places += [start + place for place in in_turn(there, per_epoch, epoch, seed)]
        start += there
    return places


def _shuffled_steps(
    examples: list[int], per_step: int, generator: torch.Generator
) -> list[list[int]]:
    """Cut sorted examples into steps in random order.

    If the examples do not fill the steps, the incomplete step comes last. Its examples are taken
    from a random place among the sorted ones.
    """
    complete, left = divmod(len(examples), per_step)
    start = int(torch.randint(complete + 1, (1,), generator=generator)) * per_step
    incomplete = examples[start : start + left]
    rest = examples[:start] + examples[start + left :]
    steps = [rest[i * per_step : (i + 1) * per_step] for i in range(complete)]
    shuffled = [steps[i] for i in torch.randperm(complete, generator=generator).tolist()]
    return [*shuffled, incomplete] if incomplete else shuffled


@dataclass(frozen=True)
class Filler:
    """An example that only fills up a forward pass: it is read, and nothing is learned from it."""

    example: Any


class EpochExamples(Dataset[Any]):
    """Encoded examples in the order of the current epoch, which accelerate's loader sets.

    Read it in sequence. The Trainer's own length-grouped sampler draws from the global random
    generator. A run killed within an epoch and resumed would then read other examples.

    Args:
        examples: encoded examples, each with `input_ids`.
        seed: seed of the run.
        examples_per_step: see `epoch_order`.
        order: see `epoch_order`.
        beside: further examples, of which an epoch reads a part.
        multiple: an epoch has a multiple of so many; `Filler` examples at its end make it up.
            Several processes need the same number of forward passes. accelerate would let some
            examples be learned from twice.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        seed: int,
        examples_per_step: int,
        order: str = "by-step",
        beside: Sequence[Beside] = (),
        multiple: int = 1,
    ):
        self._examples = [*examples, *(e for one in beside for e in one.examples)]
        self._lengths = [len(example.input_ids) for example in self._examples]
        turns = [(len(one.examples), one.per_epoch) for one in beside]
        self._settings = (seed, examples_per_step, order, turns)
        self._multiple = multiple
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Switch to the order of an epoch."""
        self._order = epoch_order(self._lengths, epoch, *self._settings)

    def __len__(self) -> int:
        return -(-len(self._order) // self._multiple) * self._multiple

    def __getitem__(self, index: int) -> Any:
        if index < len(self._order):
            return self._examples[self._order[index]]
        if index >= len(self):
            raise IndexError(index)
        return Filler(self._examples[self._order[-1]])


def size_forwards(
    lengths: Sequence[int], max_examples: int, forward_tokens: int
) -> list[list[int]]:
    """Return the examples of each forward pass, chosen to minimise the total time.

    Examples are sorted from long to short and cut into forward passes. The cuts are optimal
    (dynamic programming) if the time is 1 for each token, padding included, plus `forward_tokens`
    for each forward pass.

    Args:
        lengths: tokens of each example.
        max_examples: most examples per forward pass, at least 1.
        forward_tokens: fixed time of a forward pass, in the time of one token.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[float, int]] = [(0.0, 0)]  # best[n]: (time of n examples, last cut)
    for end in range(1, len(order) + 1):
        starts = range(max(0, end - max_examples), end)
        times = ((best[s][0] + lengths[order[s]] * (end - s) + forward_tokens, s) for s in starts)
        best.append(min(times))
    forwards: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        forwards.append(order[start:end])
        end = start
    return forwards[::-1]


def split_evenly(costs: Sequence[float], parts: int) -> list[range]:
    """Cut items into consecutive parts of about equal cost; return the places of each part.

    An item belongs to the part that its middle lies in, so no part costs more than its share and
    one item.

    Args:
        costs: cost of each item, above 0.
        parts: number of parts, at least 1. Some are empty if there are too few items.
    """
    ends = [0, *itertools.accumulate(costs)]
    part = [int((a + b) / 2 / ends[-1] * parts) for a, b in itertools.pairwise(ends)]
    return [range(bisect_left(part, n), bisect_left(part, n + 1)) for n in range(parts)]


def group_by_prefix(
    examples: Sequence[tuple[Sequence[int], int]], max_examples: int, forward_tokens: int
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Return groups of examples whose common prefix should be read once, and the other examples.

    Questions about the same text share that text as a prefix. Reading it once takes an additional
    forward pass. A group is formed if it saves more time than that, measured as in `size_forwards`.

    Args:
        examples: (token ids, number of leading tokens that may be shared) of each example.
        max_examples: most examples per forward pass, at least 1.
        forward_tokens: fixed time of a forward pass, in the time of one token.

    Returns:
        [(indices of a group, number of common leading tokens)], [indices of the other examples].
    """
    order = sorted(range(len(examples)), key=lambda i: tuple(examples[i][0]))
    shared: list[tuple[list[int], int]] = []
    alone: list[int] = []
    while order:
        members, common = [order[0]], examples[order[0]][1]
        for i in order[1:max_examples]:
            ids, shareable = examples[i]
            new_common = min(_common_length(examples[members[0]][0], ids), common, shareable)
            # An example that shares less than half its tokens fits its next neighbours better.
            saved = new_common * len(members) - common * (len(members) - 1)
            if saved <= 0 or 2 * new_common < len(ids):
                break
            members.append(i)
            common = new_common
        order = order[len(members) :]
        if common * (len(members) - 1) > forward_tokens:
            shared.append((members, common))
        else:
            alone += members
    return shared, alone


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
