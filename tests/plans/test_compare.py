"""The comparison: what each method starts from, chooses and costs, and what the tables say."""

import csv
import io
import shutil
import statistics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.peft_merges import peft_merge
from grasp_lora.base.files import machine_names, read_json, read_jsonl, write_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import RunConfig, load_config
from grasp_lora.core.lora import merge
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.recipes.recipe import Recipe
from grasp_lora.plans.compare import compare_methods, plan_of, stages_of
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.launch import Pool
from grasp_lora.plans.methods import (
    GRID,
    METHODS,
    RULES,
    TRIALS,
    job_name,
    method_of,
)
from grasp_lora.plans.plan import Plan, PlanBuilder, part_of
from grasp_lora.plans.recipes import Case, by, changed_settings
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.plans.single import train_adapter
from grasp_lora.plans.stored import read_stage, write_plan
from grasp_lora.report.comparison import (
    comparison_csv,
    comparison_markdown,
    price_rows,
    several_machines_note,
)
from grasp_lora.report.pictures import plot_comparison
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.keys import hash_of, key_of
from grasp_lora.stages.other_merges import NotApplicable, summed
from grasp_lora.stages.prune import ratio_of
from grasp_lora.stages.stage import Cost, Stage, Work
from grasp_lora.stages.table import KINDS
from grasp_lora.stages.train import folds_of
from grasp_lora.tasks.base import Example
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.merged_folder import read_start
from helpers import drawing, tiny_adapter_folder, tiny_backbone_folder, tiny_model, tiny_tokenizer
from jobs import TRAINED, job, write_job

METHODS_ON_ALL_LABELS = ("source-finetuned-labelled", "late-merge-labelled", "grasp-labelled")
ONLY = (
    *("zero-shot", "source", "source-finetuned", "target-all-labels", "average-finetuned"),
    *("learned-weights", "ties-finetuned", "grid", "grasp-restart", "random-masks"),
    *("ratio-higher", "ratio-nearest", "target-adalora", "target-trained"),
    *("grasp-continue", "grasp-adapters", "late-merge", "grasp-late", "recut-8", "optuna-tpe"),
    *METHODS_ON_ALL_LABELS,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny_backbone_folder(folder / "base")
    adapters = {
        "source": str(tiny_adapter_folder(folder / "source", tiny_model(), r=4, seed=1)),
        "target": str(tiny_adapter_folder(folder / "target", tiny_model(), r=2, seed=2)),
    }
    steps = {"epochs": 1, "batch_size": 2}
    changes = {"search": steps, "finetune": steps, "train": steps, "adapters": adapters}
    changes["controller"] = {"rounds": 2, "rows": 4}
    return write_job(folder / "run.yaml", job(folder, **changes))


@pytest.fixture(scope="module")
def done(settings):
    out = settings.parent / "comparison"
    with drawing():
        found = compare_methods(load_config(settings), out, ONLY, (1, 2), quiet=True)
    return found, out


def of(found, method):
    return [row for row in found["rows"] if row["method"] == method]


def test_every_method_has_its_rows(done):
    found, _ = done
    assert found["failed"] == {}
    counts = {name: len(of(found, name)) for name in found["methods"]}
    once = dict.fromkeys(("zero-shot", "source", "target-all-labels", "learned-weights"), 1)
    once |= dict.fromkeys(("random-masks", "ratio-higher", "target-adalora"), 1)
    twice = dict.fromkeys(("source-finetuned", "average-finetuned", "grid", "grasp-restart"), 2)
    twice |= {"ratio-nearest": 2, "grasp-continue": 2, "late-merge": 2, "grasp-late": 2}
    twice |= {"target-trained": 2}
    once |= dict.fromkeys(("grasp-adapters", "recut-8", "optuna-tpe"), 1)
    twice |= dict.fromkeys(METHODS_ON_ALL_LABELS, 2)
    assert counts == once | twice | {f"grid-{ratio}": 2 for ratio in GRID}
    assert list(found["not_applicable"]) == ["ties-finetuned"]
    assert "rank 4 and" in found["not_applicable"]["ties-finetuned"]


RELATIVES = (
    *("layer-swap", "layer-swap-finetuned", "ties-delta-finetuned", "taylor-0.4", "obs-0.4"),
    *("ranks-taylor-0.4", "2-of-4", "grasp-2-of-4"),
)


def test_the_methods_relatives_are_rows_too(tmp_path):
    folder = tmp_path / "base"
    model = tiny_model(layers=4)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    steps = {"epochs": 1, "batch_size": 2}
    changes = {"search": steps, "finetune": steps, "controller": {"rounds": 2, "rows": 4}}
    changes["adapters"] = {
        role: str(tiny_adapter_folder(tmp_path / role, model, r=4, seed=seed))
        for seed, role in enumerate(("source", "target"))
    }
    config = load_config(write_job(tmp_path / "run.yaml", job(tmp_path, **changes)))
    found = compare_methods(config, tmp_path / "out", RELATIVES, (1,), quiet=True)
    assert found["failed"] == found["not_applicable"] == {}
    ratios = {row["method"]: row["ratio"] for row in found["rows"]}
    assert ratios.pop("grasp-2-of-4") in (0.0, 0.5)
    unpruned = ("layer-swap", "layer-swap-finetuned", "ties-delta-finetuned")
    pruned = {"taylor-0.4": 0.4, "obs-0.4": 0.4, "ranks-taylor-0.4": 0.4, "2-of-4": 0.5}
    assert ratios == dict.fromkeys(unpruned, 0.0) | pruned
    swapped = read_adapter(tmp_path / "out" / "layer-swap" / "start", model).adapter
    given = {r: read_adapter(tmp_path / r, model).adapter for r in ("source", "target")}
    for name, one in swapped.items():
        role = "source" if name.split(".")[2] in "12" else "target"
        assert torch.allclose(one.delta(), given[role][name].delta(), atol=1e-6), name


def test_an_adapter_in_fewer_bytes_is_a_row_where_a_size_is_given(settings, tmp_path):
    rows = ("average-finetuned", "average-finetuned-small")
    found = compare_methods(load_config(settings), tmp_path / "none", rows, (1,), quiet=True)
    assert found["not_applicable"] == {
        "average-finetuned-small": "no size is given; set budget_mb, like budget_mb: 0.5"
    }
    config = load_config(settings, ["budget_mb=0.002"])
    found = compare_methods(config, tmp_path / "some", rows, (1,), quiet=True)
    (whole,), (small,) = (of(found, name) for name in rows)
    assert 0 < small["adapter_bytes"] <= 2000 < whole["adapter_bytes"]
    assert small["forwards"] > whole["forwards"]
    assert small["runs"] == whole["runs"]
    assert small["dev_loss"] != whole["dev_loss"]
    config = load_config(settings, ["budget_mb=0.00003"])
    found = compare_methods(config, tmp_path / "least", rows, (1,), quiet=True)
    assert "holds nothing of this adapter" in found["not_applicable"]["average-finetuned-small"]


def test_a_layer_swap_of_two_layers_is_not_applicable(settings, tmp_path):
    found = compare_methods(load_config(settings), tmp_path, ("layer-swap",), (1,), quiet=True)
    assert "at least three layers, these change 2" in found["not_applicable"]["layer-swap"]


def test_every_rule_of_importance_has_its_rows():
    assert set(RULES) == set(IMPORTANCE) - {RunConfig.model_fields["importance"].default}


def test_the_grid_takes_the_point_with_the_lowest_labelled_loss_at_the_price_of_all(done):
    found, out = done
    for seed in (1, 2):
        points = [row for row in found["rows"] if row["method"].startswith("grid-0")]
        points = [row for row in points if row["seed"] == seed]
        (chosen,) = (row for row in of(found, "grid") if row["seed"] == seed)
        best = min(points, key=lambda row: row["dev_loss"])
        assert chosen["ratio"] == best["ratio"]
        assert chosen["scores"] == best["scores"]
        assert chosen["job"] == best["job"]
        for name in ("runs", "seconds", "forwards", "steps", "tokens"):
            assert chosen[name] == pytest.approx(sum(row[name] for row in points))
        result = read_json(out / best["job"] / "result.json")["result"]
        losses = [x for split in ("micro_dev", "dev") for x in result["losses"][split]]
        assert len(losses) == 8
        assert best["dev_loss"] == pytest.approx(statistics.fmean(losses))


def test_a_target_adapter_is_trained_anew_with_each_seed_as_the_training_command_does(
    settings, done, tmp_path
):
    found, out = done
    rows = of(found, "target-trained")
    weights, split = {}, load_config(settings).seed
    for row in rows:
        seed = row["seed"]
        final = out / f"target-trained-s{seed}" / "final"
        weights[seed] = load_file(final / "adapter_model.safetensors")
        # The rows are those of the configuration's own seed, whatever the adapter is drawn with.
        config = load_config(settings, [f"seed={seed}", f"data.split_seed={split}"])
        alone = train_adapter(config, "target", tmp_path / str(seed))
        alone = load_file(alone / "adapter_model.safetensors")
        assert all(torch.equal(alone[name], value) for name, value in weights[seed].items())
        stage = read_json(final / "stage.json")
        assert (row["runs"], row["steps"], row["ratio"]) == (1, stage["steps"], 0.0)
        assert row["seconds"] == stage["seconds"]
    first, second = weights.values()
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_optuna_has_a_model_before_its_runs_are_over(settings, sampler):
    """By default its samplers draw ten trials at random, more than there are."""
    import optuna  # noqa: PLC0415 (optional)

    plan, _ = plan_of(load_config(settings), (1,), TRAINED)
    inputs = plan.stages[f"optuna-{sampler}-s1/trial-0"].options
    assert inputs["sampler"] == sampler
    assert 1 <= inputs["drawn"] < TRIALS - 2
    found = {}
    for name, made in (
        ("ours", {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}[sampler]),
        ("drawn", optuna.samplers.RandomSampler),
    ):
        own = {"n_startup_trials": inputs["drawn"]} if name == "ours" else {}
        study = optuna.create_study(sampler=made(seed=42, **own))
        study.optimize(lambda trial: (trial.suggest_float("ratio", 0.1, 0.8) - 0.3) ** 2, TRIALS)
        found[name] = [trial.params["ratio"] for trial in study.trials]
    assert found["ours"][: inputs["drawn"]] == found["drawn"][: inputs["drawn"]]
    ours, drawn = ([abs(x - 0.3) for x in ratios[inputs["drawn"] :]] for ratios in found.values())
    assert statistics.fmean(ours) < statistics.fmean(drawn)


def test_the_trials_of_an_optuna_search_are_those_of_its_sampler(done, settings):
    import optuna  # noqa: PLC0415 (optional)

    _, out = done
    plan, _ = plan_of(load_config(settings), (1,), TRAINED)
    sampler = optuna.samplers.TPESampler(
        seed=1, n_startup_trials=plan.stages["optuna-tpe-s1/trial-0"].options["drawn"]
    )
    study = optuna.create_study(sampler=sampler)
    for number in range(TRIALS):
        stage = read_json(out / "optuna-tpe-s1" / f"trial-{number}" / "stage.json")
        trial = study.ask()
        assert stage["ratio"] == trial.suggest_float("ratio", 0.1, 0.8)
        study.tell(trial, stage["best"]["loss"])


def test_optuna_pays_for_all_its_runs_and_keeps_the_best(done):
    found, out = done
    (row,) = of(found, "optuna-tpe")
    assert (row["runs"], row["steps"]) == (8, 32)
    finals = [read_json(f) for f in (out / "optuna-tpe-s1").glob("trial-*/stage.json")]
    best = min(finals, key=lambda one: one["best"]["loss"])
    assert row["ratio"] == best["ratio"]
    assert 0.1 <= row["ratio"] <= 0.8


def test_a_late_merge_is_of_the_fine_tuned_source_adapter_and_trains_nothing(done):
    found, out = done
    for row in of(found, "late-merge"):
        seed = row["seed"]
        result = read_json(out / f"late-merge-s{seed}" / "result.json")["result"]
        parts = [
            read_adapter(out / f"source-finetuned-s{seed}" / "final").adapter,
            read_adapter(settings_adapter(out, "target")).adapter,
        ]
        weights = result["weights"]
        assert weights[0] + weights[1] == pytest.approx(1)
        merged = read_adapter(out / f"late-merge-s{seed}" / "merged").adapter
        for name, module in merged.items():
            wanted = sum(w * part[name].delta() for w, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(module.delta(), wanted, atol=1e-6, rtol=1e-5)
        (tuned,) = (r for r in of(found, "source-finetuned") if r["seed"] == seed)
        assert (row["runs"], row["steps"]) == (tuned["runs"], tuned["steps"])
        # 6 shares on all 8 labelled rows
        assert row["forwards"] == tuned["forwards"] + 48


def settings_adapter(out, role):
    return out.parent / role


def test_a_ratio_of_a_late_merge_is_learned_without_training(done):
    found, out = done
    for row in of(found, "grasp-late"):
        folder = out / f"grasp-late-s{row['seed']}"
        (whole,) = (r for r in of(found, "late-merge") if r["seed"] == row["seed"])
        assert row["steps"] == whole["steps"]
        # 2 rounds of at most 3 ratios on 4 rows, and 4 dev rows
        assert 4 < row["forwards"] - whole["forwards"] <= 28
        stage = read_json(folder / "final" / "stage.json")
        assert stage["steps"] == 0
        assert [e["step"] for e in stage["evaluations"]] == [0]
        assert not (folder / "merged").exists(), "the merge of late-merge is the same"
        merged = read_adapter(out / f"late-merge-s{row['seed']}" / "merged").adapter
        final = read_adapter(folder / "final").adapter
        zeros = total = 0
        for name, module in merged.items():
            for after in (final[name].A, final[name].B):
                zeros += int((after == 0).sum())
                total += after.numel()
            wanted = module.delta()
            if row["ratio"] == 0:
                torch.testing.assert_close(final[name].delta(), wanted, atol=1e-6, rtol=1e-5)
        assert zeros / total >= row["ratio"] - 0.02
        assert row["verdict"] in ("learned", "flat", "at-bound")


def test_the_nearest_point_of_the_grid_is_taken_at_its_own_price(done):
    found, _ = done
    for row in of(found, "ratio-nearest"):
        (wanted,) = (r for r in of(found, "grasp-restart") if r["seed"] == row["seed"])
        points = [r for r in found["rows"] if r["method"].startswith("grid-0")]
        points = [r for r in points if r["seed"] == row["seed"]]
        best = min(points, key=lambda r: abs(r["ratio"] - wanted["ratio"]))
        assert row["job"] == best["job"]
        assert row["seconds"] == best["seconds"]


def test_every_score_of_every_run_has_the_interval_of_its_evaluation(done):
    found, out = done
    for row in found["rows"]:
        scores = read_json(out / row["job"] / "scores" / "scores.json")["sets"]["test"]["scores"]
        ends = {metric: [one["low"], one["high"]] for metric, one in scores.items()}
        intervals = {m: list(pair) for m, pair in row["intervals"]["test"].items()}
        assert intervals == ends, row["job"]
    row = next(row for row in found["rows"] if row["method"] == "source")
    row["intervals"]["test"]["loss"] = (1.5, 2.5)
    lines = list(csv.DictReader(io.StringIO(comparison_csv(found | {"rows": [row]}))))
    (line,) = (line for line in lines if line["metric"] == "loss")
    assert (line["low"], line["high"]) == ("1.5", "2.5")


def test_prices_count_what_was_done(done, settings):
    found, out = done
    (zero,) = of(found, "zero-shot")
    assert [zero[name] for name in ("runs", "seconds", "forwards", "steps", "tokens")] == [0] * 5
    for row in of(found, "source-finetuned"):
        # 8 rows in batches of 2, and 4 dev rows before and after
        assert (row["runs"], row["steps"], row["forwards"]) == (1, 4, 8)
    for row in of(found, "grasp-restart"):
        assert (row["runs"], row["steps"]) == (2, 8)
        (continued,) = (r for r in of(found, "grasp-continue") if r["seed"] == row["seed"])
        assert (continued["runs"], continued["steps"]) == (1, 4), "one training in two stages"
        plain = statistics.fmean(one["tokens"] for one in of(found, "average-finetuned"))
        titles, cells = price_rows(found)
        shown = next(one for one in cells if one[0] == "grasp-restart")
        worth = shown[titles.index("tokens, in plain runs")]
        assert worth == f"{row['tokens'] / plain:.2f}"
        assert row["forwards"] == 2 * 3 * 4 + 8
    (learned,) = of(found, "learned-weights")
    assert learned["forwards"] == 8 + 8 * 11  # all 8 labelled rows under eleven merges
    (labels,) = of(found, "target-all-labels")
    assert labels["runs"] == 6
    folds = [read_json(f / "stage.json") for f in sorted(out.glob("target-all-labels-s1/fold-*"))]
    context = open_context(load_config(settings), quiet=True)
    judges = [row for split in ("micro_dev", "dev") for row in context.examples("target", split)]
    rows = [*context.examples("target", "train"), *judges]
    seen = [row.id for fold in folds_of(rows, 5) for row in fold]
    curves = [
        dict(zip(seen, (loss for fold in folds for loss in fold["rows"][epoch]), strict=True))
        for epoch in range(len(folds[0]["rows"]))
    ]
    after = min(range(1, len(curves)), key=lambda epoch: statistics.fmean(curves[epoch].values()))
    # The rows that judge the others judge it too, each by the fold that did not see it.
    assert labels["dev_loss"] == pytest.approx(
        statistics.fmean(curves[after][row.id] for row in judges)
    )
    assert labels["forwards"] == sum(len(losses) for fold in folds for losses in fold["rows"])


def test_weights_that_are_searched_untrained_are_paid_for(settings, tmp_path):
    alike = tiny_adapter_folder(tmp_path / "alike", tiny_model(), r=4, seed=3)
    config = load_config(settings, [f"adapters.target={alike}"])
    found = compare_methods(config, tmp_path / "out", ("lorahub",), (1,), quiet=True)
    (row,) = of(found, "lorahub")
    assert (row["runs"], row["steps"], row["forwards"]) == (0, 0, 40 * 8)
    context = open_context(config, quiet=True)
    rows = [*context.encoded("target", "train"), *context.encoded("target", "dev")]
    length = statistics.fmean(len(one.input_ids) for one in rows)
    assert row["tokens"] == round(40 * 8 * length)
    assert row["seconds"] > 0


def test_solved_examples_are_drawn_by_each_seed_and_cost_nothing_to_choose(settings, tmp_path):
    base = shutil.copytree(settings.parent / "base", tmp_path / "base")
    changed = read_json(base / "config.json") | {"max_position_embeddings": 4096}
    write_json(base / "config.json", changed)
    config, names = load_config(settings, [f"model.name={base}"]), ("few-shot-4", "few-shot-8")
    found = compare_methods(config, tmp_path / "out", names, (1, 2), quiet=True)
    assert found["failed"] == found["not_applicable"] == {}
    assert {row["job"] for row in found["rows"]} == {
        f"{name}-s{seed}" for name in names for seed in (1, 2)
    }
    drawn = {}
    for row in found["rows"]:
        assert [row[name] for name in ("runs", "forwards", "steps", "ratio")] == [0] * 4
        shots = read_json(tmp_path / "out" / row["job"] / "scores" / "scores.json")["shots"]
        assert shots["used"] == int(row["method"][-1])
        drawn[row["job"]] = shots["ids"]
    for seed in (1, 2):
        assert drawn[f"few-shot-8-s{seed}"][:4] == drawn[f"few-shot-4-s{seed}"]
    assert drawn["few-shot-4-s1"] != drawn["few-shot-4-s2"]


def test_what_is_planned_is_what_was_done(done, settings):
    found, out = done
    config = load_config(settings)
    context = open_context(config, quiet=True)
    plan, built = plan_of(config, (1, 2), TRAINED)
    costs = plan.cost(sizes_of(config, context.data))

    def repeated(row):
        """Return the rows that equal candidates of a round did not need to read again."""
        search = built[row["job"]].search
        rounds = read_jsonl(out / search / "rounds.jsonl") if search else []
        return sum(
            len(r["rows"]) * (len(r["candidates"]) - len({*r["candidates"]})) for r in rounds
        )

    # 4 micro-dev and 4 dev rows judge, 8 train rows are read for the norms of a pruned start
    judged, train = 8, 8
    for row in found["rows"]:
        if row["method"] in ("grid", "ratio-nearest"):
            job = f"{row['method']}-s{row['seed']}"
            assert built[job].scores is None
            assert not [name for name in plan.stages if name.startswith(f"{job}/")]
            continue
        one = built[row["job"]]
        planned = sum((costs[name] for name in (*one.paid, one.scores)), Cost())
        reads = train * row["method"].startswith(("grid-0", "ratio-higher", "recut"))
        reads += 2 * train * row["method"].startswith("grasp")
        reads += 8 * train * (row["method"] == "optuna-tpe")
        if row["method"].endswith("labelled"):
            # Of the epochs planned those are trained that dev rows keep.
            assert planned.steps >= row["steps"]
        elif row["method"] == "target-all-labels":
            assert planned.steps == 5 * 7 + 8, "13 of 16 rows by twos, then all"
            assert planned.forwards >= row["forwards"]
        elif row["method"] == "grasp-adapters":
            # What scope adds depends on the ratio found, and is not planned for.
            assert planned.forwards <= row["forwards"] + judged + reads + repeated(row)
        else:
            assert planned.steps == row["steps"], row["method"]
            done_in_all = row["forwards"] + judged + reads + repeated(row)
            assert planned.forwards == done_in_all, row["method"]
        assert planned.answers == 4
        assert planned.tokens > planned.answers
    plain = costs["source-finetuned-s1/final"]
    lengths = {
        split: statistics.fmean(len(one.input_ids) for one in context.encoded("target", split))
        for split in ("train", "dev")
    }
    # 4 steps of 2 rows; 4 dev rows before and after
    parts = [round(4 * 2 * lengths["train"]), round(8 * lengths["dev"])]
    assert plain == Cost(steps=4, tokens=sum(parts), forwards=8, trained=parts[0])


def test_early_stopping_makes_less_of_what_is_planned(settings, tmp_path):
    changes = ["train.finetune.epochs=6", "train.finetune.patience=1"]
    changes += ["train.finetune.learning_rate=1.0"]
    config = load_config(settings, changes)
    found = compare_methods(config, tmp_path, ("source-finetuned",), (1,), quiet=True)
    (row,) = of(found, "source-finetuned")
    plan, _ = plan_of(config, (1,), TRAINED)
    planned = plan.cost(sizes_of(config, open_context(config, quiet=True).data))
    whole = planned["source-finetuned-s1/final"]
    assert (whole.steps, whole.forwards) == (24, 28)
    assert row["steps"] < whole.steps
    assert row["forwards"] < whole.forwards


def test_what_all_labelled_rows_train_is_made_anew_and_judged_before(done):
    found, out = done
    for row in of(found, "source-finetuned-labelled"):
        (judge,) = (r for r in of(found, "source-finetuned") if r["seed"] == row["seed"])
        epochs = read_json(out / judge["job"] / "result.json")["result"]["best"]["step"] // 4
        facts = read_json(out / row["job"] / "final" / "stage.json")["labelled"]
        assert facts["rows"] == 16
        assert facts["steps"] == 8 * epochs
        assert row["steps"] == judge["steps"] + facts["steps"], "both runs are paid for"
        assert row["runs"] == 2
        assert row["seconds"] > judge["seconds"]
        assert row["dev_loss"] is None, "it was trained on the labelled rows"
        assert not list((out / row["job"]).glob("final-judged")), "the judge was at hand"
        (late,) = (r for r in of(found, "late-merge-labelled") if r["seed"] == row["seed"])
        (before,) = (r for r in of(found, "late-merge") if r["seed"] == row["seed"])
        results = {r["job"]: read_json(out / r["job"] / "result.json") for r in (late, before)}
        weights = [one["result"]["weights"] for one in results.values()]
        assert weights[0] == weights[1], "chosen by rows that were not trained on"
        whole = read_adapter(out / row["job"] / "final").adapter
        target = read_adapter(out.parent / "target").adapter
        for name, module in read_adapter(out / late["job"] / "merged-labelled").adapter.items():
            parts = (whole[name].delta(), target[name].delta())
            wanted = sum(w * part for w, part in zip(weights[0], parts, strict=True))
            torch.testing.assert_close(module.delta(), wanted, atol=1e-6, rtol=1e-5)
        assert late["steps"] == row["steps"]
    for row in of(found, "grasp-labelled"):
        (one,) = (r for r in of(found, "grasp-continue") if r["seed"] == row["seed"])
        assert row["ratio"] == one["ratio"], "the same search"
        facts = read_json(out / row["job"] / "final" / "stage.json")
        assert row["steps"] == one["steps"] + facts["labelled"]["steps"]
        assert row["dev_loss"] is None


def test_the_time_left_is_said_after_every_stage(settings, tmp_path):
    command = ["compare", str(settings), "--out", str(tmp_path / "out"), "--jobs", "0"]
    command += ["--seeds", "1", "--only", "source-finetuned", "--threads", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if " stages" in line]
    first, last = (f"source-finetuned-s1/{name}: done" for name in ("final", "scores"))
    assert lines[0].startswith(f"{first} (1 of 2 stages, about ")
    assert lines[0].endswith(" left)")
    assert lines[1] == f"{last} (2 of 2 stages)"
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert " stages" not in again.stderr, "nothing is left to do"


def test_variations_take_the_ratio_of_the_search(done, settings, tmp_path):
    found, _ = done
    ratio = next(row["ratio"] for row in of(found, "grasp-restart") if row["seed"] == 1)
    assert of(found, "random-masks")[0]["ratio"] == ratio
    assert of(found, "ratio-higher")[0]["ratio"] == pytest.approx(ratio + 0.05)
    assert taken(settings, tmp_path, {"shift": -0.05}, 0.02) == 0.0
    assert taken(settings, tmp_path, {"shift": 0.05}, 0.93) == 0.95
    assert taken(settings, tmp_path, {"ratio": 0.4}) == 0.4


def taken(settings, folder, options, found=None):
    """Return the ratio that a stage prunes at, after a search with this ratio if there is one."""
    inputs = {} if found is None else {"ratio": folder}
    write_json(folder / "ratio.json", {"ratio": found})
    stage = Stage("final", "prune", load_config(settings), inputs, options)
    return ratio_of(Work(stage, None, inputs, folder, folder))[0]


def test_the_reference_is_the_baseline_with_the_lowest_dev_loss(done):
    found, _ = done
    losses = {
        name: statistics.fmean(row["dev_loss"] for row in of(found, name))
        for name, one in METHODS.items()
        if one.role == "baseline"
    }
    assert found["reference"] == min(losses, key=losses.get)
    others = set(found["methods"]) - {found["reference"]}
    assert set(found["paired"]) == others


def test_paired_differences_are_those_of_the_scores_over_seeds(done):
    found, _ = done
    reference = of(found, found["reference"])
    for method in ("grasp-restart", "zero-shot", "random-masks"):
        ours = {row["seed"]: row["scores"]["test"]["loss"] for row in of(found, method)}
        theirs = {row["seed"]: row["scores"]["test"]["loss"] for row in reference}
        pick = lambda one, seed: one.get(seed, next(iter(one.values())))  # noqa: E731
        seeds = {
            seed
            for seed in {*ours, *theirs}
            if all(seed in one or len(one) == 1 for one in (ours, theirs))
        }
        gaps = [pick(ours, seed) - pick(theirs, seed) for seed in seeds]
        paired = found["paired"][method]["test"]["loss"]
        assert paired["difference"] == pytest.approx(statistics.fmean(gaps), abs=1e-5)


def test_the_documents_hold_the_numbers(done):
    found, out = done
    assert read_json(out / "comparison.json")["reference"] == found["reference"]
    text = (out / "comparison.md").read_text()
    row = next(part for part in text.splitlines() if part.startswith("| grasp-restart |"))
    losses = [r["scores"]["test"]["loss"] for r in of(found, "grasp-restart")]
    assert f"{statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f}" in row
    assert "grid, chosen by the test rows" in text
    assert "| grid-0.1 |" not in text
    assert "`ties-finetuned`" in text
    lines = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    mine = [
        one for one in lines
        if (one["method"], one["metric"], one["seed"]) == ("grasp-restart", "loss", "1")
    ]  # fmt: skip
    (value,) = (float(one["value"]) for one in mine)
    assert (
        value
        == next(r for r in of(found, "grasp-restart") if r["seed"] == 1)["scores"]["test"]["loss"]
    )
    for name in ("pareto.png", "ratios.png", "cost.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_does_nothing_twice(done, settings):
    _, out = done

    def results():
        return {*out.glob("*/result.json"), *out.glob("**/stage.json")} - {*out.glob("**/*.work/*")}

    markers = results()
    times = {p: p.stat().st_mtime_ns for p in markers}
    arguments = ["compare", str(settings), "--out", str(out), "--seeds", "1,2", "--jobs", "0"]
    arguments += [text for name in ONLY for text in ("--only", name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {p: p.stat().st_mtime_ns for p in markers} == times
    assert results() == markers
    before = read_json(out / "comparison.json")
    for seeds in ("1,2", "2"):
        fewer = [*arguments[:5], seeds, "--jobs", "0", "--only", "zero-shot"]
        said = CliRunner().invoke(app, fewer)
        assert said.exit_code == 0, said.output
        assert read_json(out / "comparison.json") == before, "what is there stays in the tables"
    assert "ties-finetuned: not applicable" in result.output


def test_a_damaged_result_that_is_not_asked_for_does_not_leave_the_tables_unsaid(
    done, settings, tmp_path
):
    out = tmp_path / "copy"
    shutil.copytree(done[1], out)
    config, marker = load_config(settings), out / "grasp-restart-s1" / "final" / "stage.json"
    weights, tables = marker.with_name("adapter_model.safetensors"), out / "comparison.json"
    for file, said in (
        (weights, r"final' is damaged: 'adapter_model\.safetensors' is missing. Its method is not"),
        (marker, r"final' is not empty and no result of grasp-lora \(it has no stage\.json\)"),
    ):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=said):
            compare_methods(config, out, ("zero-shot",), (1, 2), quiet=True)
        file.write_bytes(content)
    before = tables.read_text()
    tables.write_text(before.replace("ties-finetuned", "tees-finetuned"))
    with pytest.raises(ValueError, match=r"comparison\.json' is damaged, so it is not known which"):
        compare_methods(config, out, ("zero-shot",), (1, 2), quiet=True)
    tables.write_text(before)
    (out / "grid-0.4-s1" / "result.json").write_text("")
    compare_methods(config, out, ("zero-shot",), (1, 2), quiet=True)
    assert tables.read_text() == before
    assert read_json(out / "grid-0.4-s1" / "result.json")["result"]["ratio"] == 0.4


def test_processes_give_the_same_as_this_one(done, settings, tmp_path):
    found, out = done
    names = ("source-finetuned", "grasp-restart", "random-masks")
    again = compare_methods(
        load_config(settings), tmp_path / "two", names, (1,), Pool(2, threads=1), quiet=True
    )
    for row in again["rows"]:
        (before,) = (r for r in of(found, row["method"]) if r["seed"] == row["seed"])
        for name in ("ratio", "scores", "dev_loss", "forwards", "tokens"):
            assert row[name] == before[name], (row["method"], name)
        final, files = f"{row['method']}-s1/final", ("adapter_model.safetensors",)
        for file in files:
            assert (tmp_path / "two" / final / file).read_bytes() == (
                out / final / file
            ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "no method 'nonsense'; choose from zero-shot"),
        (["--seeds", "1,1"], "different numbers"),
        (["--set", "data.target.rows={train: 8, dev: 4, micro_dev: 4}"], "no test rows"),
        (
            ["--set", "recipe=auto", "--set", "data.target.rows={train: 8, dev: 4, test: 4}"],
            "data.target.rows.micro_dev: required, not given",
        ),
    ],
)
def test_bad_options_are_refused_before_any_work(settings, tmp_path, arguments, message):
    command = ["compare", str(settings), "--out", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_stages_of_all_methods_are_a_plan_and_main_methods_get_every_seed(settings, tmp_path):
    config = load_config(settings)
    plan, built = plan_of(config, (1, 2, 3), TRAINED)
    for method, about in METHODS.items():
        count = 3 if about.seeds == "all" else 1
        assert sum(job_name(method, seed) in built for seed in (1, 2, 3)) == (
            3 if about.seeds == "none" else count
        )
    assert {method_of(job) for job in built} == set(METHODS)
    data = open_context(config, quiet=True).data

    def keys(stages):
        return {
            name: hash_of(key_of(one, KINDS[one.kind], data, None, {}))
            for name, one in stages.items()
        }

    moved = config.model_copy(update={"output": settings.parent / "elsewhere"})
    again, _ = plan_of(moved, (1, 2, 3), TRAINED)
    assert keys(again.stages) == keys(plan.stages)
    write_plan(tmp_path, plan)
    some = {name: read_stage(tmp_path, name) for name in list(plan.stages)[::25]}
    assert keys(some) == {name: keys(plan.stages)[name] for name in some}


def test_what_is_asked_for_changes_no_stage(settings):
    config = load_config(settings)
    plan, built = plan_of(config, (1, 2), TRAINED)
    for name in ("grasp-late", "grasp-labelled", "random-masks"):
        part = part_of(plan, tuple(stages_of(built, [f"{name}-s1"])))
        assert len(part.stages) < 10
        assert all(plan.stages[other] is one for other, one in part.stages.items())


def test_one_run_and_two_have_the_epochs_that_make_them_comparable(settings):
    def epochs(config):
        return tuple(config.training(name).epochs for name in ("search", "finetune"))

    config = load_config(settings, ["train.search.epochs=10", "train.finetune.epochs=10"])
    assert epochs(changed_settings(config, {"finetune.mode": "restart"}, TRAINED)) == (10, 10)
    assert epochs(changed_settings(config, {"finetune.mode": "continue"}, TRAINED)) == (5, 5)
    names = ["finetune.mode=continue", "train.search.epochs=4", "train.finetune.epochs=3"]
    config = load_config(settings, names)
    assert epochs(changed_settings(config, {}, TRAINED))[1] == 7
    assert epochs(changed_settings(config, {"finetune.mode": "continue"}, TRAINED)) == (4, 3)


def test_needs_are_run_as_well(settings):
    plan, built = plan_of(load_config(settings), (1,), TRAINED)

    def run_for(job):
        return list(part_of(plan, tuple(stages_of(built, [job]))).stages)

    own = [f"random-masks-s1/{name}" for name in ("final", "scores")]
    assert run_for("random-masks-s1") == ["adapters/merged", "grasp-restart-s1/search", *own]
    points = [f"grid-{ratio}-s1/{name}" for ratio in GRID for name in ("final", "scores")]
    assert run_for("grid-s1") == ["adapters/merged", *points]


def test_folds_hold_whole_groups_and_every_row_once():
    rows = [Example(f"r{i}", f"g{i // 3}", "es", {}, ("x",)) for i in range(20)]
    folds = folds_of(rows, 5)
    assert sorted(e.id for fold in folds for e in fold) == sorted(e.id for e in rows)
    groups = [{e.group for e in fold} for fold in folds]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 7
    assert max(map(len, folds)) - min(map(len, folds)) <= 3
    assert len(folds_of(rows[:3], 5)) == 1


@pytest.fixture(scope="module")
def pairs():
    """Two adapters of one rank, each as a merge of one."""
    generator = torch.Generator().manual_seed(0)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    live = tiny_model()
    shapes = {name: module.weight.shape for name, module in live.named_modules() if name in names}
    from grasp_lora.core.lora import LoraFactors

    def adapter():
        return {
            name: LoraFactors(
                torch.randn(4, shape[1], generator=generator),
                torch.randn(shape[0], 4, generator=generator),
                2.0,
            )
            for name, shape in shapes.items()
        }

    return [adapter(), adapter()]


def trimmed(tensor, density):
    """TIES on the side: keep the largest by size, elect the sign, average what agrees."""
    flat = tensor.abs().flatten()
    kept = max(1, int(density * flat.numel()))
    border = flat.sort(descending=True).values[kept - 1]
    return torch.where(tensor.abs() >= border, tensor, torch.zeros(()))


def test_ties_of_factors_is_the_textbooks(pairs):
    alone = [merge("cat", [one], [1.0]) for one in pairs]
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = peft_merge(model, alone, "ties", [0.5, 0.5], 0.5, seed=0)
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, module in merged.items():
        for side in ("A", "B"):
            parts = [trimmed(getattr(one[name], side), 0.5) for one in alone]
            sign = torch.sign(sum(parts))
            sign[sign == 0] = 1
            agreeing = [torch.where(torch.sign(p) == sign, p, torch.zeros(())) for p in parts]
            count = sum((p != 0).float() for p in agreeing).clamp(min=1)
            expected = sum(np.sqrt(0.5) * p for p in agreeing) / count
            assert torch.allclose(getattr(module, side), expected, atol=1e-5), (name, side)


def test_dare_depends_on_its_seed_alone(pairs):
    alone = [merge("cat", [one], [1.0]) for one in pairs]
    made = [
        peft_merge(tiny_model(), alone, "dare_linear", [0.5, 0.5], 0.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    name = next(iter(made[0]))
    assert torch.equal(made[0][name].A, made[1][name].A)
    assert not torch.equal(made[0][name].A, made[2][name].A)


def test_whole_deltas_by_svd_are_the_average_of_low_rank(pairs):
    """With density 1 nothing is trimmed; the rank-4 fit of the mean of agreeing entries is left."""
    alone = [merge("cat", [one], [1.0]) for one in pairs]
    with pytest.warns(UserWarning, match="no pruning"):
        merged = peft_merge(tiny_model(), alone, "dare_linear_svd", [0.5, 0.5], 1.0, seed=0)
    for name, module in merged.items():
        whole = sum(0.5 * one[name].delta() for one in pairs)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        best = u[:, :4] * s[:4] @ v[:4]
        assert torch.allclose(module.B @ module.A, best, atol=1e-3)


def test_lorahub_sums_factors(pairs):
    merged = summed(pairs, [0.7, -0.4])
    for name, module in merged.items():
        a = 0.7 * pairs[0][name].A - 0.4 * pairs[1][name].A
        b = 0.7 * pairs[0][name].B - 0.4 * pairs[1][name].B
        assert torch.allclose(module.B @ module.A, 2.0 * b @ a, atol=1e-4)
    with pytest.raises(NotApplicable, match="same modules"):
        summed([pairs[0], {}], [1.0, 1.0])


def pair_of(folder):
    for role, seed in (("source", 1), ("target", 2)):
        tiny_adapter_folder(folder / role, tiny_model(), r=4, seed=seed)
    return {role: folder / role for role in ("source", "target")}


def test_lorahub_finds_weights_that_lower_its_price(settings, tmp_path):
    pytest.importorskip("nevergrad")
    config = load_config(settings)
    context = open_context(config, quiet=True)
    adapters = pair_of(tmp_path)
    stage = Stage("start", "merge", config, adapters, {"rule": "lorahub"})
    session = Session(config, context.data, context)
    plan = Plan({"start": stage})
    work_off(plan, tmp_path / "a", session)
    folder = tmp_path / "a" / "start"
    facts = facts_of(folder)
    assert facts["forwards"] == 40 * 8
    assert facts["seconds"] > 0
    work_off(plan, tmp_path / "a", session)
    assert facts_of(folder) == facts
    tried = read_json(folder / "tried.json")
    assert len(tried["tried"]) == 40
    assert tried["tried"][0][1] == [0.0, 0.0], "starts at the bare backbone"
    assert all(abs(w) <= 1.5 for _, weights in tried["tried"] for w in weights)
    work_off(plan, tmp_path / "b", session)
    assert read_json(tmp_path / "b" / "start" / "tried.json") == tried
    # the folder is the merge of those weights
    loaded = [read_adapter(path).adapter for path in adapters.values()]
    expected = summed(loaded, tried["weights"])
    got = read_start(folder, context.backbone)
    for name, module in expected.items():
        assert torch.allclose(got[name].B @ got[name].A, module.B @ module.A, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "kind", "weights"),
    [
        ("svd", "svd", [0.5, 0.5]),
        ("linear", "linear", [1.0, 1.0]),
        ("sum", "cat", [1.0, 1.0]),
        ("average", "cat", [0.5, 0.5]),
        ("weights-25-75", "cat", [0.25, 0.75]),
    ],
)
def test_a_start_is_the_merge_asked_for(settings, tmp_path, start, kind, weights):
    config = load_config(settings)
    context = open_context(config, quiet=True)
    adapters, builder = pair_of(tmp_path), PlanBuilder()
    built = by(Recipe(start, None))(
        Case(builder, config, "one", adapters, None, METHODS.__getitem__)
    )
    assert built.paid == ("one/start",)
    plan = part_of(builder.build(), ("one/start",))
    session = Session(config, context.data, context)
    work_off(plan, tmp_path, session)
    folder = tmp_path / "one" / "start"
    facts = facts_of(folder)
    assert facts.get("forwards", 0) == 0
    assert facts["seconds"] > 0
    work_off(plan, tmp_path, session)
    assert facts_of(folder) == facts, "it is there already"
    loaded = [read_adapter(path).adapter for path in adapters.values()]
    expected = merge(kind, loaded, weights)
    got = read_start(folder, context.backbone)
    for name, module in expected.items():
        assert torch.allclose(got[name].B @ got[name].A, module.B @ module.A, atol=1e-6)


@pytest.mark.parametrize("method", ["linear-unscaled", "grasp-paper", "adaptive-unscaled-0.4"])
def test_the_published_merge_adds_the_factors_and_drops_the_scaling(settings, tmp_path, method):
    context = open_context(load_config(settings), quiet=True)
    adapters, builder = pair_of(tmp_path), PlanBuilder()
    case = Case(builder, context.config, "one", adapters, None, METHODS.__getitem__)
    METHODS[method].build(case)
    plan = part_of(builder.build(), ("one/start",))
    work_off(plan, tmp_path, Session(context.config, context.data, context))
    got = read_start(tmp_path / "one" / "start", context.backbone)
    one, two = (read_adapter(path).adapter for path in adapters.values())
    assert {factors.scaling for factors in (*one.values(), *two.values())} != {1.0}
    for name, module in got.items():
        delta = (one[name].B + two[name].B) @ (one[name].A + two[name].A)
        assert torch.allclose(module.B @ module.A, delta, atol=1e-6)


def test_runs_of_several_machines_are_told_apart(done, tmp_path, drawing):
    found, _ = done
    assert len(machine_names(found["rows"])) == 1
    assert "machine" not in price_rows(found)[0]
    assert several_machines_note(found) == []
    rows = [
        row | ({"machines": ["NVIDIA H200"]} if "grid" not in row["method"] else {})
        for row in found["rows"]
    ]
    mixed = dict(found) | {"rows": rows}
    here = machine_names(found["rows"])[0]
    assert sorted(machine_names(rows)) == sorted(["NVIDIA H200", here])
    titles, cells = price_rows(mixed)
    by_method = {row[0]: dict(zip(titles, row, strict=True)) for row in cells}
    assert by_method["grasp-restart"]["machine"] == "NVIDIA H200"
    assert by_method["grid"]["machine"] == here
    assert by_method["grasp-restart"]["times the grid's speed"] == "–"
    assert by_method["grid"]["times the grid's speed"] == "1.00"
    assert "2 machines" in comparison_markdown(mixed)
    plot_comparison(mixed, tmp_path)
    plot_comparison(found, tmp_path / "one")
    one, other = ((folder / "pareto.png").read_bytes() for folder in (tmp_path, tmp_path / "one"))
    assert one != other
