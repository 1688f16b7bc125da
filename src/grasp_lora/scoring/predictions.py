"""Read prediction files (JSON lines) into rows to score; every error has file and line."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grasp_lora.base.texts import normal_form
from grasp_lora.base.words import shortened, shown
from grasp_lora.metrics.records import Row

_NEEDED = "id, prediction and references"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Predictions:
    """The content of a prediction file."""

    path: Path
    rows: tuple[Row, ...]
    """At least one row, in normal form; with several sets, the ids have the form "set/id"."""
    sets: tuple[str, ...]
    """Distinct values of the key `set`, in file order."""
    grouped: bool
    """Whether the rows have groups."""


@dataclass(frozen=True)
class _Line:
    where: str
    set: str | None
    grouped: bool
    row: Row


def read_predictions(path: Path) -> Predictions:
    """Read a prediction file, see `grasp_lora.scoring.files.read_rows`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, has no row, or a row is wrong.
    """
    lines: list[_Line] = []
    places: dict[tuple[str | None, str], str] = {}
    # splitlines() would also split at U+2028 and similar characters inside a JSON text.
    for number, text in enumerate(_text_of(path).split("\n"), start=1):
        if not text.strip():
            continue
        line = _line(text, f"{path}:{number}")
        first = places.setdefault((line.set, line.row.id), line.where)
        if first != line.where:
            raise ValueError(
                f"{line.where}: the id {shown(line.row.id)} was used at {first}; "
                "give each row a different id"
            )
        if lines and line.grouped != lines[0].grouped:
            lacking = line if lines[0].grouped else lines[0]
            raise ValueError(
                f'{lacking.where}: no "group", but other rows have one; '
                "give every row a group, or none"
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no row; write at least one, one JSON object per line")
    sets = tuple(dict.fromkeys(line.set for line in lines if line.set is not None))
    rows = (line.row if len(sets) < 2 else _named_by_set(line) for line in lines)
    return Predictions(path, tuple(rows), sets, lines[0].grouped)


def matched_rows(a: Predictions, b: Predictions) -> tuple[list[Row], list[Row]]:
    """Return the rows of A and of B, both in the order of A.

    If only B has groups, the rows of A get the groups of B.

    Raises:
        ValueError: ids, references or groups differ.
    """
    of_b = {row.id: row for row in b.rows}
    of_a = {row.id for row in a.rows}
    _refuse_lone(a.path, b.path, [row.id for row in a.rows if row.id not in of_b])
    _refuse_lone(b.path, a.path, [row.id for row in b.rows if row.id not in of_a])
    pairs = [(row, of_b[row.id]) for row in a.rows]
    for one, other in pairs:
        if one.references != other.references:
            raise ValueError(
                f"the id {shown(one.id)} has the references {_short(one.references)} in {a.path}, "
                f"but {_short(other.references)} in {b.path}; use the same references for both "
                "systems"
            )
        if a.grouped and b.grouped and one.group != other.group:
            raise ValueError(
                f"the id {shown(one.id)} is of group {shown(one.group)} in {a.path}, but of "
                f"{shown(other.group)} in {b.path}; give both files the same groups, or only one "
                "file groups"
            )
    if a.grouped or not b.grouped:
        return [one for one, _ in pairs], [other for _, other in pairs]
    return [replace(one, group=other.group) for one, other in pairs], [row for _, row in pairs]


def _refuse_lone(path: Path, other: Path, ids: list[str]) -> None:
    if ids:
        named = ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if ids[3:] else "")
        raise ValueError(
            f"{other} has no row for the id {named} of {path}; compare predictions for the same ids"
        )


def _named_by_set(line: _Line) -> Row:
    row, name = line.row, f"{line.set or ''}/{line.row.id}"
    return replace(row, id=name, group=f"{line.set or ''}/{row.group}" if line.grouped else name)


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of predictions in JSON lines")
    if not path.is_file():
        raise FileNotFoundError(f"no prediction file at {path}; give the path of a .jsonl file")
    content = path.read_bytes()
    if content.startswith(_UTF16_MARKS) or b"\0" in content[:4]:
        raise ValueError(f"{path} is UTF-16 or UTF-32, not UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        found = content[error.start]
        raise ValueError(
            f"{path}:{number}: not UTF-8 (byte 0x{found:02x}); save the file as UTF-8"
        ) from None


def _line(text: str, where: str) -> _Line:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{where}: not JSON ({error}) in {_short(text)}; write one JSON object per line"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: {_short(values)} is no JSON object; write one with {_NEEDED} per line"
        )
    for key in ("id", "prediction"):
        if key not in values:
            raise ValueError(f"{where}: no {key!r} among {_short(list(values))}; needed: {_NEEDED}")
    group = _name(values, _group_key(values), where)
    row = Row(
        id=_name(values, "id", where, needed=True) or "",
        prediction=_prediction(values["prediction"], where),
        references=_references(values, where),
        group=group or "",
        loss=_loss(values.get("loss"), where),
        tokens=_tokens(values.get("tokens"), where),
    )
    return _Line(where, _name(values, "set", where), group is not None, row)


def _group_key(values: Mapping[str, Any]) -> str:
    return "context_id" if values.get("group") is None else "group"


def _name(values: Mapping[str, Any], key: str, where: str, needed: bool = False) -> str | None:
    """Return a text or integer as text; None if it is absent or null and not needed."""
    value = values.get(key)
    if value is None and not needed:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not normal_form(str(value)):
        raise ValueError(
            f"{where}: {key} is {_short(value)}; it must be a non-empty text or an integer"
        )
    return _normal_text(str(value), key, where)


def _prediction(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: prediction is {_short(value)}; it must be a text; "
            'write "" for an empty answer'
        )
    return _normal_text(value, "prediction", where)


def _references(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if ("references" in values) == ("reference" in values):
        both = "references" in values
        raise ValueError(
            f"{where}: {'both references and reference are' if both else 'no references'} "
            f"among {_short(list(values))}; give a list of texts as references, "
            "or one text as reference"
        )
    given = values["references"] if "references" in values else values["reference"]
    given = [given] if isinstance(given, str) or "reference" in values else given
    if not isinstance(given, list) or not given:
        raise ValueError(
            f"{where}: references is {_short(given)}; it must be a list of at least one text"
        )
    for text in given:
        if not isinstance(text, str) or not normal_form(text):
            raise ValueError(f"{where}: reference is {_short(text)}; it must be a non-empty text")
    return tuple(_normal_text(text, "reference", where) for text in given)


def _normal_text(text: str, key: str, where: str) -> str:
    """Return a text in normal form, so that texts that look alike are the same everywhere."""
    # JSON can hold half of a surrogate pair, which no tokenizer and no file accepts.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            f"{where}: {key} {_short(text)} holds half of a surrogate pair, which is no character; "
            "write the file again from the system's text"
        )
    return normal_form(text)


def _loss(value: Any, where: str) -> float | None:
    if value is None:
        return None
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(
            f"{where}: loss is {_short(value)}; it must be a finite number of at least 0 "
            "(nats per token); leave out the key if there is no loss"
        )
    return float(value)


def _tokens(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{where}: tokens is {_short(value)}; it must be an integer of at least 1; "
            "leave out the key if there is no loss"
        )
    return value


def _short(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False))
