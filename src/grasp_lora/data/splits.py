"""Splits that share no context: cutting rows into them, and recording them."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp_lora.tasks.records import Example

Parts = Mapping[str, Sequence[Example]]

AUTO_SHARES: Mapping[str, int] = {"train": 50, "dev": 50, "micro_dev": 16}
"""Shares of the published protocol (paper, arXiv 2601.06702)."""
AUTO_MINIMUM = 8


@dataclass(frozen=True)
class Split:
    """Rows by split name."""

    parts: dict[str, tuple[Example, ...]]
    dropped: dict[str, int]
    """Rows of a split's last group beyond its size; they are in no split."""


def split_by_group(examples: Sequence[Example], sizes: Mapping[str, int], seed: int) -> Split:
    """Cut rows into splits of exact sizes without a group in two of them.

    Groups are shuffled and splits filled in the order given. Rows that a split's last group has
    too many are dropped, not handed on. The result depends on the rows, not on their groups' order.

    Raises:
        ValueError: if a size is negative or there are too few rows.
    """
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"the size of split {name!r} must be 0 or more, got {size}")
    waiting = _shuffled_groups(examples, seed)
    parts: dict[str, tuple[Example, ...]] = {}
    dropped: dict[str, int] = {}
    for name, size in sizes.items():
        rows: list[Example] = []
        while len(rows) < size and waiting:
            rows.extend(waiting.pop())
        if len(rows) < size:
            lost = sum(dropped.values())
            raise ValueError(
                f"too few rows: the splits {dict(sizes)} need {sum(sizes.values())}, there are "
                f"{len(examples)} ({lost} of them not usable, as no context may be in two "
                f"splits), so {name!r} gets only {len(rows)}; ask for fewer or give more rows"
            )
        parts[name] = tuple(rows[:size])
        dropped[name] = len(rows) - size
    return Split(parts, dropped)


def auto_sizes(n_rows: int) -> dict[str, int]:
    """Return the sizes of train, dev and micro_dev that share `n_rows` as 50 : 50 : 16.

    Every split gets at least one row and the sizes add up to `n_rows`.

    Raises:
        ValueError: for fewer than 8 rows.
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


def split_auto(examples: Sequence[Example], seed: int) -> Split:
    """Divide all rows over train, dev and micro_dev, near `auto_sizes`, whole groups only.

    Each group goes to the split that lacks most rows; no row is dropped.

    Raises:
        ValueError: for fewer than 8 rows or fewer than 3 groups.
    """
    sizes = auto_sizes(len(examples))
    waiting = _shuffled_groups(examples, seed)
    if len(waiting) < len(sizes):
        raise ValueError(
            f"the rows come from {len(waiting)} contexts; {', '.join(sizes)} need one each, "
            f"so give at least {len(sizes)}"
        )
    rows: dict[str, list[Example]] = {name: [] for name in sizes}
    while waiting:
        empty = [name for name in rows if not rows[name]]
        open_to = empty if len(waiting) == len(empty) else list(rows)
        lacking = max(open_to, key=lambda name: sizes[name] - len(rows[name]))
        rows[lacking].extend(waiting.pop())
    return Split({name: tuple(part) for name, part in rows.items()}, dict.fromkeys(rows, 0))


def _shuffled_groups(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    return [groups[key] for key in keys]


def manifest(parts: Parts) -> dict[str, Any]:
    """Return the record of a split, as plain JSON values: ids by split and a SHA-256 over them."""
    ids = {name: [example.id for example in part] for name, part in parts.items()}
    text = json.dumps(ids, ensure_ascii=False, sort_keys=True)
    return {"splits": ids, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def label_budget(parts: Parts) -> dict[str, int]:
    """Return how many labelled rows each split takes."""
    return {name: len(part) for name, part in parts.items()}
