"""The run and the evaluation for Python: rows in usual forms, results that show themselves."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import grasp_lora
from grasp_lora.base.files import read_json
from grasp_lora.plans import public
from grasp_lora.plans.public import evaluate, run
from helpers import tiny_backbone_folder
from jobs import job, write_job, write_rows


def rows_of(numbers: range) -> list[dict]:
    return [
        {
            "id": f"q{n}",
            "context": f"casa {n} tiene {n + 2} cuartos",
            "question": f"¿Cuántos cuartos tiene la casa {n}?",
            "answers": [f"{n + 2} cuartos"],
        }
        for n in numbers
    ]


SPLITS = {"train": range(8), "validation": range(8, 12), "micro_dev": range(12, 16)}
ROWS = {name: Dataset.from_list(rows_of(numbers)) for name, numbers in SPLITS.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    tiny_backbone_folder(folder / "base")
    return folder


def settings(folder: Path) -> dict:
    values = job(folder)
    values["data"]["target"] = {"language": "es"}
    return values


@pytest.fixture(scope="module")
def result(place):
    rows = DatasetDict(ROWS | {"test": Dataset.from_list(rows_of(range(16, 20)))})
    return run(settings(place), rows=rows, quiet=True)


def test_the_splits_of_a_dataset_dict_are_the_runs_own(result):
    manifest = read_json(result.folder / "data.json")["target"]
    used = {name: len(ids) for name, ids in manifest["splits"].items()}
    assert used == {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}
    assert manifest["splits"]["dev"] == [f"q{n}" for n in range(8, 12)]


def test_the_result_says_what_the_folder_holds(result, place):
    assert result.folder == place / "run"
    assert (result.final / "adapter_config.json").is_file()
    stored = read_json(result.folder / "ratio.json")
    assert result.verdict == stored["verdict"]
    assert result.scores == read_json(result.folder / "scores.json")


def test_the_result_is_shown_as_text_and_as_html(result):
    text, html = result.table(), result._repr_html_()
    for system in result.scores["systems"]:
        assert system["name"] in text.replace("\n", " ")
    assert html.startswith("<pre>")
    assert html.endswith("</pre>")
    assert result.scores["systems"][0]["name"] in html
    assert "<script" not in html


def test_an_evaluation_takes_rows_and_shows_its_scores(result, place):
    found = evaluate(
        str(result.final),
        settings(place),
        out=place / "scored",
        rows=Dataset.from_list(rows_of(range(16, 20))),
        quiet=True,
    )
    final = next(s for s in result.scores["systems"] if s["slug"] == "final")
    loss = found.scores["sets"]["test"]["scores"]["loss"]
    assert loss["value"] == pytest.approx(
        final["sets"]["test"]["scores"]["loss"]["value"], abs=1e-4
    )
    assert "loss" in found.table()
    assert found._repr_html_().startswith("<pre>")


def test_a_result_made_from_other_rows_is_not_replaced(result, place):
    with pytest.raises(ValueError, match="overwrite"):
        run(settings(place), rows=ROWS | {"test": rows_of(range(17, 21))}, quiet=True)


@pytest.mark.parametrize("kind", ["path", "settings", "mapping"])
def test_settings_come_in_three_forms(place, tmp_path, monkeypatch, kind):
    seen = []
    monkeypatch.setattr(public.runs, "run", lambda config, *_: seen.append(config) or tmp_path)
    values = settings(place)
    path = write_job(tmp_path / "config.yaml", json.loads(json.dumps(values)))
    given = {"path": path, "settings": grasp_lora.load_config(path), "mapping": values}[kind]
    assert run(given).folder == tmp_path
    assert seen == [grasp_lora.load_config(path)]


@pytest.mark.parametrize(
    ("rows", "given"),
    [
        ({"train": [1], "dev": [2]}, {"target": {"train": [1], "dev": [2]}}),
        ([1, 2], {"target": [1, 2]}),
        (
            {"target": {"dev": [1]}, "source": [2], "tests": {"news": [3]}},
            {"target": {"dev": [1]}, "source": [2], "tests": {"news": [3]}},
        ),
        (None, None),
    ],
)
def test_rows_without_a_role_are_the_targets(place, tmp_path, monkeypatch, rows, given):
    seen = []
    monkeypatch.setattr(public.runs, "run", lambda *arguments: seen.append(arguments) or tmp_path)
    run(settings(place), rows, quiet=True)
    assert seen[0][1:] == (False, True, given)


def test_what_cannot_be_settings_or_splits_is_told(place):
    with pytest.raises(ValueError, match="config is 3, but must be settings"):
        run(3)
    with pytest.raises(ValueError, match="got 'holdout'"):
        run(settings(place), {"train": [], "holdout": []}, quiet=True)


def test_an_evaluation_without_test_rows_is_refused(place, tmp_path):
    values = settings(place)
    file = write_rows(tmp_path / "train.jsonl", range(3))
    values["data"]["target"] |= {"files": {"train": str(file)}}
    with pytest.raises(ValueError, match="test"):
        evaluate(None, values, out=tmp_path / "out", quiet=True)
