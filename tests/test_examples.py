"""The scripts and the notebook of `examples/` run as they are, on a tiny model."""

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from helpers import tiny_backbone_folder, tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 40
NO_TRL = "trl is not installed (pip install trl)"


@pytest.fixture
def arguments(tmp_path):
    """What a script is started with: model, train rows, micro-dev rows, output folder."""
    base = tiny_backbone_folder(tmp_path / "base")
    for name, count in (("train", 12), ("micro_dev", 6)):
        rows = [{"prompt": f"{name} {i} is", "completion": f" {7 * i}"} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    files = (tmp_path / "train.jsonl", tmp_path / "micro_dev.jsonl")
    return [str(one) for one in (base, *files, tmp_path / "out")]


# The libraries warn of their own ways, which a script cannot change.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_learns_a_ratio_and_saves_an_adapter(script, arguments, monkeypatch, capsys):
    if script.stem.startswith("trl"):
        pytest.importorskip("trl", reason=NO_TRL)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runpy.run_path(str(script), run_name="__main__")
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("ratio ")]
    final = Path(arguments[-1]) / "final"
    notes = json.loads((final / "grasp_lora.json").read_text())
    ratio, verdict = notes["ratio"], notes["verdict"]
    assert verdict in ("flat", "learned")
    assert line == f"ratio {ratio:.2f}, verdict {verdict}, saved in {final}"
    loaded = PeftModel.from_pretrained(tiny_model(), str(final))
    zeros = [float((p == 0).float().mean()) for n, p in loaded.named_parameters() if "lora_" in n]
    assert zeros == pytest.approx([ratio] * len(zeros), abs=0.02)


def test_the_scripts_are_short():
    assert len(list(EXAMPLES.glob("*.py"))) == 2
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < MOST_LINES, script


NOTEBOOK = EXAMPLES / "first_adapter.ipynb"


def cells_of_code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(one["source"]) for one in cells if one["cell_type"] == "code"]


def shown(cell: str, names: dict) -> Any:
    """Run a cell; return the value of its last line, as a notebook would show it."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


# The cells are run here: a kernel and what it needs are thirty packages that nothing else uses.
def test_the_notebook_runs_from_labels_to_answers(tmp_path, monkeypatch, capsys):
    base = tiny_backbone_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    values = [shown(cell.replace('"smollm2"', repr(str(base))), names) for cell in cells_of_code()]
    tables = [one._repr_html_() for one in values if hasattr(one, "_repr_html_")]
    assert len(tables) == 1
    assert "zero-shot" in tables[0]
    said = capsys.readouterr().out
    ships = json.loads(Path("runs/first/recipe.json").read_text(encoding="utf-8"))["ships"]
    assert f"ships {ships}\npruning: {names['result'].verdict}\n" in said
    assert Path("runs/first/report.html").is_file()
    answers = Path("runs/first-answers/predictions.jsonl").read_text(encoding="utf-8")
    assert [json.loads(one)["id"] for one in answers.splitlines()] == ["1", "2"]


def test_the_notebook_is_kept_without_what_it_printed():
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    for cell in book["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
