"""The tables of many languages: what a run's folder says is kept, and its tables are of that."""

from statistics import fmean

import pytest
from benchmarks import languages, records

from grasp_lora.base.files import jsonable, open_run, read_json, read_jsonl
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.run import run
from grasp_lora.workbench.encoded_parts import encoded_parts
from grasp_lora.workbench.rows import load_run_data
from helpers import tiny_backbone_folder
from jobs import job, of_adapters, write_job


def test_a_script_is_that_of_most_letters():
    assert languages.script(["Nairobi", "القاهرة هي العاصمة"]) == "Arabic"
    assert languages.script(["東京 2020"]) == "CJK"
    assert languages.script(["ሰላም", "x"]) == "Ethiopic"
    with pytest.raises(ValueError, match="no letter"):
        languages.script(["1984", "..."])


def kept(cell="hi-auto-s42", simple="few-shot, 4 examples in the prompt", **changes):
    systems = {
        "zero-shot": [5.0, 5.0, 6.0, 6.0],
        "few-shot, 4 examples in the prompt": [2.0, 2.0, 3.0, 3.0],
        "target adapter": [2.5, 2.5, 3.5, 3.5],
        "shipped": [1.5, 1.5, 2.0, 2.0],
    }
    recipe = {
        "ships": "source adapter fine-tuned",
        "simple": None if simple is None else {"name": simple},
        "gain": {"gain": 0.5, "interval": [0.25, 0.75]},
    }
    record = {
        "cell": cell,
        "language": "hi",
        "script": "Devanagari",
        "task": "qa",
        "labels": 80,
        "systems": [
            {"name": name, "scores": {"token_f1": 10.0 + number}, "losses": losses}
            for number, (name, losses) in enumerate(systems.items())
        ],
        "groups": ["a", "a", "b", "b"],
        "recipe": recipe,
        "fertility": 2.25,
        "unit": "word",
        "seconds": 600.0,
    }
    return jsonable(record | changes)


def test_a_gain_is_over_the_best_system_of_the_held_rows_and_counts_contexts():
    found = languages.gain(kept())
    # 0.5 in one context and 1.0 in the other: what is drawn of two whole contexts is one of
    # 0.5, 0.75 and 1.0, so the interval ends at the contexts' own gains.
    assert found["difference"] == pytest.approx(0.75)
    assert (found["low"], found["high"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert languages.gain(kept(simple="source adapter")) is None  # not scored on the test rows
    assert languages.gain(kept(simple=None)) is None


def test_the_tables_have_a_row_a_run(tmp_path, capsys):
    table = tmp_path / "kept.parquet"
    prompt = [{"name": "few-shot, 8 examples in the prompt", "scores": {}, "losses": [1.0] * 4}]
    one, other = kept(), kept("ar-labels-12-s42", simple=None)
    other["systems"] += prompt
    del other["systems"][1]
    other["systems"][-1]["scores"] = {"token_f1": 0.0}
    records.append(table, {"hi-auto-s42": [one]}, "languages")
    records.append(table, {"ar-labels-12-s42": [other]}, "limits")
    languages.main(["tables", "--records", str(table)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert lines == [
        "| `hi` | Devanagari | 2.2 a word | 80 | 5.500 | 2.500 | – | 3.000 | – | 1.750 "
        "| +0.750 [+0.500, +1.000] |",
        "| `hi` | source adapter fine-tuned; before: few-shot, 4 examples in the prompt "
        "| +0.500 [+0.250, +0.750] | token F1 11.0 | 13.0 | 10 |",
        "| `ar-labels-12` | Devanagari | 2.2 a word | 80 | 5.500 | 1.000 | – | 3.000 | – | 1.750 "
        "| – |",
        "| `ar-labels-12` | source adapter fine-tuned; before: nothing "
        "| +0.500 [+0.250, +0.750] | token F1 – | 13.0 | 10 |",
    ]


def test_what_is_kept_of_a_run_is_what_its_folder_says(tmp_path, capsys):
    tiny_backbone_folder(tmp_path / "base")
    folder, steps = tmp_path / "sweep", of_adapters({"epochs": 1, "batch_size": 2})
    out = folder / "es-auto-s7" / "run"
    values = job(
        tmp_path,
        recipe="auto",
        budget=9,
        output=str(out),
        train=steps,
        evaluate={"max_new_tokens": 2},
    )
    config = load_config(write_job(tmp_path / "job.yaml", values))
    run(config, quiet=True)
    open_run(folder / "es-auto-s9" / "run", config.to_record())  # begun, not finished
    arguments = ["keep", str(folder), "--records", str(tmp_path / "kept.parquet")]
    for count in (1, 0):  # the second time nothing is new
        languages.main(arguments)
        assert capsys.readouterr().out == f"{count} runs kept\n"
    record = records.read_runs(tmp_path / "kept.parquet", "languages")["es-auto-s7"]
    assert record["recipe"] == read_json(out / "recipe.json")
    predictions = read_jsonl(out / "evaluations" / "final" / "predictions.jsonl")
    (final,) = (one for one in record["systems"] if one["name"] == "shipped")
    assert final["losses"] == pytest.approx([row["loss"] for row in predictions], abs=1e-5)
    assert record["groups"] == [row["group"] for row in predictions]
    for one in record["systems"]:
        assert fmean(one["losses"]) == pytest.approx(one["scores"]["loss"], abs=1e-4)
    assert len(record["systems"]) >= 4
    assert (record["labels"], record["script"], record["unit"]) == (16, "Latin", "word")
    data = load_run_data(config, print)
    _, _, lines = encoded_parts(config, data, quiet=True)
    (described,) = (line for line in lines if line.startswith("| target/test "))
    assert described.endswith(f"| {record['fertility']:.2f} a word |")


def test_the_page_of_languages_has_the_tables_of_their_records(capsys):
    page = (records.FOLDER.parent / "languages.md").read_text("utf-8")
    languages.main(["tables"])
    assert page.split("languages tables -->\n\n")[1].strip() == capsys.readouterr().out.strip()


def test_scores_are_of_every_system_and_a_line_is_of_all_runs(tmp_path, capsys):
    table = tmp_path / "kept.parquet"
    lower = kept(
        cell="ar-auto-s42",
        simple="target adapter",
        recipe=kept()["recipe"]
        | {
            "simple": {"name": "target adapter"},
            "gain": {"gain": 0.5, "interval": [0.0, 1.0]},
        },
    )  # gains 1.0 and 1.5 in its two contexts, so 1.25 is outside
    unknown = kept(cell="th-auto-s42", simple=None)
    runs = {"hi-auto-s42": [kept()], "ar-auto-s42": [lower], "th-auto-s42": [unknown]}
    records.append(table, runs, "languages")
    languages.main(["scores", "--records", str(table)])
    lines = capsys.readouterr().out.splitlines()
    assert "| `hi` | token F1 | 10.0 | 11.0 | – | 12.0 | – | 13.0 |" in lines
    assert (
        "Mean gain +1.000; above 0 beyond its interval in 2 of 2; held by the expected interval "
        "in 1 of 2, which is 0.75 wide on average."
    ) in lines
