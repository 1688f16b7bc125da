"""The whole job on a tiny random backbone and the built-in questions."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import model_with_adapter, named_base_model
from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.devices import repeatable_attention
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans import executor
from grasp_lora.plans.run import run
from grasp_lora.plans.single import (
    evaluate_adapter,
    merge_adapters,
    prune_adapter,
    search_ratio,
    train_adapter,
)
from grasp_lora.report.run_report import write_report
from grasp_lora.stages.table import KINDS
from grasp_lora.training.activations import input_norms
from grasp_lora.training.live import LiveAdapter
from grasp_lora.training.search_callback import SearchCallback
from grasp_lora.workbench import context, fit
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import with_trainings, write_rows


def settings(folder: Path, **changes) -> RunConfig:
    values = {
        "output": folder / "run",
        "model": {"name": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "data": {
            "max_length": 640,
            "source": {"language": "en", "rows": {"train": 8, "dev": 4}},
            "target": {
                "language": "es",
                "rows": {"train": 8, "dev": 4, "micro_dev": 4, "test": 4},
            },
        },
        "controller": {"rounds": 3, "rows": 4},
        "train": {"epochs": 1},
        "search": {"epochs": 2},
        "finetune": {"epochs": 2},
        "evaluate": {"max_new_tokens": 4},
    }
    return RunConfig.model_validate(with_trainings(values | changes))


@pytest.fixture
def workplace(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    return tmp_path


def test_a_run_from_nothing_leaves_a_plain_adapter_and_its_report(workplace, drawing):
    out = run(settings(workplace), quiet=True)
    for name in (
        "ratio.json",
        "rounds.jsonl",
        "scores.json",
        "ratio.png",
        "report.md",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0
    reports = [out / "report.md", out / "report.html"]
    before = [one.read_bytes() for one in reports]
    sealed = read_json(out / "done.json")["files"]
    assert {one.name for one in reports} <= set(sealed)
    write_report(out)
    assert [one.read_bytes() for one in reports] == before
    ratio = read_json(out / "ratio.json")
    assert 0.0 <= ratio["ratio"] <= 0.8
    rounds = read_jsonl(out / "rounds.jsonl")
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert all(len(r["groups"]) == len(r["rows"]) for r in rounds)
    scores = read_json(out / "scores.json")["systems"]
    assert [s["slug"] for s in scores] == [
        "zero-shot",
        "source",
        "source-finetuned",
        "target",
        "merged",
        "merged-finetuned",
        "final",
    ]
    tested = [s["sets"]["test"] for s in scores]
    assert all(one["n"] == 4 and one["scores"]["loss"]["value"] > 0 for one in tested)
    tensors = load_file(out / "final" / "adapter_model.safetensors")
    zeros = sum(int((t == 0).sum()) for t in tensors.values())
    entries = sum(t.numel() for t in tensors.values())
    assert ratio["zeros"]["exported"] == pytest.approx(zeros / entries)
    assert not list(out.rglob("*.work")), "checkpoints are removed when a stage is done"
    card = ModelCard.load(out / "final" / "README.md")
    assert card.data.language == ["es", "en"]
    assert "{context}" in card.text, "the template in force"
    final = scores[-1]["sets"]["test"]["scores"]["loss"]["value"]
    assert f"| test | 4 | loss | {final:.3f} |" in card.text


def test_the_final_adapter_loads_in_plain_peft_with_the_evaluated_loss(workplace):
    out = run(settings(workplace), quiet=True)
    base = AutoModelForCausalLM.from_pretrained(workplace / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(out / "final"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        seen = model(input_ids=ids).logits
    weights = load_file(out / "final" / "adapter_model.safetensors")
    by_hand = AutoModelForCausalLM.from_pretrained(workplace / "base", dtype=torch.float32)
    known = dict(by_hand.named_modules())
    with torch.no_grad():
        for key, a in weights.items():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                known[name].weight += weights[key.replace("lora_A", "lora_B")] @ a
        assert torch.allclose(seen, by_hand(input_ids=ids).logits, atol=1e-5)


def test_two_given_adapters_need_no_source_rows_and_no_training(workplace):
    model = tiny_model("llama")
    for seed, role in enumerate(("en", "es")):
        tiny_adapter_folder(workplace / role, model, r=4 + seed, seed=seed)
    config = settings(
        workplace,
        adapters={"source": workplace / "en", "target": workplace / "es"},
        data={
            "max_length": 640,
            "target": {"language": "es", "rows": {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}},
        },
    )
    out = run(config, quiet=True)
    assert not (out / "adapters").exists()
    assert (out / "final" / "adapter_model.safetensors").exists()
    about = read_json(out / "merged" / "merge.json")
    assert about["kind"] == "cat"
    assert about["weights"] == [0.5, 0.5]
    ratio = read_json(out / "ratio.json")
    assert ratio["ratio"] > 0
    for source in ("0", "1"):
        assert ratio["zeros"]["per_source"][source] == pytest.approx(ratio["ratio"], abs=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"merge": {"kind": "linear"}},
        {"merge": {"kind": "svd"}, "mask_unit": "merged"},
        {"merge": {"kind": "ties-delta"}, "mask_unit": "merged"},
        {"preset": "paper", "controller": {"preset": "paper", "interval": 3}},
        {"controller": {"preset": "paper", "rounds": 2}},
        {"finetune": {"mode": "continue", "epochs": 1, "mask_schedule": 2}},
        {"importance": "magnitude", "mask_unit": "merged"},
        {"structure": "rank"},
        {"structure": "rank", "merge": {"kind": "linear"}, "finetune": {"mask_schedule": 1}},
    ],
)
def test_every_way_of_merging_and_masking_runs_to_the_end(workplace, changes):
    out = run(
        settings(workplace, evaluate={"max_new_tokens": 2, "baselines": False}, **changes),
        quiet=True,
    )
    assert (out / "done.json").exists()
    assert len(read_json(out / "scores.json")["systems"]) == 1
    ratio = read_json(out / "ratio.json")
    controller = changes.get("controller", {"preset": "standard"})["preset"]
    assert ratio["preset"] == changes.get("preset", "standard") + ", changed"
    assert ratio["controller_preset"] == f"{controller}, changed"
    assert "train.search.epochs" in ratio["changed_from_preset"]
    assert ("merge.kind" in ratio["changed_from_preset"]) == ("merge" in changes)


def test_a_run_can_start_from_a_layer_swap_and_masks_its_adapters_apart(tmp_path):
    model = tiny_model(layers=4)
    tiny_backbone_folder(tmp_path / "base", layers=4)
    given = {
        role: tiny_adapter_folder(tmp_path / role, model, r=4, seed=seed)
        for seed, role in enumerate(("source", "target"))
    }
    adapters = {role: str(folder) for role, folder in given.items()}
    config = settings(tmp_path, adapters=adapters, merge={"kind": "layer-swap"})
    out = run(config, quiet=True)
    about = read_json(out / "merged" / "merge.json")
    assert (about["kind"], about["outer_layers"]) == ("layer-swap", [0, 3])
    merged = read_adapter(out / "merged", model).adapter
    for name, one in merged.items():
        role = "source" if name.split(".")[2] in "12" else "target"
        kept = read_adapter(given[role], model).adapter[name]
        assert torch.allclose(one.delta(), kept.delta(), atol=1e-6), name
    ratio = read_json(out / "ratio.json")
    for source in ("0", "1"):
        assert ratio["zeros"]["per_source"][source] == pytest.approx(ratio["ratio"], abs=0.01)
    assert "merged, untrained" in [one["name"] for one in read_json(out / "scores.json")["systems"]]


def test_a_run_fits_its_result_into_megabytes_and_scores_it(workplace):
    config = settings(workplace, budget_mb=0.002)
    out = run(config, quiet=True)
    whole = load_file(out / "final" / "adapter_model.safetensors")
    stored = load_file(out / "small" / "quantized.safetensors")
    assert 0 < sum(one.nbytes for one in stored.values()) <= 2000
    assert sum(2 * one.numel() for one in whole.values()) > 2000
    system = next(s for s in read_json(out / "scores.json")["systems"] if s["slug"] == "small")
    assert (system["name"], system["path"]) == ("final, in 0.002 MB", "small")
    assert "final, in 0.002 MB" in (out / "report.md").read_text()
    opened = context.open_context(config, quiet=True)
    tests = opened.rows("target", ["test"])
    with model_with_adapter(opened.backbone, out / "small") as model:
        found = example_losses(model, tests.batches(range(len(tests.encoded))), len(tests.encoded))
    rows = read_jsonl(out / "evaluations" / "small" / "predictions.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(found, abs=1e-4)


def test_megabytes_that_hold_nothing_are_refused_before_any_work(workplace):
    with pytest.raises(ValueError, match="budget_mb: 1e-05 MB holds nothing of an adapter of this"):
        run(settings(workplace, budget_mb=1e-5), quiet=True)
    assert not (workplace / "run").exists()
    few = {"language": "es", "rows": {"train": 8, "dev": 1, "micro_dev": 1, "test": 4}}
    data = {"max_length": 640, "source": {"language": "en", "rows": {"train": 8}}, "target": few}
    with pytest.raises(ValueError, match="measured on at least 4 micro-dev and dev examples"):
        run(settings(workplace, budget_mb=1.0, data=data), quiet=True)
    assert not (workplace / "run").exists()


def test_pruning_whole_components_makes_a_smaller_adapter_that_says_the_same(workplace):
    config = settings(workplace, structure="rank", lora={"r": 4})
    opened = context.open_context(config, quiet=True)
    for role in ("source", "target"):
        train_adapter(config, role, workplace / role, context=opened)
    merged = merge_adapters(
        config, [workplace / "source", workplace / "target"], workplace / "merged", context=opened
    )
    final = prune_adapter(config, merged, 0.5, workplace / "final", context=opened)
    stage = read_json(final / "stage.json")
    assert stage["ranks"]["exported"] == stage["ranks"]["whole"] // 2
    assert stage["zeros"]["exported"] == pytest.approx(0.5)
    tensors = load_file(final / "adapter_model.safetensors")
    assert all(not bool((tensor == 0).all(dim=1).any()) for tensor in tensors.values())
    sizes = {key: tensor.shape for key, tensor in tensors.items() if "lora_A" in key}
    assert {shape[0] for shape in sizes.values()} == {4}, "half of each source's 4"
    evaluate_adapter(config, final, workplace / "scores", context=opened)
    losses = [row["loss"] for row in read_jsonl(workplace / "scores" / "predictions.jsonl")]
    assert all(loss > 0 for loss in losses)
    dev = opened.rows("target", ["dev"])
    with model_with_adapter(opened.backbone, final) as model:
        found = example_losses(model, dev.batches(range(len(dev.encoded))), len(dev.encoded))
    assert found == pytest.approx(stage["best_rows"], abs=1e-5)


def test_a_late_merge_is_made_of_the_fine_tuned_source_adapter_and_not_trained(workplace):
    folders = {
        "source": str(tiny_adapter_folder(workplace / "a", tiny_model(), r=4, seed=1)),
        "target": str(tiny_adapter_folder(workplace / "b", tiny_model(), r=2, seed=2)),
    }
    config = settings(workplace, adapters=folders, merge={"when": "after"})
    out = run(config, quiet=True)
    tuned = read_adapter(out / "baselines" / "source-finetuned").adapter
    target = read_adapter(Path(folders["target"])).adapter
    found = read_json(out / "weights" / "weights.json")
    assert len(found["losses"]) == 6
    merged = read_adapter(out / "merged").adapter
    for name, module in merged.items():
        parts = (tuned[name].delta(), target[name].delta())
        wanted = sum(w * part for w, part in zip(found["weights"], parts, strict=True))
        torch.testing.assert_close(module.delta(), wanted, atol=1e-6, rtol=1e-5)
    assert [r["step"] for r in read_jsonl(out / "rounds.jsonl")] == [1, 2, 3]
    final, ratio = read_json(out / "shipped" / "stage.json"), read_json(out / "ratio.json")
    assert final["steps"] == 0
    assert final["ratio"] == ratio["ratio"]
    assert "overfitting" not in {one["name"] for one in ratio["findings"]}
    kept = read_adapter(out / "final").adapter
    for name, module in kept.items():
        # An entry is as it was merged, or zero: nothing has trained it.
        same = (module.A == merged[name].A) | (module.A == 0)
        assert bool(same.all())
    scores = read_json(out / "scores.json")
    assert scores["unpruned"] == "merged"
    names = {one["slug"]: one["name"] for one in scores["systems"]}
    assert names["merged"] == "fine-tuned source merged with target"
    assert names["final"].endswith("not trained further")
    report = (out / "report.md").read_text()
    assert "against fine-tuned source merged with target" in report


def test_a_late_search_goes_on_after_the_rounds_that_were_kept(workplace, monkeypatch):
    merged = tiny_adapter_folder(workplace / "merged", tiny_model(), r=4, seed=1)
    config = settings(workplace, merge={"when": "after"}, controller={"rounds": 4, "rows": 4})
    config = config.with_training("search", batch_size=2)
    whole = search_ratio(config, merged, workplace / "whole")
    done, alone = [], SearchCallback.run_untrained_round

    def killed(self, number):
        if number == 3 and 3 not in done:
            done.append(number)
            raise KeyboardInterrupt
        done.append(number)
        alone(self, number)

    monkeypatch.setattr(SearchCallback, "run_untrained_round", killed)
    with pytest.raises(KeyboardInterrupt):
        search_ratio(config, merged, workplace / "out")
    out = search_ratio(config, merged, workplace / "out")
    assert done == [1, 2, 3, 3, 4]
    for name in ("rounds.jsonl", "ratio.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert read_json(out / "ratio.json")["flipped_entries"] == [0] * 4, "no mask is in force"
    assert not (workplace / "out.work").exists()


def test_weights_given_for_a_late_merge_are_taken(workplace):
    folders = {
        "source": str(tiny_adapter_folder(workplace / "a", tiny_model(), r=4, seed=1)),
        "target": str(tiny_adapter_folder(workplace / "b", tiny_model(), r=2, seed=2)),
    }
    merge = {"when": "after", "weights": [0.75, 0.25]}
    config = settings(workplace, adapters=folders, merge=merge)
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"baselines": False})}
    )
    out = run(config, quiet=True)
    assert not (out / "weights").exists()
    assert read_json(out / "merged" / "stage.json")["weights"] == [0.75, 0.25]
    assert (out / "baselines" / "source-finetuned" / "stage.json").exists()


def test_going_on_from_the_search_trains_the_baselines_as_long_in_all(workplace):
    config = settings(
        workplace,
        search={"epochs": 2},
        finetune={"mode": "continue", "epochs": 1, "learning_rate": 0.01},
        evaluate={"max_new_tokens": 2},
    )
    out = run(config, quiet=True)
    steps = {
        name: read_json(out / name / "stage.json")["steps"]
        for name in (
            "search",
            "shipped",
            "baselines/merged-finetuned",
            "baselines/source-finetuned",
        )
    }
    assert steps["baselines/merged-finetuned"] == steps["search"] + steps["shipped"] == 3 * 2
    assert steps["baselines/source-finetuned"] == 3 * 2
    log = read_json(out / "shipped" / "stage.json")["log"]
    kept = read_json(out / "search" / "stage.json")["best"]["step"] // 2
    assert [entry["learning_rate"] for entry in log] == pytest.approx([0.01 * 0.85**kept] * 2)
    alone = read_json(out / "baselines/merged-finetuned/stage.json")["log"]
    assert alone[0]["learning_rate"] == 0.01
    again = prune_adapter(
        config, out / "search/adapter", read_json(out / "ratio.json")["ratio"], out / "by-hand"
    )
    assert (again / "adapter_model.safetensors").read_bytes() == (
        out / "final/adapter_model.safetensors"
    ).read_bytes()


def test_trying_whether_attention_can_repeat_leaves_no_trace(workplace, monkeypatch):
    config = settings(workplace, lora={"dropout": 0.5})
    tried: list[bool] = []

    @contextmanager
    def on_a_gpu(device, attempt, notice):
        del device
        attempt()
        tried.append(True)
        with repeatable_attention(torch.device("cpu"), attempt, notice):
            yield

    plain = train_adapter(config, "target", workplace / "plain")
    monkeypatch.setattr(fit, "repeatable_attention", on_a_gpu)
    again = train_adapter(config, "target", workplace / "again")
    assert tried
    files = [folder / "adapter_model.safetensors" for folder in (plain, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("rate", "kept"), [(0.01, 2), (0.02, 1), (1.0, 0)])
def test_going_on_begins_at_the_best_epoch_of_the_search(workplace, rate, kept):
    section = {"epochs": 2, "learning_rate": rate}
    going_on = {"mode": "continue", "epochs": 1, "learning_rate": 0.01}
    opened = context.open_context(settings(workplace), quiet=True)
    for role in ("source", "target"):
        train_adapter(opened.config, role, workplace / role, context=opened)
    folders = [workplace / "source", workplace / "target"]
    merged = merge_adapters(opened.config, folders, workplace / "merged", context=opened)
    found = {}
    for mode in ("continue", "restart"):
        config = settings(workplace, search=section, finetune=going_on | {"mode": mode})
        search_ratio(config, merged, workplace / mode)
        found[mode] = read_json(workplace / mode / "stage.json")
    losses = {e["step"]: e["loss"] for e in found["continue"]["evaluations"]}
    assert min(losses, key=lambda step: losses[step]) == 2 * kept, "an epoch has two steps"
    assert read_json(workplace / "continue" / "adapter" / "merge.json")["epochs"] == kept
    assert found["restart"]["evaluations"] == []
    ends = [start_of(workplace / mode / "adapter") for mode in ("continue", "restart")]
    assert same(*ends) == (kept == 2), "without a best the end of the search is kept"
    assert same(ends[0], start_of(merged)) == (kept == 0)
    config = settings(workplace, search=section, finetune=going_on)
    final = prune_adapter(config, workplace / "continue" / "adapter", 0.0, workplace / "final")
    stage = read_json(final / "stage.json")
    assert stage["evaluations"][0]["loss"] == pytest.approx(losses[2 * kept], abs=1e-5)
    assert stage["log"][0]["learning_rate"] == pytest.approx(0.01 * 0.85**kept)


def start_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {file.name + key: t for file in files for key, t in load_file(file).items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize(("schedule", "cuts"), [("once", 1), ("every-step", 5), (3, 2)])
def test_the_final_mask_is_cut_as_often_as_scheduled(workplace, monkeypatch, schedule, cuts, clear):
    calls = []
    commit = LiveAdapter.commit
    monkeypatch.setattr(
        LiveAdapter, "commit", lambda self, *given: calls.append(given) or commit(self, *given)
    )
    start = tiny_adapter_folder(workplace / "adapter", tiny_model("llama"))
    controller = {"clear_moments": clear}
    finetune = {"epochs": 2, "mask_schedule": schedule}
    config = settings(workplace, finetune=finetune, controller=controller)
    out = prune_adapter(config, start, 0.5, workplace / "out")
    stage = read_json(out / "stage.json")
    assert stage["steps"] == 4
    assert len(calls) == cuts
    for _, optimizer, cleared in calls[1:]:
        assert optimizer is not None, "cuts between steps change the moments"
        assert cleared is clear
    assert ("controller.clear_moments" in stage["key"]["settings"]) == (schedule != "once")


def test_runs_from_the_same_merge_share_one_reading_of_the_train_rows(workplace, monkeypatch):
    seen = []
    monkeypatch.setattr(
        context, "input_norms", lambda *given: seen.append(1) or input_norms(*given)
    )
    run(settings(workplace, importance="activation"), quiet=True)
    assert len(seen) == 1, "search and final run start alike"
    changed = {"importance": "activation", "output": workplace / "onward"}
    run(settings(workplace, finetune={"epochs": 1, "mode": "continue"}, **changed), quiet=True)
    assert len(seen) == 3, "going on from the search is another start"


def test_the_same_seed_gives_the_same_ratio_and_scores(workplace):
    small = {"evaluate": {"max_new_tokens": 2, "baselines": False}}
    one = run(settings(workplace, output=workplace / "one", **small), quiet=True)
    two = run(settings(workplace, output=workplace / "two", **small), quiet=True)
    assert read_json(one / "ratio.json") == read_json(two / "ratio.json")
    assert read_json(one / "scores.json") == read_json(two / "scores.json")
    assert (one / "final/adapter_model.safetensors").read_bytes() == (
        two / "final/adapter_model.safetensors"
    ).read_bytes()


def test_a_test_row_that_does_not_fit_is_told_before_any_training(workplace):
    rows = [{"id": "a", "context": "Short.", "question": "Why " * 700 + "?", "answers": ["Short"]}]
    (workplace / "far.jsonl").write_text(json.dumps(rows[0]) + "\n")
    config = settings(workplace)
    tests = {"far": {"language": "es", "files": workplace / "far.jsonl"}}
    data = config.data.model_dump() | {"tests": tests}
    with pytest.raises(ValueError, match="row 'a' does not fit"):
        run(RunConfig.model_validate(config.model_dump() | {"data": data}), quiet=True)
    assert not (workplace / "run").exists()


def test_a_row_that_does_not_fit_among_many_is_left_out_of_the_answers(workplace, capsys):
    long = "Why " * 700 + "?"
    rows = [
        {"id": f"r{n}", "context": f"Number {n} is red.", "question": long if n == 3 else "Which?",
         "answers": ["red"]}
        for n in range(12)
    ]  # fmt: skip
    files = workplace / "far.jsonl"
    files.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(workplace)
    data = config.data.model_dump() | {"tests": {"far": {"language": "es", "files": files}}}
    config = RunConfig.model_validate(config.model_dump() | {"data": data})
    out = evaluate_adapter(config, None, workplace / "scores")
    found = [row["id"] for row in read_jsonl(out / "predictions.jsonl") if row["set"] == "far"]
    assert found == [f"r{n}" for n in range(12) if n != 3]
    assert "tests far: 1 of 12 rows left out, such as 'r3': they do not fit 512 tokens" in (
        " ".join("".join(capsys.readouterr()).split())
    )


QUICK = {"max_new_tokens": 2, "baselines": False}


def seconds(parts: dict) -> float:
    return sum(spent["seconds"] for spent in parts.values())


def test_a_profile_accounts_for_all_of_the_wall_time(workplace, drawing):
    out = run(settings(workplace, evaluate=QUICK), quiet=True, profile=True)
    profile = read_json(out / "profile.json")
    stages = profile["stages"]
    names = ["adapters/source", "adapters/target", "merged", "search", "shipped"]
    assert list(stages) == [*names, "evaluations/final", "outside the stages"]
    assert sum(map(seconds, stages.values())) == pytest.approx(profile["wall_seconds"])
    for name in ("search", "shipped"):
        steps = read_json(out / name / "stage.json")["steps"]
        assert stages[name]["step"]["calls"] == steps
        assert stages[name]["checkpoint"]["calls"] == steps / 2, "one after each epoch of 2 steps"
    assert stages["shipped"]["dev"]["calls"] == 3
    assert "baseline" not in stages["search"], "the default measures none"
    assert stages["search"]["probe"]["calls"] == 9, "3 rounds of 3 candidates"
    assert stages["evaluations/final"]["generate"]["calls"] == 1
    assert "| search | **all** |" in (out / "profile.md").read_text()
    assert (out / "profile.png").stat().st_size > 0
    assert read_json(out / "provenance.json")["threads"] == torch.get_num_threads()
    time = read_json(out / "provenance.json")["time"]
    assert time["wall_seconds"] == profile["wall_seconds"]
    assert sum(time["shares"].values()) == pytest.approx(1)
    assert "| wall time |" in (out / "report.md").read_text()


def break_off(config: RunConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Run until the first stage of a kind, whose work fails."""

    def fail(_work):
        raise ValueError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(executor, "KINDS", KINDS | {kind: replace(KINDS[kind], run=fail)})
        with pytest.raises(ValueError, match="broken off"):
            run(config, quiet=True)


def test_a_resumed_run_reports_the_times_of_its_earlier_processes_too(workplace, monkeypatch):
    config = settings(workplace, evaluate=QUICK)
    break_off(config, monkeypatch, "prune")
    kept = read_json(config.output / "timing.json")
    out = run(config, quiet=True)
    assert not (out / "profile.json").exists()
    times = read_json(out / "timing.json")
    assert times["resumed"] == 1
    assert times["stages"]["search"] == kept["stages"]["search"]
    assert times["wall_seconds"] > kept["wall_seconds"]
    assert sum(map(seconds, times["stages"].values())) == pytest.approx(times["wall_seconds"])
    assert "The run was resumed once" in (out / "report.md").read_text()


def test_a_stage_whose_times_were_not_kept_is_said_to_be_so(workplace, monkeypatch):
    config = settings(workplace, evaluate=QUICK)
    break_off(config, monkeypatch, "search")
    (config.output / "timing.json").unlink()
    out = run(config, quiet=True, profile=True)
    told = "adapters/source, adapters/target, merged: done by an earlier process whose times"
    assert told in (out / "report.md").read_text()
    assert told in (out / "profile.md").read_text()
    assert read_json(out / "provenance.json")["time"]["stages"]["merged"] is None


def test_a_run_with_extra_rows_records_them_and_does_nothing_twice(workplace):
    values = settings(workplace, evaluate=QUICK).to_dict() | {"recipe": "grasp"}
    path = write_rows(workplace / "extra.jsonl", range(5), prefix="x")
    values["data"]["extra"] = {"files": str(path), "weight": 0.5}
    config = RunConfig.model_validate(values)
    out = run(config, quiet=True)
    record = read_json(out / "data.json")["extra"]
    assert record["splits"] == {"train": [f"x{n}" for n in range(5)]}
    # 8 labelled and 4 extra rows by fours, two epochs each
    for name, steps in (("adapters/target", 3), ("search", 6), ("shipped", 6)):
        assert read_json(out / name / "stage.json")["steps"] == steps, name
    assert read_json(out / "adapters/source" / "stage.json")["steps"] == 2
    before = {
        name: (out / name / "stage.json").stat().st_mtime_ns for name in ("search", "shipped")
    }
    (out / "done.json").unlink()
    run(config, quiet=True)
    assert before == {n: (out / n / "stage.json").stat().st_mtime_ns for n in before}
    write_rows(path, range(6), prefix="x")
    with pytest.raises(ValueError, match="the examples of extra/train have changed"):
        run(config, quiet=True)


def in_process(code: str, *arguments: Path) -> subprocess.Popen[bytes]:
    """Start Python; return once it has printed a line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


OWNER = """
import sys
from pathlib import Path
from grasp_lora.base.owner import owned
with owned(Path(sys.argv[1]), print):
    print("holds", flush=True)
    input()
"""


def test_a_second_run_in_a_folder_is_refused_before_any_work(workplace):
    config = settings(workplace, evaluate=QUICK)
    with in_process(OWNER, config.output) as process:
        with pytest.raises(ValueError, match=rf"run' is in use by process {process.pid} on "):
            run(config, quiet=True)
        process.communicate(b"\n")
    assert not config.output.exists()


def test_a_run_keeps_the_threads_it_was_begun_with_and_its_adapters(workplace, monkeypatch, capsys):
    """A resumed run has the same number; an input that --overwrite would remove is refused."""
    config, begun = settings(workplace, evaluate=QUICK), torch.get_num_threads()
    numbers: list[int] = []
    prune = KINDS["prune"]

    def killed(_work):
        raise KeyboardInterrupt

    def noted(work):
        numbers.append(torch.get_num_threads())
        return prune.run(work)

    monkeypatch.setattr(executor, "KINDS", dict(KINDS) | {"prune": replace(prune, run=killed)})
    with pytest.raises(KeyboardInterrupt):
        run(config, quiet=True)
    assert read_json(config.output / "config.json")["threads"] == begun
    monkeypatch.setattr(executor, "KINDS", dict(KINDS) | {"prune": replace(prune, run=noted)})
    torch.set_num_threads(begun + 1)
    try:
        run(config)
        assert torch.get_num_threads() == begun + 1, "the caller has its own number again"
    finally:
        torch.set_num_threads(begun)
    assert set(numbers) == {begun}
    said = " ".join(capsys.readouterr().err.split())
    assert f"was begun with {begun} threads, so {begun} are used again in place of" in said
    assert not list(config.output.rglob("*.lock"))

    trained = config.output / "adapters"
    adapters = {"source": str(trained / "source"), "target": str(trained / "target")}
    given = settings(workplace, evaluate=QUICK, adapters=adapters)
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    with pytest.raises(ValueError, match=r"adapters' would be replaced, but '.*source' is read"):
        run(given, overwrite=True, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_no_file_of_a_run_has_the_path_of_the_home_folder(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    monkeypatch.setenv("USERPROFILE", str(workplace))
    rows = write_rows(workplace / "more.jsonl", range(100, 104))
    data = settings(workplace).to_dict()["data"]
    data |= {"tests": {"more": {"language": "es", "files": str(rows)}}}
    out = run(settings(workplace, evaluate=QUICK, data=data), quiet=True)
    told = [p for p in out.rglob("*") if p.is_file() and str(workplace).encode() in p.read_bytes()]
    assert told == []
    made = read_json(out / "final" / "adapter_config.json")
    assert made["base_model_name_or_path"] is None
    assert named_base_model(out / "final") == str(workplace / "base")
    evaluate_adapter(settings(workplace, evaluate=QUICK), out / "final", workplace / "again")
