"""What a comparison's runs begin with and are charged for, and what a killed one leaves."""

import shutil
import sys
import time

import pytest
from benchmarks import recorded
from grasp_lora.plans.job import RESULT_FILE
from grasp_lora.plans.queue import Job, Outcome, keys_of, run_queue
from grasp_lora.workbench.folders import model_content

from grasp_lora.base.files import read_json, write_json
from grasp_lora.config.run_config import load_config
from grasp_lora.plans import projection, queue
from grasp_lora.plans.compare import METHODS, changed_settings, compare_methods, jobs_of, summary
from grasp_lora.report.comparison import comparison_markdown, comparison_tables, price_rows
from grasp_lora.stages import evaluate, weights
from grasp_lora.stages.train import train_adapter
from grasp_lora.training.best import BestCallback
from grasp_lora.workbench.context import open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import TRAIN, job, write_job

ALL = list(METHODS)


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
    changes = {"train": dict.fromkeys(TRAIN, steps)}
    changes["adapters"] = {role: str(place / role) for role in ("source", "target")}
    changes["controller"] = {"rounds": 2, "rows": 4}
    return write_job(place / "run.yaml", job(place, **changes))


def rows_of(found, method):
    return [row for row in found["rows"] if row["method"] == method]


def queued(config, seeds=(1,)):
    return keys_of(jobs_of(config, open_context(config, quiet=True).data, ALL, seeds))


def test_all_begin_at_the_one_merge_configured_and_pay_for_its_weights(settings, tmp_path):
    config = load_config(settings, ["merge.weights=auto", "seed=3"])
    out = tmp_path / "auto"
    names = ("grid-0.4", "grasp-restart", "average-finetuned")
    found = compare_methods(config, out, names, (1,), 0, 1, quiet=True)
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
    found = compare_methods(config, tmp_path, ("grid-0.4", "svd"), (1,), 0, 1, quiet=True)
    assert found["failed"] == {}
    ranks = {
        name: read_json(tmp_path / name / "adapter_config.json")["r"]
        for name in ("adapters/merged", "grid-0.4-s1/final", "svd/start")
    }
    assert ranks == {"adapters/merged": 2, "grid-0.4-s1/final": 2, "svd/start": 4}


def test_merging_after_fine_tuning_is_for_the_methods_that_say_so(settings):
    config = load_config(settings)
    after = load_config(settings, ["merge.when=after"])
    assert changed_settings(after, {}).merge.when == "before"
    late = changed_settings(after, METHODS["late-merge"].changes)
    assert late.merge.when == "after"
    assert queued(after) == queued(config)


def test_adalora_has_a_step_size_of_its_own(settings):
    config = load_config(settings, ["train.target.learning_rate=3e-4"])
    changed = changed_settings(config, METHODS["target-adalora"].changes)
    assert changed.training("target").learning_rate == 3e-3
    for name in ("source", "search", "finetune"):
        assert changed.training(name).learning_rate == config.training(name).learning_rate


@pytest.mark.parametrize("plain", ["source-finetuned", "average-finetuned", "grasp-continue"])
def test_three_times_the_learning_rate_is_of_the_one_configured(settings, plain):
    config, faster = load_config(settings), f"{plain}-3x"
    sections = ("search", "finetune") if plain == "grasp-continue" else ("finetune",)
    for rate, tripled in ((1e-4, 3e-4), (2e-5, 6e-5)):
        names = [f"train.{section}.learning_rate={rate}" for section in ("search", "finetune")]
        changed = changed_settings(load_config(settings, names), METHODS[faster].changes)
        threefold = [f"train.{section}.learning_rate={tripled}" for section in sections]
        expected = load_config(settings, names + threefold)
        assert changed == changed_settings(expected, METHODS[plain].changes)
    jobs = jobs_of(config, open_context(config, quiet=True).data, [plain, faster], (1, 2))
    assert len(set(keys_of(jobs).values())) == 5, "the adapters and two runs a seed that differ"


def test_an_adapter_that_evaluation_would_refuse_stops_the_queue_at_once(settings, tmp_path):
    role = tmp_path / "source"
    shutil.copytree(load_config(settings).adapters.source, role)
    file = role / "adapter_config.json"
    write_json(file, read_json(file) | {"task_type": "FEATURE_EXTRACTION"})
    config = load_config(settings, [f"adapters.source={role}"])
    names = ("average-finetuned", "target")
    found = compare_methods(config, tmp_path / "out", names, (1,), 0, 1, quiet=True)
    assert "FEATURE_EXTRACTION" in found["failed"]["adapters"]
    assert found["failed"]["target"] == "not run, adapters has no result"
    assert not list((tmp_path / "out").glob("*/final*"))


def test_a_local_model_of_other_weights_is_another_queue(settings, tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = load_config(settings, [f"model.name={tmp_path / 'base'}"])
    before = queued(config)
    assert queued(config) == before
    tiny_backbone_folder(tmp_path / "base", seed=5)
    after = queued(config)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert model_content("meta-llama/Meta-Llama-3-8B") is None


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


def test_a_price_names_the_machines_and_the_peak_of_every_run_in_it(settings):
    here, gpu = {"cpu": "C", "gpu": None}, {"cpu": "C", "gpu": "G"}
    ratios = [name for name in METHODS if name.startswith("grid-0")]
    outcomes = {
        f"{name}-s1": Outcome(result(0.1, 1.0), 1.0, 5 + place, machine=gpu if place else here)
        for place, name in enumerate(ratios)
    }
    outcomes |= {
        "source-finetuned-s1": Outcome(result(0.0, 1.0), 1.0, 90, machine=gpu),
        "source-finetuned-labelled-s1": Outcome(result(0.0, 1.0), 1.0, 7, machine=here),
        "random-masks-s1": Outcome(result(0.0, 1.0), 1.0, 3, machine=here),
        "grasp-restart-s1": Outcome(result(0.0, 1.0), 1.0, 99, machine=gpu),
        "late-merge-s1": Outcome(result(0.0, 1.0), 1.0, 4, machine=here),
        "grid-s1": Outcome(result(0.1, 1.0, chosen=f"{ratios[0]}-s1"), 0.1, 1, machine=here),
        "ratio-nearest-s1": Outcome(
            result(0.1, 1.0, chosen=f"{ratios[-1]}-s1"), 0.1, 1, machine=here
        ),
    }
    found = summary(load_config(settings), outcomes)
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


def test_scores_without_a_headline_still_make_tables(settings):
    one = Outcome(result(0.0, 1.0) | {"scores": {"test": {"rougeL": 20.0}}})
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
    outcomes = {job: Outcome(result(0.0, 1.0, dev=dev)) for job, dev in curves.items()}
    # how an adapter that is not trained here was once trained is not of interest
    untrained = result(0.0, 1.0, dev=[[0, 3.0], [2, 2.0]])
    untrained["price"] = untrained["price"] | {"steps": 0}
    text = comparison_markdown(
        summary(load_config(settings), outcomes | {"source": Outcome(untrained)})
    )
    (line,) = (line for line in text.splitlines() if "lowest in their last epoch" in line)
    assert line.endswith("than they look here: `source-finetuned` (1 of 2).")


def test_methods_that_often_answer_with_nothing_are_named(settings):
    def answered(empty: int | None) -> Outcome:
        found = result(0.0, 1.0)
        rows = len(found["rows"]["test"]["ids"])
        assert rows == 2
        return Outcome(found | ({} if empty is None else {"empty": {"test": empty}}))

    outcomes = {
        "source-finetuned-s1": answered(0),
        "average-finetuned-s1": answered(1),
        "average-finetuned-s2": answered(0),
        "svd-finetuned-s1": answered(None),
    }
    text = comparison_markdown(summary(load_config(settings), outcomes))
    (line,) = (line for line in text.splitlines() if line.startswith("Empty answers"))
    assert line.endswith("asks for a token): `average-finetuned` 25.")
    few = {"source-finetuned-s1": answered(0), "svd-finetuned-s1": answered(None)}
    assert "Empty answers" not in comparison_markdown(summary(load_config(settings), few))


def test_every_run_has_its_share_of_the_cores_the_measuring_one_too(
    settings, tmp_path, monkeypatch
):
    asked = []

    def run(folder, jobs, workers, threads, *rest):
        asked.append((workers, threads))
        return {one.name: Outcome(dict.fromkeys(("load", "step", "forward", "answer"), 0.0))
                for one in jobs}  # fmt: skip

    monkeypatch.setattr(queue.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(projection, "run_queue", run)
    config = load_config(settings)
    data = open_context(config, quiet=True).data
    jobs = jobs_of(config, data, ["zero-shot"], (1,))
    projection.run_projected(config, data, tmp_path / "q", jobs, 2, None, False, True)
    assert asked == [(1, 3), (2, 3)]


def test_what_was_not_installed_is_run_once_it_is(settings, tmp_path, monkeypatch):
    pytest.importorskip("nevergrad")
    config, out = load_config(settings), tmp_path / "out"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "nevergrad", None)
        for _ in range(2):
            found = compare_methods(config, out, ("lorahub",), (1,), 0, 1, quiet=True)
            assert "pip install nevergrad" in found["not_applicable"]["lorahub"]
    found = compare_methods(config, out, ("lorahub",), (1,), 0, 1, quiet=True)
    assert found["not_applicable"] == {}
    assert len(rows_of(found, "lorahub")) == 1


def test_methods_in_which_nothing_is_drawn_have_a_table_of_their_own(settings, tmp_path):
    config = load_config(settings)
    found = compare_methods(config, tmp_path, ("zero-shot", "source"), (5,), 0, 1, quiet=True)
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
        last.setattr(evaluate, "finish_stage", killed)
        with pytest.raises(Killed):
            evaluate.evaluate_adapter(*arguments, context=context)
    assert (tmp_path / "scores" / "predictions.jsonl").exists()
    evaluate.evaluate_adapter(*arguments, context=context)
    assert (tmp_path / "scores" / "stage.json").exists()


def test_weights_killed_as_they_end_are_learned_again(settings, place, tmp_path, monkeypatch):
    context = open_context(load_config(settings), quiet=True)
    arguments = (context, place / "source", place / "target", tmp_path / "weights")
    with monkeypatch.context() as last:
        last.setattr(weights, "finish_stage", killed)
        with pytest.raises(Killed):
            weights.learned_weights(*arguments)
    assert (tmp_path / "weights" / "weights.json").exists()
    assert len(weights.learned_weights(*arguments)) == 2


def test_overwriting_that_was_killed_can_be_done_again(tmp_path, monkeypatch):
    def job_of(seed):
        return Job("one", "methods:refused", {"why": f"reason {seed}"})

    run_queue(tmp_path / "q", [job_of(1)], 0, 1, quiet=True)
    (tmp_path / "q" / "one" / "job.json").unlink()  # as far as a removal got
    with pytest.raises(ValueError, match="--overwrite"):
        run_queue(tmp_path / "q", [job_of(2)], 0, 1, quiet=True)
    with monkeypatch.context() as midway:
        midway.setattr(queue, "_write_jobs", killed)
        with pytest.raises(Killed):
            run_queue(tmp_path / "q", [job_of(2)], 0, 1, overwrite=True, quiet=True)
    found = run_queue(tmp_path / "q", [job_of(2)], 0, 1, quiet=True)
    assert found["one"].result == {"not_applicable": "reason 2"}
    assert [p.name for p in (tmp_path / "q").glob("*/" + RESULT_FILE)] == [RESULT_FILE]


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
    longer = longer.with_training("source", epochs=9).with_training("target", epochs=9)
    again = recorded.with_adapters(longer, tmp_path, "en-es").adapters
    assert again.source == folders["en-es"].source, "it sees its rows once, whatever is configured"
    assert again.target != folders["en-es"].target
