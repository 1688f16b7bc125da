"""What pydantic says of a value, in words: where it stands, what was given, what is allowed."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from grasp_lora.base.words import from_percent, shortened, shown
from grasp_lora.config.data_sections import FILES_KINDS
from grasp_lora.config.yaml_text import KeyPath, Words

_TEXTS = {"string_type": "text", "path_type": "a path"}
_NUMBERS = {"float_type": "a number", "float_parsing": "a number"}
_BLOCK = "a block of key: value lines"
_ALLOWED = {
    **_TEXTS,
    **_NUMBERS,
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list such as [a, b]",
    "dict_type": _BLOCK,
    "model_type": _BLOCK,
    "dataclass_type": _BLOCK,
    "string_too_short": "text that is not empty",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above {}"),
    "greater_than_equal": ("ge", "a number of at least {}"),
    "less_than": ("lt", "a number below {}"),
    "less_than_equal": ("le", "a number of at most {}"),
}


def path_of(loc: Sequence[Any], given: Any, missing: bool) -> KeyPath:
    """Return the path as the user wrote it: `loc` without the parts that name members of unions.

    Args:
        loc: place in pydantic's report.
        given: the values that were validated.
        missing: whether the last part is a key that was not given.
    """
    path: list[str] = []
    for part in loc:
        if isinstance(given, Mapping) and part in given:
            # pydantic gives the key true as 1.
            path.append(str(next(key for key in given if key == part)))
            given = given[part]
        elif isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
            path.append(str(part))
            given = given[part]
    return (*path, str(loc[-1])) if missing else tuple(path)


def allowed(fault: Mapping[str, Any]) -> str:
    """Return what pydantic allows in the place of a fault, such as "a whole number"."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind in _BOUNDS:
        name, text = _BOUNDS[kind]
        bound = context[name]
        return text.format(bound if isinstance(bound, int) else f"{bound:g}")
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "union_tag_invalid":
        tags = str(context["expected_tags"]).replace("'", "").split(", ")
        return ", or ".join(FILES_KINDS[tag] for tag in tags)
    return _ALLOWED.get(kind) or str(fault["msg"]).removeprefix("Input should be ")


def value_fault(path: KeyPath, faults: Sequence[Mapping[str, Any]], words: Words) -> str:
    """Return what is wrong with a value, and what to give.

    Args:
        path: path of the value.
        faults: what pydantic says of it, one for each member of a union.
        words: how values were written in YAML.
    """
    value, word = faults[0]["input"], words.values.get(path)
    kinds = {fault["type"] for fault in faults}
    scalar = isinstance(value, bool | int | float | date)
    listed = any(f"'{word}'" in str(fault.get("ctx", {}).get("expected")) for fault in faults)
    if scalar and word is not None and (listed or kinds & _TEXTS.keys()):
        return f"YAML reads {shortened(word)} as {_read_as(value)}; {_quoted(path, word, words)}"
    rules = ", or ".join(dict.fromkeys(map(allowed, faults)))
    fraction = from_percent(value)
    number = kinds & _NUMBERS.keys() if isinstance(value, str) else _above_one(faults)
    advice = f"; write {fraction:g}" if fraction is not None and number else ""
    as_read = ""
    if isinstance(value, bool) and word is not None and word.lower() != _read_as(value):
        as_read = f" ({word} in YAML)"
    return f"got {shown(value)}{as_read}; give {rules}{advice}"


_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def misread_number(word: str, value: float) -> str:
    """Return what to say where YAML reads a number unlike people do; "" if it does not.

    Args:
        word: the number as it was written.
        value: the number that YAML takes it for.
    """
    octal = _OCTAL.fullmatch(word) and int(value) != int(word)
    if octal:
        return (
            f"YAML reads {shortened(word)} as {value:g}, in base 8; write {int(word)} or {value:g}"
        )
    if ":" in word:
        return f"YAML reads {shortened(word)} as {value:g}, in base 60; write it without colons"
    return ""


def key_fault(path: KeyPath, key: Any, words: Words) -> str:
    """Return what is wrong with a key that is no text, and what to write."""
    word = words.keys.get(path)
    if word is None:
        return f"the key {shown(key)} is no text; give text"
    return f'YAML reads this key as {_read_as(key)}; quote it: "{shortened(word)}"'


def dotted(path: KeyPath, words: Words) -> str:
    """Return the key of a setting as the user wrote it, such as `data.target.language`."""
    parts = [words.keys.get(path[: end + 1], part) for end, part in enumerate(path)]
    return shortened(".".join(parts))


def _above_one(faults: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a value is refused because it is above 1."""
    bounds = [fault.get("ctx", {}).get(n) for fault in faults for n in ("lt", "le")]
    return 1.0 in bounds


def _read_as(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "a date" if isinstance(value, date) else "a number"


def _quoted(path: KeyPath, word: str, words: Words) -> str:
    """Return the advice to put a word in quotes; on the command line the shell takes one pair."""
    quoted = f'"{shortened(word)}"'
    if path in words.options:
        return f"quote it: --set '{'.'.join(path)}={quoted}'"
    if any(path[:end] in words.options for end in range(1, len(path))):
        return f"quote it: {quoted}, and put the whole option in single quotes"
    return f"quote it: {quoted}"
