"""The folder of a stage's result: looked at, worked on beside its place, published by one rename.

While a stage works, `<result>.work` holds its key (`stage.json`), the Trainer's checkpoints and
`result/`, the folder that is being written. A finished result gets its own `stage.json`, written
last, and is then renamed into its place. So a folder that is there is complete.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grasp_lora.base.files import holds_something, read_json, write_json
from grasp_lora.stages.keys import STAGE_FILE as STAGE_FILE
from grasp_lora.stages.keys import Key, differences

State = Literal["absent", "begun", "done", "differs"]


@dataclass(frozen=True)
class Found:
    """What is in the place of a result.

    Attributes:
        state: "absent"; "begun" (interrupted, the same key); "done" (the same key); or "differs".
        why: for "differs", one line for each difference.
    """

    state: State
    why: tuple[str, ...] = ()


def work_folder(out: Path) -> Path:
    """Return where a stage works until its result is published: beside the result."""
    return out.with_name(f"{out.name}.work")


def look(out: Path, key: Key) -> Found:
    """Return what is in the place of a result; changes nothing.

    Args:
        out: the place.
        key: of the result that is asked for.

    Raises:
        ValueError: something is there that no stage wrote.
    """
    finished, begun = out / STAGE_FILE, work_folder(out) / STAGE_FILE
    if out.is_file() or (out.exists() and not finished.exists() and holds_something(out)):
        raise ValueError(
            f"'{out}' is not empty and no result of grasp-lora (it has no {STAGE_FILE}); choose "
            "another folder, or empty it yourself"
        )
    if finished.exists():
        why = differences(read_json(finished)["key"], key)
        return Found("differs", tuple(why)) if why else Found("done")
    if begun.exists():
        why = differences(read_json(begun)["key"], key)
        if not why:
            return Found("begun")
        # Without a checkpoint nothing would be lost that a user could want to keep.
        if any(begun.parent.glob("checkpoint-*")):
            return Found("differs", tuple(why))
    return Found("absent")


def refusal(out: Path, found: Found) -> str:
    """Return the message for a result that other inputs made."""
    state = "a finished" if (out / STAGE_FILE).exists() else "an interrupted"
    return (
        f"'{out}' holds {state} result made with other inputs: {'; '.join(found.why)}. Choose "
        "another folder, or pass --overwrite to replace it"
    )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of a result's place for the body; the system frees it when a process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two starts in one folder apart there
        yield
        return
    place = out.with_name(f"{out.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(place, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(place, file.fileno()):
                continue  # who held the lock before has removed the file: this one locks nothing
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
    """Prepare the work on a result; checkpoints of other inputs are removed.

    Args:
        out: the place of the result.
        key: its key.
        again: remove checkpoints of the same inputs as well.

    Returns:
        The folder to write the result to, empty, and the folder for checkpoints.
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
    """Write the marker into the finished folder and rename it into its place.

    An older result is put aside first (`<result>.old`) and removed once the new one is there.
    """
    result, old = work_folder(out) / "result", out.with_name(f"{out.name}.old")
    write_json(result / STAGE_FILE, {"key": key} | dict(facts))
    if (out / STAGE_FILE).exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    elif out.exists():
        shutil.rmtree(out)  # `look` has found at most temporary files of a crash in it
    out.parent.mkdir(parents=True, exist_ok=True)
    result.rename(out)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a finished stage needs no more: its checkpoints, and the result it replaced."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
    shutil.rmtree(out.with_name(f"{out.name}.old"), ignore_errors=True)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what the marker of a finished stage says; nothing for any other folder."""
    file = folder / STAGE_FILE
    return read_json(file) if file.exists() else {}
