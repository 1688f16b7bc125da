"""Given adapters that name another base model than the backbone: told before any work."""

import json

import pytest
from typer.testing import CliRunner

from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.given import check_given
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return (configuration file, source, target); both name other bases, not the same one."""
    folder = tmp_path_factory.mktemp("given")
    tiny_backbone_folder(folder / "base")
    adapters = {}
    for seed, role in enumerate(("source", "target")):
        adapters[role] = tiny_adapter_folder(folder / role, tiny_model(), seed=seed)
        path = adapters[role] / "adapter_config.json"
        named = {"base_model_name_or_path": f"someone/{role}-base"}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
    paths = {role: str(path) for role, path in adapters.items()}
    file = write_job(folder / "run.yaml", job(folder, adapters=paths))
    return str(file), adapters["source"], adapters["target"]


def check_told(output):
    said = " ".join(output.split())
    assert "source names someone/source-base as its base model; it is put on" in said
    assert "target names someone/target-base as its base model; it is put on" in said
    assert "different base models (someone/source-base, someone/target-base)" in said


def test_another_base_is_told_before_a_run(place, capsys):
    file, *adapters = place
    check_given(open_context(load_config(file)), adapters)
    check_told(capsys.readouterr().err)


def test_another_base_is_told_by_merge_and_precheck(place, tmp_path):
    file, *_ = place
    for command in (["merge", file, "--out", str(tmp_path / "merged")], ["precheck", file]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        check_told(done.output)
