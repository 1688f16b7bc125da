"""The folder of a stage's result: it is written beside its place, then renamed into it.

While a stage works, `<result>.work` holds its key (`stage.json`), the Trainer's checkpoints and
`result/`, the folder that is being written. The result's own `stage.json` is written last. Then
`result/` is renamed to `<result>`, so a result folder that exists is complete. The marker seals the
files of the result (`base/seal.py`), so a result that was damaged since is not taken for whole: it
is put aside and made again.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from grasp_lora.base.files import (
    damage,
    damage_in,
    damage_words,
    follow_umask,
    holds_something,
    jsonable,
    make_folder,
    put_aside,
    read_json,
    sync_folder,
    write_sealed,
)
from grasp_lora.base.words import shown_path
from grasp_lora.stages.keys import READ, Key, differences, hash_of
from grasp_lora.stages.keys import STAGE_FILE as STAGE_FILE

State = Literal["absent", "begun", "done", "differs", "damaged"]


@dataclass(frozen=True)
class Found:
    """What is in the place of a result.

    Attributes:
        state: "absent"; "begun" (interrupted, with the same key); "done" (with the same key);
            "differs" (begun or done with another key); or "damaged" (begun or done, but not as it
            was written).
        why: for "differs", one line for each difference; for "damaged", one about the files.
        place: for "damaged", the folder that is.
    """

    state: State
    why: tuple[str, ...] = ()
    place: Path | None = None


def work_folder(out: Path) -> Path:
    """Return the folder that a stage works in until its result is published."""
    return out.with_name(f"{out.name}.work")


def places_of(out: Path) -> tuple[Path, ...]:
    """Return all places that a stage writes: its result, its work, and the result it replaces."""
    return out, work_folder(out), _old(out)


def _old(out: Path) -> Path:
    return out.with_name(f"{out.name}.old")


def look(out: Path, key: Key) -> Found:
    """Return what is in the place of a result; nothing is changed.

    Args:
        out: the place of the result.
        key: the key of the result that is wanted.

    Raises:
        ValueError: the place holds files that no stage wrote.
    """
    finished, begun = out / STAGE_FILE, work_folder(out) / STAGE_FILE
    if out.is_file() or (out.exists() and not finished.exists() and holds_something(out)):
        raise ValueError(
            f"{shown_path(out)} is not empty and no result of grasp-lora (it has no {STAGE_FILE}); "
            "choose another folder, or rename this one"
        )
    if finished.exists():
        return _compared(finished, key, "done")
    # Without a checkpoint there is no work that a user could want to keep.
    worth = any(begun.parent.glob("checkpoint-*"))
    if begun.exists() or worth:
        found = _compared(begun, key, "begun")
        if worth or found.state == "begun":
            return found
    return Found("absent")


def _compared(marker: Path, key: Key, state: State) -> Found:
    """Return the state of what a marker stands for, which is `state` if nothing is wrong."""
    wrong = damage(marker)
    if wrong:
        return Found("damaged", (damage_words(wrong),), marker.parent)
    why = differences(read_json(marker).get("key", {}), key)
    return Found("differs", tuple(why)) if why else Found(state)


def without_damage(found: Found) -> str:
    """Rename a damaged folder, so that its stage can be done again; return a line about it."""
    assert found.place is not None, "only what is damaged is put aside"
    kept = put_aside(found.place)
    return (
        f"{shown_path(found.place)} is damaged: {found.why[0]}. It is kept as "
        f"{shown_path(kept.name)} and made again"
    )


def check_input(folder: Path) -> None:
    """Check that what stages read of a folder is as the stage that wrote it left it.

    Other files may be gone, as in a copy of an adapter. A folder that no stage wrote is not
    checked.

    Args:
        folder: the folder of a result, or a folder in it, such as `adapter/` of a search.

    Raises:
        ValueError: a file that stages read was lost or changed since.
    """
    marker, found = damage_in(folder)
    if marker is None:
        return
    wrong = {
        name: why
        for name, why in found.items()
        if name == marker.name or any(fnmatch(Path(name).name, one) for one in READ)
    }
    if wrong:
        raise ValueError(
            f"{shown_path(marker.parent)} is damaged: {damage_words(wrong)}. Copy it again, or "
            f"make it again; if the change is yours, remove its {marker.name}"
        )


def refusal(out: Path, found: Found) -> str:
    """Return the error message for a result that was made from other inputs."""
    state = "a finished" if (out / STAGE_FILE).exists() else "an interrupted"
    return (
        f"{shown_path(out)} holds {state} result made with other inputs: {'; '.join(found.why)}. "
        "Choose another folder, or pass --overwrite to replace it"
    )


def begun_with(out: Path, key: Key) -> int | None:
    """Return the processes that a stage was begun with; None if it was not, or not recorded."""
    marker = work_folder(out) / STAGE_FILE
    if _compared(marker, key, "begun").state != "begun":
        return None
    return read_json(marker).get("processes")


def begin(
    out: Path, key: Key, again: bool = False, processes: int | None = None
) -> tuple[Path, Path]:
    """Prepare the work on a result; checkpoints made from other inputs are removed.

    Args:
        out: the place of the result.
        key: the key of the result.
        again: also remove checkpoints made from the same inputs.
        processes: the processes that the work is begun with, see `begun_with`.

    Returns:
        The empty folder to write the result to, and the folder for checkpoints.
    """
    work = work_folder(out)
    if again or _compared(work / STAGE_FILE, key, "begun").state != "begun":
        shutil.rmtree(work, ignore_errors=True)
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    make_folder(result)
    write_sealed(work / STAGE_FILE, {"key": jsonable(key), "processes": processes}, ())
    return result, work


def publish(out: Path, key: Key, facts: Mapping[str, Any]) -> None:
    """Write the marker into the finished folder, and rename the folder into its place.

    All files get the permissions that the umask gives the marker. They are on the disk before the
    marker is, and the folder is before its checkpoints go. An older result is first renamed to
    `<result>.old`, and removed once the new one is in place.
    """
    result, old = work_folder(out) / "result", _old(out)
    whole = {"key": key, "hash": hash_of(key)} | dict(facts)
    write_sealed(result / STAGE_FILE, jsonable(whole))
    follow_umask(result, result / STAGE_FILE)
    if (out / STAGE_FILE).exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    elif out.exists():
        shutil.rmtree(out)  # `look` made sure that it holds at most temporary files of a crash
    make_folder(out.parent)
    result.rename(out)
    sync_folder(out.parent)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove the checkpoints of a finished stage, and the result that it replaced."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
    shutil.rmtree(_old(out), ignore_errors=True)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts in the marker of a finished stage; an empty dictionary for other folders."""
    file = folder / STAGE_FILE
    return read_json(file) if file.exists() else {}
