"""A baseline is fine-tuned for as many optimizer steps as the result, in every plan."""

import math
from fractions import Fraction

import pytest

from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import make_config
from grasp_lora.plans.compare import plan_of
from grasp_lora.plans.run import run
from grasp_lora.plans.run_plan import TUNED, UNPRUNED, run_plan
from grasp_lora.stages.stage import Sizes
from grasp_lora.workbench.beside import target_epoch
from grasp_lora.workbench.rows import RunData
from helpers import tiny_backbone_folder
from jobs import TRAINED, job, with_trainings, write_rows

SPLITS = {"train": 11, "dev": 4, "micro_dev": 4, "test": 4}
BATCH = {"batch_size": 2, "accumulation": 2}
PER_EPOCH = 3  # 11 rows make 6 batches of 2, and 3 steps of 2 batches

LENGTHS = {
    "epochs": ({"epochs": 4}, {"epochs": 3}),
    "one epoch each": ({"epochs": 1}, {"epochs": 1}),
    "steps of both": ({"max_steps": 20}, {"max_steps": 20}),
    "steps of both, beside epochs": ({"max_steps": 7, "epochs": 1}, {"max_steps": 4, "epochs": 9}),
    "steps of the search": ({"max_steps": 20}, {"epochs": 5}),
    "steps of the final run": ({"epochs": 2}, {"max_steps": 5}),
    "few steps": ({"max_steps": 1}, {"max_steps": 1}),
}


def steps_by_hand(training):
    return training.get("max_steps") or training["epochs"] * PER_EPOCH


@pytest.fixture
def config_of(tmp_path):
    tiny_backbone_folder(tmp_path / "base")

    def make(mode, search, finetune, **changes):
        values = job(
            tmp_path,
            search=BATCH | search,
            finetune=BATCH | finetune,
            evaluate={"baselines": True},
            **changes,
        )
        values["finetune"] = {"mode": mode}
        return make_config(values)

    return make


def steps_of(plan):
    sizes = Sizes(
        {("target", split): count for split, count in SPLITS.items()},
        {("target", split): 5.0 for split in SPLITS},
    )
    return {name: cost.steps for name, cost in plan.cost(sizes).items()}


def examples():
    return RunData({"target": {split: [None] * count for split, count in SPLITS.items()}})


@pytest.mark.parametrize("mode", ["restart", "continue"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_a_run_trains_its_baselines_as_long_as_its_result(config_of, mode, lengths):
    steps = steps_of(run_plan(config_of(mode, *lengths), examples()).plan)
    search, final = map(steps_by_hand, lengths)
    assert (steps["search"], steps["shipped"]) == (search, final)
    result = final + (search if mode == "continue" else 0)
    assert (steps[TUNED], steps[UNPRUNED]) == (result, result)


@pytest.mark.parametrize("mode", ["restart", "continue"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_all_methods_of_a_comparison_train_as_long(config_of, mode, lengths):
    plan, _ = plan_of(config_of(mode, *lengths), (1,), SPLITS["train"])
    steps = steps_of(plan)
    search, final = map(steps_by_hand, lengths)
    whole = final + (search if mode == "continue" else 0)
    for name in ("source-finetuned", "average-finetuned", "grid-0.4", "grasp-restart"):
        assert steps[f"{name}-s1/final"] == whole, name
    assert steps["grasp-restart-s1/search"] == whole, "the search is as long as a fine-tuning"
    parts = steps["grasp-continue-s1/search"], steps["grasp-continue-s1/final"]
    assert parts[0] + parts[1] == max(whole, 2)
    assert abs(parts[0] - parts[1]) < 2 * PER_EPOCH
    if whole % PER_EPOCH == 0 and whole > PER_EPOCH:
        assert parts[0] == PER_EPOCH * math.ceil(whole / PER_EPOCH / 2), "whole epochs stay whole"


def test_with_other_batches_the_passes_over_the_examples_are_equal(config_of):
    single = {"batch_size": 1, "accumulation": 1}
    config = config_of("continue", {"epochs": 2} | single, {"epochs": 4})
    assert steps_of(run_plan(config, examples()).plan)[UNPRUNED] == (2 + 4) * PER_EPOCH
    config = config_of("continue", {"max_steps": 33} | single, {"max_steps": 4})
    passes = Fraction(33, 11) + Fraction(4, PER_EPOCH)
    assert steps_of(run_plan(config, examples()).plan)[UNPRUNED] == passes * PER_EPOCH


def test_the_steps_done_are_equal_as_well(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    values = with_trainings(
        job(
            tmp_path,
            search={"max_steps": 5, "batch_size": 4},
            finetune={"epochs": 2, "batch_size": 4, "patience": None},
            evaluate={"max_new_tokens": 2, "baselines": True},
        )
    )
    values["finetune"] = {"mode": "continue"}
    out = run(make_config(values), quiet=True)

    def done(stage):
        return read_json(out / stage / "stage.json")["steps"]

    assert (done("search"), done("shipped")) == (5, 2 * TRAINED // 4)
    assert done(TUNED) == done(UNPRUNED) == 5 + 4


@pytest.mark.parametrize("mode", ["restart", "continue"])
@pytest.mark.parametrize("there", [3, 40])
def test_with_extra_rows_too_all_are_trained_as_long(config_of, tmp_path, mode, there):
    """An epoch reads 11 labelled and up to 11 extra rows: in 6 steps, or in 4 of 14 rows."""
    path = write_rows(tmp_path / "extra.jsonl", range(there))
    data = job(tmp_path)["data"] | {"extra": {"files": str(path)}}
    config = config_of(mode, {"max_steps": 9}, {"max_steps": 7}, data=data)
    rows = RunData(examples().parts | {"extra": {"train": [None] * there}})
    read, per_epoch = (14, 4) if there == 3 else (22, 6)
    assert target_epoch(config, rows) == read

    def lengths(plan):
        parts = {("target", name): count for name, count in SPLITS.items()}
        parts[("extra", "train")] = there
        sizes = Sizes(parts, dict.fromkeys(parts, 5.0))
        return {name: cost.steps for name, cost in plan.cost(sizes).items()}

    whole = 7 + (9 if mode == "continue" else 0)
    steps = lengths(run_plan(config, rows).plan)
    assert (steps[TUNED], steps[UNPRUNED], steps["shipped"]) == (whole, whole, 7)
    config = config_of(mode, {"epochs": 2}, {"epochs": 3}, data=data)
    steps = lengths(run_plan(config, rows).plan)
    passes = 3 + (2 if mode == "continue" else 0)
    assert (steps[TUNED], steps["search"]) == (passes * per_epoch, 2 * per_epoch)
    plan, _ = plan_of(config_of(mode, {"max_steps": 9}, {"max_steps": 7}, data=data), (1,), read)
    steps = lengths(plan)
    assert steps["source-finetuned-s1/final"] == steps["grasp-restart-s1/search"] == whole
