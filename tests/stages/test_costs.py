"""The cost that is planned for a training with rows beside the labelled ones is what it reads."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import make_config
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.stages.costs import Rows, steps_cost
from grasp_lora.stages.stage import Cost, Sizes, Stage
from grasp_lora.workbench.beside import wanted_beside
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.rows import load_run_data
from helpers import rows_trained, tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job

TRAIN, DEV, EXTRA = ("target", "train"), ("target", "dev"), ("extra", "train")
EXTRA_ROWS = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    tiny_backbone_folder(folder / "base")
    tiny_adapter_folder(folder / "start", tiny_model(), r=4)
    rows = [
        {
            "id": f"x{n}",
            "context": " ".join(f"Room {n}-{m} has a door." for m in range(1 + n * n % 7)),
            "question": f"What has room {n}?",
            "answers": ["a door"],
        }
        for n in range(EXTRA_ROWS)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "extra.jsonl").write_text(text, encoding="utf-8")
    return folder


def config_of(place: Path, weight: float | None, **training):
    training = {"batch_size": 3, "epochs": 3, "patience": None} | training
    own = {key: value for key, value in training.items() if key != "rows"}
    search = {key: value for key, value in own.items() if key != "patience"}
    train = {"target": own, "finetune": own, "search": search}
    values = job(place, train=train)
    values["adapters"] = {"source": str(place / "start")}
    if "rows" in training:
        values["finetune"] = {"rows": training["rows"]}
    if weight is not None:
        values["data"]["extra"] = {"files": str(place / "extra.jsonl"), "weight": weight}
    return make_config(values)


@dataclass
class Done:
    """What a stage was planned to cost, its facts, and the rows and tokens it trained on."""

    cost: Cost
    facts: dict
    rows: list[str]
    tokens: int
    sizes: Sizes

    @property
    def extra(self) -> int:
        """How many extra rows were read."""
        return sum(name.startswith("x") for name in self.rows)


def done(config, stages, folder, monkeypatch):
    """Return what a stage was planned to cost, and what it did, after those that it needs."""
    context, plan = open_context(config, quiet=True), PlanBuilder()
    session, sizes = Session(config, context.data, context), sizes_of(config, context.data)
    for stage in stages:
        work_off(plan.build(), folder, session)
        plan.add(stage)
    tokens: list[int] = []

    def count(model, _inputs, given):
        if model.training:
            tokens.append(int(given["attention_mask"].sum()))

    hook = context.backbone.model.register_forward_pre_hook(count, with_kwargs=True)
    with monkeypatch.context() as patch:
        read = rows_trained(patch)
        work_off(plan.build(), folder, session)
    hook.remove()
    last = stages[-1].name
    facts = read_json(folder / last / "stage.json")
    return Done(plan.build().cost(sizes)[last], facts, [row.id for row in read], sum(tokens), sizes)


TRAININGS = {
    "a part of the extra rows": (0.4, {}),
    "all of them": (5.0, {}),
    "several passes": (1.0, {"epochs": 5}),
    "steps within an epoch": (0.5, {"max_steps": 7}),
    "rows of like length": (0.5, {"order": "by-length", "max_steps": 5}),
    "accumulated": (0.6, {"batch_size": 2, "accumulation": 3}),
}


@pytest.mark.parametrize(("weight", "training"), TRAININGS.values(), ids=list(TRAININGS))
@pytest.mark.parametrize("kind", ["train", "prune", "joint"])
def test_the_tokens_planned_are_those_read(place, tmp_path, monkeypatch, kind, weight, training):
    config = config_of(place, weight, **training)
    options = {"role": "target"} if kind == "train" else {"joint": kind == "joint"}
    inputs = {} if kind == "train" else {"start": place / "start"}
    stage = Stage("one", "train" if kind == "train" else "prune", config, inputs, options)
    found = done(config, [stage], tmp_path, monkeypatch)
    trained = Cost(found.facts["steps"], found.tokens, trained=found.tokens)
    assert found.cost == trained + found.sizes.reading(1 + config.training("target").epochs, DEV)
    assert found.extra
    source = {e.id for e in load_run_data(config, lambda _line: None).parts["source"]["train"]}
    assert any(name in source for name in found.rows) == (kind == "joint")


def test_without_rows_beside_the_cost_is_that_of_the_labelled_rows(place):
    config = config_of(place, None)
    sizes = Sizes({TRAIN: 7, EXTRA: 5}, {TRAIN: 10.0, EXTRA: 90.0})
    training = config.training("finetune")
    assert steps_cost(training, sizes, Rows((TRAIN,))) == Cost(9, 270, trained=270)
    assert steps_cost(training, Sizes({}, {}), Rows((TRAIN,), {EXTRA: 1.0})) == Cost()
    # 7 + 4 rows take 4 steps, and 3 epochs read 12 of the rows beside: 90 tokens each on average
    read = 21 * 10 + 12 * 90
    beside = Rows((TRAIN,), {EXTRA: 0.5})
    assert steps_cost(training, sizes, beside) == Cost(12, read, trained=read)


def test_a_retraining_on_all_labels_reads_more_rows_beside_them(place, tmp_path, monkeypatch):
    config = config_of(place, 0.5, epochs=2, learning_rate=0.003, rows="labelled")
    start = {"start": place / "start"}
    stages = [
        Stage("judged", "prune", config, start),
        Stage("whole", "prune", config, start | {"judged": "judged"}),
    ]
    found = done(config, stages, tmp_path, monkeypatch)
    assert found.facts["best"]["step"] == 2 * 4, "12 rows by threes, and the last epoch is the best"
    # 16 labelled rows and 8 extra rows by threes
    assert (found.facts["labelled"]["rows"], found.facts["labelled"]["steps"]) == (16, 2 * 8)
    assert found.cost == Cost(2 * 8, found.tokens, trained=found.tokens)
    assert found.extra == 2 * 8


def test_a_search_has_more_steps_and_its_rounds_spread_over_them(place, tmp_path, monkeypatch):
    config = config_of(place, 1.0, epochs=2)
    stage = Stage("search", "search", config, {"merged": place / "start"})
    found = done(config, [stage], tmp_path, monkeypatch)
    assert found.cost.steps == found.facts["steps"] == 2 * 6
    assert (len(found.rows), found.extra) == (2 * 16, 2 * 8)
    rounds = (tmp_path / "search" / "rounds.jsonl").read_text().splitlines()
    assert len(rounds) == 3
    assert json.loads(rounds[-1])["step"] > 2 * 3, "the rounds go on beyond labelled rows alone"
    probed = {name for line in rounds for name in json.loads(line)["rows"]}
    assert not any(name.startswith("x") for name in probed)


def test_an_untrained_search_does_not_depend_on_extra_rows(place):
    def cost(weight):
        config = config_of(place, weight)
        stage = Stage("search", "search", config, {"merged": place / "start"}, {"untrained": True})
        plan = PlanBuilder()
        plan.add(stage)
        return plan.build().cost(sizes_of(config, open_context(config, quiet=True).data))["search"]

    assert cost(None) == cost(1.0)


@pytest.mark.parametrize("fold", [0, 1])
def test_a_fold_reads_no_more_than_is_planned(place, tmp_path, monkeypatch, fold):
    config = config_of(place, 0.5, epochs=2)
    options = {"role": "target", "folds": 2, "fold": fold}
    stage = Stage("fold", "train", config, options=options)
    found = done(config, [stage], tmp_path, monkeypatch)
    assert found.facts["steps"] <= found.cost.steps
    labelled = found.facts["rows_trained"]
    assert found.extra == 2 * wanted_beside(0.5, labelled)
    assert len(found.rows) == 2 * labelled + found.extra


def test_all_labels_at_once_read_more_rows_beside_them(place, tmp_path, monkeypatch):
    config = config_of(place, 0.5)
    options = {"labelled": True, "epochs": 2}
    stage = Stage("one", "prune", config, {"start": place / "start"}, options)
    found = done(config, [stage], tmp_path, monkeypatch)
    assert found.cost == Cost(2 * 8, found.tokens, trained=found.tokens), (
        "16 labelled and 8 extra rows by threes"
    )
    assert found.extra == 2 * 8


def test_micro_dev_rows_may_judge_a_training_with_extra_rows(place, tmp_path, monkeypatch):
    config = config_of(place, 0.5)
    inputs = {"start": place / "start"}
    stage = Stage("one", "prune", config, inputs, {"micro_dev": True})
    found = done(config, [stage], tmp_path, monkeypatch)
    judged = found.sizes.reading(1 + 3, DEV, ("target", "micro_dev"))
    assert found.cost == Cost(3 * 4, found.tokens, trained=found.tokens) + judged
    assert found.extra == 3 * 4
