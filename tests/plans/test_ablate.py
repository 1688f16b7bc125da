"""The ablation: which variants run, what it says of them, and that it can be stopped."""

import dataclasses

import pytest
from typer.testing import CliRunner

from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.core import ControllerConfig
from grasp_lora.plans.ablate import AS_CONFIGURED, CHANGES, ablate
from grasp_lora.plans.launch import Pool
from grasp_lora.plans.results import loss_jump
from helpers import tiny_backbone_folder
from jobs import job, write_job

ONLY = ("entropy-on", "moments-kept", "rows-32", "entropy-off")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    tiny_backbone_folder(folder / "base")
    steps = {"epochs": 2, "batch_size": 2}
    changes = {"train": {"search": steps, "finetune": steps}, "merge": {"kind": "cat"}}
    return write_job(folder / "run.yaml", job(folder, **changes))


@pytest.fixture(scope="module")
def done(settings):
    out = settings.parent / "ablation"
    options = {"only": ONLY, "seeds": (1, 2), "quiet": True}
    return ablate(load_config(settings), out, **options), out, options


def test_a_variant_changes_only_what_it_says():
    for preset in ("standard", "paper"):
        config = ControllerConfig(preset=preset)
        for name, variant in CHANGES.items():
            changed = dataclasses.asdict(variant.of(config))
            before = dataclasses.asdict(config)
            differing = {key for key in before if before[key] != changed[key]}
            assert differing <= set(variant.changes) | {"rounds", "interval"}, name
            if variant.rounds == 1.0:
                assert not differing & {"rounds", "interval"}, name
    assert CHANGES["twice-the-rounds"].of(ControllerConfig()).rounds == 16
    assert CHANGES["twice-the-rounds"].of(ControllerConfig(preset="paper")).interval == 5
    assert CHANGES["half-the-rounds"].of(ControllerConfig(preset="paper")).interval == 20


def test_only_variants_that_differ_and_can_be_are_run(done):
    found, _, _ = done
    assert list(found["variants"]) == [AS_CONFIGURED, "entropy-on", "moments-kept"]
    assert found["left_out"] == {
        "entropy-off": "the configuration has these settings already",
        "rows-32": "there are only 8 examples to probe",
    }
    assert found["failed"] == {}


def test_the_numbers_are_those_of_the_runs(done):
    found, out, _ = done
    for name, one in found["variants"].items():
        for seed in ("1", "2"):
            run, folder = one["runs"][seed], out / f"{name}-s{seed}"
            rounds = read_jsonl(folder / "search" / "rounds.jsonl")
            assert run["ratio"] == read_json(folder / "search" / "ratio.json")["ratio"]
            assert run["commits"] == sum(r["committed"] for r in rounds)
            assert run["best"] == read_json(folder / "final" / "stage.json")["best"]
            assert set(run["scores"]["test"]) >= {"exact_match", "loss"}
        ratios = [one["runs"][seed]["ratio"] for seed in ("1", "2")]
        assert one["mean"]["ratio"]["mean"] == pytest.approx(sum(ratios) / 2)
    gaps = [
        found["variants"]["entropy-on"]["runs"][s]["best"]["loss"]
        - found["variants"][AS_CONFIGURED]["runs"][s]["best"]["loss"]
        for s in ("1", "2")
    ]
    apart = found["variants"]["entropy-on"]["against_configured"]["dev_loss"]
    assert apart["mean"] == pytest.approx(sum(gaps) / 2)
    assert apart["standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    same = found["variants"][AS_CONFIGURED]["against_configured"]["dev_loss"]
    assert same == {"mean": 0.0, "standard_error": 0.0}


def test_importance_and_structure_can_be_changed_too(settings, tmp_path):
    only = ("importance-obs", "importance-activation", "2-of-4", "whole-components")
    config = load_config(settings, ["scope=layer"])
    found = ablate(config, tmp_path, only=only, seeds=(1,), quiet=True)
    assert list(found["variants"]) == [AS_CONFIGURED, "importance-obs", "whole-components"]
    assert found["failed"] == {}
    assert found["left_out"]["importance-activation"] == (
        "the configuration has these settings already"
    )
    assert "scope: 'layer' gives groups different ratios" in found["left_out"]["2-of-4"]
    key = read_json(tmp_path / "importance-obs-s1" / "search" / "stage.json")["key"]
    assert key["settings"]["importance"] == "obs"


def test_the_merge_can_be_changed_too(settings, tmp_path):
    base = tiny_backbone_folder(tmp_path / "base", layers=4)
    config = load_config(settings, [f"model.name={base}"])
    found = ablate(config, tmp_path / "out", ("layer-swap", "ties-delta"), (1,), quiet=True)
    assert list(found["variants"]) == [AS_CONFIGURED, "layer-swap", "ties-delta"]
    assert found["failed"] == {}
    kinds = {
        name: read_json(tmp_path / "out" / "adapters" / name / "merge.json")["kind"]
        for name in ("merged", "layer-swap", "ties-delta")
    }
    assert kinds == {"merged": "cat", "layer-swap": "layer-swap", "ties-delta": "ties-delta"}
    key = read_json(tmp_path / "out" / "layer-swap-s1" / "search" / "stage.json")["key"]
    assert (
        key["inputs"]["merged"]
        != read_json(tmp_path / "out" / f"{AS_CONFIGURED}-s1" / "search" / "stage.json")["key"][
            "inputs"
        ]["merged"]
    )


def test_a_variant_that_these_adapters_do_not_allow_is_left_out(settings, tmp_path):
    found = ablate(load_config(settings), tmp_path, ("layer-swap",), (1,), quiet=True)
    assert list(found["variants"]) == [AS_CONFIGURED]
    assert "at least three layers, these change 2" in found["left_out"]["layer-swap"]
    assert found["failed"] == {}


def test_one_merge_serves_all_and_seeds_differ(done):
    found, out, _ = done
    assert (out / "adapters" / "merged" / "adapter_model.safetensors").exists()
    assert not list(out.glob("*-s1/merged"))
    runs = found["variants"][AS_CONFIGURED]["runs"]
    assert runs["1"]["best"]["loss"] != runs["2"]["best"]["loss"]


def test_two_at_once_give_the_same_as_one_after_the_other(done, settings, tmp_path):
    found, _, options = done
    again = ablate(
        load_config(settings), tmp_path / "two", **options | {"pool": Pool(2, threads=1)}
    )
    for name, one in found["variants"].items():
        for seed, run in one["runs"].items():
            other = again["variants"][name]["runs"][seed]
            places = ("adapter", "price")  # folders and seconds differ, nothing else may
            assert {k: v for k, v in run.items() if k not in places} == {
                k: v for k, v in other.items() if k not in places
            }
            assert run["price"]["tokens"] == other["price"]["tokens"]


def test_the_command_prints_the_table_and_does_nothing_twice(done, settings):
    found, out, _ = done
    times = {p: p.stat().st_mtime_ns for p in out.glob("**/stage.json")}
    assert len(times) == 3 * 2 * 3 + 3, "search, final run and scores; two adapters, their merge"
    arguments = ["ablate", str(settings), "--out", str(out), "--seeds", "1,2"]
    arguments += [text for name in ONLY for text in ("--only", name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {p: p.stat().st_mtime_ns for p in out.glob("**/stage.json")} == times
    assert "entropy-on" in result.output
    written = (out / "ablation.md").read_text()
    fewer = CliRunner().invoke(app, [*arguments[:6], "--only", "moments-kept"])
    assert fewer.exit_code == 0, fewer.output
    assert list(read_json(out / "ablation.json")["variants"]) == list(found["variants"])
    line = next(part for part in written.splitlines() if part.startswith("| entropy-on"))
    dev = found["variants"]["entropy-on"]["mean"]["dev_loss"]["mean"]
    assert f"{dev:.4f}" in line
    assert "`rows-32`: there are only 8 examples to probe" in written


def test_a_run_without_a_result_is_named_and_the_exit_code_is_1(settings, tmp_path):
    # Nothing tells beforehand that this learning rate diverges.
    changes = ["train.search.learning_rate=1.0e+30", "train.search.max_grad_norm=1.0e+30"]
    arguments = ["ablate", str(settings), "--out", str(tmp_path / "out"), "--jobs", "0"]
    arguments += ["--only", AS_CONFIGURED, *(t for c in changes for t in ("--set", c))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    found = read_json(tmp_path / "out" / "ablation.json")
    assert list(found["failed"]) == [f"{AS_CONFIGURED}-s42"]
    assert "Without a result" in (tmp_path / "out" / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "no variant 'nonsense'; choose from as-configured"),
        (["--seeds", "1,x"], "give whole numbers"),
        (["--seeds", "1,1"], "different numbers"),
        (["--jobs", "-1"], "at least 0, got -1"),
    ],
)
def test_bad_options_are_refused_before_any_work(settings, tmp_path, arguments, message):
    command = ["ablate", str(settings), "--out", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_the_jump_is_the_loss_after_a_commit_less_that_before():
    log = [{"step": s, "loss": float(s >= 6)} for s in range(1, 11)]
    assert loss_jump(log, [5]) == 1.0
    assert loss_jump(log, [5, 7], window=2) == pytest.approx((1.0 + 0.0) / 2)
    assert loss_jump(log, [10]) is None  # nothing after the last step
    assert loss_jump(log, []) is None
