"""The command init, from its options to the description; completion of commands in a shell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from grasp_lora.cli import app, start
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a backbone, two adapters that name it, and labelled examples."""
    folder = tmp_path_factory.mktemp("start")
    tiny_backbone_folder(folder / "base")
    for name in ("source", "target"):
        config = tiny_adapter_folder(folder / name, tiny_model()) / "adapter_config.json"
        content = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "base")}
        config.write_text(json.dumps(content))
    write_rows(folder / "rows.jsonl", range(12))
    return folder


def init(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def test_init_writes_a_configuration_and_its_schema_and_describes_the_examples(place, tmp_path):
    out = tmp_path / "first.yaml"
    options = ["--data", place / "rows.jsonl", "--language", "ar", "--source", place / "source"]
    done = init(out, *options, "--target", place / "target")
    assert done.exit_code == 0, done.output
    found = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert found["model"] == str(place / "base")
    assert found["data"]["task"] == "qa"
    assert '# prompt: "أجب بكلمات من النص.' in out.read_text(encoding="utf-8")
    schema = json.loads((tmp_path / "grasp-lora.schema.json").read_text(encoding="utf-8"))
    assert schema["properties"]["budget"]["type"] == "number"
    assert "Leakage: none found" in done.output
    assert "| target/train | ar |" in done.output
    assert f"next: grasp-lora plan {out}" in done.output.replace("\n", "")
    again = init(out, *options)
    assert again.exit_code == 2
    assert "exists; name another file, or pass --overwrite" in again.output


def test_init_asks_on_a_terminal_for_what_no_option_gives(place, tmp_path, monkeypatch):
    answers = iter([str(place / "rows.jsonl"), "ar", str(place / "source")])
    monkeypatch.setattr(start, "_terminal", lambda: True)
    monkeypatch.setattr(start.typer, "prompt", lambda _question: next(answers))
    done = init(tmp_path / "first.yaml")
    assert done.exit_code == 0, done.output
    found = yaml.safe_load((tmp_path / "first.yaml").read_text(encoding="utf-8"))
    assert found["adapters"] == {"source": str(place / "source")}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], "--data"),
        (["--data", "x"], "--language"),
        (["--data", "x", "--language", "ar"], "--source or --source-data"),
    ],
)
def test_without_a_terminal_init_names_the_missing_option(tmp_path, given, missing):
    done = init(tmp_path / "first.yaml", *given)
    assert done.exit_code == 2
    assert f"{missing} is missing, and no terminal is there to ask" in done.output
    assert not (tmp_path / "first.yaml").exists()


def test_init_replaces_no_file_of_examples(place, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", range(12))
    before = rows.read_bytes()
    done = init(
        rows, "--overwrite", "--data", rows, "--language", "ar", "--source", place / "source"
    )
    assert done.exit_code == 2
    assert rows.read_bytes() == before


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_once_the_completion_is_installed(tmp_path):
    """In a home folder of its own; the shell is found by the process that starts the command."""
    command = tmp_path / "grasp-lora"
    code = 'import sys; sys.argv[0] = "grasp-lora"; from grasp_lora.cli import main; main()'
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    command.chmod(0o755)
    lines = [
        "grasp-lora --install-completion",
        "source ~/.bash_completions/grasp-lora.sh",
        "COMP_WORDS=(grasp-lora pu); COMP_CWORD=1",
        "_grasp_lora_completion grasp-lora",
        'echo "completed: ${COMPREPLY[@]}"',
        "grasp-lora --show-completion",
        "true",  # bash gives its own process to the last command, which would find no shell then
    ]
    own = {"HOME": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, env=os.environ | own
    )
    assert "completed: push\n" in done.stdout, done.stderr
    assert "complete -o default -F _grasp_lora_completion grasp-lora" in done.stdout
    assert "grasp-lora.sh" in (tmp_path / ".bashrc").read_text()
