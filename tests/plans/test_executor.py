"""The executor: what is done, what is not done again, what is refused, what a failure stops."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from grasp_lora.base.files import read_json, write_json
from grasp_lora.base.owner import Owned, lock_beside
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.plans import executor
from grasp_lora.plans.executor import PLAIN, Options, work_off
from grasp_lora.plans.plan import Plan, PlanBuilder, part_of
from grasp_lora.plans.session import Session
from grasp_lora.plans.single import (
    evaluate_adapter,
    merge_adapters,
    prune_adapter,
    train_adapter,
)
from grasp_lora.stages.stage import Input, Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.context import Context, open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_rows

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> SimpleNamespace:
    """Return settings, an open context, and two adapters."""
    folder = tmp_path_factory.mktemp("executor")
    tiny_backbone_folder(folder / "base")
    pair = [tiny_adapter_folder(folder / f"{n}", tiny_model(), seed=n) for n in (1, 2)]
    context = open_context(settings(folder), quiet=True)
    return SimpleNamespace(folder=folder, config=context.config, context=context, pair=pair)


def settings(folder: Path, **changes) -> RunConfig:
    return make_config(job(folder, **changes))


def session_of(context: Context) -> Session:
    return Session(context.config, context.data, context)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Return a list that receives the name of every stage whose work is done."""
    found: list[str] = []

    def noting(kind):
        return replace(kind, run=lambda work: found.append(work.stage.name) or kind.run(work))

    counted = {name: noting(kind) for name, kind in KINDS.items()}
    monkeypatch.setattr(executor, "KINDS", counted)
    return found


def plan_of(config: RunConfig, pair: list[Path], *ratios: float) -> Plan:
    """Return a plan: merge two adapters, prune the merge at each ratio without training it."""
    plan = PlanBuilder()
    inputs: dict[str, Input] = dict(zip(("source", "target"), pair, strict=True))
    merged = plan.add(Stage("merged", "merge", config, inputs))
    for ratio in ratios:
        options = {"ratio": ratio, "untrained": True}
        plan.add(Stage(f"pruned-{ratio:g}", "prune", config, {"start": merged}, options))
    return plan.build()


def same(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_an_untrained_adapter_is_not_returned_for_a_trained_one(given, tmp_path):
    out, start = tmp_path / "out", given.pair[0]

    def pruned(**more) -> Path:
        return prune_adapter(given.config, start, 0.5, out, context=given.context, **more)

    pruned(options={"untrained": True})
    untrained = (out / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"made with other inputs: .*untrained was true, is none"):
        pruned()
    assert (out / WEIGHTS).read_bytes() == untrained
    pruned(overwrite=True)
    assert read_json(out / "stage.json")["steps"] > 0
    assert (out / WEIGHTS).read_bytes() != untrained
    with pytest.raises(ValueError, match=r"untrained was none, is true"):
        pruned(options={"untrained": True})


def test_random_masks_are_not_returned_for_those_of_the_rule(given, tmp_path):
    out, start = tmp_path / "out", given.pair[0]

    def pruned(drawn: bool, **more) -> dict[str, torch.Tensor]:
        options = {"untrained": True, "random_masks": drawn}
        prune_adapter(given.config, start, 0.5, out, context=given.context, options=options, **more)
        return load_file(out / WEIGHTS)

    drawn = pruned(True)
    with pytest.raises(ValueError, match=r"random_masks was true, is none\."):
        pruned(False)
    chosen = pruned(False, overwrite=True)
    assert any(not torch.equal(drawn[name] == 0, t == 0) for name, t in chosen.items())


def test_other_weights_at_the_place_of_the_base_model_are_noticed(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    out, config = tmp_path / "out", settings(tmp_path, train={"epochs": 1, "max_steps": 1})
    train_adapter(config, "target", out)
    before = (out / WEIGHTS).read_bytes()
    train_adapter(config, "target", out)
    assert (out / WEIGHTS).read_bytes() == before
    tiny_backbone_folder(tmp_path / "base", seed=5)
    with pytest.raises(ValueError, match="the weights of the base model are others"):
        train_adapter(config, "target", out)
    assert (out / WEIGHTS).read_bytes() == before
    train_adapter(config, "target", out, overwrite=True)
    assert (out / WEIGHTS).read_bytes() != before


def test_what_was_trained_stays_when_the_evaluation_changes(given, tmp_path, ran):
    context = given.context
    for beams in (1, 2):
        evaluate = {"max_new_tokens": 2, "baselines": False, "beams": beams}
        config = settings(given.folder, evaluate=evaluate, output=str(tmp_path / "elsewhere"))
        final = prune_adapter(config, given.pair[0], 0.5, tmp_path / "final", context=context)
        evaluate_adapter(config, final, tmp_path / f"scores-{beams}", context=context)
    assert ran == ["final", "scores-1", "scores-2"]
    with pytest.raises(ValueError, match=r"inputs: evaluate\.beams was 1, is 2\."):
        evaluate_adapter(config, final, tmp_path / "scores-1", context=context)


def test_a_plan_is_done_once_also_where_its_folder_was_moved(given, tmp_path, ran):
    plan, session = plan_of(given.config, given.pair, 0.2, 0.5), session_of(given.context)
    outcomes = work_off(plan, tmp_path / "here", session)
    assert ran == list(outcomes) == ["merged", "pruned-0.2", "pruned-0.5"]
    moved = (tmp_path / "here").rename(tmp_path / "there")
    pair = [shutil.copytree(one, tmp_path / f"copy-{one.name}") for one in given.pair]
    elsewhere = given.config.model_copy(update={"output": tmp_path / "other"})
    again = work_off(plan_of(elsewhere, pair, 0.2, 0.5), moved, session)
    assert len(ran) == 3, "places do not count, of the folder as little as of what was given"
    assert again["merged"].folder == moved / "merged"


def test_the_same_stage_of_two_plans_is_done_once(given, tmp_path, ran):
    session = session_of(given.context)
    work_off(plan_of(given.config, given.pair, 0.2), tmp_path, session)
    work_off(plan_of(given.config, given.pair, 0.2, 0.5), tmp_path, session)
    assert ran == ["merged", "pruned-0.2", "pruned-0.5"]


def test_a_plan_lists_the_same_work_once_whatever_it_is_called(given):
    plan, config = PlanBuilder(), given.config
    inputs: dict[str, Input] = dict(zip(("source", "target"), given.pair, strict=True))
    first = plan.add(Stage("merged", "merge", config, inputs))
    reseeded = config.model_copy(update={"seed": 7})
    assert plan.add(Stage("again", "merge", reseeded, inputs, title="another")) == first
    half = Stage("half", "prune", config, {"start": first}, {"ratio": 0.5, "untrained": False})
    assert plan.add(half) == "half"
    assert plan.add(replace(half, name="same", options={"ratio": 0.5})) == "half"
    assert plan.add(replace(half, name="drawn", options={"ratio": 0.5, "random_masks": True}))
    assert plan.add(replace(half, name="other", config=reseeded)) == "other"
    assert plan.add(replace(half, name="trained", inputs={"start": given.pair[0]})) == "trained"
    built = plan.build()
    assert list(built.stages) == ["merged", "half", "drawn", "other", "trained"]
    assert list(part_of(built, ("drawn",)).stages) == ["merged", "drawn"]
    assert list(part_of(built, ("trained",)).stages) == ["trained"]


def test_a_plan_refuses_before_any_work(given, tmp_path, ran):
    session, plan = session_of(given.context), plan_of(given.config, given.pair, 0.2, 0.5)
    work_off(plan_of(given.config, given.pair, 0.2), tmp_path, session)
    (tmp_path / "pruned-0.2").rename(tmp_path / "pruned-0.5")
    shutil.rmtree(tmp_path / "merged")
    ran.clear()

    def refused(said: str, options: Options) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=said):
            work_off(plan, tmp_path, session, options)
        assert sorted(tmp_path.rglob("*")) == before
        assert ran == [], "neither the merge nor the other pruning, which come first"

    for options in (PLAIN, Options(keep_going=True)):
        refused(r"pruned-0\.5' holds a finished .*ratio was 0\.2, is 0\.5", options)
    (tmp_path / "pruned-0.5" / "stage.json").unlink()
    refused("no result of grasp-lora", Options(overwrite=True))


def test_overwriting_replaces_what_differs_or_else_all(given, tmp_path, ran):
    session, overwrite = session_of(given.context), Options(overwrite=True)
    work_off(plan_of(given.config, given.pair, 0.2, 0.5), tmp_path, session)
    first = (tmp_path / "pruned-0.2" / WEIGHTS).read_bytes()
    ran.clear()
    changed = given.config.model_copy(update={"importance": "magnitude"})
    one, two = (plan_of(config, given.pair, 0.2) for config in (changed, given.config))
    work_off(one, tmp_path, session, overwrite)
    assert ran == ["pruned-0.2"], "the merge is the same"
    work_off(two, tmp_path, session, overwrite)
    assert ran == ["pruned-0.2"] * 2
    assert (tmp_path / "pruned-0.2" / WEIGHTS).read_bytes() == first
    work_off(two, tmp_path, session, overwrite)
    assert ran == ["pruned-0.2"] * 2 + ["merged", "pruned-0.2"], "nothing differed: all again"
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".work", ".old")]


def test_what_is_made_of_another_input_is_made_anew(given, tmp_path, ran):
    session = session_of(given.context)
    plan = plan_of(given.config, given.pair, 0.2)
    work_off(plan, tmp_path, session)
    reversed_pair = plan_of(given.config, given.pair[::-1], 0.2)
    with pytest.raises(ValueError, match="folder given as source has another content; the folder"):
        work_off(reversed_pair, tmp_path, session)
    ran.clear()
    work_off(reversed_pair, tmp_path, session, Options(overwrite=True))
    assert ran == ["merged", "pruned-0.2"]


def test_a_stage_that_fails_keeps_its_log_and_the_others_go_on(given, tmp_path, ran, monkeypatch):
    prune = executor.KINDS["prune"]

    def failing(work):
        if work.stage.option("ratio") == 0.2:
            raise RuntimeError("told to fail")
        return prune.run(work)

    broken = dict(executor.KINDS) | {"prune": replace(prune, run=failing)}
    plan = PlanBuilder()
    for stage in plan_of(given.config, given.pair, 0.2, 0.5).stages.values():
        plan.add(stage)
    options = {"ratio": 0.7, "untrained": True}
    plan.add(Stage("onward", "prune", given.config, {"start": "pruned-0.2"}, options))
    session, ended = session_of(given.context), []
    keep = Options(keep_going=True, ended=lambda name, _outcome: ended.append(name))
    with monkeypatch.context() as patch:
        patch.setattr(executor, "KINDS", broken)
        with pytest.raises(RuntimeError, match="told to fail"):
            work_off(plan.build(), tmp_path, session)
        outcomes = work_off(plan.build(), tmp_path, session, keep)
    log = tmp_path / "pruned-0.2.log.txt"
    assert ended == list(outcomes) == ["merged", "pruned-0.2", "pruned-0.5", "onward"]
    assert [one.error for one in outcomes.values()] == [
        None,
        f"failed (told to fail), see {log}",
        None,
        "not done, pruned-0.2 has no result",
    ]
    assert "RuntimeError: told to fail" in log.read_text()
    assert not (tmp_path / "pruned-0.2").exists()
    ran.clear()
    assert not [
        one for one in work_off(plan.build(), tmp_path, session, keep).values() if one.error
    ]
    assert ran == ["pruned-0.2", "onward"], "what was done is not done again"
    assert not log.exists()


def test_a_fault_of_the_start_leaves_nothing_that_refuses_the_right_one(given, tmp_path):
    out = tmp_path / "out"
    options = {"untrained": True}
    with pytest.raises(FileNotFoundError):
        prune_adapter(
            given.config, tmp_path / "nowhere", 0.5, out, context=given.context, options=options
        )
    assert not out.exists()
    prune_adapter(given.config, given.pair[0], 0.5, out, context=given.context, options=options)
    assert (out / WEIGHTS).exists()


def test_a_killed_replacement_goes_on_and_ends_as_if_it_had_not_been(given, tmp_path, capsys):
    context = open_context(given.config, data=given.context.data)
    slow = {"epochs": 2, "batch_size": 2, "save_every": 1}
    config = settings(given.folder, train=slow)
    whole = train_adapter(config, "target", tmp_path / "whole", context=context)
    out, saves = train_adapter(given.config, "target", tmp_path / "out", context=context), []
    before = (out / WEIGHTS).read_bytes()

    def killed() -> None:
        saves.append(1)
        if len(saves) >= 3:
            raise KeyboardInterrupt

    context.on_saved = killed
    with pytest.raises(KeyboardInterrupt):
        train_adapter(config, "target", out, overwrite=True, context=context)
    context.on_saved = lambda: None
    assert (out / WEIGHTS).read_bytes() == before, "the old one stays until the new one is whole"
    capsys.readouterr()
    train_adapter(config, "target", out, overwrite=True, context=context)
    assert "resuming from checkpoint-" in capsys.readouterr().err
    assert same(out, whole)
    facts = [read_json(folder / "stage.json") for folder in (whole, out)]
    for name in ("key", "best", "evaluations", "log", "steps"):
        assert facts[0][name] == facts[1][name]


def test_a_setting_that_came_in_since_does_not_undo_what_was_done(given, tmp_path, ran):
    plan, session = plan_of(given.config, given.pair, 0.5), session_of(given.context)
    work_off(plan, tmp_path, session)
    ran.clear()
    file = tmp_path / "pruned-0.5" / "stage.json"
    stored = read_json(file)
    for name in ("files", "sha256"):  # earlier versions wrote no seal
        del stored[name]
    assert stored["key"]["settings"].pop("structure") == "entries"
    write_json(file, stored)
    work_off(plan, tmp_path, session, PLAIN)
    assert ran == []
    stored["key"]["settings"]["old.switch"] = "on"
    write_json(file, stored)
    with pytest.raises(ValueError, match=r'old\.switch was "on", is none\.'):
        work_off(plan, tmp_path, session, PLAIN)


def test_an_adapter_that_is_given_is_not_removed_by_the_result_that_would_replace_it(
    given, tmp_path, ran
):
    def pruned(start: Path, out: Path, **more) -> Path:
        options = {"untrained": True}
        return prune_adapter(
            given.config, start, 0.5, out, context=given.context, options=options, **more
        )

    kept = pruned(given.pair[0], tmp_path / "kept")
    link = tmp_path / "link"
    link.symlink_to(kept)
    before = {p: p.read_bytes() for p in kept.rglob("*")}
    ran.clear()
    for start in (kept, link, tmp_path / "link" / ".." / "kept"):
        with pytest.raises(ValueError, match=r"kept' would be replaced, but '.*' is read"):
            pruned(start, kept, overwrite=True)
    below = pruned(given.pair[1], kept / "below")
    with pytest.raises(ValueError, match=r"below' would be replaced, but '.*kept' is read from th"):
        pruned(kept, below, overwrite=True)
    shutil.rmtree(below)
    assert ran == ["below"]
    assert {p: p.read_bytes() for p in kept.rglob("*")} == before


def test_examples_and_the_base_model_are_not_removed_either(given, tmp_path, ran):
    session, plan = session_of(given.context), plan_of(given.config, given.pair)
    work_off(plan, tmp_path, session)
    rows = write_rows(tmp_path / "merged" / "rows.jsonl", range(4))
    tests = {"tests": {"mine": {"language": "es", "files": str(rows)}}}
    values = given.config.to_dict()
    for changes in (
        {"model": values["model"] | {"name": str(tmp_path / "merged")}},
        {"data": values["data"] | tests},
    ):
        session.config = RunConfig.model_validate(values | changes)
        ran.clear()
        with pytest.raises(ValueError, match=r"merged' would be replaced, but '.*merged"):
            work_off(plan, tmp_path, session, Options(overwrite=True))
        assert ran == []
    assert rows.exists()


def test_a_damaged_result_in_which_an_input_lies_stays_where_it_is(given, tmp_path, ran):
    session, plan = session_of(given.context), plan_of(given.config, given.pair)
    work_off(plan, tmp_path, session)
    rows = write_rows(tmp_path / "merged" / "rows.jsonl", range(4))
    (tmp_path / "merged" / WEIGHTS).write_bytes(b"")
    tests = {"tests": {"mine": {"language": "es", "files": str(rows)}}}
    values = given.config.to_dict()
    session.config = RunConfig.model_validate(values | {"data": values["data"] | tests})
    ran.clear()
    with pytest.raises(ValueError, match=r"merged' would be replaced, but '.*rows\.jsonl' is read"):
        work_off(plan, tmp_path, session)
    assert ran == []
    assert rows.exists()


def test_weights_have_the_permissions_of_the_other_files(given, tmp_path):
    before = os.umask(0o027)
    try:
        work_off(plan_of(given.config, given.pair), tmp_path, session_of(given.context))
    finally:
        os.umask(before)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "merged").iterdir()}
    assert len(modes) > 4
    assert set(modes.values()) == {"0o640"}, modes


def test_a_stage_waits_for_a_process_of_a_killed_plan(given, tmp_path, capfd):
    """The lock beside the place of the result is held for a second."""
    lock = lock_beside(tmp_path / "merged")
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    hold += "; print('holds', flush=True); time.sleep(1)"
    command = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        work_off(plan_of(given.config, given.pair), tmp_path, session_of(given.context))
        assert process.wait() == 0
    assert (tmp_path / "merged" / "stage.json").exists()
    said = " ".join(capfd.readouterr().err.split())
    assert "is in use by another process: waiting until that has ended" in said


def test_a_stage_command_is_refused_where_another_process_makes_the_result(given, tmp_path, ran):
    code = "import sys; from pathlib import Path; from grasp_lora.base.owner import owned_place"
    code += "\nwith owned_place(Path(sys.argv[1]), print): print('holds', flush=True); input()"
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Owned, match=f"out' is in use by process {process.pid} on "):
            merge_adapters(given.config, given.pair, out, context=given.context)
        assert ran == []
        process.communicate(b"\n")
    merge_adapters(given.config, given.pair, out, context=given.context)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
