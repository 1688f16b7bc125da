"""Remove repeated texts from splits that were drawn from one pool."""

from collections.abc import Sequence

from grasp_lora.data.leaks import find_leaks
from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example

KEPT_FIRST = ("test", "micro_dev", "dev", "train")
"""Of two splits that share a text, the one named first here keeps it."""


def drop_repeated_texts(
    parts: Parts, *, threshold: float = 0.8
) -> tuple[dict[str, tuple[Example, ...]], dict[str, int]]:
    """Return the splits without groups whose text is the same or nearly the same in another split.

    A file may contain an article twice with a few words changed. Such copies are different groups
    and may be drawn into different splits. The group is removed from the split that comes later in
    `KEPT_FIRST`, so splits can become slightly smaller than requested.

    Args:
        parts: split -> examples.
        threshold: Jaccard similarity from which two texts count as repeated; see `find_leaks`.

    Returns:
        split -> kept examples, in the given order, and split -> number of removed examples.
    """
    groups = {
        (split, example.id): example.group
        for split, examples in parts.items()
        for example in examples
    }
    gone: set[tuple[str, str]] = set()
    for leak in find_leaks(parts, threshold=threshold):
        if leak.kind == "id":  # within one pool equal ids do not mean equal texts
            continue
        places = [(split, groups[split, row]) for split, row in (leak.first, leak.second)]
        if gone.isdisjoint(places):
            gone.add(max(places, key=lambda place: _rank(place[0])))
    kept = {
        split: tuple(example for example in examples if (split, example.group) not in gone)
        for split, examples in parts.items()
    }
    return kept, {split: _lost(parts[split], kept[split]) for split in parts}


def _rank(split: str) -> int:
    return KEPT_FIRST.index(split) if split in KEPT_FIRST else len(KEPT_FIRST)


def _lost(before: Sequence[Example], after: Sequence[Example]) -> int:
    return len(before) - len(after)
