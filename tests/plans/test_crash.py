"""kill -9 in the middle of a stage, then the same command again."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grasp_lora.base.files import read_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.single import train_adapter
from grasp_lora.workbench.context import open_context
from helpers import tiny_backbone_folder
from jobs import QUIET_EVALUATION, TRAIN, job, start, write_job

STEPS = {"epochs": 2, "batch_size": 1, "save_every": 1}
RESULTS = (
    "ratio.json",
    "rounds.jsonl",
    "scores.json",
    "adapters/source/adapter_model.safetensors",
    "adapters/target/adapter_model.safetensors",
    "final/adapter_model.safetensors",
    "final/adapter_config.json",
)
STAGES = ("adapters/source", "search", "shipped")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    tiny_backbone_folder(folder / "base")
    return folder


def config(base: Path, name: str) -> Path:
    train = dict.fromkeys(TRAIN, STEPS)
    values = job(base, train=train, output=str(base / name), controller={"rounds": 6, "rows": 4})
    return write_job(base / f"{name}.yaml", values | {"evaluate": QUIET_EVALUATION})


@pytest.fixture(scope="module")
def uninterrupted(base):
    done = CliRunner().invoke(app, ["run", str(config(base, "whole"))])
    assert done.exit_code == 0, done.output
    return {name: (base / "whole" / name).read_bytes() for name in RESULTS}


def kill_when(process, reached: Callable[[], bool]) -> str:
    """Return what the process had printed for the user."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, f"ended before it was killed: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -9
    return said


def test_a_run_killed_in_every_stage_ends_as_if_it_had_not_been(base, uninterrupted):
    path, out = config(base, "killed"), base / "killed"

    def reached(stage: str) -> bool:
        complete = len(list((out / f"{stage}.work").glob("checkpoint-*/grasp.json")))
        return complete >= 2 and (
            stage != "search" or (out / "search.work/result/rounds.jsonl").exists()
        )

    for number, stage in enumerate(STAGES):
        said = kill_when(start("run", path), partial(reached, stage))
        assert not (out / stage / "stage.json").exists(), "the kill came too late to test anything"
        assert said.count("resuming from checkpoint-") == min(number, 1)
    again = CliRunner().invoke(app, ["run", str(path)])
    assert again.exit_code == 0, again.output
    assert "final fine-tuning: resuming from checkpoint-" in again.output
    for name in RESULTS:
        assert (out / name).read_bytes() == uninterrupted[name], name
    assert not list(out.rglob("*.work"))
    time = read_json(out / "provenance.json")["time"]
    assert time["resumed"] == len(STAGES)
    assert all(time["stages"][stage] > 0 for stage in STAGES), "times of killed processes are kept"


def test_a_finished_run_is_not_run_again_unasked(base, uninterrupted, monkeypatch):
    # Its receipt tells that it is finished, so no row is read.
    monkeypatch.setattr("grasp_lora.plans.run.load_run_data", None)
    before = {p: p.stat().st_mtime_ns for p in (base / "whole").rglob("*")}
    done = CliRunner().invoke(app, ["run", str(config(base, "whole"))])
    assert done.exit_code == 0, done.output
    said = done.output.replace("\n", "")
    assert f"{base / 'whole'} holds this finished run already; --overwrite makes it again" in said
    assert "wrote" not in done.output
    assert {p: p.stat().st_mtime_ns for p in (base / "whole").rglob("*")} == before


def test_a_stage_killed_once_patience_ran_out_does_no_further_step(base):
    training = {"learning_rate": 0.3, "epochs": 4, "batch_size": 4, "patience": 1}
    values = job(base, train={"target": training})
    opened = open_context(load_config(write_job(base / "patience.yaml", values)), quiet=True)

    def trained(name: str) -> tuple[dict, bytes]:
        out = train_adapter(opened.config, "target", base / name, context=opened)
        facts = read_json(out / "stage.json")
        del facts["seconds"], facts["peak_memory_bytes"], facts["sha256"]
        return facts, (out / "adapter_model.safetensors").read_bytes()

    def killed() -> None:
        raise KeyboardInterrupt

    whole = trained("patient")
    assert whole[0]["steps"] == 2, "patience was to run out after the first epoch"
    opened.on_saved = killed
    with pytest.raises(KeyboardInterrupt):
        trained("interrupted")
    opened.on_saved = lambda: None
    assert trained("interrupted") == whole
