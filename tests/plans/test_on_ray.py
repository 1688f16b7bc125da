"""Stages as tasks of Ray: a cluster of this machine with two places and one GPU that is none."""

import functools
import os
import signal

import pytest

import adding
from adding import driver, plan_of, processes, starts, sums, wait_until
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.compare import compare_methods
from grasp_lora.plans.executor import log_of
from grasp_lora.plans.launch import Pool, work_off_many
from grasp_lora.plans.on_ray import gpu_share
from grasp_lora.plans.session import Session
from grasp_lora.stages.stage import Sizes
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import load_run_data
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job

ray = pytest.importorskip("ray", reason="needs the extra ray: pip install ray")
# Workers of Ray yield to all else by default; on a busy machine they would hardly move.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
pytestmark = [
    pytest.mark.filterwarnings("ignore:::ray", "ignore::ResourceWarning"),
    pytest.mark.timeout(900),  # a cluster of its own takes half a minute and more
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The cluster that the tests of this file use; its processes know the stage "add"."""
    with (
        adding.kind_of_work(tmp_path_factory.mktemp("work")),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            num_gpus=1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    tiny_backbone_folder(folder / "base")
    adapters = {
        "source": str(tiny_adapter_folder(folder / "source", tiny_model(), r=4, seed=1)),
        "target": str(tiny_adapter_folder(folder / "target", tiny_model(), r=2, seed=2)),
    }
    steps = {"epochs": 1, "batch_size": 2}
    return load_config(
        write_job(folder / "run.yaml", job(folder, finetune=steps, adapters=adapters))
    )


@pytest.fixture
def added(config):
    return functools.partial(adding.added, config)


@pytest.fixture
def run(config, cluster):
    data = load_run_data(config, Reporter(quiet=True).say)

    def work(folder, *stages, **options):
        pool = Pool(2, threads=1, on="ray", options=options)
        session = Session(config, data, quiet=True)
        return work_off_many(plan_of(stages), folder, session, Sizes({}, {}), pool)

    return work


def test_tasks_end_as_processes_here_do(run, added, tmp_path):
    stages = [
        added("first", 1),
        added("bad", fail=True),
        added("odd", refuse=True),
        added("second", 10, needs=("first",)),
        added("after", needs=("bad",)),
    ]
    found = run(tmp_path / "q", *stages)
    assert sums(tmp_path / "q", ["first", "second"]) == {"first": 1, "second": 11}
    assert "failed (exit code 1)" in found["bad"].error
    assert "told to fail" in log_of(tmp_path / "q" / "bad").read_text()
    assert starts(tmp_path / "q", "bad") == 1, "an error would only be raised again"
    assert found["after"].error == "not done, bad has no result"
    assert found["odd"].refused == "told to refuse"


def test_a_stage_whose_process_is_killed_is_tried_again(run, added, tmp_path):
    place = tmp_path / "q"
    found = run(place, added("slow", 2, kill="once"))
    assert found["slow"].error is None
    assert sums(place, ["slow"]) == {"slow": 2}
    assert starts(place, "slow") == 2


def test_what_is_killed_every_time_fails(run, added, tmp_path):
    found = run(tmp_path / "q", added("slow", 2, kill="always"), max_retries=1)
    assert "failed" in found["slow"].error
    assert "ended by signal 9" in log_of(tmp_path / "q" / "slow").read_text()
    assert starts(tmp_path / "q", "slow") == 2


def test_a_driver_that_was_killed_goes_on(run, added, tmp_path):
    """Its cluster ends with it, and so does the stage that ran there."""
    place = tmp_path / "q"
    stages = [added("a"), added("slow", 2, sleep=60.0, once=True), added("c", needs=("slow",))]
    process = driver(place, stages, on="ray")
    wait_until((place / "slow.starts").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not processes("grasp_lora.plans.worker", str(place)))
    found = run(place, *stages)
    assert sums(place, found) == {"a": 1, "slow": 2, "c": 3}
    assert (starts(place, "a"), starts(place, "slow")) == (1, 2)


def test_a_comparison_has_the_same_bytes_as_one_here(config, cluster, tmp_path):
    for name, pool in (("here", Pool(threads=1)), ("ray", Pool(2, threads=1, on="ray"))):
        compare_methods(config, tmp_path / name, ("average-finetuned",), (1,), pool, quiet=True)
    weights = [p.relative_to(tmp_path / "here") for p in tmp_path.glob("here/**/*.safetensors")]
    weights += [p.relative_to(tmp_path / "here") for p in tmp_path.glob("here/**/*.jsonl")]
    assert len(weights) >= 2
    for file in weights:
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


def test_parameters_that_ray_does_not_take_are_one_line(run, added, tmp_path):
    with pytest.raises(ValueError, match=r"Ray refuses the parameters of --engine: .*num_moons"):
        run(tmp_path / "q", added("a"), num_moons=1)


@pytest.mark.parametrize(
    ("jobs", "gpus", "share"),
    [(1, 1, 1.0), (2, 1, 0.5), (4, 3, 0.5), (2, 8, 1.0), (3, 1, 1 / 3), (2, 0, 0.0)],
)
def test_stages_at_once_share_the_gpus(jobs, gpus, share):
    assert gpu_share(jobs, gpus) == share
