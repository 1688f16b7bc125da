"""A finished adapter under a budget: the files that are written, and what they were measured as."""

import math
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import model_with_adapter
from grasp_lora.adapters.packed import QUANTIZED_FILE, load_quantized
from grasp_lora.base.files import read_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import make_config
from grasp_lora.core.budget import WHOLE, Option, added
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans.show import sizes_of
from grasp_lora.plans.single import shrink_adapter
from grasp_lora.stages.stage import Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.sizes import check_budget, resizable
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job, write_rows

RANKS = {"q_proj": 8}
"""The other modules have rank 4: the plain file fills them up with zeros."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shrink")
    tiny_backbone_folder(folder / "base", width=64)
    tiny_adapter_folder(folder / "adapter", tiny_model(width=64), r=4, rank_pattern=RANKS)
    return folder


@pytest.fixture(scope="module")
def config(place):
    numbers = {"train": range(4), "dev": range(10, 17), "micro_dev": range(20, 23)}
    numbers["test"] = range(30, 34)
    files = {
        part: str(write_rows(place / f"{part}.jsonl", own, part)) for part, own in numbers.items()
    }
    values = job(place, adapters={"source": str(place / "adapter")})
    target = {"language": "es", "files": files, "prompt": "{context} {question}"}
    values["data"] = {"max_length": 200, "target": target}
    return make_config(values)


@pytest.fixture(scope="module")
def context(config):
    return open_context(config, quiet=True)


def whole_bytes(place):
    return sum(2 * (one.A.numel() + one.B.numel()) for one in factors(place / "adapter").values())


def factors(folder):
    return read_adapter(folder).adapter


def shrunk(config, context, place, name, share):
    budget = share * whole_bytes(place) / 1e6
    return shrink_adapter(config, place / "adapter", budget, place / name, context=context)


@pytest.fixture(scope="module", params=[0.9, 0.45, 0.12])
def result(request, config, context, place):
    share = request.param
    return shrunk(config, context, place, f"out-{share}", share), int(share * whole_bytes(place))


def numbers_in(file):
    """Return the bytes of a safetensors file without its header."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return os.path.getsize(file) - 8 - header


def test_the_file_has_the_bytes_told_and_keeps_to_the_budget(result):
    folder, budget = result
    told = read_json(folder / "shrink.json")
    size = numbers_in(folder / QUANTIZED_FILE)
    assert told["bytes"] == size == sum(one["bytes"] for one in told["modules"].values())
    assert 0 < size <= budget
    for name, one in told["modules"].items():
        stored = load_file(folder / QUANTIZED_FILE)
        own = sum(t.nbytes for key, t in stored.items() if key.startswith(f"{name}."))
        assert own == one["bytes"]


def test_both_files_hold_the_same_numbers_bit_for_bit(result):
    folder, _ = result
    plain, small = factors(folder), load_quantized(folder)
    assert plain.keys() == small.keys()
    for name, (A, B) in small.items():
        assert plain[name].scaling == 1
        assert A.dtype == B.dtype == torch.bfloat16
        assert torch.equal(plain[name].A.bfloat16(), A)
        assert torch.equal(plain[name].A, A.float())
        assert torch.equal(plain[name].B, B.float())
    written = load_file(folder / "adapter_model.safetensors")
    assert {one.dtype for one in written.values()} == {torch.bfloat16}
    plain = read_json(folder / "shrink.json")["plain_bytes"]
    assert numbers_in(folder / "adapter_model.safetensors") == plain
    ranks = {min(one.shape) for one in written.values()}
    assert len(ranks) == 1, "one rank for all, as every engine reads it"


def test_the_losses_told_are_those_of_what_peft_loads(result, context):
    folder, _ = result
    told = read_json(folder / "shrink.json")
    pool = context.rows("target", ["micro_dev", "dev"])
    ids = [row.id for row in pool.encoded]
    assert sorted(told["rows"]) == sorted(ids), "fewer than 48 rows: all choose, no test row"
    for place, wanted in (
        (folder, told["whole"]["losses"]),
        (folder.parent / "adapter", told["as_it_is"]),
    ):
        with model_with_adapter(context.backbone, place) as model, torch.no_grad():
            losses = example_losses(model, pool.batches(range(len(ids))), len(ids))
        assert [losses[ids.index(one)] for one in told["rows"]] == pytest.approx(wanted, abs=1e-5)


def test_peft_alone_loads_the_logits_that_were_measured(result, context, place):
    folder, _ = result
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.arange(40).view(1, -1)
    told = read_json(folder / "shrink.json")["modules"]
    choice = {one["group"]: option_named(one["option"]) for one in told.values()}
    with torch.no_grad(), resizable(context, place / "adapter") as sizes:
        with sizes.under(choice):
            measured = sizes.live.model(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, measured, atol=1e-5)


def option_named(name):
    if name == "drop":
        return Option(0)
    rank, form = name.split()
    return Option(int(rank.partition("/")[2] or 1), form)


def test_what_is_told_of_options_is_paired_with_the_adapter_in_bf16(result):
    folder, _ = result
    told = read_json(folder / "shrink.json")
    assert list(told["options"]) == list(factors(folder.parent / "adapter"))
    base, groups = told["bf16"]["losses"], told["groups"]
    for part, own in told["options"].items():
        assert len(own) == 9
        for one in own.values():
            gain = added(one["losses"], base, groups)
            assert [one["added"], one["standard_error"]] == [gain.gain, gain.error]
        module = told["modules"][part]
        if module["option"] != WHOLE.name:
            assert module["added"] == own[module["option"]]["added"]
            assert module["bytes"] == own[module["option"]]["bytes"]


def test_a_trimmed_module_is_the_best_fit_of_its_rank(context, place):
    with resizable(context, place / "adapter") as sizes:
        cut = sizes.packed(sizes.uniform(Option(2)))
        for name, one in factors(place / "adapter").items():
            U, S, Vh = torch.linalg.svd(one.delta().double(), full_matrices=False)
            kept = math.ceil(one.rank / 2)
            best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
            A, B = (factor.double() for factor in cut[name].factors())
            assert A.shape[0] == kept
            assert float((B @ A - best).norm() / best.norm()) < 0.01, "bf16 rounds"
        for one in sizes.packed(sizes.uniform(WHOLE)).items():
            name, (A, B) = one[0], one[1].factors()
            delta = factors(place / "adapter")[name].delta()
            assert float((B.float() @ A.float() - delta).norm() / delta.norm()) < 0.01


def test_an_adapter_that_fits_is_only_rounded(config, context, place):
    folder = shrunk(config, context, place, "fits", 1.0)
    told = read_json(folder / "shrink.json")
    assert told["chosen_by"] == "whole"
    assert told["options"] == {}
    assert {one["option"] for one in told["modules"].values()} == {"r bf16"}
    assert read_json(folder / "stage.json")["forwards"] == 2 * len(told["rows"])


def test_the_cost_planned_is_an_upper_bound(result, config, context):
    folder, _ = result
    stage = Stage("one", "shrink", config, {}, {"budget_mb": 1.0})
    planned = KINDS["shrink"].cost(stage, sizes_of(config, context.data))
    assert 0 < read_json(folder / "stage.json")["forwards"] <= planned.forwards
    assert planned.forwards == (63 + 12) * 10


@pytest.mark.parametrize("megabytes", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_has_to_be_positive(place, config, megabytes):
    with pytest.raises(ValueError, match=r"^a budget of \S+ MB is no size; give megabytes above 0"):
        shrink_adapter(config, place / "adapter", megabytes, place / "never")
    assert not (place / "never").exists()


def test_a_budget_below_the_cheapest_group_is_refused_before_any_work(place, config, monkeypatch):
    adapter = factors(place / "adapter")
    # v_proj: rank 4 / 4, 64 inputs and 32 outputs in int4, a scale of two bytes for each 32.
    least = (64 + 32) // 2 + 2 * 3
    assert check_budget(least / 1e6, adapter) == least
    assert check_budget(0.29, adapter) == 290_000, "0.29 * 100 is 28.999999999999996"
    assert check_budget(54.0009e-6, adapter) == 54
    monkeypatch.setattr("grasp_lora.plans.single.load_run_data", None)
    with pytest.raises(ValueError, match="holds nothing of this adapter: the least is 0.000054 MB"):
        shrink_adapter(config, place / "adapter", (least - 1) / 1e6, place / "never")


def test_the_command_writes_the_folder_once(config, place):
    file = write_job(place / "run.yaml", config.to_dict())
    budget, out = str(0.5 * whole_bytes(place) / 1e6), place / "by-command"
    options = ["--adapter", str(place / "adapter"), "--budget-mb", budget, "--out", str(out)]
    for line in ("wrote ", "holds this result already"):
        done = CliRunner().invoke(app, ["shrink", str(file), *options])
        assert done.exit_code == 0, done.output
        assert line in done.output
    assert load_quantized(out)
    assert "MB of numbers in quantized.safetensors" not in done.output, "the second does nothing"
