"""Stages as jobs of Slurm: submitit's local jobs, and a stand-in of Slurm's commands."""

import functools
import os
import signal
from pathlib import Path

import pytest

import adding
import fake_slurm
from adding import driver, plan_of, processes, starts, sums, wait_until
from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.executor import log_of
from grasp_lora.plans.launch import Pool, work_off_many
from grasp_lora.plans.on_slurm import FOLDER
from grasp_lora.plans.session import Session
from grasp_lora.stages.stage import Sizes
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import load_run_data
from helpers import tiny_backbone_folder
from jobs import job, write_job

pytest.importorskip("submitit", reason="needs the extra slurm: pip install submitit")

pytestmark = pytest.mark.timeout(900)

LOCAL = {"cluster": "local", "timeout_min": 10}


@pytest.fixture(autouse=True)
def kind_of_work(tmp_path_factory):
    with adding.kind_of_work(tmp_path_factory.mktemp("work")):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    tiny_backbone_folder(folder / "base")
    return load_config(write_job(folder / "run.yaml", job(folder)))


@pytest.fixture
def added(config):
    return functools.partial(adding.added, config)


@pytest.fixture
def run(config):
    data = load_run_data(config, Reporter(quiet=True).say)

    def work(folder, *stages, **pool):
        pool = {"jobs": 4, "threads": 1, "on": "slurm", "options": LOCAL} | pool
        session = Session(config, data, quiet=True)
        return work_off_many(plan_of(stages), folder, session, Sizes({}, {}), Pool(**pool))

    return work


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The stand-in's commands are found first; returns its folder."""
    fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_jobs_end_as_processes_here_do(run, added, tmp_path):
    stages = [
        added("first", 1),
        added("bad", fail=True),
        added("odd", refuse=True),
        added("second", 10, needs=("first",)),
        added("after", needs=("bad",)),
    ]
    found = run(Path(os.path.relpath(tmp_path / "q")), *stages)
    assert sums(tmp_path / "q", ["first", "second"]) == {"first": 1, "second": 11}
    assert "failed (exit code 1)" in found["bad"].error
    assert "told to fail" in log_of(tmp_path / "q" / "bad").read_text()
    assert found["after"].error == "not done, bad has no result"
    assert found["odd"].refused == "told to refuse"
    assert not log_of(tmp_path / "q" / "first").exists()


def test_a_job_that_is_preempted_is_queued_again(run, added, tmp_path):
    place = tmp_path / "q"
    process = driver(place, [added("slow", 2, sleep=4.0)], on="slurm", options=LOCAL)
    wait_until((place / "slow.starts").exists)
    (parent,) = processes("submitit.core._submit", str(place))
    (child,) = processes("grasp_lora.plans.worker", str(place), "slow")
    parent.send_signal(signal.SIGUSR2)
    assert process.wait(600) == 0
    assert not child.is_running()
    assert sums(place, ["slow"]) == {"slow": 2}
    assert starts(place, "slow") == 2


def test_what_is_ready_at_once_is_an_array(run, added, tmp_path, slurm):
    stages = [added("a"), added("b", 2)]
    options = {"slurm_partition": "long", "timeout_min": 7, "gpus_per_node": 1}
    found = run(tmp_path / "q", *stages, options=options)
    assert sums(tmp_path / "q", found) == {"a": 1, "b": 2}
    (script,) = (slurm / "calls").read_text().splitlines()
    asked = Path(script).read_text()
    for flag in ("array=0-1%2", "partition=long", "time=7", "gpus-per-node=1", "cpus-per-task=1"):
        assert f"#SBATCH --{flag}\n" in asked
    assert read_json(tmp_path / "q" / FOLDER / "jobs.json")["b"]["job"] == "101_1"


def test_a_driver_that_was_killed_joins_the_jobs_it_left(added, tmp_path, slurm):
    place, stages = tmp_path / "q", [added("slow", 2, sleep=25.0), added("c", needs=("slow",))]
    process = driver(place, stages, on="slurm")
    wait_until((place / "slow.starts").exists)
    process.kill()
    process.wait()
    assert driver(place, stages, on="slurm").wait(600) == 0
    assert sums(place, ["slow", "c"]) == {"slow": 2, "c": 3}
    assert starts(place, "slow") == 1
    assert len((slurm / "calls").read_text().splitlines()) == 2, "slow and c, once each"


def test_stopping_cancels_the_jobs(run, added, tmp_path, slurm):
    place, stages = tmp_path / "q", [added("slow", 2, sleep=60.0)]
    process = driver(place, stages, on="slurm")
    wait_until((place / "slow.starts").exists)
    process.terminate()
    assert process.wait(600) == 128 + signal.SIGTERM
    wait_until(lambda: not processes("grasp_lora.plans.worker", str(place), "slow"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "local", "gpu": 1}, "submitit refuses the parameters of --engine: .*gpu"),
        ({"cluster": "the moon"}, "submitit refuses .*the moon"),
        ({"cluster": "slurm"}, "no Slurm here: .*srun.*; start where sbatch is"),
    ],
)
def test_what_submitit_does_not_take_is_one_line(run, added, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "q", added("a"), options=options)
