"""The texts of examples as they are compared: in one form, with their shingles."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from grasp_lora.base.texts import normal_form, without_vowel_marks
from grasp_lora.data.similar import Sets, sets_of_shingles
from grasp_lora.data.splits import Parts
from grasp_lora.tasks.records import Example, main_language

BODIES = ("context", "article")
"""Inputs that count as an example's body."""

SHORTEST = {"words": 10, "characters": 20}
"""Least length for near-duplicates. Shorter texts are only compared for equality."""

_WORDS, _CHARACTERS = 3, 5
"""Length of a shingle."""

# Han, kana, Thai, Lao, Burmese and Khmer are written without spaces between words.
_UNSEGMENTED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A distinct text of a split, with the id of the first example that contains it."""

    split: str
    id: str
    group: str
    language: str
    text: str
    key: bytes
    """Hash of the text without case, punctuation and white space: equal for the same text."""
    letters: int
    """Characters that are left of the text then."""
    unsegmented: int
    """Those of them that are of a script without spaces."""
    is_body: bool
    """Whether the text is a context or an article; other texts may be a shared instruction."""

    @property
    def place(self) -> tuple[str, str]:
        """Split and group."""
        return self.split, self.group


def units_of(parts: Parts) -> list[Unit]:
    """Return the distinct texts of each split, in the order of splits and examples."""
    found: dict[tuple[str, ...], Unit] = {}
    for split, examples in parts.items():
        for e in examples:
            text, named = _body(e), any(e.fields.get(name) for name in BODIES)
            identity = (split, e.language, e.group, text)
            if identity not in found:
                key, language = _key(text), main_language(e.language)
                digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16)
                unsegmented = 0 if key.isascii() else len(_UNSEGMENTED.findall(key))
                found[identity] = Unit(
                    split=split,
                    id=e.id,
                    group=e.group,
                    language=language,
                    text=text,
                    key=digest.digest(),
                    letters=len(key),
                    unsegmented=unsegmented,
                    is_body=named,
                )
    return list(found.values())


def bodies_by_language(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return the units that are contexts or articles, a list for each language that has any."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.is_body:
            found.setdefault(unit.language, []).append(unit)
    return list(found.values())


def shingles(units: Sequence[Unit]) -> Sets:
    """Return the set of shingles of each unit, all of one language; short texts have none.

    Shingles are 3 words, or 5 characters where most letters are of a script without spaces.
    """
    if 2 * sum(unit.unsegmented for unit in units) > sum(unit.letters for unit in units):
        texts = (_key(u.text) if u.letters >= SHORTEST["characters"] else "" for u in units)
        return sets_of_shingles(texts, _CHARACTERS)
    words = (_plain(unit.text).translate(_SPACED).split() for unit in units)
    return sets_of_shingles((w if len(w) >= SHORTEST["words"] else () for w in words), _WORDS)


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
    bare = normal_form(text)
    if bare.isascii():
        return bare.casefold()
    bare = without_vowel_marks(bare)
    return unicodedata.normalize("NFKC", bare).casefold()


def _key(text: str) -> str:
    """Return the text for comparison; a text that is only punctuation keeps its punctuation."""
    plain = _plain(text)
    return plain.translate(_DROPPED) or " ".join(plain.split())
