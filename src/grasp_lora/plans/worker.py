"""Does one stage of a plan in a process: `python -m grasp_lora.plans.worker FOLDER STAGE`.

The folder's `plan.json` defines the stage. The folders that the plan names hold everything the
stage needs, so any machine that can read and write them can do it.
"""

import gc
import os
import sys
import threading
from pathlib import Path

from grasp_lora.plans.executor import PLAIN, do
from grasp_lora.plans.pool import AGAIN, OVERWRITE, WITH_PARENT
from grasp_lora.plans.session import Session
from grasp_lora.plans.stored import read_stage
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.workbench.processes import join
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import load_run_data

NOT_APPLICABLE = 3
"""Exit code of a stage that cannot run on these adapters or on this machine; the reason is the last
line of standard output."""


def work(place: Path, name: str, overwrite: bool = False, again: bool = False) -> None:
    """Do a stage of the plan in a folder, unless it is done.

    Args:
        place: the plan's folder.
        name: name of the stage.
        overwrite: replace a result made from other inputs.
        again: do the stage even if it is done.
    """
    stage = read_stage(place, name)
    join(stage.config)
    data = load_run_data(stage.config, Reporter().say)
    options = PLAIN.replacing() if overwrite else PLAIN
    do(stage, place, Session(stage.config, data), options, again)


def main(arguments: list[str]) -> int:
    """Do the stage that the command line names; return the exit code."""
    place, name, *flags = arguments
    if WITH_PARENT in flags:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(Path(place), name, OVERWRITE in flags, AGAIN in flags)
    except NotApplicable as error:
        print(error)
        return NOT_APPLICABLE
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would stop the interpreter's end
        pass
    os._exit(1)  # as abrupt as a kill: whatever a stage has written by then is good for the next


if __name__ == "__main__":
    # The Trainer collects garbage before training, which takes half a second for all imports.
    gc.freeze()
    sys.exit(main(sys.argv[1:]))
