"""Test the tables and sentences that are made from records."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grasp_lora.base.files import write_json
from grasp_lora.report.run import difference_lines, score_tables, verdict_words
from grasp_lora.report.run_report import write_report
from grasp_lora.report.time_words import profile_markdown


def score(
    value: float | None, low: float | None = None, high: float | None = None, **settings: Any
):
    return {"value": value, "low": low, "high": high, "n": 100, "settings": settings}


def system(slug: str, name: str, zeros: float | None = None, **scores: Any) -> dict[str, Any]:
    return {
        "slug": slug,
        "name": name,
        "zeros": zeros,
        "sets": {"test": {"language": "ar", "n": 100, "scores": scores}},
    }


SCORES: dict[str, Any] = {
    "task": "qa",
    "language": "ar",
    "seed": 42,
    "systems": [
        system(
            "a",
            "zero-shot",
            exact_match=score(3.25, 0.0, 7.0),
            bleu=score(1.0),
            loss=score(2.7404, 2.5, 3.0, tokenizer="x"),
        ),
        system(
            "b",
            "a | b",
            0.4567,
            exact_match=score(50),
            bleu=score(None),
            loss=score(1.5, tokenizer="y"),
        ),
    ],
}


def pair(
    difference: float, p_value: float | None = 0.5, low: float | None = -1.0
) -> dict[str, Any]:
    return {"difference": difference, "low": low, "high": 1.0, "p_value": p_value}


def compared(**tests: Any) -> dict[str, Any]:
    systems = [
        system("merged-finetuned", "unpruned", loss=score(1.0)),
        system("final", "final", loss=score(tests["loss"]["difference"] + 1.0)),
    ]
    found = {"merged-finetuned": {"test": tests}}
    return {"task": "qa", "seed": 1, "systems": systems, "comparisons": found}


def test_the_terminal_table_holds_the_most_informative_scores():
    console = Console(width=100, record=True, file=io.StringIO())
    (table,) = score_tables(SCORES)
    console.print(table)
    text = console.export_text()
    assert "qa, ar, 100 examples, seed 42" in text
    assert text.index("zero-shot") < text.index("a | b")
    assert all(cell in text for cell in ("3.2", "2.74", "45.7"))
    assert "BLEU" not in text


def test_the_report_has_outcome_picture_and_every_score_the_page_their_settings_too(tmp_path):
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(tmp_path / "scores.json", SCORES)
    (tmp_path / "ratio.png").touch()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "**Ratio 0.400, verdict flat: no gain over the lowest ratio could be shown" in text
    assert "(ratio.png)" in text
    lines = text.splitlines()
    assert "| system | exact match | BLEU | loss | zeros (%) |" in lines
    assert "| zero-shot | 3.2 \\[0.0, 7.0] | 1.0 | 2.74 \\[2.50, 3.00] | – |" in lines
    assert "| a \\| b | 50.0 | – | 1.50 | 45.7 |" in lines
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'data-value="2.7404">2.74 [2.50, 3.00]</td>' in page
    assert '<td dir="auto">tokenizer: x</td>' in page


def test_a_column_with_scores_of_different_settings_has_a_warning(tmp_path):
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(tmp_path / "scores.json", SCORES)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The column loss of test holds scores of different settings" in text
    assert "The column exact match" not in text


def test_leaks_that_were_allowed_are_in_the_report(tmp_path):
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(tmp_path / "scores.json", SCORES)
    leak = {"kind": "near", "first": ["target/train", "q1"], "second": ["target/test", "q2"]}
    write_json(tmp_path / "data.json", {"leaks": [leak | {"similarity": 0.91}]})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "- near: target/train q1 and target/test q2, similarity 0.91" in text


TIME: dict[str, Any] = {
    "wall_seconds": 200.0,
    "resumed": 0,
    "synchronized": False,
    "stages": {"merged": None, "search": 150.25, "outside the stages": 49.75},
    "shares": {"step": 0.5, "probe": 0.25, "I/O": 0.125, "idle": 0.125},
}


def report_with(folder: Path, device: str = "cpu", **changes: Any) -> str:
    write_json(folder / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(folder / "scores.json", SCORES)
    write_json(folder / "provenance.json", {"device": device, "time": TIME | changes})
    return write_report(folder).read_text(encoding="utf-8")


def test_the_report_says_where_the_time_went(tmp_path):
    text = report_with(tmp_path)
    assert "| wall time | step | probe | I/O | idle |" in text
    assert "| 200 s | 50.0 % | 25.0 % | 12.5 % | 12.5 % |" in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'data-value="150.0">150</td>' in page
    assert 'data-value="49.75">49.75</td>' in page
    assert "merged: done by an earlier process whose times were not kept." in text
    assert "resumed" not in text
    assert "the device" not in text


def test_the_report_of_a_resumed_run_says_which_times_are_lost(tmp_path):
    assert "The run was resumed once. The times of its earlier" in report_with(tmp_path, resumed=1)
    assert "except the time between the last checkpoint" in report_with(tmp_path, resumed=2)


def test_times_on_a_gpu_say_whether_the_clock_waited_for_it(tmp_path):
    assert "The clock did not wait for the device" in report_with(tmp_path, "cuda:0")
    waited = report_with(tmp_path, "cuda:0", synchronized=True)
    assert "The clock waited for the device" in waited
    assert "not wait" not in waited


def test_a_profile_has_a_row_for_every_part_of_every_stage():
    profile = TIME | {
        "parts": {"step": "training", "probe": "losses", "idle": "all the rest"},
        "stages": {
            "merged": {},
            "search": {
                "idle": {"seconds": 10.0, "calls": 0},
                "step": {"seconds": 90.0, "calls": 30},
            },
            "final": {"step": {"seconds": 100.0, "calls": 70}},
        },
    }
    text = profile_markdown(profile)
    assert "| step | 190 | 95.0 % | 100 | 1900.0 | training |" in text
    assert "| idle | 10.00 | 5.0 % | – | – | all the rest |" in text
    assert "| **all** | 200 | 100.0 % | – | – | |" in text
    assert "| search | **all** | 100 | 50.0 % | – | – |" in text
    assert "| | step | 90.00 | 45.0 % | 30 | 3000.0 |\n| | idle | 10.00 | 5.0 % | – | – |" in text
    assert "| probe" not in text
    assert "| merged" not in text
    assert "merged: done by an earlier process" in text


def test_a_run_without_scores_has_no_report(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"ratio\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (pair(0.1, 0.01), "or stopping epoch. The system with the lowest loss is: unpruned."),
        (
            pair(-0.1, 0.01),
            "loss is lower than the unpruned one's, and the difference is significant over these",
        ),
        (pair(-0.1, 0.2), "Pruning did not change the test loss significantly over these"),
    ],
)
def test_the_report_says_in_words_whether_pruning_paid(loss, said):
    assert said in verdict_words(compared(loss=loss))


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_a_system_without_a_finite_loss_is_not_the_one_with_the_lowest(bad):
    scores = compared(loss=pair(0.1, 0.01))
    for system in scores["systems"]:
        if system["slug"] == "merged-finetuned":
            (one,) = system["sets"].values()
            one["scores"]["loss"]["value"] = bad
    assert "The system with the lowest loss is: unpruned." not in verdict_words(scores)


def test_each_comparison_says_whether_the_difference_is_significant():
    found = compared(exact_match=pair(2.0), loss=pair(-0.5, 0.01))
    text = difference_lines(found)["merged-finetuned"]
    assert "exact match +2.0 [-1.0, +1.0], p 0.50, not significant" in text
    assert "loss -0.500 [-1.000, +1.000], p 0.01." in text


def test_a_comparison_over_one_context_has_no_test():
    said = verdict_words(compared(loss=pair(-0.5, None, None)))
    assert "one context, so no test can say whether pruning changed their loss." in said
    assert "significantly" not in said


def test_without_baselines_nothing_is_compared():
    alone = system("final", "final", loss=score(1.0))
    scores = {"task": "qa", "systems": [alone], "comparisons": {}}
    assert verdict_words(scores) == ""
    assert difference_lines(scores) == {}


def test_several_test_sets_have_a_table_each_and_their_mean_and_worst(tmp_path):
    row = system("final", "final", exact_match=score(50.0))
    row["sets"]["news"] = {"language": "ar", "n": 7, "scores": {"exact_match": score(30.0)}}
    row |= {"mean": {"exact_match": 40.0}, "worst": {"exact_match": {"set": "news", "value": 30.0}}}
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(tmp_path / "scores.json", SCORES | {"systems": [row]})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "qa, ar, test set news, 7 examples" in (tmp_path / "report.html").read_text("utf-8")
    assert "| final | 50.0 |" in text
    assert "| final | 40.0, 30.0 (news) |" in text


def test_markdown_and_page_have_the_same_sections_in_the_same_order(tmp_path):
    report_with(tmp_path)
    leak = {"kind": "near", "first": ["a", "q1"], "second": ["b", "q2"], "similarity": 0.9}
    write_json(tmp_path / "data.json", {"leaks": [leak]})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    headings = re.findall("^## (.*)", text, re.M)
    assert headings == re.findall("<h2>(.*)</h2>", page)
    assert headings == ["Systems", "Data and warnings", "Cost, settings, provenance"]
    assert text.index("# Prune ratio") < text.index("**Ratio 0.400") < text.index("## Systems")
