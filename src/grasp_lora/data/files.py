"""Examples of a task from a file in any usual form, or from rows at hand."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grasp_lora.data.columns import Columns, input_names, match_columns
from grasp_lora.data.forms import DELIMITED, Record, given_records, open_records
from grasp_lora.data.values import answer_values, id_value, text_fault, text_value
from grasp_lora.tasks.records import Example, Task, normalize_text, one_line, text_key

OUTSIDE = "answer outside its context"
SHOWN = 3
"""Places named where too many rows are faulty."""


@dataclass(frozen=True)
class LoadReport:
    """What was seen while reading examples."""

    path: str
    """The file, or "rows" for rows given as they are."""
    form: str
    """One of "jsonl", "json", "squad", "csv", "tsv", "parquet", and "rows"."""
    rows: int
    """Examples that were kept."""
    contexts: int
    """Distinct groups among them."""
    answers_outside: int = 0
    """Questions kept with an accepted answer that is not a substring of their context."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why rows were left out, such as "empty question" -> how many."""
    duplicates: int = 0
    """Rows dropped as they equal an earlier one; counted only where rows have no id."""
    joined: int = 0
    """Rows with an answer whose lines were joined, as answers of the task are of one line."""

    def line(self) -> str:
        """Return one sentence on what was left out or is odd, "" where nothing is."""
        parts: list[str] = []
        if self.answers_outside:
            parts.append(
                f"{self.answers_outside} of {self.rows} rows have an answer that is not in "
                "their context"
            )
        if self.left_out:
            parts.append(
                f"{_rows(sum(self.left_out.values()))} left out ({_listed(self.left_out)})"
            )
        if self.duplicates:
            parts.append(f"{_rows(self.duplicates)} dropped as the same as an earlier one")
        if self.joined:
            parts.append(
                f"{self.joined} of {self.rows} rows had answers of several lines, which are "
                "read as one line each, as generation ends at a line break (task text-to-text "
                "keeps lines)"
            )
        return "; ".join(parts)


def load_examples(
    source: str | Path | Iterable[Mapping[str, Any]],
    task: Task,
    language: str,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    max_faulty: float = 0.1,
) -> tuple[list[Example], LoadReport]:
    """Read the examples of a task.

    Texts are brought to Unicode NFC. Rows with an empty or broken input or answer, or without an
    answer, are left out and counted; questions with an answer that is not in their context are
    kept and counted. Rows without an id get one made from their texts, and then equal rows are
    read once. The lines of an answer are joined by spaces if the task's answers are of one line.

    Args:
        source: a file (see `forms.open_records` for the forms), or rows such as a list of
            mappings or a `datasets.Dataset`.
        task: what a row holds.
        language: code of the rows' language.
        columns: our name (an input, the answer, "id" or "group") -> column of the file; what it
            leaves out is found by its own name, then by the task's aliases.
        template: the prompt's template, which names the inputs of a task without fields.
        max_faulty: largest share of faulty rows, in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is in none of the forms, a column is missing, a value is of the
            wrong type, an id is used twice, no row is left, or too many are faulty.
    """
    if not 0 <= max_faulty <= 1:
        raise ValueError(f"max_faulty is a share of rows in [0, 1], got {max_faulty}")
    inputs = input_names(task, template, language)
    path, form, records = _records_of(source)
    available = list(dict.fromkeys(name for record in records for name in record.values))
    matched = match_columns(available, task, inputs, columns, path)
    reading = _Reading(
        task, language, matched, packed=f".{form}" in DELIMITED and task.answer == "answers"
    )
    kept, faults, duplicates = _sorted_out(records, reading)
    if len(faults) / len(records) > max_faulty:
        raise ValueError(_too_many(faults, len(records), max_faulty, path))
    if not kept:
        raise ValueError(
            f"{path}: all {len(records)} rows are left out ({_counted(faults)}); mend them"
        )
    reasons = Counter(fault.reason for fault in faults)
    outside = reasons.pop(OUTSIDE, 0)
    groups = {example.group for example in kept}
    joined = [_joined(example) if task.one_line else example for example in kept]
    report = LoadReport(
        path,
        form,
        rows=len(kept),
        contexts=len(groups),
        answers_outside=outside,
        left_out=dict(reasons),
        duplicates=duplicates,
        joined=sum(new != old for new, old in zip(joined, kept, strict=True)),
    )
    return joined, report


@dataclass(frozen=True)
class _Reading:
    """How the records of one source become examples."""

    task: Task
    language: str
    columns: Columns
    packed: bool
    """Whether a list of answers is spelled out in one text."""


@dataclass(frozen=True)
class _Fault:
    where: str
    reason: str


def _records_of(
    source: str | Path | Iterable[Mapping[str, Any]],
) -> tuple[str, str, list[Record]]:
    """Return the name of a source, its form, and its records, at least one."""
    if isinstance(source, str | Path):
        path, (form, read) = str(source), open_records(source)
    else:
        path, form, read = "rows", "rows", given_records(source)
    records = list(read)
    if not records:
        raise ValueError(f"{path} holds no row; it needs at least one")
    return path, form, records


def _sorted_out(
    records: Sequence[Record], reading: _Reading
) -> tuple[list[Example], list[_Fault], int]:
    """Return the examples, the faults in the order of the rows, and the number of duplicates."""
    kept: dict[str, Example] = {}
    faults: list[_Fault] = []
    duplicates = 0
    for record, given_id in _with_ids(records, reading.columns):
        example = _example(record, reading, given_id)
        if isinstance(example, _Fault):
            faults.append(example)
        elif example.id in kept:
            duplicates += 1
        else:
            kept[example.id] = example
            if _has_outside_answer(example, reading.task):
                faults.append(_Fault(record.where, OUTSIDE))
    return list(kept.values()), faults, duplicates


def _with_ids(records: Sequence[Record], columns: Columns) -> Iterator[tuple[Record, str | None]]:
    """Yield each record with its own id, or with None where there is no such column.

    Raises:
        ValueError: if a record lacks a column, or its id is no id or another record's.
    """
    seen: dict[str, str] = {}
    for record in records:
        absent = [name for name in columns.needed if name not in record.values]
        if absent:
            raise ValueError(
                f"{record.where}: missing {', '.join(absent)}, which other rows have; needed are "
                f"{', '.join(columns.needed)}"
            )
        if columns.id is None:
            yield record, None
            continue
        given = id_value(record.values[columns.id], "id", record.where)
        if given in seen:
            raise ValueError(
                f"{record.where}: the id {given!r} is used twice, first at {seen[given]}; give "
                "each row its own"
            )
        seen[given] = record.where
        yield record, given


def _example(record: Record, reading: _Reading, given_id: str | None) -> Example | _Fault:
    """Return the example of a record, or why it is left out."""
    values, where, columns = record.values, record.where, reading.columns
    answer = reading.task.answer
    fields = {
        name: text_value(values[column], name, where) for name, column in columns.fields.items()
    }
    references = answer_values(values[columns.answer], answer, where, packed=reading.packed)
    reason = _reason_to_leave_out(fields, references, answer.removesuffix("s"))
    if reason is not None:
        return _Fault(where, reason)
    if columns.group is None:
        # A task without fields of its own may have an instruction first, the same in every row.
        group = text_key("\n".join(list(fields.values())[: 1 if reading.task.fields else None]))
    else:
        group = id_value(values[columns.group], "group", where)
    example_id = given_id or _content_id((*fields.values(), *references))
    return Example(example_id, group, reading.language, fields, references)


def _joined(example: Example) -> Example:
    """Return the example with each reference in one line; two that are then equal are one."""
    references = tuple(dict.fromkeys(map(one_line, example.references)))
    return replace(example, references=references)


def _reason_to_leave_out(
    fields: Mapping[str, str], references: Sequence[str], answer: str
) -> str | None:
    texts = [*fields.items(), *((answer, text) for text in references)]
    found = ((text_fault(text), name) for name, text in texts)
    reason = next((f"{fault} {name}" for fault, name in found if fault is not None), None)
    return reason if references or reason is not None else f"no {answer}"


def _content_id(texts: Sequence[str]) -> str:
    """Return an id that depends on nothing but the texts of a row, as they are compared."""
    spelled = json.dumps([normalize_text(text) for text in texts])
    return "row-" + hashlib.sha256(spelled.encode()).hexdigest()[:16]


def _has_outside_answer(example: Example, task: Task) -> bool:
    context = example.fields.get("context")
    if context is None or task.answer != "answers":
        return False
    return any(answer not in context for answer in example.references)


def _too_many(faults: Sequence[_Fault], rows: int, max_faulty: float, path: str) -> str:
    places = "; ".join(f"{fault.where} ({fault.reason})" for fault in faults[:SHOWN])
    return (
        f"{path}: {len(faults)} of {rows} rows ({100 * len(faults) / rows:.3g}%) are faulty "
        f"({_counted(faults)}), at most {100 * max_faulty:.3g}% may be; the first are {places}; "
        "mend them, or set data.max_faulty higher if they are meant to be so"
    )


def _counted(faults: Iterable[_Fault]) -> str:
    return _listed(Counter(fault.reason for fault in faults))


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
