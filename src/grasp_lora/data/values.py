"""Values of a record to texts: what counts as a text, an answer, an empty or broken one."""

import ast
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

INVISIBLE = ("Cc", "Cf")
"""Unicode categories of controls and marks that show nothing, such as zero-width space."""
SURROGATE = re.compile("[\ud800-\udfff]")


def text_value(value: Any, name: str, where: str) -> str:
    """Return a text in Unicode NFC; a missing value (None, NaN) is the empty text.

    Args:
        value: what stands in the column.
        name: what it holds, for messages.
        where: its place, for messages.

    Raises:
        ValueError: if it is a number or anything else that is no text.
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
        value: one text, a list of texts, SQuAD's list of `{"text": ...}`, or the columns
            `{"text": [...]}` of the hub.
        name: what it holds, for messages.
        where: its place, for messages.
        packed: whether a text that spells out a list (CSV can hold no other) is one.

    Raises:
        ValueError: if there is anything but texts.
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

    Raises:
        ValueError: unless it is a text that is not blank, or a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{where}: {name} must be a text or a whole number, got {value!r}")
    return str(value)


def text_fault(text: str) -> str | None:
    """Return "empty" for a text that shows nothing, "broken" for half a character, else None.

    Half a surrogate pair comes from a text cut by UTF-16 units; no tokenizer takes it.
    """
    if all(c.isspace() or unicodedata.category(c) in INVISIBLE for c in text):
        return "empty"
    return "broken" if SURROGATE.search(text) else None


def _is_missing(value: Any) -> bool:
    # pandas writes NaN, the one number that differs from itself, where a text is absent.
    return value is None or (isinstance(value, float) and value != value)


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def _unpacked(text: str) -> Any:
    """Return the list or mapping a text spells out, in JSON or as Python prints it, or itself."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):
            value = value["text"]
        # "[1]" is how a text quotes a source, so only what holds texts counts as a list.
        if isinstance(value, list) and all(_holds_text(entry) for entry in value):
            return value
    return text


def _holds_text(entry: Any) -> bool:
    return isinstance(entry.get("text") if isinstance(entry, Mapping) else entry, str)
