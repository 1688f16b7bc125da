"""The script for a GPU: its tiny form does every part on the CPU, so that it cannot rot."""

import importlib.util
import json
import math
import warnings

import pytest
import torch
from benchmarks import common, gpu, step

from helpers import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "tiny.json"
    with warnings.catch_warnings():
        # torch.compile looks at the gradient of every tensor that it traces.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        gpu.main(["--tiny", "--json", str(path)])
    return json.loads(path.read_text())


def numbers_in(value):
    if isinstance(value, dict):
        return [n for one in value.values() for n in numbers_in(one)]
    if isinstance(value, list):
        return [n for one in value for n in numbers_in(one)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("part", ["build", *gpu.PARTS])
def test_every_part_of_a_backbone_in_whole_weights_is_done_and_its_figures_are_numbers(part, tiny):
    record = tiny["cases"]["llama-tiny"][part]
    assert record["state"] == "done", record
    assert all(map(math.isfinite, numbers_in(record)))
    assert record["seconds"] >= 0


def test_the_figures_are_those_of_the_parts(tiny):
    parts = tiny["cases"]["llama-tiny"]
    assert set(parts["step"]["over_first"]) == {"ours", "any kernels", "plain"}
    assert parts["step"]["over_first"]["ours"] == 1
    assert parts["step"]["not_done"]["liger"]
    assert parts["repetition"]["same_bytes"] is True
    assert parts["generation"]["tokens_per_second"] > 0
    for length in ("usual", "long"):
        found = parts["attention"][length]
        assert set(found["seconds_of"]) | set(found["not_done"]) == set(gpu.ATTENTIONS)
        assert {"sdpa", "eager"} <= set(found["seconds_of"])
    assert set(parts["compile"]["over_first"]) == {"eager", "compiled"}
    assert set(parts["memory"]["bytes"]) == {"plain", "search"}
    assert parts["search"]["rounds"] > 0
    assert {"machine", "versions", "command"} <= tiny.keys()


def test_four_bits_are_done_where_bitsandbytes_is_and_skipped_with_the_reason_elsewhere(tiny):
    record = tiny["cases"]["llama-tiny 4bit"]["build"]
    if importlib.util.find_spec("bitsandbytes") is None:
        assert record["state"] == "skipped"
        assert record["why"] == "bitsandbytes is not installed"
    else:
        assert record["state"] == "done", record


def records_of(monkeypatch, parts, seconds=60.0):
    monkeypatch.setattr(gpu, "PARTS", parts)
    found = []
    gpu.do_case("llama-tiny", seconds, True, found.append)
    return {record["part"]: record for record in found}


def test_a_part_that_fails_is_told_and_the_rest_goes_on(monkeypatch):
    def fails(bench):
        raise torch.OutOfMemoryError("CUDA out of\n memory")

    def skips(bench):
        raise gpu.Skipped("no kernel")

    parts = {
        "a": (fails, 1.0),
        "b": (skips, 1.0),
        "c": (lambda bench: {"left": bench.left()}, 1.0),
    }
    found = records_of(monkeypatch, parts)
    assert found["a"]["state"] == "failed"
    assert found["a"]["why"] == "OutOfMemoryError: CUDA out of memory"
    assert (found["b"]["state"], found["b"]["why"]) == ("skipped", "no kernel")
    assert found["c"]["state"] == "done"
    assert 50 < found["c"]["left"] <= 60, "it gets what the others left"


def test_a_part_has_its_share_of_the_time_and_none_is_begun_without_time(monkeypatch):
    parts = {
        "a": (lambda bench: {"left": bench.left()}, 1.0),
        "b": (lambda bench: {"left": bench.left()}, 3.0),
    }
    found = records_of(monkeypatch, parts)
    assert found["a"]["left"] == pytest.approx(60 / 4, abs=3)
    found = records_of(monkeypatch, parts, seconds=0.0)
    assert [one["state"] for one in found.values()] == ["done", "skipped", "skipped"]
    assert found["a"]["why"] == "no time was left"


def test_a_whole_search_that_does_not_fit_is_skipped():
    bench = gpu.Bench(None, None, gpu.SMALL, lambda: 10.0, step_seconds=100.0)
    with pytest.raises(gpu.Skipped, match=r"needs about 1040 s, 10 s are left"):
        gpu.whole_search(bench)


def test_a_case_that_takes_too_long_is_ended_and_told(monkeypatch):
    monkeypatch.setattr(gpu, "START", 0.0)
    records = gpu.in_a_process("llama-tiny", 0.3, tiny=True)
    assert [record["part"] for record in records] == ["build", *gpu.PARTS]
    assert {record["state"] for record in records} == {"failed"}
    assert records[0]["why"].startswith("ended after 0 s")


def test_a_case_in_a_process_of_its_own_hands_its_records_back():
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("the short case is the one that is skipped without bitsandbytes")
    (record,) = gpu.in_a_process("llama-tiny 4bit", 60.0, tiny=True)
    assert (record["part"], record["state"]) == ("build", "skipped")


def test_it_needs_a_gpu_or_the_tiny_form(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main([])
    with pytest.raises(SystemExit):
        gpu.main(["--tiny", "--seconds", "900"])


def test_a_twin_shares_the_weights_and_nothing_else():
    model = tiny_model("llama")
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    twin = common.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    torch.testing.assert_close(twin(input_ids=ids).logits, before, rtol=0, atol=0)
    adapted = step.with_plain_adapter(twin)
    adapted.set_adapter("default")
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation != "eager"
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
