"""Leakage: equal or nearly equal examples in two splits, in one language or across languages.

The texts compared are the context or the article, or all inputs of an example that has neither.
Near-duplicates are searched among contexts and articles of the same language.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Literal, NoReturn, TypeVar

import numpy as np

from grasp_lora.base.texts import normal_form
from grasp_lora.base.words import shown
from grasp_lora.data.compared import Unit, bodies_by_language, shingles, units_of
from grasp_lora.data.similar import SimilarSets
from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example

Kind = Literal["id", "group", "text", "near"]
KINDS: Mapping[Kind, str] = {
    "id": "the same id",
    "group": "the same group",
    "text": "the same text",
    "near": "nearly the same text",
}
"""Kind of leak -> its description, the strongest kind first."""

Say = Callable[[str], None]
"""Takes a line for the user."""

_TOLD_EVERY = 10.0
"""Seconds between two lines on how far a search for near-duplicates is."""
_SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """Two examples of different splits that are equal or nearly equal."""

    kind: Kind
    first: tuple[str, str]
    """Split and id of the first example."""
    second: tuple[str, str]
    """Split and id of the second example."""
    similarity: float = 1.0
    """Jaccard similarity of the texts, in (0, 1]; 1 for all kinds except "near"."""

    def __str__(self) -> str:
        rows = " and ".join(
            f"{shown(name)} of {split}" for split, name in (self.first, self.second)
        )
        near = f", similarity {self.similarity:.2f}" if self.kind == "near" else ""
        return f"{rows} ({KINDS[self.kind]}{near})"


def find_leaks(
    parts: Parts,
    *,
    threshold: float = 0.8,
    say: Say | None = None,
    apart: Collection[Collection[str]] = (),
) -> list[Leak]:
    """Return leaks between splits, the strongest kind first, then in the order of examples.

    Every shared id is a leak. Two groups (such as the questions on two contexts) without a shared
    id are reported at most once, by their first examples and the strongest kind that applies. The
    kinds are: the same group; the same text, in normal form and NFKC, without case, punctuation,
    white space and Arabic vowel marks; and texts of one language whose shingles have a Jaccard
    similarity of at least `threshold`. Ids and groups are compared in normal form too.

    A group that leaks into another split is in at least one pair with that split. Where many groups
    of two splits are alike not every pair is reported, so that pairs are no more than groups.

    Shingles are 3 words, or 5 characters in languages written without spaces. The search is exact:
    no pair at the threshold is missed.

    Args:
        parts: split -> examples; to compare roles and languages, pass all their splits together.
        threshold: Jaccard similarity in (0, 1] from which texts are nearly the same.
        say: is told how far a long search is.
        apart: splits that `repeats.drop_repeated_texts` made at this threshold, each time it was
            called. Between those of one time only shared ids are looked for.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    check_threshold(threshold)
    search = _Search()
    _report_shared_ids(parts, search)
    made_in = {split: at for at, splits in enumerate(apart) for split in splits}
    # Splits that were made at no time are compared with all others.
    made = {split: made_in.get(split, split) for split in parts if parts[split]}
    if len(set(made.values())) < 2:
        return search.leaks
    units = units_of(parts)
    search.report_equal("group", units, lambda unit: normal_form(unit.group))
    search.report_equal("text", units, lambda unit: unit.key)
    for bodies in bodies_by_language(units):
        for one, two, similarity in _near_pairs(bodies, threshold, made, say):
            search.report("near", one, two, similarity)
    rank = list(KINDS)
    return sorted(search.leaks, key=lambda leak: rank.index(leak.kind))


def groups_like(
    examples: Sequence[Example], known: Sequence[Example], threshold: float, say: Say | None = None
) -> frozenset[str]:
    """Return the groups of `examples` that would be a leak beside `known` examples.

    Args:
        examples: examples that are compared.
        known: what they are compared with.
        threshold: see `find_leaks`.
        say: is told how far a long search is.
    """
    groups = {example.id: example.group for example in examples}
    leaks = find_leaks({"known": known, "rows": examples}, threshold=threshold, say=say)
    return frozenset(groups[leak.second[1]] for leak in leaks)


def check_threshold(threshold: float) -> None:
    """Check a Jaccard similarity from which texts are nearly the same.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a Jaccard similarity in (0, 1], got {threshold}")


def check_disjoint(
    parts: Parts, *, allow: bool = False, threshold: float = 0.8
) -> tuple[Leak, ...]:
    """Return the leaks between splits, and raise an error for them unless `allow` is set.

    Args:
        parts: see `find_leaks`.
        allow: return leaks instead of raising an error.
        threshold: see `find_leaks`.

    Raises:
        ValueError: there is a leak and `allow` is False, or the threshold is not in (0, 1].
    """
    leaks = tuple(find_leaks(parts, threshold=threshold))
    if leaks and not allow:
        refuse_leaks(leaks)
    return leaks


def refuse_leaks(leaks: Sequence[Leak]) -> NoReturn:
    """Raise the error for leaks.

    Raises:
        ValueError: always; it states the number of each kind, the first leaks and the remedy.
    """
    counts = Counter(leak.kind for leak in leaks)
    kinds = ", ".join(f"{KINDS[kind]}: {counts[kind]}" for kind in KINDS if counts[kind])
    shown = "; ".join(map(str, leaks[:_SHOWN]))
    more = "" if len(leaks) <= _SHOWN else f"; and {len(leaks) - _SHOWN} more"
    ids = ", or different rows different ids" if counts["id"] else ""
    raise ValueError(
        f"{len(leaks)} {'pair' if len(leaks) == 1 else 'pairs'} of rows in two splits ({kinds}): "
        f"{shown}{more}; "
        f"give splits that do not overlap{ids}, or pass --allow-leakage to continue and record "
        "the leakage"
    )


def drop_parallel(
    examples: Sequence[Example], used: Sequence[Example]
) -> tuple[tuple[Example, ...], int]:
    """Return (examples whose group shares no id with `used`, number of dropped examples).

    In parallel data sets an example has the same id in every language. Whole groups are dropped,
    because a translated context is the same context for all its questions. Numeric ids count too,
    since parallel files may number their examples alike. A translation in the training data would
    invalidate a result; dropping too many examples only makes the split smaller. For files that are
    not parallel, `parallel_notice` states the remedy.

    Args:
        examples: examples in one language.
        used: examples in another language that are used.
    """
    used_ids = {normal_form(example.id) for example in used}
    dropped = {example.group for example in examples if normal_form(example.id) in used_ids}
    kept = tuple(example for example in examples if example.group not in dropped)
    return kept, len(examples) - len(kept)


def parallel_notice(
    examples: Sequence[Example], used: Sequence[Example], dropped: int, used_name: str
) -> str:
    """Return a message on examples that `drop_parallel` dropped, and how to keep them.

    The remedy is named only if all shared ids are numbers.

    Args:
        examples: as given to `drop_parallel`.
        used: as given to `drop_parallel`.
        dropped: number of dropped examples.
        used_name: name of the used examples, such as "target".
    """
    ours, theirs = ({normal_form(one.id) for one in rows} for rows in (examples, used))
    message = (
        f"{dropped} rows left out, as they or others of their context share an id with a "
        f"{used_name} row: an equal id means a translation"
    )
    if not all(example_id.isdecimal() for example_id in ours & theirs):
        return message
    return (
        f"{message}; if these ids only number the rows of each file, give one file other ids, or "
        "remove its id column, and the rows are kept"
    )


@dataclass
class _Search:
    """The leaks found so far."""

    leaks: list[Leak] = field(default_factory=list)
    linked: set[tuple[tuple[str, str], tuple[str, str]]] = field(default_factory=set)
    """Pairs of groups, each with its split, that were reported."""

    def report_equal(
        self, kind: Kind, units: Sequence[Unit], key: Callable[[Unit], Hashable]
    ) -> None:
        """Report the units of different splits that have the same key."""
        alike: dict[Hashable, dict[tuple[str, str], Unit]] = {}
        for unit in units:
            # One unit per group is enough, and avoids pairing all units of a large group.
            alike.setdefault(key(unit), {}).setdefault(unit.place, unit)
        for same in alike.values():
            for one, two in _pairs_of_alike(list(same.values())):
                self.report(kind, one, two)

    def report(self, kind: Kind, one: Unit, two: Unit, similarity: float = 1.0) -> None:
        """Add a leak, unless the groups were reported."""
        if (one.place, two.place) in self.linked:
            return
        self.linked.add((one.place, two.place))
        self.leaks.append(Leak(kind, (one.split, one.id), (two.split, two.id), similarity))


def _pairs_of_alike(units: Sequence[Unit]) -> list[tuple[Unit, Unit]]:
    """Return pairs of units that are all alike: the first of each split with all of each other."""
    by_split: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        by_split.setdefault(unit.split, []).append(number)
    pairs = [
        pair
        for ones, others in combinations(by_split.values(), 2)
        for pair in [(ones[0], o) for o in others] + [(o, others[0]) for o in ones[1:]]
    ]
    return [(units[one], units[two]) for one, two in sorted(pairs)]


def _report_shared_ids(parts: Parts, search: _Search) -> None:
    seen: dict[str, dict[str, Example]] = {}
    for split, examples in parts.items():
        for example in examples:
            earlier = seen.setdefault(normal_form(example.id), {})
            for other, row in earlier.items():
                if other != split:
                    search.leaks.append(Leak("id", (other, row.id), (split, example.id)))
                    search.linked.add(((other, row.group), (split, example.group)))
            earlier.setdefault(split, example)


def _near_pairs(
    units: Sequence[Unit], threshold: float, made: Mapping[str, Hashable], say: Say | None
) -> list[tuple[Unit, Unit, float]]:
    """Return (unit, unit, similarity) for similar units of different splits, all in one language.

    Every unit with a similar one in another split is in a pair with that split. Once a unit is, it
    is paired only with units that are in none yet. Splits for which `made` has the same are not
    compared.
    """
    by_split: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        by_split.setdefault(unit.split, []).append(number)
    compared = [(a, b) for a, b in combinations(by_split, 2) if made[a] != made[b]]
    if not compared:
        return []
    index = SimilarSets(shingles(units), threshold)
    found: list[tuple[int, int, float]] = []
    for ones, others in ((by_split[a], by_split[b]) for a, b in compared):
        waiting, met = (np.zeros(len(units), np.bool_) for _ in range(2))
        waiting[ones] = True
        for two in told(others, say):
            new = list(index.similar(two, waiting)) if waiting.any() else []
            waiting[[one for one, _ in new]] = False
            met[[one for one, _ in new]] = True
            new = new or list(islice(index.similar(two, met), 1))
            found += [(two, one, similarity) for one, similarity in new]
    return [(units[one], units[two], similarity) for two, one, similarity in sorted(found)]


_T = TypeVar("_T")


def told(work: Sequence[_T], say: Say | None) -> Iterator[_T]:
    """Yield what is to be compared, and say from time to time how much of it is done."""
    next_line = time.monotonic() + _TOLD_EVERY
    for done, one in enumerate(work):
        if say is not None and time.monotonic() > next_line:
            say(f"looking for near-duplicates: {100 * done // len(work)} % of {len(work)} texts")
            next_line = time.monotonic() + _TOLD_EVERY
        yield one
