"""Finished runs side by side, in a terminal and as a page."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grasp_lora.base.files import finish_run, open_run, read_json, write_json
from grasp_lora.cli import app
from grasp_lora.report.document import Dots, Lines, Section, Table
from grasp_lora.report.runs import runs_document
from hostile import HOSTILE

PATHS = [text for text in HOSTILE if not re.search(r"[\x00-\x1f/]", text)]


def finished_run(folder: Path, loss: float = 1.0, ids: str = "abc", **settings: Any) -> Path:
    """Write the records of a finished run that has one test set; return its folder."""
    open_run(folder, {"output": str(folder), "seed": 42, "train": {"epochs": 2}} | settings)
    scores = {
        "exact_match": {"value": 50.0, "low": 40.0, "high": 60.0, "n": 3, "settings": {}},
        "rouge1": {"value": 55.0, "low": None, "high": None, "n": 3, "settings": {}},
        "loss": {"value": loss, "low": loss - 0.5, "high": loss + 0.5, "n": 3, "settings": {}},
    }
    sets = {"test": {"language": "ar", "n": 3, "scores": scores}}
    rows = [{"slug": slug, "name": slug, "sets": sets} for slug in ("source", "final")]
    write_json(folder / "scores.json", {"task": "qa", "seed": 42, "systems": rows})
    write_json(folder / "ratio.json", {"ratio": 0.25, "verdict": "flat"})
    data = {"target": {"splits": {"test": list(ids)}, "from": "x", "sha256": ids}}
    write_json(folder / "data.json", data)
    time = {"wall_seconds": 61.0, "stages": {}, "shares": {}, "resumed": 0, "synchronized": False}
    made = {"time": time, "device": "cpu", "dtype": "torch.float32", "peak_memory_bytes": 2e9}
    write_json(folder / "provenance.json", made)
    finish_run(folder)
    return folder


def section(document: Any, title: str) -> Section:
    return next(one for one in document.sections if one.title == title)


def rows_of(found: Section, number: int = 0) -> list[list[str]]:
    tables = [part for part in found.parts if isinstance(part, Table)]
    return [[cell.text for cell in row] for row in tables[number].rows]


def test_runs_stand_side_by_side_with_the_settings_that_differ(tmp_path):
    a = finished_run(tmp_path / "a")
    b = finished_run(tmp_path / "b", loss=0.75, train={"epochs": 3}, budget=5)
    document = runs_document([a, b])
    assert document.decision == ("2 runs", "lowest loss on test: b, 0.75 [0.25, 1.25]")
    decisions = rows_of(section(document, "Decisions"))
    assert [name for name, _ in decisions] == ["a", "b"]
    assert decisions[0][1].startswith("Ratio 0.250, verdict flat")
    scores = section(document, "Scores of what is shipped, test")
    assert rows_of(scores)[1] == ["b", "3", "50.0 [40.0, 60.0]", "0.75 [0.25, 1.25]"]
    assert rows_of(scores, 1)[0] == ["a", "3", "50.0 [40.0, 60.0]", "55.0", "1.00 [0.50, 1.50]"]
    dots = [part for part in scores.parts if isinstance(part, Dots)]
    assert dots[1].rows == (("a", 1.0, 0.5, 1.5), ("b", 0.75, 0.25, 1.25))
    cost = rows_of(section(document, "Ratio and cost"))
    assert cost[0] == ["a", "0.250", "flat", "–", "61", "2.00", "cpu, float32"]
    differ = rows_of(section(document, "Settings that differ"))
    assert differ == [["train.epochs", "2", "3"], ["budget", "–", "5"]]


def test_scores_on_other_examples_are_not_ranked(tmp_path):
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b", ids="xyz")
    document = runs_document([a, b])
    assert document.decision == ("2 runs",)
    (first, *_) = section(document, "Scores of what is shipped, test").parts
    assert isinstance(first, Lines)
    assert "tested on different examples: do not compare" in first.texts[0]


def test_a_run_without_scores_stands_beside_others(tmp_path):
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b")
    write_json(b / "scores.json", {"task": "qa", "seed": 42, "systems": []})
    document = runs_document([a, b])
    assert rows_of(section(document, "Scores of what is shipped, test"))[0][0] == "a"
    assert len(rows_of(section(document, "Decisions"))) == 2


def test_folders_of_one_name_are_told_apart_and_the_same_settings_are_said(tmp_path):
    document = runs_document([finished_run(tmp_path / p / "run") for p in "ab"])
    names = [name for name, _ in rows_of(section(document, "Decisions"))]
    assert names == [str(tmp_path / p / "run") for p in "ab"]
    (told,) = section(document, "Settings that differ").parts
    assert told == Lines(("None but the place of the results.",))


def shown(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_command_prints_the_runs_and_writes_one_page(tmp_path):
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b", loss=0.75)
    out = tmp_path / "deep" / "both.html"
    done = shown(a, b, "--out", out)
    assert done.exit_code == 0, done.output
    assert "lowest loss on test: b, 0.75 [0.25, 1.25]" in done.output
    assert "train.epochs" not in done.output
    assert "<h2>Ratio and cost</h2>" in out.read_text(encoding="utf-8")
    assert os.listdir(a) == os.listdir(b)
    again = shown(a, b, "--out", out)
    assert again.exit_code == 2
    assert "both.html' exists; pass --overwrite to replace it" in again.output
    assert shown(a, b, "--out", out, "--overwrite").exit_code == 0


def test_of_one_run_the_command_shows_its_report(tmp_path):
    done = shown(finished_run(tmp_path / "a"), "--out", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    assert "Ratio 0.250, verdict flat" in done.output
    assert "<h2>Systems</h2>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_what_is_no_finished_run_is_refused_before_anything_is_written(tmp_path):
    a, begun = finished_run(tmp_path / "a"), tmp_path / "begun"
    open_run(begun, {"seed": 1})
    for folder in (begun, tmp_path / "none"):
        done = shown(a, folder, "--out", tmp_path / "x.html")
        assert done.exit_code == 2
        assert f"'{folder}' holds no finished run; give folders that" in done.output
    assert f"'{a}' is given twice" in shown(a, a).output
    assert not (tmp_path / "x.html").exists()


def test_a_record_of_a_run_is_not_replaced_by_a_report(tmp_path):
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b")
    before = (a / "scores.json").read_bytes()
    done = shown(a, b, "--out", a / "scores.json", "--overwrite")
    assert done.exit_code == 2
    assert (a / "scores.json").read_bytes() == before


@pytest.mark.parametrize("name", PATHS)
def test_names_and_settings_from_outside_are_shown_as_they_are(tmp_path, name):
    a = finished_run(tmp_path / name, note={name: name})
    done = shown(a, finished_run(tmp_path / "b"), "--out", tmp_path / "x.html")
    assert done.exit_code == 0, done.output
    assert not re.search("[\x1b\u202e]", done.output)
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1
    assert not re.search("[\x1b\u202e]", page)


def test_runs_whose_result_was_not_scored_have_no_scores(tmp_path):
    folders = [finished_run(tmp_path / name) for name in "ab"]
    for folder in folders:
        scores = read_json(folder / "scores.json")
        scores["systems"] = [row for row in scores["systems"] if row["slug"] != "final"]
        write_json(folder / "scores.json", scores)
    titles = [one.title for one in runs_document(folders).sections]
    assert titles == ["Decisions", "Ratio and cost", "Settings that differ"]
