"""How a folder of stages stands, told from its files while stages run, wait and fail."""

import json

import pytest
from typer.testing import CliRunner

import adding
from adding import added, driver, plan_of, wait_until
from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.status import folder_status
from grasp_lora.plans.stored import write_plan
from helpers import tiny_backbone_folder
from jobs import job, write_job


@pytest.fixture(autouse=True)
def kind_of_work(tmp_path_factory):
    with adding.kind_of_work(tmp_path_factory.mktemp("work")):
        yield


@pytest.fixture
def config(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    return load_config(write_job(tmp_path / "run.yaml", job(tmp_path)))


def states(found):
    return {one["stage"]: one["state"] for one in found["stages"]}


def test_every_state_is_told_from_files_alone(config, tmp_path):
    place = tmp_path / "q"
    stages = [
        added(config, "first"),
        added(config, "bad", fail=True),
        added(config, "after", needs=("bad",)),
        added(config, "odd", refuse=True),
        added(config, "slow", sleep=600.0),
        added(config, "last", needs=("slow",)),
    ]
    write_plan(place, plan_of(stages), 1)
    found = folder_status(place)
    assert found["count"] == {"waiting": 6}
    assert found["driver"] is None
    process = driver(place, stages, jobs=0)
    try:
        wait_until((place / "slow.starts").exists)
        found = folder_status(place)
        assert states(found) == {
            "first": "done",
            "bad": "failed",
            "after": "failed",
            "odd": "refused",
            "slow": "running",
            "last": "waiting",
        }
        by_name = {one["stage"]: one for one in found["stages"]}
        assert by_name["bad"]["why"] == "ValueError: told to fail"
        assert by_name["after"]["why"] == "bad has no result"
        assert by_name["odd"]["why"] == "told to refuse"
        assert by_name["slow"]["where"].startswith(f"process {process.pid} on ")
        assert found["driver"]["where"] == by_name["slow"]["where"]
        assert found["driver"]["since"] <= by_name["slow"]["since"]
        printed = CliRunner().invoke(app, ["status", str(place), "--json"])
        assert json.loads(printed.stdout) == found
        assert str(tmp_path) not in printed.stdout, "paths are relative"
        told = CliRunner().invoke(app, ["status", str(place)], env={"COLUMNS": "200"}).stdout
        assert "1 done, 2 failed, 1 refused, 1 running, 1 waiting" in told
    finally:
        process.kill()
        process.wait()
    found = folder_status(place)
    assert states(found) | {"slow": "waiting"} == states(found)
    assert found["driver"] is None
    (place / "first" / "weights.json").write_text("7")
    (first, *_) = folder_status(place)["stages"]
    assert (first["state"], first["why"]) == ("waiting", "damaged")


def test_what_holds_no_plan_is_one_line(tmp_path):
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 2
    assert "plan.json' does not exist" in done.stderr
