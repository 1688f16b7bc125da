"""What a plan is predicted to take on GPUs: the glue from stages to the model of cost."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.core.forecast.machines import GPUS, SHAPES
from grasp_lora.core.forecast.times import FOUR_BITS, answer_seconds, read_seconds, step_seconds
from grasp_lora.plans.forecast import Place, forecast, place_of, setting_of, shape_of
from grasp_lora.plans.show import Planned, planned_run
from grasp_lora.stages.stage import Cost
from grasp_lora.workbench.context import new_tokens
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    tiny_backbone_folder(folder / "base")
    adapters = {
        role: str(tiny_adapter_folder(folder / role, tiny_model(), r=4, seed=seed))
        for seed, role in enumerate(("source", "target"))
    }
    changes = {"adapters": adapters, "controller": {"rounds": 2, "rows": 4}, "recipe": "grasp"}
    return write_job(folder / "run.yaml", job(folder, **changes))


@pytest.fixture(scope="module")
def config(settings):
    return load_config(settings)


def place(size="8B", gpus=1, gpu="h100"):
    return Place(gpu, GPUS[gpu], gpus, size, SHAPES[size])


def planned(name, kind, cost, needs=(), state="absent"):
    return Planned(name, kind, needs, state, (), cost)


def test_a_stage_takes_its_steps_what_it_reads_and_what_it_answers(config):
    training = config.training("search")
    rows = training.batch_size * training.accumulation
    cost = Cost(steps=10, tokens=10 * rows * 100 + 32 * 50, forwards=32, trained=10 * rows * 100)
    (found,) = forecast([planned("search", "search", cost)], config, place()).stages
    setting = replace(setting_of(config, place(), "search"), together=training.batch_size)
    batch = config.evaluate.batch_size
    wanted = 10 * step_seconds(setting, rows, 100)
    wanted += -(-32 // batch) * read_seconds(setting, batch, 50)
    assert found.alone == found.shared == pytest.approx(wanted)
    assert found.dollars == pytest.approx(wanted / 3600 * GPUS["h100"].price)

    cost = Cost(tokens=5 * 40, answers=5)
    (found,) = forecast([planned("evaluation", "evaluate", cost)], config, place()).stages
    most = new_tokens(config, "target", "test")
    setting = setting_of(config, place(), "evaluate")
    assert found.alone == pytest.approx(answer_seconds(setting, min(batch, 5), 40, most))


def test_what_is_done_costs_nothing_and_a_merge_only_its_loading(config):
    stages = [
        planned("adapters/source", "train", Cost(9, 900, trained=900), state="done"),
        planned("merged", "merge", Cost(), ("adapters/source",)),
    ]
    found = forecast(stages, config, place())
    assert [one.name for one in found.stages] == ["merged"]
    assert found.stages[0].alone == 0
    assert found.one_by_one == found.side_by_side == found.loading > 10


def test_stages_side_by_side_wait_for_what_they_need(config):
    cost = Cost(1000, 400_000, trained=400_000)
    stages = [
        planned("a", "train", cost),
        planned("b", "train", cost),
        planned("c", "prune", cost, ("a", "b")),
    ]
    one, two = (forecast(stages, config, place(gpus=n)) for n in (1, 2))
    a, b, c = (stage.alone for stage in one.stages)
    assert one.side_by_side == pytest.approx(3 * one.loading + a + b + c)
    assert two.side_by_side == pytest.approx(2 * two.loading + max(a, b) + c)
    assert one.one_by_one == pytest.approx(one.loading + a + b + c)


def test_what_does_not_fit_is_told(config):
    stages = [planned("final", "prune", Cost(10, 4000, trained=4000))]
    found = forecast(stages, config, place("70B", gpu="l4"))
    assert found.stages[0].alone is None
    assert found.one_by_one is None
    assert found.side_by_side is None
    eight = forecast(stages, config, place("70B", 8, "h100"))
    assert eight.stages[0].alone is None
    assert eight.one_by_one > 0
    assert eight.side_by_side is None
    assert eight.stages[0].memory < GPUS["h100"].memory


def test_settings_decide_how_the_backbone_is_used(config):
    train, search = (setting_of(config, place(), kind) for kind in ("train", "search"))
    assert (train.rank, search.rank) == (config.lora.r, 2 * config.lora.r)
    four = config.model_copy(
        update={"model": config.model.model_copy(update={"quantization": "4bit"})}
    )
    assert setting_of(four, place(), "train").entry == FOUR_BITS


def test_the_size_of_the_configured_backbone_is_read_from_its_configuration(config):
    found = place_of(config, "a100", 2, None, 1.5)
    model = tiny_model()
    assert found.shape == shape_of(model.config)
    assert found.shape.layers == model.config.num_hidden_layers
    assert found.machine.price == 1.5
    assert found.gpus == 2
    with pytest.raises(ValueError, match="give --model-size"):
        shape_of(tiny_model("gpt2").config)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpu", "h1000"], "--gpu: there is no GPU 'h1000' here; choose from l4"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus must be 1 or more, got 0"),
        (["--gpu", "h100", "--model-size", "9B"], "--model-size: there is no '9B' here"),
        (["--gpu", "h100", "--price", "-1"], "--price must be dollars an hour, 0 or more"),
        (["--gpu", "h100", "--price", "nan"], "--price must be dollars an hour, 0 or more"),
        (["--gpus", "4"], "--gpus, --model-size and --price need --gpu NAME"),
        (["--model-size", "8B"], "--gpus, --model-size and --price need --gpu NAME"),
    ],
)
def test_a_wrong_option_is_one_error_before_any_work(settings, options, told):
    done = CliRunner().invoke(app, ["plan", str(settings), *options])
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())


def test_the_command_shows_what_it_predicts_below_the_plan(settings, config):
    plain = CliRunner().invoke(app, ["plan", str(settings)])
    assert plain.exit_code == 0
    assert "predicted" not in plain.output.lower()
    options = ["--gpu", "h100", "--gpus", "4", "--model-size", "8B", "--price", "36000"]
    done = CliRunner().invoke(app, ["plan", str(settings), *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "predicted for 4 x h100, 8B" in done.output
    assert "not measured" in done.output
    stages, _ = planned_run(config, quiet=True)
    for one in stages:
        assert done.output.count(one.name) >= 2
    (line,) = [row for row in done.output.splitlines() if row.startswith("one stage after")]
    seconds = float(line.split(": ")[1].split(" s,")[0])
    dollars = float(line.split("$")[1].replace(",", ""))
    assert dollars == pytest.approx(seconds * 40, rel=0.05)
