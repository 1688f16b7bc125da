"""The power is cut in the middle of a run: what was not synced is lost, and the run goes on."""

import os
import random

import pytest
from benchmarks.torture_damage import result_of
from benchmarks.torture_power import LOST, Disk
from typer.testing import CliRunner

from grasp_lora.cli import app
from helpers import tiny_backbone_folder
from jobs import job, write_job

if os.name == "nt":
    pytest.skip("folders cannot be synced here", allow_module_level=True)


def test_a_run_after_a_power_cut_ends_as_if_there_had_been_none(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    steps = {"epochs": 1, "batch_size": 2, "save_every": 2}
    train = dict.fromkeys(("source", "target", "search", "finetune"), steps)
    out = tmp_path / "run"
    config = write_job(tmp_path / "run.json", job(tmp_path, train=train, controller={"rounds": 2}))

    def run() -> str:
        done = CliRunner().invoke(app, ["run", str(config)])
        assert done.exit_code == 0, done.output
        return done.output

    disk = Disk()
    with disk.watching():
        run()
    moments, wanted = disk.syncs, result_of(out)
    out.rename(tmp_path / "first")

    drawn, cuts = random.Random(5), {}
    for number, lost in enumerate(LOST * 2):
        cuts[drawn.randrange(number * moments // 6, (number + 1) * moments // 6)] = lost
    disk = Disk()

    def cut(count: int) -> None:
        if count in cuts:
            disk.survivors(out, tmp_path / f"cut-{count}", cuts[count])

    with disk.watching(cut):
        run()
    assert result_of(out) == wanted
    finished = 0
    for count, lost in cuts.items():
        out.rename(tmp_path / f"before-{count}")
        (tmp_path / f"cut-{count}").rename(out)
        finished += len(list(out.glob("*/stage.json")))
        said = run()
        assert result_of(out) == wanted, (count, lost)
        assert "damaged" not in said, "what a marker stands for was on the disk before it"
        assert not list(out.rglob("*.work"))
    assert finished > 6, "what was finished before a cut is not done again"
