"""The result of a run as it goes out: `final/`, a copy without what only later stages read.

The stage that makes the result works in its own folder, as all stages do. That folder has the
stage's marker, and the factors of each source of a merge. `final/` has what engines, hubs and
people read.
"""

import shutil
from pathlib import Path

from grasp_lora.adapters.chat import TEMPLATE_FILE
from grasp_lora.adapters.folder import ADAPTER_CONFIG_FILE, NOTES_FILE, WEIGHTS_FILE
from grasp_lora.base.files import PROMPT_FILE, RESULT, RESULT_STAGE, sync, sync_folder
from grasp_lora.base.words import shown_path
from grasp_lora.report.card import facts_of_run, write_card
from grasp_lora.stages.folder import STAGE_FILE

SEALED = (ADAPTER_CONFIG_FILE, WEIGHTS_FILE, NOTES_FILE, TEMPLATE_FILE, PROMPT_FILE)
"""The files of `final/` that are copies. Its card is not: users complete it."""


def publish_result(out: Path) -> None:
    """Make `final/` of a run anew: written beside its place, then renamed into it."""
    made, place = out / RESULT_STAGE, out / RESULT
    beside = place.with_name(f"{RESULT}.work")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    names = [name for name in SEALED if (made / name).is_file()]
    for name in names:
        shutil.copyfile(made / name, beside / name)
    sync(beside, names)
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    sync_folder(out)


def add_card(out: Path) -> None:
    """Write the model card into `final/`, from the files of the finished run."""
    if (out / RESULT / ADAPTER_CONFIG_FILE).is_file():
        write_card(out / RESULT, facts_of_run(out))


def check_layout(out: Path) -> None:
    """Check that a run folder was not made by a version whose `final/` was a stage's folder.

    Raises:
        ValueError: it was, so what is there is not known here as a result.
    """
    if (out / RESULT / STAGE_FILE).is_file() and not (out / RESULT_STAGE).exists():
        raise ValueError(
            f"{shown_path(out)} was made by an earlier version, which kept the stage of its result "
            f"in {RESULT}/: rename that folder to {RESULT_STAGE}, or set another output"
        )
