"""Turn the values of a record into texts, answers and ids, and detect unusable texts."""

import json
import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grasp_lora.base.words import shown
from grasp_lora.data.printed import NotPrinted, Shortened, printed_value

INVISIBLE = ("Cc", "Cf")
"""Unicode categories of invisible characters, such as controls and the zero-width space."""
SURROGATE = re.compile("[\ud800-\udfff]")
TRUTH: Mapping[str, bool] = MappingProxyType(
    {"true": True, "yes": True, "1": True, "1.0": True}
    | {"false": False, "no": False, "0": False, "0.0": False}
)
"""What a flag may be, in lower case -> its value."""

# A bracket, then a quote or another list. A citation, "[1]", and "[sic] it" are plain texts.
_PRINTED = re.compile(r"""(?:array\(\s*)?[\[{]\s*(?:['"\[{]|(?:array|list|np\.str_)\()""")


def text_value(value: Any, name: str, where: str) -> str:
    """Return a text in Unicode NFC; a missing value (None, NaN) gives the empty text.

    Args:
        value: value in the column.
        name: name of the field, for messages.
        where: place of the record, for messages.

    Raises:
        ValueError: the value is a number or anything else that is not a text.
    """
    if _is_missing(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {name} must be a text, got {_shown(value)}; write a text in quotes"
        )
    return unicodedata.normalize("NFC", value)


def answer_values(value: Any, name: str, where: str, *, packed: bool = False) -> tuple[str, ...]:
    """Return the distinct accepted answers in their order, in Unicode NFC, without outer blanks.

    Args:
        value: a text, a list of texts, SQuAD's list of `{"text": ...}`, or the hub's
            `{"text": [...]}`.
        name: name of the field, for messages.
        where: place of the record, for messages.
        packed: parse a text that is a list in JSON or as Python or numpy print it, as in CSV
            files, which hold only texts.

    Raises:
        ValueError: the value contains anything but texts, or a text looks like a printed list and
            is none.
    """
    if packed and isinstance(value, str):
        value = _unpacked(value, name, where)
    inner = _inner_text(value, name, where)
    if not isinstance(inner, list | tuple):
        return (text_value(inner, name, where).strip(),)
    texts = [text_value(_inner_text(entry, name, where), name, where).strip() for entry in inner]
    return tuple(dict.fromkeys(texts))


def _inner_text(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "text" not in value:
        raise ValueError(
            f"{where}: {name} has no 'text', only {', '.join(map(str, value))[:80] or 'nothing'}; "
            "write a text or a list of texts"
        )
    return value["text"]


def id_value(value: Any, name: str, where: str) -> str:
    """Return an id or a group as a text.

    Args:
        value: value in the column.
        name: name of the field, for messages.
        where: place of the record, for messages.

    Raises:
        ValueError: the value is neither a text that is not blank nor a whole number, or the text
            is cut within a character.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f"{where}: {name} must be a text or a whole number, got {_shown(value)}; correct "
            "it, or name another column in columns"
        )
    if SURROGATE.search(str(value)):
        raise ValueError(
            f"{where}: {name} {shown(value)} holds half of a character (U+D800 to U+DFFF), which "
            "no file can hold; write it whole"
        )
    return str(value)


def text_fault(text: str) -> str | None:
    """Return "empty" for a text of invisible characters, "broken" for one that is cut, else None.

    A broken text contains half of a surrogate pair, because it was cut between UTF-16 units. No
    tokenizer accepts it.
    """
    for letter in text:
        if not letter.isspace() and unicodedata.category(letter) not in INVISIBLE:
            break
    else:
        return "empty"
    return "broken" if SURROGATE.search(text) else None


def _is_missing(value: Any) -> bool:
    # pandas uses NaN, the only number unequal to itself, for an absent text.
    return value is None or (isinstance(value, float) and value != value)


def flag_value(value: Any, name: str, where: str) -> bool | None:
    """Return a flag as a truth value; a missing value (None, NaN, an empty text) gives None.

    Args:
        value: value in the column.
        name: name of the column, for messages.
        where: place of the record, for messages.

    Raises:
        ValueError: the value is neither true nor false.
    """
    said = "" if _is_missing(value) else str(value).strip().lower()
    if not said:
        return None
    known = TRUTH.get(said)
    if known is None:
        raise ValueError(
            f"{where}: {name} must be true or false, got {_shown(value)}; correct it, or rename "
            "the column if it says something else"
        )
    return known


def _shown(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def _unpacked(text: str, name: str, where: str) -> Any:
    """Return the list or mapping of texts that a cell of a table holds, or its text.

    Raises:
        ValueError: the text looks like a printed list or mapping, but cannot be read exactly.
    """
    stripped = text.strip()
    closes = any(mark in stripped for mark in "]}")
    looks = _PRINTED.match(stripped) and (stripped.endswith(("]", "}", ")")) or not closes)
    try:
        value = _parsed(stripped)
    except NotPrinted as error:
        if not looks:
            return text
        cut = isinstance(error, Shortened)
        why = "shortened with '...', so answers are lost" if cut else "not exactly one"
        raise ValueError(
            f"{where}: {name} looks like a printed list, but is {why}: {shown(text)}; write a "
            'JSON list of texts, such as ["a", "b"], or keep the rows in JSON lines'
        ) from None
    if looks and not isinstance(value, list):
        return value
    # A list of numbers may be a citation such as "[1]", so only a list of texts counts.
    return value if isinstance(value, list) and (looks or all(map(_holds_text, value))) else text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return printed_value(text)


def _holds_text(entry: Any) -> bool:
    inner = entry.get("text") if isinstance(entry, Mapping) else entry
    return isinstance(inner, str) or _is_missing(inner)
