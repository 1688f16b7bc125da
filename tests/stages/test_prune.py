"""Joint batches, and the masks and values of each importance and structure."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import make_config
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.second_order import compensated
from grasp_lora.plans.compare import compare_methods
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.training.live import LiveAdapter, block_importance
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.merged_folder import read_start
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


def own_settings(place, **changes):
    """Return settings of given adapters on rows of one's own, a few steps of search."""
    training = {"epochs": 2, "batch_size": 4, "patience": None}
    values = job(place, train={"finetune": training, "search": training}, **changes)
    values["adapters"] = {role: str(place / role) for role in ("source", "target")}
    return make_config(values)


def worked_off(folder, config, *stages):
    """Do stages; return the context that they had."""
    context, plan = open_context(config, quiet=True), PlanBuilder()
    for stage in stages:
        plan.add(stage)
    work_off(plan.build(), folder, Session(config, context.data, context))
    return context


@pytest.mark.parametrize(
    ("importance", "structure", "ratio", "known"),
    [
        ("taylor", "entries", 0.4, 0.4),
        ("taylor-smoothed", "rank", 0.5, 0.5),
        ("activation", "2:4", 0.3, 0.5),
        ("obs", "entries", 0.4, 0.4),
    ],
)
def test_masks_and_values_are_those_of_the_rule(
    place, tmp_path, importance, structure, ratio, known
):
    config = own_settings(place, importance=importance, structure=structure)
    start = {"start": place / "source"}
    stage = Stage("out", "prune", config, start, {"ratio": ratio, "untrained": True})
    context = worked_off(tmp_path, config, stage)
    facts = read_json(tmp_path / "out" / "stage.json")
    assert facts["ratio"] == known
    assert facts["zeros"]["exported"] == pytest.approx(known, abs=0.01)
    with context.live(read_start(place / "source", context.backbone), config.mask_unit) as live:
        measured = context.norms(live, importance)
        (masks,) = live.masks(block_importance(IMPORTANCE[importance], measured), [ratio])
        expected = {}
        for block, a, b in live.effective_blocks():
            keep = masks[block.a].keep(), masks[block.b].keep()
            values = a * keep[0], b * keep[1]
            if importance == "obs":
                values = compensated(a, b, *keep, measured[block.module])
                assert not torch.equal(values[0], a * keep[0])
            expected[block.module] = values
    written = read_adapter(tmp_path / "out", context.backbone.model).adapter
    for name, (a, b) in expected.items():
        found = written[name]
        assert torch.allclose(found.delta(), b @ a, atol=1e-6), name


def test_compensation_makes_up_for_what_is_pruned(place, tmp_path):
    errors = {}
    for importance in ("magnitude", "obs"):
        config = own_settings(place, importance=importance)
        options = {"ratio": 0.5, "untrained": True}
        stage = Stage("out", "prune", config, {"start": place / "source"}, options)
        context = worked_off(tmp_path / importance, config, stage)
        pruned = read_adapter(tmp_path / importance / "out", context.backbone.model).adapter
        whole = read_adapter(place / "source", context.backbone.model).adapter
        with context.live(read_start(place / "source", context.backbone), "merged") as live:
            curvatures = context.norms(live, "obs")
        errors[importance] = {
            name: torch.einsum(
                "ij,jk,ik->", gap := (whole[name].delta() - pruned[name].delta()),
                curvatures[name].moments, gap,
            )
            for name in whole
        }  # fmt: skip
    for name, error in errors["obs"].items():
        assert error < errors["magnitude"][name], name


@pytest.mark.parametrize(
    ("importance", "structure"),
    [("taylor", "entries"), ("taylor-smoothed", "rank"), ("obs", "entries"), ("obs", "2:4")],
)
def test_search_and_final_run_read_what_is_planned(
    place, tmp_path, importance, structure, monkeypatch
):
    fits, trial = [], LiveAdapter.trial

    def watched(self, masks, fit=None):
        fits.append(fit)
        return trial(self, masks, fit)

    monkeypatch.setattr(LiveAdapter, "trial", watched)
    config = own_settings(place, importance=importance, structure=structure)
    merged = {"source": place / "source", "target": place / "target"}
    stages = [
        Stage("merged", "merge", config, merged),
        Stage("search", "search", config, {"merged": "merged"}),
        Stage("final", "prune", config, {"start": "merged", "ratio": "search"}),
    ]
    context = worked_off(tmp_path, config, *stages)
    facts = read_json(tmp_path / "search" / "ratio.json")
    assert facts["importance"] == importance
    assert fits
    assert all((fit is not None) == (importance == "obs") for fit in fits)
    if structure == "2:4":
        assert facts["ratio"] in (0.0, 0.5)
    sizes = sizes_of(config, context.data)
    reads = 0 if importance.startswith("taylor") else TRAINED
    rounds, candidates, rows = 3, 3, 4
    planned = KINDS["search"].cost(stages[1], sizes).forwards
    assert planned == rounds * candidates * rows + reads
    final = KINDS["prune"].cost(stages[2], sizes).forwards
    plain = own_settings(place, importance="magnitude", structure=structure)
    without = Stage("final", "prune", plain, stages[2].inputs)
    assert final == KINDS["prune"].cost(without, sizes).forwards + TRAINED
