"""The scripts of `examples/` run as they are, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

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
