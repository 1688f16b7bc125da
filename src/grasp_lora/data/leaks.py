"""Leakage: the same or nearly the same rows in two splits, in one language or across languages.

The text compared is what an answer is read from: the context or the article, or all inputs of a
row that has neither. Near-duplicates are looked for among contexts and articles of one language.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NoReturn, cast

from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example, main_language, normalize_text

Kind = Literal["id", "group", "text", "near"]
KINDS: Mapping[Kind, str] = {
    "id": "the same id",
    "group": "the same group",
    "text": "the same text",
    "near": "nearly the same text",
}
"""What two rows share, the strongest first."""

BODIES = ("context", "article")
SHORTEST = {"words": 10, "characters": 20}
"""Shorter texts are compared for equality only: one changed word leaves too little of them."""

# Han, kana, Thai, Lao, Burmese and Khmer put no space between words.
_UNSEGMENTED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_PERMUTATIONS = 128
_MISSED = 1e-4
_SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """Two rows of different splits that should not both be there."""

    kind: Kind
    first: tuple[str, str]
    """Split and id."""
    second: tuple[str, str]
    similarity: float = 1.0
    """Jaccard similarity of the texts, in (0, 1]; 1 for every kind but "near"."""

    def __str__(self) -> str:
        rows = " and ".join(f"{name!r} of {split}" for split, name in (self.first, self.second))
        near = f", similarity {self.similarity:.2f}" if self.kind == "near" else ""
        return f"{rows} ({KINDS[self.kind]}{near})"


def find_leaks(parts: Parts, *, threshold: float = 0.8) -> list[Leak]:
    """Return the rows that two splits share, the strongest kind first, then in their order.

    Every shared id is a leak. Two groups of rows (such as the questions on two contexts) are
    reported once more only if no id of them is shared, by their first rows and under the strongest
    kind: the same group, the same text after NFKC without case, punctuation and white space, or
    texts of one language whose shingles have a Jaccard similarity of at least `threshold`.
    Shingles are 3 words, or 5 characters in languages written without spaces. Candidates come from
    MinHash, which misses a pair at the threshold (from 0.1 on) with probability below 1e-4; what is
    reported is counted exactly. The same rows give the same leaks.

    Args:
        parts: examples by split; compare roles and languages by giving all of them together.
        threshold: in (0, 1].

    Raises:
        ValueError: if the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a Jaccard similarity in (0, 1], got {threshold}")
    search = _Search(_units(parts))
    _share_ids(parts, search)
    search.share("group", lambda unit: unit.group)
    search.share("text", lambda unit: unit.key)
    for language in dict.fromkeys(unit.language for unit in search.units):
        units = [unit for unit in search.units if unit.language == language and unit.is_body]
        for one, two, similarity in _near(units, threshold):
            search.report("near", one, two, similarity)
    rank = list(KINDS)
    return sorted(search.leaks, key=lambda leak: rank.index(leak.kind))


def check_disjoint(
    parts: Parts, *, allow: bool = False, threshold: float = 0.8
) -> tuple[Leak, ...]:
    """Return the leaks between splits, which only `allow` lets pass; see `find_leaks`.

    Raises:
        ValueError: if there is one and `allow` is False, or the threshold is not in (0, 1].
    """
    leaks = tuple(find_leaks(parts, threshold=threshold))
    if leaks and not allow:
        refuse_leaks(leaks)
    return leaks


def refuse_leaks(leaks: Sequence[Leak]) -> NoReturn:
    """Raise the error that says what leaks and what to do.

    Raises:
        ValueError: always, with the count of each kind and the first leaks.
    """
    counts = Counter(leak.kind for leak in leaks)
    kinds = ", ".join(f"{KINDS[kind]}: {counts[kind]}" for kind in KINDS if counts[kind])
    shown = "; ".join(map(str, leaks[:_SHOWN]))
    more = "" if len(leaks) <= _SHOWN else f"; and {len(leaks) - _SHOWN} more"
    ids = ", or rows that are not the same row different ids" if counts["id"] else ""
    raise ValueError(
        f"{len(leaks)} {'pair' if len(leaks) == 1 else 'pairs'} of rows in two splits ({kinds}): "
        f"{shown}{more}; "
        f"give splits that do not overlap{ids}, or pass --allow-leakage to go on and have it "
        "recorded"
    )


def drop_parallel(
    rows: Sequence[Example], used: Sequence[Example]
) -> tuple[tuple[Example, ...], int]:
    """Return the rows whose group holds no id of `used`, and how many are dropped.

    Parallel data sets give a row the same id in every language. Whole groups go, because a
    translated context is the same context, whichever of its questions is asked. Ids that are
    numbers count like all others: parallel files may be numbered alike, and a translation that is
    trained on spoils a result, while rows left out only make it smaller. `parallel_notice` says what
    to do about files that are not parallel.

    Args:
        rows: rows of one language.
        used: rows of another language that are taken.
    """
    taken = {example.id for example in used}
    gone = {example.group for example in rows if example.id in taken}
    kept = tuple(example for example in rows if example.group not in gone)
    return kept, len(rows) - len(kept)


def parallel_notice(
    rows: Sequence[Example], used: Sequence[Example], dropped: int, taken: str
) -> str:
    """Say why `drop_parallel` dropped rows, and how to keep them where their ids are numbers.

    Args:
        rows: as given to `drop_parallel`.
        used: as given to `drop_parallel`.
        dropped: how many it dropped.
        taken: what the used rows are called, such as "target".
    """
    shared = {example.id for example in rows} & {example.id for example in used}
    line = (
        f"{dropped} rows left out, as they or others of their context share an id with a {taken} "
        "row: one id in two languages means a translation"
    )
    if not all(row_id.isdecimal() for row_id in shared):
        return line
    return (
        f"{line}; if these ids only number the rows of each file, give one file ids of its own, or "
        "take its id column away, and the rows are kept"
    )


@dataclass(frozen=True)
class _Unit:
    """A distinct text of a split, named by the first row that has it."""

    split: str
    id: str
    group: str
    language: str
    text: str
    key: str
    is_body: bool
    """Whether the text is a context or an article. Other rows may share an instruction."""

    @property
    def place(self) -> tuple[str, str]:
        return self.split, self.group


@dataclass
class _Search:
    """What is found so far."""

    units: Sequence[_Unit]
    leaks: list[Leak] = field(default_factory=list)
    linked: set[tuple[tuple[str, str], tuple[str, str]]] = field(default_factory=set)
    """Pairs of groups, each with its split, that are reported."""

    def share(self, kind: Kind, shared: Callable[[_Unit], str]) -> None:
        """Report the units of different splits for which `shared` is equal."""
        alike: dict[str, list[_Unit]] = {}
        for unit in self.units:
            alike.setdefault(shared(unit), []).append(unit)
        for units in alike.values():
            # One unit a group is enough, and keeps a large group from being paired with itself.
            distinct: dict[tuple[str, str], _Unit] = {}
            for unit in units:
                distinct.setdefault(unit.place, unit)
            for one, two in combinations(distinct.values(), 2):
                self.report(kind, one, two)

    def report(self, kind: Kind, one: _Unit, two: _Unit, similarity: float = 1.0) -> None:
        if one.split == two.split or (one.place, two.place) in self.linked:
            return
        self.linked.add((one.place, two.place))
        self.leaks.append(Leak(kind, (one.split, one.id), (two.split, two.id), similarity))


def _units(parts: Parts) -> list[_Unit]:
    found: dict[tuple[str, ...], _Unit] = {}
    for split, examples in parts.items():
        for e in examples:
            text, named = _body(e), any(name in e.fields for name in BODIES)
            identity = (split, e.language, e.group, text)
            if identity not in found:
                found[identity] = _Unit(
                    split, e.id, e.group, main_language(e.language), text, _key(text), named
                )
    return list(found.values())


def _share_ids(parts: Parts, search: _Search) -> None:
    seen: dict[str, dict[str, Example]] = {}
    for split, examples in parts.items():
        for example in examples:
            earlier = seen.setdefault(example.id, {})
            for other, row in earlier.items():
                if other != split:
                    search.leaks.append(Leak("id", (other, row.id), (split, example.id)))
                    search.linked.add(((other, row.group), (split, example.group)))
            earlier.setdefault(split, example)


def _body(example: Example) -> str:
    named = next((example.fields[name] for name in BODIES if name in example.fields), None)
    return "\n".join(example.fields.values()) if named is None else named


class _Table(dict[int, str | None]):
    """Code point -> itself, or a substitute for punctuation, separators and controls."""

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
    return unicodedata.normalize("NFKC", text).casefold()


def _key(text: str) -> str:
    """Return the form in which texts are the same; a text of punctuation alone keeps it."""
    return _plain(text).translate(_DROPPED) or normalize_text(text)


def _near(units: Sequence[_Unit], threshold: float) -> Iterator[tuple[_Unit, _Unit, float]]:
    """Yield the pairs of different splits whose shingles are alike, all of one language."""
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
            # Only earlier splits are in the index, so that rows of one split, which may be alike,
            # are not compared at all.
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
    """Return bands and rows of the index: as strict as they can be and miss next to nothing."""
    for rows in (32, 16, 8, 4, 2):
        bands = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands < _MISSED:
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
    # Sets of very different size cannot reach it; counting what they share is the costly part.
    if min(len(one), len(two)) / max(len(one), len(two)) < threshold:
        return 0.0
    shared = len(one & two)
    return shared / (len(one) + len(two) - shared)
