"""The folder of a stage's result: it is written beside its place, then renamed into it.

While a stage works, `<result>.work` holds its key (`stage.json`), the Trainer's checkpoints and
`result/`, the folder that is being written. The result's own `stage.json` is written last. Then
`result/` is renamed to `<result>`, so a result folder that exists is complete.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grasp_lora.base.files import follow_umask, holds_something, read_json, write_json
from grasp_lora.base.words import shown_path
from grasp_lora.stages.keys import STAGE_FILE as STAGE_FILE
from grasp_lora.stages.keys import Key, differences, hash_of

State = Literal["absent", "begun", "done", "differs"]


@dataclass(frozen=True)
class Found:
    """What is in the place of a result.

    Attributes:
        state: "absent"; "begun" (interrupted, with the same key); "done" (with the same key); or
            "differs" (begun or done with another key).
        why: for "differs", one line for each difference.
    """

    state: State
    why: tuple[str, ...] = ()


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
            "choose another folder, or empty it yourself"
        )
    if finished.exists():
        why = differences(read_json(finished)["key"], key)
        return Found("differs", tuple(why)) if why else Found("done")
    if begun.exists():
        why = differences(read_json(begun)["key"], key)
        if not why:
            return Found("begun")
        # Without a checkpoint there is no work that a user could want to keep.
        if any(begun.parent.glob("checkpoint-*")):
            return Found("differs", tuple(why))
    return Found("absent")


def refusal(out: Path, found: Found) -> str:
    """Return the error message for a result that was made from other inputs."""
    state = "a finished" if (out / STAGE_FILE).exists() else "an interrupted"
    return (
        f"{shown_path(out)} holds {state} result made with other inputs: {'; '.join(found.why)}. "
        "Choose another folder, or pass --overwrite to replace it"
    )


def begin(out: Path, key: Key, again: bool = False) -> tuple[Path, Path]:
    """Prepare the work on a result; checkpoints made from other inputs are removed.

    Args:
        out: the place of the result.
        key: the key of the result.
        again: also remove checkpoints made from the same inputs.

    Returns:
        The empty folder to write the result to, and the folder for checkpoints.
    """
    work = work_folder(out)
    begun = work / STAGE_FILE
    if again or not begun.exists() or differences(read_json(begun)["key"], key):
        shutil.rmtree(work, ignore_errors=True)
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir(parents=True)
    write_json(work / STAGE_FILE, {"key": key})
    return result, work


def publish(out: Path, key: Key, facts: Mapping[str, Any]) -> None:
    """Write the marker into the finished folder, and rename the folder into its place.

    All files get the permissions that the umask gives the marker.

    An older result is first renamed to `<result>.old`, and removed once the new one is in place.
    """
    result, old = work_folder(out) / "result", _old(out)
    write_json(result / STAGE_FILE, {"key": key, "hash": hash_of(key)} | dict(facts))
    follow_umask(result, result / STAGE_FILE)
    if (out / STAGE_FILE).exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    elif out.exists():
        shutil.rmtree(out)  # `look` made sure that it holds at most temporary files of a crash
    out.parent.mkdir(parents=True, exist_ok=True)
    result.rename(out)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove the checkpoints of a finished stage, and the result that it replaced."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
    shutil.rmtree(_old(out), ignore_errors=True)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts in the marker of a finished stage; an empty dictionary for other folders."""
    file = folder / STAGE_FILE
    return read_json(file) if file.exists() else {}
