"""The marker of a finished run, `done.json`: it seals the run's own files and its stages' markers.

Each stage's marker seals the files of that stage, so all of a finished run can be checked.
"""

from collections.abc import Iterable
from pathlib import Path

from grasp_lora.base.files import (
    DONE_FILE,
    RECEIPT_FILE,
    RESULT,
    RUN_CONFIG_FILE,
    TIMES_FILE,
    WRITTEN,
    damage,
    damage_words,
    finish_run,
    put_aside,
    read_config,
    read_json,
)
from grasp_lora.base.seal import FILES
from grasp_lora.base.words import shown_path
from grasp_lora.plans.published import SEALED
from grasp_lora.stages.folder import STAGE_FILE


def mark_finished(out: Path, stages: Iterable[str]) -> None:
    """Mark the run in a folder as finished.

    Args:
        out: the run folder.
        stages: names of its stages; those that could not be done have no marker and are left out.
    """
    # The times are written anew whenever a run is begun, also one that is then refused, and the
    # receipt has the hash of this marker.
    unsealed = (TIMES_FILE, RECEIPT_FILE)
    own = [name for name in (RUN_CONFIG_FILE, *WRITTEN) if name not in unsealed]
    names = [*own, *(f"{name}/{STAGE_FILE}" for name in stages)]
    names += [f"{RESULT}/{name}" for name in SEALED]
    finish_run(out, [name for name in names if (out / name).is_file()])


def damage_in_run(out: Path) -> dict[str, str]:
    """Return file name -> what is wrong with it, for all files of a finished run.

    A stage whose folder is gone as a whole was not damaged: someone removed it.
    """
    found = damage(out / DONE_FILE)
    if DONE_FILE in found:
        return found
    for name in read_json(out / DONE_FILE).get(FILES, {}):
        folder, _, file = name.rpartition("/")
        if file != STAGE_FILE:
            continue
        if not (out / folder).is_dir():
            found.pop(name, None)
        elif name not in found:
            found |= {f"{folder}/{one}": why for one, why in damage(out / name).items()}
    return found


def put_files_aside(out: Path) -> list[str]:
    """Rename the damaged files of a run that are no stage's, so that the run can write them again.

    A damaged result is renamed as a whole.

    Returns:
        A line about each, and about each that is missing.
    """
    found = damage_in_run(out) if (out / DONE_FILE).exists() else {}
    if (out / RUN_CONFIG_FILE).exists():
        try:
            read_config(out)
        except ValueError:
            found[RUN_CONFIG_FILE] = "is damaged"
    lines: list[str] = []
    below = f"{RESULT}/"
    wrong = {n.removeprefix(below): why for n, why in found.items() if n.startswith(below)}
    if wrong:
        place = out / RESULT
        kept = f" It is kept as {shown_path(put_aside(place).name)}." if place.exists() else ""
        lines.append(f"{shown_path(place)} is damaged: {damage_words(wrong)}.{kept}")
    for name, why in found.items():
        if "/" in name:
            continue  # the stage that wrote it is put aside as a whole
        file = out / name
        kept = f"; it is kept as {shown_path(put_aside(file).name)}" if file.exists() else ""
        lines.append(f"{shown_path(file)} {why}{kept}")
    return lines
