"""The folder of a result: whole or not there, whatever a kill comes between."""

from hashlib import sha256
from pathlib import Path

import pytest

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import read_json, write_json
from grasp_lora.config.run_config import make_config
from grasp_lora.plans.single import merge_adapters
from grasp_lora.stages.folder import (
    begin,
    check_input,
    look,
    publish,
    refusal,
    tidy,
    without_damage,
    work_folder,
)
from grasp_lora.stages.keys import Key, hash_of
from grasp_lora.workbench import merged_folder
from grasp_lora.workbench.context import open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job


def key(**settings) -> Key:
    whole = {"kind": "merge", "format": 1, "base": None, "settings": settings}
    return whole | {"options": {}, "examples": {}, "inputs": {}}


ONE, TWO = key(seed=1), key(seed=2)


def made(out: Path, wanted: Key, text: str) -> None:
    """Do what a stage does, but for its work."""
    result, _ = begin(out, wanted)
    (result / "x.txt").write_text(text)
    publish(out, wanted, {"seconds": 1.0})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_result_appears_whole_and_nothing_else_stays(tmp_path):
    out = tmp_path / "deep" / "out"
    assert look(out, ONE).state == "absent"
    result, checkpoints = begin(out, ONE)
    (result / "x.txt").write_text("one")
    (checkpoints / "checkpoint-1").mkdir()
    assert not out.exists()
    assert look(out, ONE).state == "begun"
    publish(out, ONE, {"seconds": 1.0})
    assert names(tmp_path / "deep") == ["out"]
    assert names(out) == ["stage.json", "x.txt"]
    marker = read_json(out / "stage.json")
    assert marker.pop("files") == {"x.txt": {"bytes": 3, "sha256": sha256(b"one").hexdigest()}}
    assert len(marker.pop("sha256")) == 64
    assert marker == {"key": ONE, "hash": hash_of(ONE), "seconds": 1.0}
    assert look(out, ONE).state == "done"


def test_a_result_of_other_inputs_is_told_and_replaced_by_one_that_is_whole(tmp_path):
    out = tmp_path / "out"
    made(out, ONE, "one")
    found = look(out, TWO)
    assert (found.state, found.why) == ("differs", ("seed was 1, is 2",))
    said = refusal(out, found)
    assert "holds a finished result made with other inputs: seed was 1, is 2. Choose" in said
    assert "--overwrite" in said
    result, _ = begin(out, TWO)
    (result / "x.txt").write_text("two")
    assert (out / "x.txt").read_text() == "one", "until the new one is there"
    publish(out, TWO, {})
    assert (out / "x.txt").read_text() == "two"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_a_result_is_put_in_place_leaves_no_part_of_it(tmp_path, monkeypatch, call):
    """The first rename puts the old result aside, the second puts the new one in its place."""
    out, rename, calls = tmp_path / "out", Path.rename, []
    made(out, ONE, "one")

    def killed(self, target):
        calls.append(self)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            made(out, TWO, "two")
    state = look(out, TWO).state
    assert state == ("differs" if call == 1 else "begun")
    if call == 1:
        assert (out / "x.txt").read_text() == "one"
    else:
        assert not out.exists()
    made(out, TWO, "two")
    assert (out / "x.txt").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_what_a_kill_left_beside_a_finished_result_is_tidied_away(tmp_path):
    out = tmp_path / "out"
    made(out, ONE, "one")
    for name in ("out.work", "out.old"):
        write_json(tmp_path / name / "stage.json", {"key": ONE})
    assert look(out, ONE).state == "done"
    tidy(out)
    assert names(tmp_path) == ["out"]


def test_an_interrupted_result_is_gone_on_with_only_from_the_same_inputs(tmp_path):
    out = tmp_path / "out"
    result, work = begin(out, ONE)
    (result / "half.txt").touch()
    (work / "checkpoint-4").mkdir()
    assert look(out, ONE).state == "begun"
    found = look(out, TWO)
    assert found.why == ("seed was 1, is 2",)
    assert "holds an interrupted result made with other inputs" in refusal(out, found)
    result, work = begin(out, ONE)
    assert names(work) == ["checkpoint-4", "result", "stage.json"]
    assert names(result) == [], "what was half written is written anew"
    assert "checkpoint-4" not in names(begin(out, ONE, again=True)[1])
    (work / "checkpoint-4").mkdir()
    assert "checkpoint-4" not in names(begin(out, TWO)[1])
    assert read_json(work_folder(out) / "stage.json")["key"] == TWO


def test_work_that_has_no_checkpoint_yet_stands_in_nobodys_way(tmp_path):
    out = tmp_path / "out"
    begin(out, ONE)
    assert look(out, TWO).state == "absent"
    made(out, TWO, "two")
    assert look(out, TWO).state == "done"


@pytest.mark.parametrize("mine", ["thesis.tex", "adapter_model.safetensors"])
def test_a_folder_that_no_stage_wrote_is_refused(tmp_path, mine):
    out = tmp_path / "out"
    out.mkdir()
    (out / mine).touch()
    for place in (out, out / mine):
        with pytest.raises(ValueError, match="is not empty and no result of grasp-lora"):
            look(place, ONE)
    assert names(out) == [mine]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "'x.txt' is missing"),
        (b"on", "'x.txt' has 2 bytes, not 3"),
        (b"", "'x.txt' has 0 bytes, not 3"),
        (b"onf", "'x.txt' has another content"),
        (b"\0\0\0", "'x.txt' has another content"),
    ],
)
def test_a_damaged_result_is_not_done_and_is_put_aside_whole(tmp_path, content, told):
    out = tmp_path / "out"
    made(out, ONE, "one")
    (out / "x.txt").unlink()
    if content is not None:
        (out / "x.txt").write_bytes(content)
    for wanted in (ONE, TWO):
        found = look(out, wanted)
        assert (found.state, found.why) == ("damaged", (told,)), "whatever is asked for"
    line = without_damage(found)
    assert told in line
    assert "It is kept as 'out.damaged' and made again" in line
    assert look(out, ONE).state == "absent"
    made(out, ONE, "one")
    (out / "x.txt").write_text("two")
    assert "'out.damaged-2'" in without_damage(look(out, ONE))
    assert names(tmp_path) == ["out.damaged", "out.damaged-2"], "nothing is deleted"
    if content is not None:
        assert (tmp_path / "out.damaged" / "x.txt").read_bytes() == content


@pytest.mark.parametrize("place", ["out", "out.work"])
@pytest.mark.parametrize("text", ["", "{", '{"key": ', "\0" * 300, "[]", '{"files": {}}'])
def test_a_damaged_marker_is_told_and_not_believed(tmp_path, place, text):
    out = tmp_path / "out"
    if place == "out":
        made(out, ONE, "one")
    else:
        (begin(out, ONE)[1] / "checkpoint-4").mkdir()
    marker = tmp_path / place / "stage.json"
    marker.write_text(text)
    found = look(out, ONE)
    assert (found.state, found.why) == ("damaged", ("'stage.json' is damaged",))
    without_damage(found)
    assert names(tmp_path) == [f"{place}.damaged"]


def test_every_turned_bit_of_a_marker_is_found_or_changes_nothing(tmp_path):
    """Without its seal a marker is one of an earlier version, whose folder is read unchecked."""
    out = tmp_path / "out"
    made(out, ONE, "one")
    marker = out / "stage.json"
    content, whole = marker.read_bytes(), read_json(marker)
    for place in range(len(content)):
        marker.unlink()
        changed = bytes([content[place] ^ 1])
        marker.write_bytes(content[:place] + changed + content[place + 1 :])
        if look(out, ONE).state != "damaged":
            assert read_json(marker) == whole, place


def test_a_checkpoint_without_the_key_of_its_stage_is_put_aside(tmp_path):
    out = tmp_path / "out"
    work = begin(out, ONE)[1]
    (work / "checkpoint-4").mkdir()
    (work / "stage.json").unlink()
    found = look(out, ONE)
    assert (found.state, found.why) == ("damaged", ("'stage.json' is missing",))
    without_damage(found)
    assert (tmp_path / "out.work.damaged" / "checkpoint-4").is_dir()


def test_a_result_of_an_earlier_version_is_done_unchecked(tmp_path):
    out = tmp_path / "out"
    made(out, ONE, "one")
    write_json(out / "stage.json", {"key": ONE, "hash": hash_of(ONE)})
    (out / "x.txt").write_text("two")
    assert look(out, ONE).state == "done"


def test_of_an_input_only_what_stages_read_must_be_there(tmp_path):
    out = tmp_path / "out"
    result, _ = begin(out, ONE)
    for name in ("notes.txt", "adapter/merge.json", "adapter/plot.png"):
        (result / name).parent.mkdir(exist_ok=True)
        (result / name).write_text("{}")
    publish(out, ONE, {})
    (out / "notes.txt").unlink()
    (out / "adapter" / "plot.png").unlink()
    for folder in (out, out / "adapter"):
        check_input(folder)
    (out / "adapter" / "merge.json").unlink()
    for folder in (out, out / "adapter"):
        with pytest.raises(ValueError, match=r"out' is damaged: 'adapter/merge\.json' is missing"):
            check_input(folder)


def test_a_folder_that_is_empty_but_for_a_torn_write_is_taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".stage.json.abc.part").touch()
    assert look(out, ONE).state == "absent"
    made(out, ONE, "one")
    assert names(out) == ["stage.json", "x.txt"]


def test_a_merge_killed_between_its_files_leaves_no_adapter_in_its_place(tmp_path, monkeypatch):
    tiny_backbone_folder(tmp_path / "base")
    pair = [tiny_adapter_folder(tmp_path / f"{n}", tiny_model(), seed=n) for n in (1, 2)]
    context = open_context(make_config(job(tmp_path)), quiet=True)
    whole = merge_adapters(context.config, pair, tmp_path / "whole", context=context)
    out = tmp_path / "out"

    def killed(*_given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merged_folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_adapters(context.config, pair, out, context=context)
    half = names(work_folder(out) / "result")
    assert "adapter_model.safetensors" in half
    assert "merge.json" not in half
    assert not out.exists(), "or the half would be taken for an adapter that was never merged"
    merge_adapters(context.config, pair, out, context=context)
    assert names(out) == names(whole)
    for name in ("adapter_model.safetensors", "parts.safetensors", "merge.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert read_adapter(out).adapter.keys() == read_adapter(whole).adapter.keys()
    assert not work_folder(out).exists()
