"""The probe of prune ratios of a finished adapter: what it finds, and what it reads."""

import pytest
import torch

from grasp_lora.adapters.opening import model_with_adapter
from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import make_config
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.stages.stage import Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.context import open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ratios")
    tiny_backbone_folder(folder / "base")
    tiny_adapter_folder(folder / "adapter", tiny_model(), r=4)
    return folder


@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_the_tokens_planned_are_those_read(place, tmp_path, importance):
    values = job(place, recipe="auto", importance=importance)
    values["adapters"] = {"source": str(place / "adapter")}
    numbers = {"train": range(6), "dev": range(10, 13), "micro_dev": range(20, 23)}
    files = {
        part: str(write_rows(tmp_path / f"{part}.jsonl", own, part))
        for part, own in numbers.items()
    }
    target = {"language": "es", "files": files, "prompt": "{context} {question}"}
    values["data"] = {"max_length": 200, "target": target}
    config = make_config(values)
    context, read = open_context(config, quiet=True), []

    def count(_model, _inputs, given):
        ids, mask = given["input_ids"], given.get("attention_mask")
        read.append(ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum()))

    hook = context.backbone.model.register_forward_pre_hook(count, with_kwargs=True)
    stage = Stage("one", "probe", config, {"adapter": place / "adapter"}, {"choice": "ratio"})
    work_off(Plan({"one": stage}), tmp_path, Session(config, context.data, context))
    hook.remove()
    cost = KINDS["probe"].cost(stage, sizes_of(config, context.data))
    assert cost.tokens == pytest.approx(sum(read), rel=0.02)
    probes = 5 * 6
    assert cost.forwards == probes + (6 if importance == "activation" else 0)
    found = read_json(tmp_path / "one" / "ratio.json")
    assert list(found["losses"]) == ["0.0", "0.2", "0.4", "0.6", "0.8"]
    with model_with_adapter(context.backbone, place / "adapter") as model, torch.no_grad():
        pool = context.rows("target", ["micro_dev", "dev"])
        losses = example_losses(model, pool.batches(range(6)), 6)
    ids = [row.id for row in pool.encoded]
    wanted = [losses[ids.index(one)] for one in found["rows"]]
    assert found["losses"]["0.0"] == pytest.approx(wanted, abs=1e-5)
