"""Turn the values of a record into texts, answers and ids, and detect unusable texts."""

import ast
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from grasp_lora.base.words import shown

INVISIBLE = ("Cc", "Cf")
"""Unicode categories of invisible characters, such as controls and the zero-width space."""
SURROGATE = re.compile("[\ud800-\udfff]")


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
    """Return the distinct accepted answers in their order, in Unicode NFC.

    Args:
        value: a text, a list of texts, SQuAD's list of `{"text": ...}`, or the hub's
            `{"text": [...]}`.
        name: name of the field, for messages.
        where: place of the record, for messages.
        packed: parse a text that contains a list, as in CSV files, which hold only texts.

    Raises:
        ValueError: the value contains anything but texts.
    """
    if packed and isinstance(value, str):
        value = _unpacked(value)
    inner = _inner_text(value, name, where)
    if not isinstance(inner, list | tuple):
        return (text_value(inner, name, where),)
    texts = [text_value(_inner_text(entry, name, where), name, where) for entry in inner]
    return tuple(dict.fromkeys(texts))


def _inner_text(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "text" not in value:
        raise ValueError(
            f"{where}: {name} has no 'text', only {', '.join(map(str, value)) or 'nothing'}; "
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
        ValueError: the value is neither a text that is not blank nor a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{where}: {name} must be a text or a whole number, got {shown(value)}")
    return str(value)


def text_fault(text: str) -> str | None:
    """Return "empty" for a text of invisible characters, "broken" for one that is cut, else None.

    A broken text contains half of a surrogate pair, because it was cut between UTF-16 units. No
    tokenizer accepts it.
    """
    if all(c.isspace() or unicodedata.category(c) in INVISIBLE for c in text):
        return "empty"
    return "broken" if SURROGATE.search(text) else None


def _is_missing(value: Any) -> bool:
    # pandas uses NaN, the only number unequal to itself, for an absent text.
    return value is None or (isinstance(value, float) and value != value)


def _shown(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def _unpacked(text: str) -> Any:
    """Return the list of texts that a text contains as JSON or as a Python literal, or the text."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):
            value = value["text"]
        # A list of numbers may be a citation such as "[1]", so only a list of texts counts.
        if isinstance(value, list) and all(_holds_text(entry) for entry in value):
            return value
    return text


def _holds_text(entry: Any) -> bool:
    return isinstance(entry.get("text") if isinstance(entry, Mapping) else entry, str)
