"""What a comparison's runs begin with and are charged for, and what a killed one leaves."""

import shutil
import sys
import time
from pathlib import Path

import pytest
from benchmarks import recorded

from grasp_lora.base.files import read_json, write_json, write_jsonl
from grasp_lora.config.run_config import load_config
from grasp_lora.models.content import base_content
from grasp_lora.plans import executor
from grasp_lora.plans.compare import compare_methods, plan_of, stages_of, summary
from grasp_lora.plans.executor import Options, Outcome, work_off
from grasp_lora.plans.methods import METHODS
from grasp_lora.plans.plan import Plan, part_of
from grasp_lora.plans.recipes import changed_settings
from grasp_lora.plans.results import MethodOutcome, method_outcomes
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.plans.single import evaluate_adapter, train_adapter
from grasp_lora.report.comparison import comparison_markdown, comparison_tables, price_rows
from grasp_lora.stages.folder import STAGE_FILE, work_folder
from grasp_lora.stages.keys import hash_of, key_of
from grasp_lora.stages.stage import Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.training.best import BestCallback
from grasp_lora.workbench.context import model_spec, open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import TRAINED, job, write_job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prices")
    tiny_backbone_folder(folder / "base")
    for role, rank in (("source", 4), ("target", 4)):
        tiny_adapter_folder(folder / role, tiny_model(), r=rank, seed=rank + len(role))
    return folder


@pytest.fixture(scope="module")
def settings(place):
    steps = {"epochs": 1, "batch_size": 2}
    changes = {"search": steps, "finetune": steps, "train": steps}
    changes["adapters"] = {role: str(place / role) for role in ("source", "target")}
    changes["controller"] = {"rounds": 2, "rows": 4}
    return write_job(place / "run.yaml", job(place, **changes))


def rows_of(found, method):
    return [row for row in found["rows"] if row["method"] == method]


def planned(config, seeds=(1,)):
    """Return the key of every stage, its inputs but for given adapters left out."""
    data, base = open_context(config, quiet=True).data, base_content(model_spec(config))
    plan, _ = plan_of(config, seeds, TRAINED)
    return {
        name: hash_of(key_of(one, KINDS[one.kind], data, base, {}))
        for name, one in plan.stages.items()
    }


def test_all_begin_at_the_one_merge_configured_and_pay_for_its_weights(settings, tmp_path):
    config = load_config(settings, ["merge.weights=auto", "seed=3"])
    out = tmp_path / "auto"
    names = ("grid-0.4", "grasp-restart", "average-finetuned")
    found = compare_methods(config, out, names, (1,), quiet=True)
    (point,), (ours,), (plain,) = (rows_of(found, name) for name in names)
    # eleven merges on the 8 labelled rows, beside 2 x 4 dev rows, and 2 rounds x 3 x 4 rows
    assert point["forwards"] == 8 * 11 + 8
    assert ours["forwards"] == 8 * 11 + 24 + 8
    assert plain["forwards"] == 8, "the average needs no weights"
    merged = out / "adapters"
    took = sum(read_json(merged / name / "stage.json")["seconds"] for name in ("weights", "merged"))
    final = read_json(out / "grid-0.4-s1" / "final" / "stage.json")["seconds"]
    assert point["seconds"] == pytest.approx(took + final)
    assert not (out / "grid-0.4-s1" / "start").exists(), "it would be another merge"


def test_the_rank_of_the_configured_merge_is_that_of_its_methods(settings, tmp_path):
    config = load_config(settings, ["merge={kind: svd, rank: 2}", "mask_unit=merged"])
    found = compare_methods(config, tmp_path, ("grid-0.4", "svd"), (1,), quiet=True)
    assert found["failed"] == {}
    ranks = {
        name: read_json(tmp_path / name / "adapter_config.json")["r"]
        for name in ("adapters/merged", "grid-0.4-s1/final", "svd/start")
    }
    assert ranks == {"adapters/merged": 2, "grid-0.4-s1/final": 2, "svd/start": 4}


def test_merging_after_fine_tuning_is_for_the_methods_that_say_so(settings):
    config = load_config(settings)
    after = load_config(settings, ["merge.when=after"])
    assert changed_settings(after, {}, TRAINED).merge.when == "before"
    late = changed_settings(after, METHODS["late-merge"].changes, TRAINED)
    assert late.merge.when == "after"
    assert planned(after) == planned(config)


def test_adalora_has_a_step_size_of_its_own(settings):
    config = load_config(settings, ["train.target.learning_rate=3e-4"])
    changed = changed_settings(config, METHODS["target-adalora"].changes, TRAINED)
    assert changed.training("target").learning_rate == 3e-3
    rates = [one.training("finetune").learning_rate for one in (changed, config)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("plain", ["source-finetuned", "average-finetuned", "grasp-continue"])
def test_three_times_the_learning_rate_is_of_the_one_configured(settings, plain):
    config, faster = load_config(settings), f"{plain}-3x"
    sections = ("search", "finetune") if plain == "grasp-continue" else ("finetune",)
    for rate, tripled in ((1e-4, 3e-4), (2e-5, 6e-5)):
        names = [f"train.{section}.learning_rate={rate}" for section in ("search", "finetune")]
        changed = changed_settings(load_config(settings, names), METHODS[faster].changes, TRAINED)
        threefold = [f"train.{section}.learning_rate={tripled}" for section in sections]
        expected = load_config(settings, names + threefold)
        assert changed == changed_settings(expected, METHODS[plain].changes, TRAINED)
    keys = planned(config, (1, 2))
    runs = {keys[f"{name}-s{seed}/final"] for name in (plain, faster) for seed in (1, 2)}
    assert len(runs) == 4, "two runs a seed that differ"


def test_an_adapter_that_evaluation_would_refuse_is_refused_before_any_work(settings, tmp_path):
    role = tmp_path / "source"
    shutil.copytree(load_config(settings).adapters.source, role)
    file = role / "adapter_config.json"
    write_json(file, read_json(file) | {"task_type": "FEATURE_EXTRACTION"})
    config = load_config(settings, [f"adapters.source={role}"])
    names = ("average-finetuned", "target")
    with pytest.raises(ValueError, match="FEATURE_EXTRACTION"):
        compare_methods(config, tmp_path / "out", names, (1,), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_local_model_of_other_weights_is_another_plan(settings, tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = load_config(settings, [f"model.name={tmp_path / 'base'}"])
    before = planned(config)
    assert planned(config) == before
    tiny_backbone_folder(tmp_path / "base", seed=5)
    after = planned(config)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    other = load_config(settings, ["model.name=meta-llama/Meta-Llama-3-8B"])
    assert base_content(model_spec(other)) is None


def result(ratio, loss, **more):
    values = {"loss": [loss - 0.1, loss + 0.1]}
    return {
        "ratio": ratio,
        "losses": {"micro_dev": [loss], "dev": [loss]},
        "scores": {"test": {"loss": loss}},
        "intervals": {"test": {"loss": (None, None)}},
        "rows": {"test": {"ids": ["a", "b"], "groups": ["g", "h"], "values": values}},
        "price": {"runs": 1, "seconds": 1.0, "forwards": 1, "steps": 1, "tokens": 1},
        "bytes": 1,
        "zeros": ratio,
    } | more


def pretend(plan, place, made):
    """Write folders of stages as if they were done.

    `made` has, for the first part of a stage's name, its machine, peak and facts.
    """
    for name, stage in plan.stages.items():
        folder, facts = place / name, {"seconds": 1.0, "steps": 1, "log": [], "ratio": 0.0}
        machine, peak, more = made.get(name.split("/")[0], (None, None, {}))
        facts |= {"machine": machine, "peak_memory_bytes": peak} | more
        write_json(folder / STAGE_FILE, facts)
        (folder / "adapter_model.safetensors").touch()
        write_json(folder / "weights.json", {"weights": [0.5, 0.5]})
        ratio = {"verdict": "flat", "findings": [], "flipped_entries": [], "entries": 1}
        write_json(folder / "ratio.json", ratio | {"ratio": 0.0, "probe_forwards": 0})
        write_jsonl(folder / "rounds.jsonl", [])
        scores = {"loss": {"value": 1.0, "low": None, "high": None}}
        write_json(folder / "scores.json", {"sets": {"test": {"scores": scores, "empty": 0}}})
        write_json(folder / "provenance.json", {"dtype": "torch.float32"})
        rows = [{"set": "test", "id": i, "group": i, "loss": 1.0} for i in "ab"]
        write_jsonl(folder / "predictions.jsonl", rows)
        if stage.option("labelled"):
            write_json(folder / "losses.json", {"micro_dev": [1.0], "dev": [1.0]})


def test_a_price_names_the_machines_and_the_peak_of_every_stage_in_it(settings, tmp_path):
    here, gpu = {"cpu": "C", "gpu": None}, {"cpu": "C", "gpu": "G"}
    ratios = [name for name in METHODS if name.startswith("grid-0")]
    made = {
        f"{name}-s1": (gpu if place else here, 5 + place, {"ratio": float(name[5:])})
        for place, name in enumerate(ratios)
    }
    made |= {
        "source-finetuned-s1": (gpu, 90, {}),
        "source-finetuned-labelled-s1": (here, 7, {"labelled": {"steps": 1, "rows": 16}}),
        "random-masks-s1": (here, 3, {}),
        "grasp-restart-s1": (gpu, 99, {"ratio": 0.77}),
        "late-merge-s1": (here, 4, {}),
    }
    config = load_config(settings)
    plan, built = plan_of(config, (1,), TRAINED)
    jobs = [*made, "grid-s1", "ratio-nearest-s1"]
    asked = part_of(plan, tuple(stages_of(built, jobs)))
    pretend(asked, tmp_path, made)
    stages = {name: Outcome(tmp_path / name) for name in asked.stages}
    sizes = sizes_of(config, open_context(config, quiet=True).data)
    chosen = {job: built[job] for job in jobs}
    found = summary(config, method_outcomes(chosen, plan, tmp_path, stages, sizes))
    priced = {
        row["method"]: (row["machines"], row["peak_memory_bytes"])
        for row in found["rows"]
        if not row["method"].startswith("grid-0")
    }
    assert priced == {
        "source-finetuned": (["G"], 90),
        "source-finetuned-labelled": (["C", "G"], 90),
        "random-masks": (["C"], 3),
        "grasp-restart": (["G"], 99),
        "late-merge": (["C", "G"], 90),
        "grid": (["C", "G"], 12),
        "ratio-nearest": (["G"], 12),
    }
    titles, cells = price_rows(found)
    speed = {row[0]: row[titles.index("times the grid's speed")] for row in cells}
    assert {*speed.values()} == {"–"}, "a grid of two machines is no unit for anyone's speed"


def test_a_choice_leaves_out_what_has_no_finite_result_and_names_it(settings, tmp_path):
    ratios = [name for name in METHODS if name.startswith("grid-0")]
    made = {f"{name}-s1": (None, None, {"ratio": float(name[5:])}) for name in ratios}
    config = load_config(settings)
    plan, built = plan_of(config, (1,), TRAINED)
    asked = part_of(plan, tuple(stages_of(built, ["grid-s1", "ratio-nearest-s1"])))
    pretend(asked, tmp_path, made | {"grasp-restart-s1": (None, None, {"ratio": 0.31})})
    stages = {name: Outcome(tmp_path / name) for name in asked.stages}
    diverged = [f"grid-0.3-s1/{name}" for name in ("final", "scores")]
    stages |= {name: Outcome(tmp_path / name, error="failed (NaN)") for name in diverged}
    losses = {"micro_dev": [None], "dev": [0.1]}  # JSON has null for what is not finite
    write_json(tmp_path / "grid-0.1-s1" / "scores" / "losses.json", losses)
    write_json(tmp_path / "grid-0.7-s1" / "scores" / "losses.json", {"micro_dev": [0], "dev": [0]})
    sizes = sizes_of(config, open_context(config, quiet=True).data)
    found = summary(config, method_outcomes(built, plan, tmp_path, stages, sizes))
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["grid"]["ratio"] == 0.7
    assert rows["grid"]["left_out"] == ["grid-0.1-s1", "grid-0.3-s1"]
    assert rows["grid"]["runs"] == 7, "what it could not choose is paid for where it was run"
    assert rows["ratio-nearest"]["ratio"] in (0.2, 0.4)
    assert rows["ratio-nearest"]["left_out"] == ["grid-0.3-s1"]
    assert found["failed"] == {"grid-0.3-s1": "failed (NaN)"}
    assert "- `grid-s1`: grid-0.1-s1, grid-0.3-s1" in comparison_markdown(found)


def test_scores_without_a_headline_still_make_tables(settings):
    one = MethodOutcome(result(0.0, 1.0) | {"scores": {"test": {"rougeL": 20.0}}})
    one.result["intervals"] = {"test": {"rougeL": (10.0, 30.0)}}
    one.result["rows"]["test"]["values"] = {"rougeL": [10.0, 30.0]}
    found = summary(load_config(settings), {"average-finetuned-s1": one, "grid-0.1-s1": one})
    assert "| average-finetuned | 1 | 0.000 | 20.0 |" in comparison_markdown(found)
    assert len(comparison_tables(found)) == 2


def test_methods_that_were_still_getting_better_are_named(settings):
    curves = {
        "source-finetuned-s1": [[0, 3.0], [2, None], [4, 2.0]],
        "source-finetuned-s2": [[0, 3.0], [2, 1.0], [4, 2.0]],
        "average-finetuned-s1": [[0, 3.0], [2, 2.0], [4, 2.0]],
        "average-finetuned-s2": [[0, 3.0], [2, 2.0], [4, None]],
        "svd-finetuned-s1": [[0, 3.0]],
        "weight-decay-s1": [[0, None], [2, 2.0]],
        "average": [],
    }
    outcomes = {job: MethodOutcome(result(0.0, 1.0, dev=dev)) for job, dev in curves.items()}
    # how an adapter that is not trained here was once trained is not of interest
    untrained = result(0.0, 1.0, dev=[[0, 3.0], [2, 2.0]])
    untrained["price"] = untrained["price"] | {"steps": 0}
    text = comparison_markdown(
        summary(load_config(settings), outcomes | {"source": MethodOutcome(untrained)})
    )
    (line,) = (line for line in text.splitlines() if "lowest in their last epoch" in line)
    assert line.endswith("may improve them: `source-finetuned` (1 of 2).")


def test_methods_that_often_answer_with_nothing_are_named(settings):
    def answered(empty: int | None) -> MethodOutcome:
        found = result(0.0, 1.0)
        rows = len(found["rows"]["test"]["ids"])
        assert rows == 2
        return MethodOutcome(found | ({} if empty is None else {"empty": {"test": empty}}))

    outcomes = {
        "source-finetuned-s1": answered(0),
        "average-finetuned-s1": answered(1),
        "average-finetuned-s2": answered(0),
        "svd-finetuned-s1": answered(None),
    }
    text = comparison_markdown(summary(load_config(settings), outcomes))
    (line,) = (line for line in text.splitlines() if line.startswith("Empty answers"))
    assert line.endswith("requires a token): `average-finetuned` 25.")
    few = {"source-finetuned-s1": answered(0), "svd-finetuned-s1": answered(None)}
    assert "Empty answers" not in comparison_markdown(summary(load_config(settings), few))


def test_what_was_not_installed_is_run_once_it_is(settings, tmp_path, monkeypatch):
    pytest.importorskip("nevergrad")
    config, out = load_config(settings), tmp_path / "out"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "nevergrad", None)
        for _ in range(2):
            found = compare_methods(config, out, ("lorahub",), (1,), quiet=True)
            assert "pip install nevergrad" in found["not_applicable"]["lorahub"]
    found = compare_methods(config, out, ("lorahub",), (1,), quiet=True)
    assert found["not_applicable"] == {}
    assert len(rows_of(found, "lorahub")) == 1


def test_methods_in_which_nothing_is_drawn_have_a_table_of_their_own(settings, tmp_path):
    config = load_config(settings)
    found = compare_methods(config, tmp_path, ("zero-shot", "source"), (5,), quiet=True)
    assert [row["method"] for row in found["rows"]] == ["zero-shot", "source"]
    assert "| zero-shot | 1 |" in (tmp_path / "comparison.md").read_text()


class Killed(BaseException):
    """Nothing in the code under test catches it, as nothing catches SIGKILL."""


def killed(*_):
    raise Killed


def test_the_seconds_of_a_killed_run_are_those_of_both_processes(settings, tmp_path, monkeypatch):
    config = load_config(settings, ["train.target.epochs=3"])
    measure, pause, calls = BestCallback._evaluate, 0.6, []

    def slow(self, step):
        calls.append(step)
        if len(calls) == 3:
            raise Killed
        time.sleep(pause)
        measure(self, step)

    monkeypatch.setattr(BestCallback, "_evaluate", slow)
    with pytest.raises(Killed):
        train_adapter(config, "target", tmp_path / "a", context=open_context(config, quiet=True))
    context = open_context(config, quiet=True)
    began = time.perf_counter()
    out = train_adapter(config, "target", tmp_path / "a", context=context)
    second = time.perf_counter() - began
    assert len(calls) == 5, "the third evaluation is made again, those before it are not"
    assert read_json(out / "stage.json")["seconds"] > second + pause


def test_an_evaluation_killed_as_it_ends_is_made_again(settings, place, tmp_path, monkeypatch):
    context = open_context(load_config(settings), quiet=True)
    arguments = (context.config, place / "source", tmp_path / "scores")
    with monkeypatch.context() as last:
        last.setattr(executor, "publish", killed)
        with pytest.raises(Killed):
            evaluate_adapter(*arguments, context=context)
    begun = work_folder(tmp_path / "scores") / "result"
    assert (begun / "predictions.jsonl").exists()
    assert not (tmp_path / "scores").exists()
    evaluate_adapter(*arguments, context=context)
    assert (tmp_path / "scores" / "stage.json").exists()
    assert not begun.exists()


def test_weights_killed_as_they_end_are_learned_again(settings, place, tmp_path, monkeypatch):
    context = open_context(load_config(settings), quiet=True)
    pair = {role: place / role for role in ("source", "target")}
    stage = Stage("weights", "probe", context.config, pair, {"choice": "weights"})
    arguments = (Plan({"weights": stage}), tmp_path, Session(context.config, context.data, context))
    with monkeypatch.context() as last:
        last.setattr(executor, "publish", killed)
        with pytest.raises(Killed):
            work_off(*arguments)
    assert (work_folder(tmp_path / "weights") / "result" / "weights.json").exists()
    work_off(*arguments)
    assert len(read_json(tmp_path / "weights" / "weights.json")["weights"]) == 2


def test_overwriting_that_was_killed_can_be_done_again(settings, place, tmp_path, monkeypatch):
    context = open_context(load_config(settings), quiet=True)

    def work(weights, overwrite=False):
        section = context.config.merge.model_copy(update={"weights": weights})
        config = context.config.model_copy(update={"merge": section})
        pair = {role: place / role for role in ("source", "target")}
        session, plan = (
            Session(config, context.data, context),
            Plan({"one": Stage("one", "merge", config, pair)}),
        )
        work_off(plan, tmp_path, session, Options(overwrite=overwrite))
        return read_json(tmp_path / "one" / "merge.json")["weights"]

    assert work((0.5, 0.5)) == [0.5, 0.5]
    with pytest.raises(ValueError, match="--overwrite"):
        work((0.75, 0.25))
    with monkeypatch.context() as midway:
        midway.setattr(executor, "publish", killed)
        with pytest.raises(Killed):
            work((0.75, 0.25), overwrite=True)
    assert work((0.5, 0.5)) == [0.5, 0.5], "until there is a new result the old one stays"
    rename = Path.rename

    def once(self, target):
        if self.name == "result":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as midway:
        midway.setattr(Path, "rename", once)
        with pytest.raises(Killed):
            work((0.75, 0.25), overwrite=True)
    assert not (tmp_path / "one").exists()
    assert work((0.75, 0.25)) == [0.75, 0.25]
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_pairs_share_a_source_adapter_where_its_rows_are_the_same(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recorded, "train_adapter", lambda _, role, out: made.append((role, out)))
    folders = {
        pair: recorded.with_adapters(recorded.config_of(pair), tmp_path, pair).adapters
        for pair in ("embedded", "en-es", "en-ar", "en-zh", "en-sw")
    }
    assert folders["en-ar"].source == folders["en-zh"].source
    assert len({one.source for one in folders.values()}) == 4
    assert len({one.target for one in folders.values()}) == 5
    longer = recorded.config_of("en-es")
    for role in ("source", "target"):
        longer = longer.with_training(role, epochs=9)
    again = recorded.with_adapters(longer, tmp_path, "en-es").adapters
    assert again.source == folders["en-es"].source, "it sees its rows once, whatever is configured"
    assert again.target != folders["en-es"].target
