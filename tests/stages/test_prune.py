"""Joint batches: source rows stand beside the target rows that an adapter is fine-tuned on."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lora.config.run_config import make_config
from grasp_lora.plans.compare import compare_methods
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.session import Session
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage
from grasp_lora.workbench.context import open_context
from helpers import rows_trained, tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import TRAINED, job

EPOCHS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    tiny_backbone_folder(folder / "base")
    for seed, role in enumerate(("source", "target")):
        tiny_adapter_folder(folder / role, tiny_model(), r=4, seed=seed)
    return folder


def settings(place, source: int | None):
    """Return settings with so many source train rows; None gives no source rows at all."""
    training = {"epochs": EPOCHS, "batch_size": 4, "patience": None}
    values = job(place, train={"finetune": training})
    values["adapters"] = {role: str(place / role) for role in ("source", "target")}
    values["data"]["source"]["rows"] = {"train": source, "dev": 4}
    if source is None:
        del values["data"]["source"]
    return make_config(values)


def finetuned(place, folder, source, patch, **options) -> tuple[list[str], Path]:
    """Return the ids read by a fine-tuning, and the folder of its result."""
    config = settings(place, source)
    context, plan = open_context(config, quiet=True), PlanBuilder()
    plan.add(Stage("out", "prune", config, {"start": place / "source"}, options))
    with patch.context() as inner:
        read = rows_trained(inner)
        work_off(plan.build(), folder, Session(config, context.data, context))
    return [row.id for row in read], folder / "out"


def test_each_epoch_reads_as_many_source_rows_as_target_rows(place, tmp_path, monkeypatch):
    read, joint = finetuned(place, tmp_path / "a", 20, monkeypatch, joint=True)
    plain, alone = finetuned(place, tmp_path / "b", 20, monkeypatch)
    times = Counter(read)
    assert len(read) == EPOCHS * 2 * TRAINED
    assert {name: times[name] for name in plain} == dict.fromkeys(plain, EPOCHS)
    source = {name: count for name, count in times.items() if name not in plain}
    assert len(source) == 20, "24 readings go through all source rows"
    assert sorted(source.values()) == [1] * 16 + [2] * 4
    one, other = (load_file(f / "adapter_model.safetensors") for f in (joint, alone))
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_fewer_source_rows_are_each_read_once_an_epoch(place, tmp_path, monkeypatch):
    read, _ = finetuned(place, tmp_path, 3, monkeypatch, joint=True)
    assert len(read) == EPOCHS * (TRAINED + 3)
    assert sorted(Counter(read).values()) == [EPOCHS] * (TRAINED + 3)


def test_without_source_rows_there_are_no_joint_batches(place, tmp_path, monkeypatch):
    with pytest.raises(NotApplicable, match=r"joint .* needs source rows: give data\.source"):
        finetuned(place, tmp_path, None, monkeypatch, joint=True)


def test_a_comparison_says_that_the_method_has_no_source_rows(place, tmp_path):
    names = ("source-finetuned", "source-finetuned-joint")
    found = compare_methods(settings(place, None), tmp_path / "none", names, (1,), quiet=True)
    assert list(found["not_applicable"]) == ["source-finetuned-joint"]
    assert "data.source" in found["not_applicable"]["source-finetuned-joint"]
    found = compare_methods(settings(place, 8), tmp_path / "some", names, (1,), quiet=True)
    steps = {row["method"]: row["steps"] for row in found["rows"]}
    assert steps == {"source-finetuned": EPOCHS * 2, "source-finetuned-joint": EPOCHS * 4}
