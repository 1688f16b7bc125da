"""A finished result is known for done by its receipt, before anything is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.base.files import finish_run, write_sealed
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.plans.receipt import Request, run_request
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job, write_rows

COMMAND = """
import sys
from grasp_lora.cli import app
try:
    app(sys.argv[1:])
finally:
    print("loaded:", *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a job whose target rows are in a file of `folder`."""
    values = job(folder)
    rows = write_rows(folder / "rows.jsonl", range(30))
    values["data"]["target"] = {
        "language": "es",
        "files": str(rows),
        "rows": {"train": 8, "dev": 4, "micro_dev": 4},
    }
    return values


def request(folder: Path, **changes: Any) -> Request:
    config = make_config(settings(folder) | changes, training=False)
    return Request(folder / "out", config, {"train": "target"}, [folder / "given"])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, an adapter, and a finished result with its receipt."""
    for name in ("base", "given", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(name.encode())
    write_sealed(tmp_path / "out" / "stage.json", {"key": {}})
    asked = request(tmp_path)
    asked.keep(asked.content())
    return tmp_path


def test_a_result_is_done_as_long_as_nothing_changes(place: Path) -> None:
    assert request(place).is_done()
    assert request(place, output=str(place / "another")).is_done()


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "rows.jsonl").write_text("{}"),
        lambda place: (place / "given" / "weights.safetensors").write_bytes(b"other"),
        lambda place: (place / "given" / "further.json").write_bytes(b"{}"),
        lambda place: (place / "base" / "weights.safetensors").write_bytes(b"other"),
        lambda place: (place / "out" / "weights.safetensors").write_bytes(b"other"),
        lambda place: (place / "out" / "weights.safetensors").unlink(),
        lambda place: write_sealed(place / "out" / "stage.json", {"key": {"seed": 1}}),
        lambda place: (place / "out" / "stage.json").unlink(),
        lambda place: (place / "out" / "receipt.json").write_text("{"),
        lambda place: (place / "out" / "receipt.json").write_text("[]"),
    ],
    ids=[
        *("rows", "adapter", "file-of-adapter", "model", "result", "result-lost", "other-result"),
        *("unfinished", "receipt-cut", "receipt-other"),
    ],
)
def test_a_result_is_looked_at_in_full_once_a_file_has_changed(
    place: Path, change: Callable[[Path], Any]
) -> None:
    asked = request(place)
    change(place)
    assert not asked.is_done()


def test_other_settings_options_and_inputs_are_other_requests(place: Path) -> None:
    asked = request(place)
    assert not request(place, seed=7).is_done()
    assert not Request(asked.place, asked.config, {"train": "source"}, asked.read).is_done()
    assert not Request(asked.place, asked.config, asked.options, []).is_done()


def test_other_code_is_another_request(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp_lora.plans.receipt._PACKAGE", place / "given")
    assert not request(place).is_done()


@pytest.mark.parametrize("files", ["xquad", {"hub": "owner/set", "splits": {"train": "train"}}])
def test_what_is_on_a_hub_or_shared_by_processes_has_no_content(
    place: Path, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"target": {"language": "es", "files": files}}
    assert request(place, data=data).content() is None
    assert request(place, model={"name": "owner/name/file.gguf"}).content() is None
    assert request(place, model={"name": "owner/name"}).content() is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not request(place).is_done()


def test_what_changed_during_the_work_gets_no_receipt(place: Path) -> None:
    (place / "out" / "receipt.json").unlink()
    asked = request(place)
    before = asked.content()
    (place / "rows.jsonl").write_text("{}")
    asked.keep(before)
    assert not (place / "out" / "receipt.json").exists()


def test_a_run_is_done_only_with_all_its_stages(place: Path) -> None:
    config: RunConfig = make_config(settings(place) | {"output": str(place)}, training=False)
    finish_run(place, ["out/stage.json"])
    asked = run_request(config)
    asked.keep(asked.content())
    assert asked.is_done()
    (place / "out" / "weights.safetensors").write_bytes(b"other")
    assert not asked.is_done()


def test_a_stage_that_is_done_loads_no_library(tmp_path: Path) -> None:
    tiny_backbone_folder(tmp_path / "base")
    for seed, name in enumerate(("source", "target")):
        tiny_adapter_folder(tmp_path / name, tiny_model(), seed=seed)
    adapters = {name: str(tmp_path / name) for name in ("source", "target")}
    config = write_job(tmp_path / "job.yaml", settings(tmp_path) | {"adapters": adapters})

    def merge() -> str:
        line = ["merge", str(config), "--out", str(tmp_path / "merged")]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *line],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        )
        return done.stdout + done.stderr

    assert f"wrote {tmp_path / 'merged'}" in merge()
    marker = (tmp_path / "merged" / "stage.json").read_bytes()
    again = merge()
    assert f"{tmp_path / 'merged'} holds this result already" in again
    assert again.splitlines()[-1] == "loaded:"
    file = tmp_path / "source" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1}))
    assert "the folder given as source has another content" in merge()
    assert (tmp_path / "merged" / "stage.json").read_bytes() == marker
