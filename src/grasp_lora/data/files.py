"""Read the examples of a task from a file in a common format, or from mappings."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grasp_lora.base.words import shown
from grasp_lora.data.columns import Columns, input_names, match_columns
from grasp_lora.data.forms import DELIMITED, Record, given_records, open_records
from grasp_lora.data.values import answer_values, id_value, text_fault, text_value
from grasp_lora.tasks.records import Example, Task, normalize_text, one_line, text_key

OUTSIDE = "answer outside its context"
SHOWN = 3
"""Number of faulty rows that an error message names."""


@dataclass(frozen=True)
class LoadReport:
    """Statistics of reading examples."""

    path: str
    """The file, or "rows" if the rows were given as mappings."""
    form: str
    """Format: "jsonl", "json", "squad", "csv", "tsv", "parquet" or "rows"."""
    rows: int
    """Number of examples that were kept."""
    contexts: int
    """Number of distinct groups among them."""
    answers_outside: int = 0
    """Kept questions with an accepted answer that is not a substring of their context."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason, such as "empty question" -> number of rows left out."""
    duplicates: int = 0
    """Rows dropped because they equal an earlier one; only for rows without ids."""
    joined: int = 0
    """Rows with an answer whose lines were joined, because the task has one-line answers."""

    def line(self) -> str:
        """Return a sentence on rows that were left out or are unusual; "" if there are none."""
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

    Texts are converted to Unicode NFC. Rows without an answer, or with an empty or broken input or
    answer, are left out and counted. Questions with an answer that is not in their context are kept
    and counted. Both count as faulty. Rows without ids get ids made from their texts, and equal
    rows are then read once. The lines of an answer are joined by spaces if the task has one-line
    answers.

    Args:
        source: a file in a format of `forms.open_records`, or rows such as a list of mappings or a
            `datasets.Dataset`.
        task: task of the examples.
        language: language code of the examples.
        columns: name (an input, the answer, "id" or "group") -> column of the file. Other names are
            searched among the columns, then by the task's aliases.
        template: prompt template, which names the inputs of a task without fields.
        max_faulty: largest allowed fraction of faulty rows, in [0, 1].

    Returns:
        The examples in the order of the rows, and statistics.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has an unknown format, a column is missing, a value has the wrong type,
            an id is used twice, no row is left, or too many rows are faulty.
    """
    if not 0 <= max_faulty <= 1:
        raise ValueError(f"max_faulty is a share of rows in [0, 1], got {max_faulty}")
    inputs = input_names(task, template, language)
    path, form, records = _records_of(source)
    available = list(dict.fromkeys(name for record in records for name in record.values))
    matched = match_columns(available, task, inputs, columns, path)
    rules = _ReadingRules(
        task, language, matched, packed=f".{form}" in DELIMITED and task.answer == "answers"
    )
    kept, faults, duplicates = _examples_and_faults(records, rules)
    if len(faults) / len(records) > max_faulty:
        raise ValueError(_too_many(faults, len(records), max_faulty, path))
    if not kept:
        raise ValueError(
            f"{path}: all {len(records)} rows are left out ({_counted(faults)}); correct them"
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
class _ReadingRules:
    """Rules for turning the records of one source into examples."""

    task: Task
    language: str
    columns: Columns
    packed: bool
    """Whether one text may contain a list of answers, as in CSV."""


@dataclass(frozen=True)
class _Fault:
    """A faulty row: its place in the source and the reason."""

    where: str
    reason: str


def _records_of(
    source: str | Path | Iterable[Mapping[str, Any]],
) -> tuple[str, str, list[Record]]:
    """Return (name of a source, its format, its records), with at least one record."""
    if isinstance(source, str | Path):
        path, (form, read) = str(source), open_records(source)
    else:
        path, form, read = "rows", "rows", given_records(source)
    records = list(read)
    if not records:
        raise ValueError(f"{path} holds no row; it needs at least one")
    return path, form, records


def _examples_and_faults(
    records: Sequence[Record], rules: _ReadingRules
) -> tuple[list[Example], list[_Fault], int]:
    """Return (examples, faults in the order of the rows, number of duplicates)."""
    kept: dict[str, Example] = {}
    faults: list[_Fault] = []
    duplicates = 0
    for record, given_id in _with_ids(records, rules.columns):
        example = _example(record, rules, given_id)
        if isinstance(example, _Fault):
            faults.append(example)
        elif example.id in kept:
            duplicates += 1
        else:
            kept[example.id] = example
            if _has_outside_answer(example, rules.task):
                faults.append(_Fault(record.where, OUTSIDE))
    return list(kept.values()), faults, duplicates


def _with_ids(records: Sequence[Record], columns: Columns) -> Iterator[tuple[Record, str | None]]:
    """Yield (record, its id); the id is None if there is no id column.

    Raises:
        ValueError: a record lacks a column, or its id is not valid or not unique.
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
                f"{record.where}: the id {shown(given)} is used twice, first at {seen[given]}; "
                "give each row its own"
            )
        seen[given] = record.where
        yield record, given


def _example(record: Record, rules: _ReadingRules, given_id: str | None) -> Example | _Fault:
    """Return the example of a record, or the fault for which it is left out."""
    values, where, columns = record.values, record.where, rules.columns
    answer = rules.task.answer
    fields = {
        name: text_value(values[column], name, where) for name, column in columns.fields.items()
    }
    references = answer_values(values[columns.answer], answer, where, packed=rules.packed)
    reason = _reason_to_leave_out(fields, references, answer.removesuffix("s"))
    if reason is not None:
        return _Fault(where, reason)
    if columns.group is None:
        # The first input of a task without fields may be an instruction that all rows share.
        group = text_key("\n".join(list(fields.values())[: 1 if rules.task.fields else None]))
    else:
        group = id_value(values[columns.group], "group", where)
    example_id = given_id or _content_id((*fields.values(), *references))
    return Example(example_id, group, rules.language, fields, references)


def _joined(example: Example) -> Example:
    """Return the example with each reference in one line, without duplicates."""
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
    """Return an id that depends only on the normalised texts of a row."""
    normalized = json.dumps([normalize_text(text) for text in texts])
    return "row-" + hashlib.sha256(normalized.encode()).hexdigest()[:16]


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
        "correct them, or raise data.max_faulty if they are intended"
    )


def _counted(faults: Iterable[_Fault]) -> str:
    return _listed(Counter(fault.reason for fault in faults))


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
