"""Remove repeated texts from splits that were drawn from one pool."""

from collections.abc import Hashable, Sequence

import numpy as np

from grasp_lora.base.texts import normal_form
from grasp_lora.data.compared import Unit, bodies_by_language, shingles, units_of
from grasp_lora.data.leaks import Say, check_threshold, told
from grasp_lora.data.similar import SimilarSets
from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example

KEPT_FIRST = ("test", "micro_dev", "dev", "train")
"""Of two splits that share a text, the one named first here keeps it."""


def drop_repeated_texts(
    parts: Parts, *, threshold: float = 0.8, say: Say | None = None
) -> tuple[dict[str, tuple[Example, ...]], dict[str, int]]:
    """Return the splits without groups whose text is the same or nearly the same in another split.

    A file may contain an article twice with a few words changed. Such copies are different groups
    and may be drawn into different splits. The group is removed from the split that comes later in
    `KEPT_FIRST`, so splits can become slightly smaller than requested. The order of the splits in
    `parts` makes no difference.

    Args:
        parts: split -> examples.
        threshold: Jaccard similarity from which two texts count as repeated; see `find_leaks`.
        say: is told how far a long search is.

    Returns:
        split -> kept examples, in the given order, and split -> number of removed examples.
    """
    check_threshold(threshold)
    in_order = {split: parts[split] for split in sorted(parts, key=_rank, reverse=True)}
    units, gone = units_of(in_order), set[tuple[str, str]]()
    for keys in ([normal_form(unit.group) for unit in units], [unit.key for unit in units]):
        _drop_equal(units, keys, gone)
    for bodies in bodies_by_language(units):
        _drop_near(bodies, threshold, gone, say)
    kept = {
        split: tuple(example for example in examples if (split, example.group) not in gone)
        for split, examples in parts.items()
    }
    return kept, {split: len(parts[split]) - len(kept[split]) for split in parts}


def _drop_equal(
    units: Sequence[Unit], keys: Sequence[Hashable], gone: set[tuple[str, str]]
) -> None:
    """Add the groups of units that have the key of a kept one of a later split to `gone`."""
    alike: dict[Hashable, list[Unit]] = {}
    for unit, key in zip(units, keys, strict=True):
        alike.setdefault(key, []).append(unit)
    for same in alike.values():
        kept = [unit for unit in same if unit.place not in gone]
        gone.update(unit.place for unit in kept if unit.split != kept[-1].split)


def _drop_near(
    units: Sequence[Unit], threshold: float, gone: set[tuple[str, str]], say: Say | None
) -> None:
    """Add the groups of units that are similar to a kept one of a later split to `gone`."""
    by_split: dict[str, list[int]] = {}
    by_place: dict[tuple[str, str], list[int]] = {}
    for number, unit in enumerate(units):
        by_split.setdefault(unit.split, []).append(number)
        by_place.setdefault(unit.place, []).append(number)
    if len(by_split) < 2:
        return
    index = SimilarSets(shingles(units), threshold)
    earlier = np.zeros(len(units), np.bool_)
    for numbers in by_split.values():
        kept = [number for number in numbers if units[number].place not in gone]
        for number in told(kept, say) if earlier.any() else ():
            for other, _ in index.similar(number, earlier):
                gone.add(units[other].place)
                earlier[by_place[units[other].place]] = False
        earlier[kept] = True


def _rank(split: str) -> int:
    return KEPT_FIRST.index(split) if split in KEPT_FIRST else len(KEPT_FIRST)
