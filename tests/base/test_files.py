"""Test the run folder: resume, refusals, writes that survive a crash."""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from grasp_lora.base import files as runs
from grasp_lora.base.files import (
    check_disk,
    check_run,
    finish_run,
    finished_at,
    follow_umask,
    open_run,
    peak_memory_bytes,
    protect,
    provenance,
    read_config,
    read_json,
    read_jsonl,
    threads_of,
    touch,
    write_json,
    write_jsonl,
    write_text,
)

CONFIG = {"output": "runs/a", "seed": 42, "search": {"epochs": 3}, "weights": (0.5, 0.5)}


def test_a_new_folder_holds_its_configuration(tmp_path):
    run = tmp_path / "deep" / "run"
    assert not check_run(run)
    open_run(run, CONFIG)
    assert read_config(run) == {**CONFIG, "weights": [0.5, 0.5]}


def test_an_unfinished_run_of_the_same_configuration_is_resumed(tmp_path):
    open_run(tmp_path, CONFIG)
    write_json(tmp_path / "search" / "ratio.json", {"ratio": 0.4})
    assert not check_run(tmp_path), "it is not finished"
    open_run(tmp_path, {**CONFIG, "output": "moved/here"})
    assert read_json(tmp_path / "search" / "ratio.json") == {"ratio": 0.4}


def test_what_another_configuration_changes_is_left_to_the_stages(tmp_path):
    open_run(tmp_path, CONFIG)
    write_json(tmp_path / "search" / "ratio.json", {"ratio": 0.4})
    finish_run(tmp_path)
    open_run(tmp_path, {**CONFIG, "seed": 7})
    assert read_config(tmp_path)["seed"] == 7
    assert not check_run(tmp_path), "it is under way again"
    assert read_json(tmp_path / "search" / "ratio.json") == {"ratio": 0.4}


def test_a_finished_run_is_kept_unless_all_is_to_be_done_again(tmp_path):
    open_run(tmp_path, CONFIG)
    write_json(tmp_path / "final" / "adapter_config.json", {})
    write_json(tmp_path / "search.work" / "checkpoint-1" / "x.json", {})
    (tmp_path / "my-notes.txt").write_text("mine")
    finish_run(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert check_run(tmp_path), "the caller is told that it is finished"
    assert sorted(os.listdir(tmp_path)) == before
    open_run(tmp_path, {**CONFIG, "seed": 1}, again=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "my-notes.txt"]
    assert read_config(tmp_path)["seed"] == 1


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, again):
    (tmp_path / "final").mkdir()
    for attempt in (lambda: check_run(tmp_path), lambda: open_run(tmp_path, CONFIG, again)):
        with pytest.raises(ValueError, match="no run of grasp-lora"):
            attempt()
        assert os.listdir(tmp_path) == ["final"]


def test_a_foreign_config_json_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "merged").mkdir()
    for attempt in (lambda: check_run(tmp_path), lambda: open_run(tmp_path, CONFIG, again=True)):
        with pytest.raises(ValueError, match="not written by grasp-lora"):
            attempt()
        assert sorted(os.listdir(tmp_path)) == ["config.json", "merged"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="is a file"):
        open_run(tmp_path / "run", CONFIG)


def test_a_crash_before_the_first_file_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path, CONFIG)
    monkeypatch.undo()
    (tmp_path / ".config.json.abc.part").touch()
    assert not check_run(tmp_path)
    open_run(tmp_path, CONFIG)
    assert read_config(tmp_path)["seed"] == 42


def test_a_failed_write_keeps_the_old_content_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_has_no_nan_and_takes_paths_and_tuples(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"loss": math.nan, "span": (1.5, -math.inf), "at": Path("a/b"), "ü": "é"})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"loss": None, "span": [1.5, None], "at": "a/b", "ü": "é"}
    assert "ü" in text


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308])
def test_floats_survive_a_file_exactly(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "rounds.jsonl"
    write_jsonl(path, [{"round": 0}, {"round": 1, "text": "zwölf"}])
    whole = path.read_bytes()
    for cut in range(len(whole) - len('{"round": 1, "text": "zwölf"}\n'.encode()), len(whole)):
        path.write_bytes(whole[:cut])
        assert read_jsonl(path) == [{"round": 0}]
    path.write_bytes(b"")
    assert read_jsonl(path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rounds.jsonl"
    write_text(path, '{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(ValueError, match=r"rounds\.jsonl:2 is not JSON"):
        read_jsonl(path)


def test_missing_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "half.json").write_text('{"a":')
    with pytest.raises(ValueError, match="not JSON"):
        read_json(tmp_path / "half.json")


def test_provenance_names_the_versions_in_use():
    import torch

    facts = provenance()
    # Some builds leave the part after "+" out of the package's own version.
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["cpu_count"] >= 1
    assert json.loads(json.dumps(facts)) == facts


def test_peak_memory_is_in_bytes():
    # A Python with torch loaded takes more than 50 MB and less than 1 TB.
    peak = peak_memory_bytes()
    assert peak is not None
    assert 5e7 < peak < 1e12


def test_check_disk_refuses_what_does_not_fit(tmp_path):
    check_disk(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(ValueError, match="only .* GB are free"):
        check_disk(tmp_path / "not" / "yet" / "there", 10**18)


def test_a_finished_run_says_when_and_keeps_its_number_of_threads(tmp_path):
    assert (finished_at(tmp_path), threads_of(tmp_path)) == (None, None)
    open_run(tmp_path, CONFIG, threads=3)
    assert (finished_at(tmp_path), threads_of(tmp_path)) == (None, 3)
    finish_run(tmp_path)
    assert finished_at(tmp_path) == read_json(tmp_path / "done.json")["finished"]


@pytest.mark.parametrize("content", ["", "null", "[1]", '{"sha256": "0", "finished": "now"}'])
def test_a_damaged_marker_says_that_nothing_is_finished(tmp_path, content):
    finish_run(tmp_path)
    (tmp_path / "done.json").write_text(content)
    assert finished_at(tmp_path) is None


def test_a_full_disk_names_the_file_and_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(path, {"new": 2})
    assert caught.value.filename == str(path)
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(("number", "refused"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_a_disk_that_fails_is_told_but_not_one_that_syncs_no_folders(
    tmp_path, monkeypatch, number, refused
):
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(runs.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output") if refused else nullcontext():
        write_json(tmp_path / "x.json", {"new": 2})
    assert read_json(tmp_path / "x.json") == {"new": 2}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the permissions that new files do not get."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_permissions_that_the_umask_gives(tmp_path, umask):
    write_text(tmp_path / "x.json", "{}")
    assert mode(tmp_path / "x.json") == 0o666 & ~umask
    (tmp_path / "deep").mkdir()
    weights = tmp_path / "deep" / "weights"
    weights.touch(mode=0o600)
    follow_umask(tmp_path, tmp_path / "x.json")
    assert mode(weights) == 0o666 & ~umask


def test_what_cannot_be_written_is_known_before_and_nothing_stays(tmp_path):
    touch(tmp_path / "a" / "b" / "x.json")
    assert os.listdir(tmp_path) == []
    write_text(tmp_path / "x.json", "old")
    touch(tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "old"
    with pytest.raises(IsADirectoryError):
        touch(tmp_path)
    with pytest.raises(OSError, match="'.*x.json/y.json'"):
        touch(tmp_path / "x.json" / "y.json")
    assert os.listdir(tmp_path) == ["x.json"]


def place(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


@pytest.mark.parametrize(
    "given",
    ["out", "out/adapter", "out/adapter/../adapter", "link", "link/adapter", "./out/adapter/file"],
)
def test_an_input_that_would_be_removed_is_kept_however_it_is_named(tmp_path, monkeypatch, given):
    place(tmp_path, "out/adapter")
    (tmp_path / "out" / "adapter" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"'out' would be replaced, but '{Path(given)}' is read"):
        protect([Path(given)], [Path("out")])
    protect([Path("out")], [Path("absent"), Path("other")])
    protect([Path("absent")], [Path("out")])


def test_a_removed_link_counts_as_what_it_leads_to(tmp_path):
    adapter = place(tmp_path, "adapter")
    (tmp_path / "final").symlink_to(adapter)
    with pytest.raises(ValueError, match="is read from there"):
        protect([adapter], [tmp_path / "final"])
    with pytest.raises(ValueError, match="is read from there"):
        protect([tmp_path / "final"], [tmp_path / "final"])


def test_what_lies_in_an_adapter_may_not_be_removed_either(tmp_path):
    """An adapter may lie in the only subfolder of the folder that is given."""
    inner = place(tmp_path, "given/adapter")
    protect([tmp_path / "given"], [inner])
    with pytest.raises(ValueError, match="adapter' would be replaced, but '.*given' is read"):
        protect([tmp_path / "given"], [inner], whole=True)
