"""Names and ids from outside in what people read: a terminal, Markdown, pictures."""

import io
import re
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from grasp_lora.base.files import write_json
from grasp_lora.base.words import fenced, in_markdown, in_picture
from grasp_lora.report.comparison import comparison_markdown
from grasp_lora.report.pictures import plot_comparison
from grasp_lora.report.run import score_tables
from grasp_lora.report.run_report import write_report
from hostile import HALF, HOSTILE

OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@pytest.mark.parametrize("text", [*HOSTILE, HALF])
def test_markdown_makes_nothing_of_a_text(text):
    shown = in_markdown(text)
    assert "\n" not in shown
    assert not OBEYED.search(shown)
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[`*\[|~$]", re.sub(r"\\\\", "", shown))


@pytest.mark.parametrize("text", ["exact_match", "en-ar", "0.25 + 0.75 (dev)", "قطة", "#1: a, b!"])
def test_markdown_leaves_plain_names_as_they_are(text):
    assert in_markdown(text) == text


def test_a_text_cannot_end_the_block_of_code_it_stands_in():
    first, text, last = fenced("a\n````\nb")
    assert first == last == "`````"
    assert text == "a\n````\nb"
    assert fenced("می\u200cخواهم \u202e")[1] == "می\u200cخواهم \\u202e"


@pytest.mark.parametrize("text", [*HOSTILE, HALF])
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_pictures_draw_a_text_and_no_formula(tmp_path, drawing, text):
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(in_picture(text))
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def scores_of(name: str) -> dict[str, Any]:
    one = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 4, "settings": {"model": name}}
    part = {"language": "ar", "n": 4, "scores": {"exact_match": one}}
    system = {"slug": "final", "name": name, "zeros": None, "sets": {name: part, "test": part}}
    system |= {"mean": {"exact_match": 50.0}, "worst": {"exact_match": {"set": name, "value": 5.0}}}
    return {"task": "qa", "seed": 1, "systems": [system], "comparisons": {}}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_and_its_tables_show_names_as_they_are(tmp_path, name):
    scores = scores_of(name)
    ratio = {"ratio": 0.4, "verdict": "flat", "findings": [{"name": "odd", "says": name}]}
    leak = {"kind": "id", "first": ["train", name], "second": ["dev", name], "similarity": 1.0}
    for file, content in (("scores", scores), ("ratio", ratio), ("data", {"leaks": [leak]})):
        write_json(tmp_path / f"{file}.json", content)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert not OBEYED.search(text)
    for found in ("<script", "![x]", "\n# c"):
        assert found not in text
    assert not re.search(r"(?<!\\)\[click\]", text)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system="truecolor")
    for table in score_tables(scores):
        console.print(table)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert not OBEYED.search(plain)
    if "[" in name and "\x1b" not in name:
        assert name.split("\n")[0] in plain


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_a_comparison_is_drawn_and_written_whatever_its_test_sets_are_called(
    tmp_path, drawing, name
):
    row = {"method": "grasp", "seed": 1, "ratio": 0.4, "seconds": 1.0, "tokens": 5, "steps": 1}
    row |= {"scores": {name: {"loss": 1.0}}, "intervals": {name: {"loss": [0.5, 1.5]}}}
    row |= {"dev_loss": 1.0, "runs": 1, "forwards": 1, "peak_memory_bytes": 0}
    row |= {"adapter_bytes": 1, "zeros": None}
    found = {"pair": name, "task": "qa", "reference": None, "rows": [row], "paired": {}}
    found |= {"methods": {"grasp": "about"}, "not_applicable": {"late": name}, "failed": {}}
    plot_comparison(found, tmp_path)
    assert (tmp_path / "pareto.png").exists()
    text = comparison_markdown(found)
    assert not OBEYED.search(text)
    assert "<script" not in text
