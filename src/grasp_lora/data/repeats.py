"""Taking repeated texts out of splits that were drawn from one pool."""

from collections.abc import Sequence

from grasp_lora.data.leaks import find_leaks
from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example

KEPT_FIRST = ("test", "micro_dev", "dev", "train")
"""Of two splits that share a text the one named first keeps it."""


def drop_repeated_texts(
    parts: Parts, *, threshold: float = 0.8
) -> tuple[dict[str, tuple[Example, ...]], dict[str, int]]:
    """Return the splits without the groups that repeat, or nearly repeat, another split's text.

    A file may hold one article twice with a few words changed; drawing whole groups does not keep
    the two together. Rows go from the split that is less needed for measuring, so the splits may
    come out a little smaller than asked for.

    Args:
        parts: examples by split.
        threshold: Jaccard similarity from which texts repeat each other, see `find_leaks`.

    Returns:
        The splits in the order given, and how many rows each has lost.
    """
    groups = {
        (split, example.id): example.group for split, rows in parts.items() for example in rows
    }
    gone: set[tuple[str, str]] = set()
    for leak in find_leaks(parts, threshold=threshold):
        if leak.kind == "id":  # of one pool: different rows that are called alike
            continue
        places = [(split, groups[split, row]) for split, row in (leak.first, leak.second)]
        if gone.isdisjoint(places):
            gone.add(max(places, key=lambda place: _rank(place[0])))
    kept = {
        split: tuple(example for example in rows if (split, example.group) not in gone)
        for split, rows in parts.items()
    }
    return kept, {split: _lost(parts[split], kept[split]) for split in parts}


def _rank(split: str) -> int:
    return KEPT_FIRST.index(split) if split in KEPT_FIRST else len(KEPT_FIRST)


def _lost(before: Sequence[Example], after: Sequence[Example]) -> int:
    return len(before) - len(after)
