"""Question files: JSON lines, or the JSON of SQuAD v1.1 (also XQuAD, MLQA, ARCD, CMRC)."""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from grasp_lora.tasks.records import Example, text_key

KEYS = ("id", "context", "question", "answers")


@dataclass(frozen=True)
class LoadReport:
    """What was seen while reading a question file."""

    path: str
    form: str
    """Either "jsonl" or "squad"."""
    rows: int
    contexts: int
    """Distinct contexts."""
    answers_outside: int
    """Rows with an accepted answer that is not a substring of their context."""


@dataclass(frozen=True)
class _Row:
    where: str
    values: Mapping[str, Any]


def read_examples(path: str | Path, language: str) -> list[Example]:
    """Return the rows of a question file; see `load_examples`."""
    return load_examples(path, language)[0]


def load_examples(path: str | Path, language: str) -> tuple[list[Example], LoadReport]:
    """Read a question file, its form chosen by what is in it.

    Texts are brought to Unicode NFC; an answer that is not in its context is kept and counted.

    Args:
        path: UTF-8 (with or without a byte order mark). Either one JSON object a line with
            `id`, `context`, `question`, `answers` (a list of texts), or one JSON object
            `data` -> `paragraphs` -> `qas` as in SQuAD v1.1.
        language: two-letter code of the rows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, is neither form, or a row is incomplete or repeated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no question file at {path}; give the path of a .jsonl file or a SQuAD .json file"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it needs at least one question")
    document = _squad_document(text)
    rows = _jsonl_rows(path, text) if document is None else _squad_rows(path, document)
    examples: dict[str, Example] = {}
    for row in rows:
        example = _example(row, language)
        if example.id in examples:
            raise ValueError(f"{row.where}: the id {example.id!r} is used twice; ids are unique")
        examples[example.id] = example
    if not examples:
        raise ValueError(f"{path} holds no question; it needs at least one")
    found = list(examples.values())
    report = LoadReport(
        path=str(path),
        form="jsonl" if document is None else "squad",
        rows=len(found),
        contexts=len({example.group for example in found}),
        answers_outside=sum(map(_has_outside_answer, found)),
    )
    return found, report


def _has_outside_answer(example: Example) -> bool:
    return any(answer not in example.fields["context"] for answer in example.references)


def _squad_document(text: str) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return None
    if isinstance(document, dict) and "data" in document:
        return cast(dict[str, Any], document)
    return None


def _jsonl_rows(path: Path, text: str) -> Iterator[_Row]:
    # Not splitlines(): U+2028 and its like may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg}); write one JSON object a line"
            ) from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a JSON object is needed, got {type(values).__name__}")
        yield _Row(where, cast(dict[str, Any], values))


def _squad_rows(path: Path, document: Mapping[str, Any]) -> Iterator[_Row]:
    for a, article in enumerate(_list_at(document, "data", str(path))):
        at = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_list_at(article, "paragraphs", at)):
            place = f"{at}.paragraphs[{p}]"
            for q, question in enumerate(_list_at(paragraph, "qas", place)):
                where = f"{place}.qas[{q}]"
                if not isinstance(question, dict):
                    raise ValueError(f"{where}: a JSON object is needed")
                values = dict(cast(dict[str, Any], question))
                if "context" in paragraph:
                    values["context"] = paragraph["context"]
                answers = values.get("answers")
                if isinstance(answers, list):
                    values["answers"] = [
                        entry.get("text") if isinstance(entry, dict) else entry
                        for entry in cast(list[Any], answers)
                    ]
                yield _Row(where, values)


def _list_at(parent: Any, key: str, where: str) -> list[Any]:
    value = cast(dict[str, Any], parent).get(key) if isinstance(parent, dict) else None
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key!r} must be a list, as in SQuAD v1.1")
    return cast(list[Any], value)


def _example(row: _Row, language: str) -> Example:
    missing = [key for key in KEYS if key not in row.values]
    if missing:
        raise ValueError(f"{row.where}: missing {', '.join(missing)}; needed are {', '.join(KEYS)}")
    given = row.values["id"]
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise ValueError(f"{row.where}: id must be a text or a whole number, got {given!r}")
    context = _text(row, "context", row.values["context"])
    answers = row.values["answers"]
    if not isinstance(answers, list):
        raise ValueError(
            f"{row.where}: answers must be a list of texts, got {type(answers).__name__}"
        )
    if not answers:
        raise ValueError(
            f"{row.where}: answers is empty; unanswerable questions are not supported, "
            "leave the row out"
        )
    texts = [_text(row, "answer", answer) for answer in cast(list[Any], answers)]
    return Example(
        id=str(given),
        group=text_key(context),
        language=language,
        fields={"context": context, "question": _text(row, "question", row.values["question"])},
        references=tuple(dict.fromkeys(texts)),
    )


def _text(row: _Row, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{row.where}: {name} must be a text that is not empty, got {value!r}")
    return unicodedata.normalize("NFC", value)
