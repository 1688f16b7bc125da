"""Read the examples of a task from a file in a common format, or from mappings."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grasp_lora.base.texts import contains
from grasp_lora.base.words import shown
from grasp_lora.data.columns import (
    PLAUSIBLE,
    UNANSWERABLE,
    Columns,
    input_names,
    match_columns,
    optional_inputs,
)
from grasp_lora.data.forms import DELIMITED, Record, given_records, open_records
from grasp_lora.data.values import (
    answer_values,
    flag_value,
    id_value,
    text_fault,
    text_value,
)
from grasp_lora.tasks.records import Example, Task, normalize_text, one_line, text_key

OUTSIDE = "answer outside its context"
MARKED = "marked as without an answer"
DUPLICATE = "the same as an earlier row"
BLANK = "a blank among its answers"
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
    """Kept questions with an accepted answer that their context does not contain."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason, such as "empty question" -> number of rows left out."""
    duplicates: int = 0
    """Rows dropped because they equal an earlier one; only for rows without ids."""
    joined: int = 0
    """Rows with an answer whose lines were joined, because the task has one-line answers."""
    blank_answers: int = 0
    """Kept rows with a blank among their answers, which is dropped."""
    empty_inputs: Mapping[str, int] = field(default_factory=dict)
    """Input -> number of kept rows where it is empty, so that their prompts leave it out."""
    split: str = ""
    """The split that was read, if the file holds splits."""
    first: Mapping[str, str] = field(default_factory=dict)
    """Reason, `DUPLICATE`, `BLANK` or an empty input -> id or place of the first such row."""

    def line(self) -> str:
        """Return a sentence on rows that were left out or are unusual; "" if there are none."""
        parts = [f"the rows are those of its split {self.split!r}"] if self.split else []
        if self.answers_outside:
            parts.append(
                f"{self.answers_outside} of {self.rows} rows have an answer that is not in "
                "their context"
            )
        if self.left_out:
            told = ", ".join(
                f"{reason}: {count}, such as {self.first[reason]}"
                for reason, count in self.left_out.items()
            )
            parts.append(f"{_rows(sum(self.left_out.values()))} left out ({told})")
        if self.duplicates:
            parts.append(
                f"{_rows(self.duplicates)} dropped as the same as an earlier one, such as "
                f"{self.first[DUPLICATE]}"
            )
        if self.blank_answers:
            parts.append(
                f"{self.blank_answers} of {self.rows} rows, such as {self.first[BLANK]}, had a "
                "blank among their answers, which is dropped"
            )
        parts += [
            f"{count} of {self.rows} rows, such as {self.first[name]}, have no {name}; its lines "
            "are left out of their prompts"
            for name, count in self.empty_inputs.items()
        ]
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
    split: str | None = None,
) -> tuple[list[Example], LoadReport]:
    """Read the examples of a task.

    Texts are converted to Unicode NFC, and answers lose their outer blanks. Rows without an answer,
    or with an empty or broken input or answer, are left out and counted. Questions with an answer
    that their context does not contain are kept and counted. Both count as faulty. Rows that say
    that their question has no answer (see `columns.UNANSWERABLE`) are left out and counted, but are
    not faulty. A blank among other answers is dropped, and an input may be empty where the template
    can leave it out. Rows without ids get ids made from their texts, and equal rows are then read
    once. The lines of an answer are joined by spaces if the task has one-line answers.

    Args:
        source: a file in a format of `forms.open_records`, or rows such as a list of mappings or a
            `datasets.Dataset`.
        task: task of the examples.
        language: language code of the examples.
        columns: name (an input, the answer, "id" or "group") -> column of the file. Other names are
            searched among the columns, then by the task's aliases.
        template: prompt template, which names the inputs of a task without fields.
        max_faulty: largest allowed fraction of faulty rows, in [0, 1].
        split: the split to read where a file holds several; see `forms.SPLIT_NAMES`.

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
    path, form, records, used = _records_of(source, split)
    available = list(dict.fromkeys(name for record in records for name in record.values))
    optional = optional_inputs(task, template, language)
    matched = match_columns(available, task, inputs, columns, path, optional)
    # Where the template names the inputs, an answer may be code, and a list the answer itself.
    packed = f".{form}" in DELIMITED and bool(task.fields)
    rules = _ReadingRules(task, language, matched, packed)
    count = len(records)
    found = _examples_and_faults(records, rules)
    faulty = [fault for fault in found.faults if fault.reason != MARKED]
    if len(faulty) / count > max_faulty:
        raise ValueError(_too_many(faulty, count, max_faulty, path))
    if not found.kept:
        raise ValueError(
            f"{path}: all {count} rows are left out ({_counted(found.faults)}); correct them"
        )
    return _joined_and_reported(found, rules, LoadReport(path, form, 0, 0, split=used))


def _joined_and_reported(
    found: "_Found", rules: "_ReadingRules", report: LoadReport
) -> tuple[list[Example], LoadReport]:
    """Return the examples as the task writes answers, and the report with all its numbers."""
    kept = found.kept
    joined = [_joined(example) if rules.task.one_line else example for example in kept]
    reasons = Counter(fault.reason for fault in found.faults)
    counted = Counter(what for what, _ in found.counted)
    told = [(fault.reason, fault.name) for fault in found.faults] + found.counted
    return joined, replace(
        report,
        rows=len(kept),
        contexts=len({example.group for example in kept}),
        answers_outside=reasons.pop(OUTSIDE, 0),
        left_out=dict(reasons),
        duplicates=counted[DUPLICATE],
        joined=sum(new != old for new, old in zip(joined, kept, strict=True)),
        blank_answers=counted[BLANK],
        empty_inputs={n: counted[n] for n in rules.columns.optional if counted[n]},
        # Of equal keys the last one stays, so the first row goes in last.
        first={what: shown(name) for what, name in reversed(told) if what != OUTSIDE},
    )


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
    """A row that is left out, or one to count: its place in the source and the reason."""

    where: str
    reason: str
    id: str | None = None

    @property
    def name(self) -> str:
        """Its id, or its place if it has none."""
        return self.where if self.id is None else self.id


@dataclass(frozen=True)
class _Found:
    """What the rows of a source gave."""

    kept: list[Example]
    faults: list[_Fault]
    counted: list[tuple[str, str]]
    """(`DUPLICATE`, `BLANK` or an input that is empty, id or place) of rows that are used."""


def _records_of(
    source: str | Path | Iterable[Mapping[str, Any]], split: str | None
) -> tuple[str, str, deque[Record], str]:
    """Return (name of a source, its format, its records, the split read), at least one record."""
    used = ""
    if isinstance(source, str | Path):
        path, (form, read, used) = str(source), open_records(source, split)
    else:
        path, form, read = "rows", "rows", given_records(source)
    records = deque(read)
    if not records:
        raise ValueError(f"{path} holds no row; it needs at least one")
    return path, form, records, used


def _examples_and_faults(records: deque[Record], rules: _ReadingRules) -> _Found:
    """Return what the records give; they are taken out, so that few rows are held twice."""
    kept: dict[str, Example] = {}
    found = _Found([], [], [])
    for record, given_id in _with_ids(records, rules.columns):
        example = _example(record, rules, given_id)
        if isinstance(example, _Fault):
            found.faults.append(example)
            continue
        if example.id in kept:
            found.counted.append((DUPLICATE, record.where))
            continue
        name, whole = given_id or record.where, _without_blanks(example.references)
        if whole != example.references:
            found.counted.append((BLANK, name))
        found.counted.extend((n, name) for n in rules.columns.optional if not example.fields[n])
        example = replace(example, references=whole)
        kept[example.id] = example
        if _has_outside_answer(example, rules.task):
            found.faults.append(_Fault(record.where, OUTSIDE))
    found.kept.extend(kept.values())
    return found


def _with_ids(records: deque[Record], columns: Columns) -> Iterator[tuple[Record, str | None]]:
    """Take each record out and yield (record, its id); the id is None if there is no id column.

    Raises:
        ValueError: a record lacks a column, or its id is not valid or not unique.
    """
    seen: dict[str, str] = {}
    while records:
        record = records.popleft()
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
    if _is_marked(record, rules):
        return _Fault(where, MARKED, given_id)
    answer = rules.task.answer
    fields = {
        name: text_value(values.get(column), name, where) for name, column in columns.fields.items()
    }
    empty = [name for name, text in fields.items() if text_fault(text) == "empty"]
    # Where all inputs are empty, none of them is optional.
    absent = set(empty) & set(columns.optional) if len(empty) < len(fields) else set[str]()
    fields |= dict.fromkeys(absent, "")
    references = answer_values(values[columns.answer], answer, where, packed=rules.packed)
    needed = {name: text for name, text in fields.items() if name not in absent}
    reason = _reason_to_leave_out(needed, references, answer.removesuffix("s"))
    if reason is not None:
        return _Fault(where, reason, given_id)
    if columns.group is None:
        # The first input of a task without fields may be an instruction that all rows share.
        group = text_key("\n".join(list(fields.values())[: 1 if rules.task.fields else None]))
    else:
        group = id_value(values[columns.group], "group", where)
    example_id = given_id or _content_id((*fields.values(), *_without_blanks(references)))
    return Example(example_id, group, rules.language, fields, references)


def _is_marked(record: Record, rules: _ReadingRules) -> bool:
    """Return whether a row says that its question has no answer, whatever stands in its answers."""
    columns, values, where = rules.columns, record.values, record.where
    said = {name: flag_value(values.get(name), name, where) for name in columns.flags}
    told = {name: value for name, value in said.items() if value is not None}
    if told or not columns.plausible:
        return any(value == UNANSWERABLE[name] for name, value in told.items())
    plausible = answer_values(values.get(PLAUSIBLE), PLAUSIBLE, where, packed=rules.packed)
    return any(text_fault(text) is None for text in plausible)


def _without_blanks(references: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text in references if text_fault(text) != "empty")


def _joined(example: Example) -> Example:
    """Return the example with each reference in one line, without duplicates."""
    references = tuple(dict.fromkeys(map(one_line, example.references)))
    return replace(example, references=references)


def _reason_to_leave_out(
    fields: Mapping[str, str], references: Sequence[str], answer: str
) -> str | None:
    """Return why a row cannot be used; one blank among other answers is no reason."""
    faults = [(text_fault(text), name) for name, text in fields.items()]
    of_answers = [text_fault(text) for text in references]
    if "broken" in of_answers or (of_answers and all(of_answers)):
        faults.append((next(fault for fault in of_answers if fault is not None), answer))
    reason = next((f"{fault} {name}" for fault, name in faults if fault is not None), None)
    return reason if references or reason is not None else f"no {answer}"


def _content_id(texts: Sequence[str]) -> str:
    """Return an id that depends only on the normalised texts of a row."""
    normalized = json.dumps([normalize_text(text) for text in texts])
    return "row-" + hashlib.sha256(normalized.encode()).hexdigest()[:16]


def _has_outside_answer(example: Example, task: Task) -> bool:
    context = example.fields.get("context")
    if context is None or task.answer != "answers":
        return False
    return any(not contains(context, answer) for answer in example.references)


def _too_many(faults: Sequence[_Fault], rows: int, max_faulty: float, path: str) -> str:
    places = "; ".join(f"{fault.where} ({fault.reason})" for fault in faults[:SHOWN])
    return (
        f"{path}: {len(faults)} of {rows} rows ({100 * len(faults) / rows:.3g}%) are faulty "
        f"({_counted(faults)}), at most {100 * max_faulty:.3g}% may be; the first are {places}; "
        "correct them, or raise data.max_faulty if they are intended"
    )


def _counted(faults: Iterable[_Fault]) -> str:
    reasons = Counter(fault.reason for fault in faults)
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
