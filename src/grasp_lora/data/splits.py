"""Divide examples into splits that share no group, and record the splits."""

import hashlib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp_lora.tasks.records import Example

Parts = Mapping[str, Sequence[Example]]
"""Split -> examples."""

AUTO_SHARES: Mapping[str, int] = {"train": 50, "dev": 50, "micro_dev": 16}
"""Proportions of the paper's split sizes (arXiv 2601.06702)."""
AUTO_MINIMUM = 8
"""Fewest examples that `auto_sizes` divides."""


@dataclass(frozen=True)
class Split:
    """Examples by split, and the number of dropped examples."""

    parts: dict[str, tuple[Example, ...]]
    """Split -> examples."""
    dropped: dict[str, int]
    """Split -> examples of its last group beyond its size; they are in no split."""


def split_by_group(
    examples: Sequence[Example],
    sizes: Mapping[str, int],
    seed: int,
    trained: Collection[str] = (),
) -> Split:
    """Divide examples into splits of exact sizes; no group is in two splits.

    Groups are shuffled, and splits are filled in the given order. Excess examples of a split's last
    group are dropped. The result does not depend on the order of the groups in `examples`.

    Args:
        examples: the examples.
        sizes: split -> number of examples.
        seed: seed of the shuffle.
        trained: groups that "train" is filled with first and that no other split gets.

    Raises:
        ValueError: a size is negative, or there are too few examples.
    """
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"the size of split {name!r} must be 0 or more, got {size}")
    waiting, seen = _shuffled_groups(examples, seed, trained)
    parts: dict[str, tuple[Example, ...]] = {}
    dropped: dict[str, int] = {}
    for name, size in sizes.items():
        rows: list[Example] = []
        pools = (seen, waiting) if name == "train" else (waiting,)
        for pool in pools:
            while len(rows) < size and pool:
                rows.extend(pool.pop())
        if len(rows) < size:
            lost = sum(dropped.values())
            raise ValueError(
                f"too few rows: the splits {dict(sizes)} need {sum(sizes.values())}, there are "
                f"{len(examples)} ({lost} of them not usable, as no context may be in two "
                f"splits{_for_train_alone(examples, trained)}), so {name!r} gets only "
                f"{len(rows)}; ask for fewer or give more rows"
            )
        parts[name] = tuple(rows[:size])
        dropped[name] = len(rows) - size
    return Split(parts, dropped)


def auto_sizes(n_rows: int) -> dict[str, int]:
    """Return sizes of train, dev and micro_dev that add up to `n_rows`, in the ratio 50 : 50 : 16.

    Every split gets at least one example.

    Raises:
        ValueError: `n_rows` is below 8.
    """
    if n_rows < AUTO_MINIMUM:
        raise ValueError(
            f"{n_rows} labelled rows cannot be divided into train, dev and micro_dev; "
            f"give at least {AUTO_MINIMUM}"
        )
    total = sum(AUTO_SHARES.values())
    dev = n_rows * AUTO_SHARES["dev"] // total
    micro_dev = n_rows * AUTO_SHARES["micro_dev"] // total
    return {"train": n_rows - dev - micro_dev, "dev": dev, "micro_dev": micro_dev}


def split_auto(examples: Sequence[Example], seed: int, trained: Collection[str] = ()) -> Split:
    """Divide all examples into train, dev and micro_dev, with sizes close to `auto_sizes`.

    Each group goes as a whole to the split that lacks most examples. No example is dropped.

    Args:
        examples: the examples.
        seed: seed of the shuffle.
        trained: groups that go into train, however many they are.

    Raises:
        ValueError: there are fewer than 8 examples, fewer than 3 groups, or fewer than 2 beside
            those of `trained`.
    """
    sizes = auto_sizes(len(examples))
    waiting, seen = _shuffled_groups(examples, seed, trained)
    rows: dict[str, list[Example]] = {name: [] for name in sizes}
    rows["train"] += [example for group in seen for example in group]
    unfilled = [name for name in rows if not rows[name]]
    if len(waiting) < len(unfilled):
        raise ValueError(
            f"the rows come from {len(waiting) + len(seen)} contexts"
            f"{_for_train_alone(examples, trained)}; {', '.join(unfilled)} need one each, so "
            f"give at least {len(unfilled) - len(waiting)} more"
        )
    while waiting:
        empty = [name for name in rows if not rows[name]]
        open_to = empty if len(waiting) == len(empty) else list(rows)
        lacking = max(open_to, key=lambda name: sizes[name] - len(rows[name]))
        rows[lacking].extend(waiting.pop())
    return Split({name: tuple(part) for name, part in rows.items()}, dict.fromkeys(rows, 0))


def _for_train_alone(examples: Sequence[Example], trained: Collection[str]) -> str:
    count = sum(example.group in trained for example in examples)
    return f", {count} of them for train alone, as a given adapter was trained on them" * bool(
        count
    )


def _shuffled_groups(
    examples: Sequence[Example], seed: int, trained: Collection[str] = ()
) -> tuple[list[list[Example]], list[list[Example]]]:
    """Return the groups in random order: the others, and those of `trained`."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    return (
        [groups[key] for key in keys if key not in trained],
        [groups[key] for key in keys if key in trained],
    )


def manifest(parts: Parts) -> dict[str, Any]:
    """Return the ids of each split and a SHA-256 (hex) of them, as plain JSON values."""
    ids = {name: [example.id for example in part] for name, part in parts.items()}
    text = json.dumps(ids, ensure_ascii=False, sort_keys=True)
    return {"splits": ids, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def label_budget(parts: Parts) -> dict[str, int]:
    """Return split -> number of labelled examples."""
    return {name: len(part) for name, part in parts.items()}
