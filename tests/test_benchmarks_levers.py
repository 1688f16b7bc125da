"""Benchmarks of levers and of the model of cost: their short forms on a tiny model."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from benchmarks import forecast, levers
from torch.nn import functional as F

from grasp_lora.core.forecast.machines import BANDWIDTH_SHARE, GPUS, MATRIX_SHARE
from helpers import tiny_backbone_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_backbone_folder(tmp_path_factory.mktemp("levers") / "base")


@pytest.fixture(scope="module")
def result(folder):
    path = folder.parent / "levers.json"
    with warnings.catch_warnings():
        # torch.compile looks at the gradient of every tensor that it traces.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        given = ["--quick", "--model", str(folder), "--dtype", "float32", "--device", "cpu"]
        levers.main([*given, "--json", str(path)])
    return json.loads(path.read_text())


def test_every_lever_has_ratios_to_what_the_library_does(result):
    assert set(result["levers"]) == set(levers.LEVERS)
    for rows in result["levers"].values():
        assert rows
        assert all(math.isfinite(ratio) and ratio > 0 for _, _, ratio, *_ in rows)
    firsts = {(lever, way) for rows in result["levers"].values() for lever, way, *_ in rows}
    assert ("packing", "padded") in firsts
    assert ("packing", "packed") in firsts


def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(result):
    apart = {way: rest for _, way, _, *rest in result["levers"]["packing"]}
    for way in ("two forwards", "four forwards", "packed", "packed, sdpa"):
        assert max(apart[way]) < 1e-5, way


def test_added_products_have_the_loss_and_the_gradients_of_peft(result):
    steps = [row for row in result["levers"]["adapter"] if row[0].endswith("step")]
    assert len(steps) == 4
    assert all(max(rest) < 1e-5 for _, _, _, *rest in steps)


def test_compiled_layers_have_the_loss_and_the_gradients_of_plain_ones(result):
    steps = [row for row in result["levers"]["compile"] if row[0].endswith("step")]
    assert len(steps) == 4
    assert all(max(rest) < 1e-5 for _, _, _, *rest in steps)


def test_losses_in_chunks_are_those_of_all_tokens_at_once():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (150, 30))
    labels = torch.randint(0, 30, (150,), generator=generator)
    leaf = hidden.clone().requires_grad_()
    wanted = F.cross_entropy(leaf @ weight.T, labels, reduction="sum")
    wanted.backward()
    for name, way in levers.loss_ways(hidden, weight, labels).items():
        loss, gradient = way()
        assert loss == pytest.approx(wanted.item(), rel=1e-5), name
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-4)


def test_the_model_of_cost_is_held_against_what_is_measured(folder, monkeypatch):
    monkeypatch.setattr(forecast, "on_two_ranks", lambda options: 1.0)
    path = folder.parent / "forecast.json"
    given = ["--quick", "--model", str(folder), "--dtype", "float32", "--device", "cpu"]
    forecast.main([*given, "--json", str(path)])
    found = json.loads(path.read_text())
    assert set(found["ratios"]) == {"step", "reading", "answer", "step, 2 ranks"}
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in found["ratios"].values())
    for row in found["rows"]:
        assert found["ratios"][row["what"]] == row["predicted"] / row["measured"]


PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_those_of_the_model(capsys):
    forecast.main(["--tables"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in PAGE.splitlines()] == []


def test_the_page_has_every_gpu_with_its_published_rates():
    for name, machine in GPUS.items():
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        rate, bandwidth, memory, link, price = (float(c) for c in row.split("|")[2:7])
        assert machine.matrix_rate == pytest.approx(MATRIX_SHARE * rate * 1e12)
        assert machine.bandwidth == pytest.approx(BANDWIDTH_SHARE * bandwidth * 1e9)
        assert machine.memory == memory * 1e9
        assert machine.link == pytest.approx(BANDWIDTH_SHARE * link * 1e9)
        assert machine.price == price
