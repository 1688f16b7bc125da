"""The published files load unchanged; every count is verified by other means."""

import csv
import json
from pathlib import Path
from unicodedata import normalize

import pytest

from grasp_lora.data.files import load_examples
from grasp_lora.tasks.base import TASKS

DATA = Path(__file__).parents[2].parent / "shared" / "data"
QA, SUMMARIZATION = TASKS["qa"], TASKS["summarization"]
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the published files are not beside the repository"
)


def names(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(DATA)) for path in DATA.glob(pattern)) or ["absent"]


def lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def questions(path: Path) -> list[dict]:
    document = json.loads(path.read_text("utf-8"))
    return [
        {**question, "context": paragraph["context"]}
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


@pytest.mark.parametrize("name", names("qa/*.jsonl"))
def test_question_files_load_whole(name: str) -> None:
    examples, report = load_examples(DATA / name, QA, Path(name).stem[:2], max_faulty=0)
    rows = lines(DATA / name)
    assert [e.id for e in examples] == [row["id"] for row in rows]
    assert report.contexts == len({row["context"] for row in rows})
    assert (report.form, report.rows, report.line()) == ("jsonl", len(rows), "")


@pytest.mark.parametrize("name", names("summarization/*.jsonl"))
def test_summary_files_load_whole(name: str) -> None:
    examples, report = load_examples(DATA / name, SUMMARIZATION, Path(name).stem, max_faulty=0)
    rows = lines(DATA / name)
    assert [e.id for e in examples] == [str(row["id"]) for row in rows]
    assert (report.rows, report.contexts, report.line()) == (
        len(rows),
        len({row["article"] for row in rows}),
        "",
    )


@pytest.mark.parametrize(
    ("name", "rows", "outside", "left_out"),
    [
        ("arcd-train.json", 693, 3, {}),
        ("cmrc2018_trial.json", 1000, 0, {"empty question": 2}),
        ("xquad.en.json", 851, 0, {}),
        ("xquad.ar.json", 851, 0, {}),
        ("xquad.zh.json", 851, 0, {}),
    ],
)
def test_squad_files_load_as_published(name: str, rows: int, outside: int, left_out: dict) -> None:
    examples, report = load_examples(DATA / "raw" / name, QA, "en")
    found = [row for row in questions(DATA / "raw" / name) if row["question"]]
    assert [e.id for e in examples] == [str(row["id"]) for row in found]
    assert [set(e.references) for e in examples] == [
        {normalize("NFC", answer["text"]).strip() for answer in row["answers"]} for row in found
    ]
    assert report.contexts == len({row["context"] for row in found})
    assert (report.form, report.rows, report.answers_outside) == ("squad", rows, outside)
    assert report.left_out == left_out


def test_a_news_table_loads_as_published() -> None:
    path = DATA / "raw" / "masakhanews_swa_dev.tsv"
    examples, report = load_examples(path, SUMMARIZATION, "sw", max_faulty=0)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(e.fields["article"], e.references) for e in examples] == [
        (row["text"], (row["headline"],)) for row in rows
    ]
    assert (report.form, report.rows, report.contexts) == ("tsv", 237, 237)
    assert len({e.id for e in examples}) == 237
    assert report.line() == ""
