"""Leakage: equal or nearly equal examples in two splits, in one language or across languages.

The texts compared are the context or the article, or all inputs of an example that has neither.
Near-duplicates are searched among contexts and articles of the same language.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NoReturn, cast

from grasp_lora.base.texts import normal_form, without_vowel_marks
from grasp_lora.base.words import shown
from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example, main_language

Kind = Literal["id", "group", "text", "near"]
KINDS: Mapping[Kind, str] = {
    "id": "the same id",
    "group": "the same group",
    "text": "the same text",
    "near": "nearly the same text",
}
"""Kind of leak -> its description, the strongest kind first."""

BODIES = ("context", "article")
"""Inputs that count as an example's body."""

SHORTEST = {"words": 10, "characters": 20}
"""Least length for near-duplicates. Shorter texts are only compared for equality."""

# Han, kana, Thai, Lao, Burmese and Khmer are written without spaces between words.
_UNSEGMENTED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_PERMUTATIONS = 128
_MISS_PROBABILITY = 1e-4
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


def find_leaks(parts: Parts, *, threshold: float = 0.8) -> list[Leak]:
    """Return the leaks between splits, the strongest kind first, then in the order of examples.

    Every shared id is a leak. Two groups (such as the questions on two contexts) without a shared
    id are reported at most once, by their first examples and the strongest kind that applies. The
    kinds are: the same group; the same text, in normal form and NFKC, without case, punctuation,
    white space and Arabic vowel marks; and texts of one language whose shingles have a Jaccard
    similarity of at least `threshold`. Ids and groups are compared in normal form too.

    Shingles are 3 words, or 5 characters in languages written without spaces. Candidates come from
    MinHash, which misses a pair at the threshold with a probability below 1e-4 if the threshold is
    at least 0.1. Reported similarities are exact. The result is deterministic.

    Args:
        parts: split -> examples; to compare roles and languages, pass all their splits together.
        threshold: Jaccard similarity in (0, 1] from which texts are nearly the same.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a Jaccard similarity in (0, 1], got {threshold}")
    search = _Search(_units(parts))
    _report_shared_ids(parts, search)
    search.report_equal("group", lambda unit: normal_form(unit.group))
    search.report_equal("text", lambda unit: unit.key)
    for language in dict.fromkeys(unit.language for unit in search.units):
        units = [unit for unit in search.units if unit.language == language and unit.is_body]
        for one, two, similarity in _near_pairs(units, threshold):
            search.report("near", one, two, similarity)
    rank = list(KINDS)
    return sorted(search.leaks, key=lambda leak: rank.index(leak.kind))


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


@dataclass(frozen=True)
class _Unit:
    """A distinct text of a split, with the id of the first example that contains it."""

    split: str
    id: str
    group: str
    language: str
    text: str
    key: str
    is_body: bool
    """Whether the text is a context or an article; other texts may be a shared instruction."""

    @property
    def place(self) -> tuple[str, str]:
        """Split and group."""
        return self.split, self.group


@dataclass
class _Search:
    """The leaks found so far."""

    units: Sequence[_Unit]
    leaks: list[Leak] = field(default_factory=list)
    linked: set[tuple[tuple[str, str], tuple[str, str]]] = field(default_factory=set)
    """Pairs of groups, each with its split, that were reported."""

    def report_equal(self, kind: Kind, key: Callable[[_Unit], str]) -> None:
        """Report the units of different splits that have the same key."""
        alike: dict[str, list[_Unit]] = {}
        for unit in self.units:
            alike.setdefault(key(unit), []).append(unit)
        for units in alike.values():
            # One unit per group is enough, and avoids pairing all units of a large group.
            distinct: dict[tuple[str, str], _Unit] = {}
            for unit in units:
                distinct.setdefault(unit.place, unit)
            for one, two in combinations(distinct.values(), 2):
                self.report(kind, one, two)

    def report(self, kind: Kind, one: _Unit, two: _Unit, similarity: float = 1.0) -> None:
        """Add a leak, unless both units are in one split or their groups were reported."""
        if one.split == two.split or (one.place, two.place) in self.linked:
            return
        self.linked.add((one.place, two.place))
        self.leaks.append(Leak(kind, (one.split, one.id), (two.split, two.id), similarity))


def _units(parts: Parts) -> list[_Unit]:
    found: dict[tuple[str, ...], _Unit] = {}
    for split, examples in parts.items():
        for e in examples:
            text, named = _body(e), any(e.fields.get(name) for name in BODIES)
            identity = (split, e.language, e.group, text)
            if identity not in found:
                found[identity] = _Unit(
                    split, e.id, e.group, main_language(e.language), text, _key(text), named
                )
    return list(found.values())


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


def _body(example: Example) -> str:
    named = next((example.fields[name] for name in BODIES if example.fields.get(name)), None)
    return "\n".join(example.fields.values()) if named is None else named


class _Table(dict[int, str | None]):
    """Translation table that replaces punctuation, separators and controls by a substitute."""

    def __init__(self, substitute: str | None) -> None:
        super().__init__()
        self.substitute = substitute

    def __missing__(self, code: int) -> str | None:
        letter = chr(code)
        self[code] = self.substitute if unicodedata.category(letter)[0] in "PZC" else letter
        return self[code]


_DROPPED = _Table(None)
_SPACED = _Table(" ")


def _plain(text: str) -> str:
    bare = without_vowel_marks(normal_form(text))
    return unicodedata.normalize("NFKC", bare).casefold()


def _key(text: str) -> str:
    """Return the text for comparison; a text that is only punctuation keeps its punctuation."""
    plain = _plain(text)
    return plain.translate(_DROPPED) or " ".join(plain.split())


def _near_pairs(units: Sequence[_Unit], threshold: float) -> Iterator[tuple[_Unit, _Unit, float]]:
    """Yield (unit, unit, similarity) for similar units of different splits, all in one language."""
    if len({unit.split for unit in units}) < 2:
        return
    from datasketch import MinHash, MinHashLSH

    letters = sum(len(unit.key) for unit in units)
    unsegmented = sum(len(_UNSEGMENTED.findall(unit.key)) for unit in units)
    shingles = _character_shingles if 2 * unsegmented > letters else _word_shingles
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
    start = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
    waiting: list[tuple[int, Any]] = []
    for number, unit in enumerate(units):
        if waiting and units[waiting[0][0]].split != unit.split:
            # The index contains only earlier splits, so that similar texts within a split are not
            # compared.
            for earlier, sketch in waiting:
                index.insert(earlier, sketch)
            waiting = []
        own = shingles(unit)
        if not own:
            continue
        sketch = start.copy()
        sketch.update_batch([shingle.encode() for shingle in own])
        for other in sorted(cast(list[int], index.query(sketch))):
            similarity = _jaccard(own, shingles(units[other]), threshold)
            if similarity >= threshold:
                yield units[other], unit, similarity
        waiting.append((number, sketch))


def _bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows) of the index: the most rows that miss fewer than 1 pair in 10,000."""
    for rows in (32, 16, 8, 4, 2):
        bands = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands < _MISS_PROBABILITY:
            return bands, rows
    return _PERMUTATIONS, 1


def _word_shingles(unit: _Unit) -> set[str]:
    words = _plain(unit.text).translate(_SPACED).split()
    if len(words) < SHORTEST["words"]:
        return set()
    return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}


def _character_shingles(unit: _Unit) -> set[str]:
    if len(unit.key) < SHORTEST["characters"]:
        return set()
    return {unit.key[i : i + 5] for i in range(len(unit.key) - 4)}


def _jaccard(one: set[str], two: set[str], threshold: float) -> float:
    # Sets of very different size cannot reach the threshold; intersecting them is slow.
    if min(len(one), len(two)) / max(len(one), len(two)) < threshold:
        return 0.0
    shared = len(one & two)
    return shared / (len(one) + len(two) - shared)
