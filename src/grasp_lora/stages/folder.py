"""The folder of a stage's result: it is written beside its place, then renamed into it.

While a stage works, `<result>.work` holds its key (`stage.json`), the Trainer's checkpoints and
`result/`, the folder that is being written. The result's own `stage.json` is written last. Then
`result/` is renamed to `<result>`, so a result folder that exists is complete.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grasp_lora.base.files import holds_something, read_json, write_json
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


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of a result's place during the body; a process that dies frees it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: do not start twice in one folder there
        yield
        return
    place = out.with_name(f"{out.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(place, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(place, file.fileno()):
                continue  # the last holder has removed this file, so the lock protects nothing
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _is_still(place: Path, opened: int) -> bool:
    try:
        return place.stat().st_ino == os.fstat(opened).st_ino
    except FileNotFoundError:
        return False


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

    An older result is first renamed to `<result>.old`, and removed once the new one is in place.
    """
    result, old = work_folder(out) / "result", out.with_name(f"{out.name}.old")
    write_json(result / STAGE_FILE, {"key": key, "hash": hash_of(key)} | dict(facts))
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
    shutil.rmtree(out.with_name(f"{out.name}.old"), ignore_errors=True)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts in the marker of a finished stage; an empty dictionary for other folders."""
    file = folder / STAGE_FILE
    return read_json(file) if file.exists() else {}
