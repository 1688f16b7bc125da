"""One file of a run is damaged, and the run goes on: the same result, or an error that names it."""

import shutil

import pytest
from benchmarks.torture_damage import Case, Laboratory, cases, damage, result_of, torture

from grasp_lora.base.files import read_json, write_json
from helpers import tiny_backbone_folder
from jobs import job

KNOWN = (
    ("half", "merged/merge.json", "gone"),
    ("half", "search.work/checkpoint-5/optimizer.pt", "gone"),
    ("half", "search.work/checkpoint-5/scheduler.pt", "emptied"),
    ("whole", "search/rounds.jsonl", "emptied"),
    ("whole", "final/adapter_model.safetensors", "flip"),
)
"""Damages that once were not seen."""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    return Laboratory(folder, tiny_backbone_folder(folder / "base"), job)


def taken_for_finished(laboratory: Laboratory) -> bool:
    code, said = laboratory.command("grasp")
    return code == 0 and "holds this finished run already" in " ".join(said.split())


def test_no_damage_is_carried_into_a_result_unseen(laboratory):
    chosen = [Case("grasp", *one) for one in KNOWN] + cases(laboratory, ["grasp"], 3, seed=11)
    lost = []
    found = torture(laboratory, chosen, seed=11, say=lost.append)
    assert lost == []
    assert sum(tried for tried, _ in found.values()) == len(KNOWN) + 3


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(laboratory):
    out = laboratory.out("grasp")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(laboratory.kept("grasp", "half"), out)
    for number in (5, 4):
        damage(out / "search.work" / f"checkpoint-{number}" / "optimizer.pt", "zeros")
    code, said = laboratory.command("grasp")
    assert code == 0
    line = " ".join(said.split())
    assert "search: checkpoint-5 is damaged ('optimizer.pt' has another content); " in line
    assert "checkpoint-4 is damaged ('optimizer.pt' has another content); going on from" in line
    assert "search: resuming from checkpoint-3" in line
    assert result_of(out) == laboratory.result("grasp")


def test_what_was_damaged_in_a_finished_run_is_named_kept_and_made_again(laboratory):
    out = laboratory.out("grasp")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(laboratory.kept("grasp", "whole"), out)
    before = (out / "final" / "adapter_model.safetensors").read_bytes()
    assert taken_for_finished(laboratory)
    for name in ("final/adapter_model.safetensors", "scores.json", "config.json"):
        damage(out / name, "zeros")
    code, said = laboratory.command("grasp")
    line = "".join(said.split())  # a long path is broken within
    assert code == 0, said
    assert "final'isdamaged:'adapter_model.safetensors'hasanothercontent.Itiskept" in line
    assert "scores.json'hasanothercontent;itiskeptas'scores.json.damaged'" in line
    assert (out / "final.damaged" / "adapter_model.safetensors").read_bytes() == bytes(len(before))
    assert "--overwrite" not in line
    assert result_of(out) == laboratory.result("grasp")
    assert read_json(out / "config.json")["config"]["seed"] == 42
    assert (out / "config.json.damaged").read_bytes().strip(b"\0") == b""


def test_a_plan_shows_what_is_damaged_and_changes_nothing(laboratory):
    out = laboratory.out("grasp")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(laboratory.kept("grasp", "half"), out)
    damage(out / "merged" / "merge.json", "gone")
    before = sorted(out.rglob("*"))
    code, said = laboratory.command("grasp", "plan")
    assert code == 0, said
    states = [word for word in said.split() if word in ("done", "damaged", "resumes")]
    assert states == ["done", "done", "damaged", "resumes"]
    assert "merged: 'merge.json' is missing" in said
    assert sorted(out.rglob("*")) == before


def test_a_finished_run_of_an_earlier_version_is_taken_as_it_is(laboratory):
    out = laboratory.out("grasp")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(laboratory.kept("grasp", "whole"), out)
    for marker in (out / "done.json", out / "timing.json", *out.rglob("stage.json")):
        stored = read_json(marker)
        write_json(marker, {n: v for n, v in stored.items() if n not in ("files", "sha256")})
    damage(out / "report.md", "flip")
    assert taken_for_finished(laboratory)
