"""Which rows share a forward: little padding, and the same optimizer steps as a plain shuffle.

A padded token costs as much as a real one. Rows of like length therefore share a forward, as far
as the order that training asks for leaves a choice; where nothing is trained it leaves all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

ORDERS = ("by-step", "by-length")

_JITTER = 0.1
"""Share by which lengths are blurred before rows are ordered by them, so that epochs differ."""

_EPOCHS = 1_000_003
"""More epochs than any run has: keeps the seeds of one run's epochs apart from the next seed's."""


def epoch_order(
    lengths: Sequence[int], epoch: int, seed: int, rows_per_step: int, order: str = "by-step"
) -> list[int]:
    """Return the order in which an epoch goes through the rows.

    Every `rows_per_step` rows in a row make up an optimizer step; within it they go from long to
    short, so that the forwards it is divided into hold rows of like length.

    Args:
        lengths: tokens of each row.
        epoch: number of the epoch; each has an order of its own.
        seed: of the run.
        rows_per_step: rows per optimizer step, over all forwards and processes.
        order: `by-step` draws the rows of a step at random, as a plain shuffle does; `by-length`
            draws them from rows of like length and shuffles the steps (our own variant).

    Raises:
        ValueError: `order` is neither.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {list(ORDERS)}, got {order!r}")
    generator = torch.Generator().manual_seed(seed * _EPOCHS + epoch)
    rows: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if order == "by-length":
        noise = torch.rand(len(lengths), generator=generator).tolist()
        rows.sort(key=lambda i: lengths[i] * (1 - _JITTER + 2 * _JITTER * noise[i]))
        steps = _shuffled_steps(rows, rows_per_step, generator)
    else:
        steps = [rows[i : i + rows_per_step] for i in range(0, len(rows), rows_per_step)]
    return [i for step in steps for i in sorted(step, key=lambda i: -lengths[i])]


def _shuffled_steps(
    rows: list[int], rows_per_step: int, generator: torch.Generator
) -> list[list[int]]:
    """Cut sorted rows into steps in random order; the short step comes last, of random length."""
    whole, left = divmod(len(rows), rows_per_step)
    short_at = int(torch.randint(whole + 1, (1,), generator=generator)) * rows_per_step
    short = rows[short_at : short_at + left]
    rest = rows[:short_at] + rows[short_at + left :]
    steps = [rest[i * rows_per_step : (i + 1) * rows_per_step] for i in range(whole)]
    shuffled = [steps[i] for i in torch.randperm(whole, generator=generator).tolist()]
    return [*shuffled, short] if short else shuffled


class EpochExamples(Dataset[Any]):
    """Encoded rows in the order of the epoch that accelerate's loader announces.

    To be read in sequence: the order is here and not in a sampler of the Trainer's, whose own
    grouping by length draws from the global generator, so that a run killed within an epoch would
    not go on with the rows it had before.

    Args:
        rows: encoded rows, each with `input_ids`.
        seed: of the run.
        rows_per_step: as `epoch_order`.
        order: as `epoch_order`.
    """

    def __init__(self, rows: Sequence[Any], seed: int, rows_per_step: int, order: str = "by-step"):
        self._rows = rows
        self._lengths = [len(row.input_ids) for row in rows]
        self._settings = (seed, rows_per_step, order)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self._order = epoch_order(self._lengths, epoch, *self._settings)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[self._order[index]]


def size_forwards(lengths: Sequence[int], most_rows: int, forward_tokens: int) -> list[list[int]]:
    """Return the rows of each forward, so that padding and forwards together cost least.

    Rows go from long to short; where to cut is the optimum for a cost of one for each token,
    padding included, and `forward_tokens` for each forward (dynamic programming).

    Args:
        lengths: tokens of each row.
        most_rows: rows a forward may hold, at least 1.
        forward_tokens: tokens that cost as much as one more forward does by itself.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[float, int]] = [(0.0, 0)]  # (cost of the first rows, where the last cut is)
    for end in range(1, len(order) + 1):
        starts = range(max(0, end - most_rows), end)
        costs = ((best[s][0] + lengths[order[s]] * (end - s) + forward_tokens, s) for s in starts)
        best.append(min(costs))
    cuts: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        cuts.append(order[start:end])
        end = start
    return cuts[::-1]


def group_by_prefix(
    rows: Sequence[tuple[Sequence[int], int]], most_rows: int, forward_tokens: int
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Return rows that begin alike, whose common beginning is better read once, and the others.

    Questions about one text begin with that text. Reading it once takes a forward of its own; it
    is worth that where the tokens saved outweigh it, at the prices of `size_forwards`.

    Args:
        rows: (token ids, how many of them at the beginning may be shared).
        most_rows: rows a forward may hold, at least 1.
        forward_tokens: tokens that cost as much as one more forward does by itself.

    Returns:
        [(rows that share a forward, their common tokens)], [rows that stand alone].
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i][0]))
    shared: list[tuple[list[int], int]] = []
    alone: list[int] = []
    while order:
        members, common = [order[0]], rows[order[0]][1]
        for i in order[1:most_rows]:
            with_it = min(_common(rows[members[0]][0], rows[i][0]), common, rows[i][1])
            # Less than half a row in common: its own neighbours are the better company.
            saved = with_it * len(members) - common * (len(members) - 1)
            if saved <= 0 or 2 * with_it < len(rows[i][0]):
                break
            members.append(i)
            common = with_it
        order = order[len(members) :]
        if common * (len(members) - 1) > forward_tokens:
            shared.append((members, common))
        else:
            alone += members
    return shared, alone


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
