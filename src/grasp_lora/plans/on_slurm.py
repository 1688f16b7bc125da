"""Stages as jobs of Slurm, through submitit. What is ready at once is one array.

This process keeps the order, not Slurm's dependencies: a stage that cannot run on some adapters is
no failure, and a plan may grow while it is worked off.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.base.files import read_json, write_json
from grasp_lora.base.words import shortened
from grasp_lora.plans.pool import Engine, Launcher, Pool, Process, StageJob

FOLDER = ".slurm"
"""Folder in a plan's folder: submitit's files of each job, and the job of each stage."""
_JOBS_FILE = "jobs.json"
_DAY = 24 * 60
"""Minutes that a job may take unless the options say so; submitit's own default is five."""
_CONSTRUCTOR = ("cluster", "slurm_max_num_timeout", "slurm_python")
"""Parameters with which an `AutoExecutor` is made; all others are of its `update_parameters`."""


class SlurmStage:
    """What a job does. A job that is preempted or out of time is queued again and goes on.

    Args:
        job: the stage.
    """

    def __init__(self, job: StageJob):
        self.job = job

    def __call__(self) -> int:
        return self.job.done_in_child()

    def checkpoint(self) -> Any:
        """Return what the next attempt does: the same, from the stage's own checkpoints."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        return DelayedSubmission(self)


@contextmanager
def _open(place: Path, pool: Pool, threads: int) -> Iterator[Launcher]:
    import submitit  # pyright: ignore[reportMissingImports]

    own = {"cluster": "slurm"} | {k: v for k, v in pool.options.items() if k in _CONSTRUCTOR}
    given = {k: v for k, v in pool.options.items() if k not in _CONSTRUCTOR}
    usual = {"name": "grasp-lora", "cpus_per_task": threads, "timeout_min": _DAY}
    folder = place.absolute() / FOLDER
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", **own)
        executor.update_parameters(**(usual | given))
    except (NameError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"submitit refuses the parameters of --engine: {_line(error, 0)}"
        ) from None
    except RuntimeError as error:
        raise ValueError(f"no Slurm here: {_line(error)}; start where sbatch is") from None
    yield _Slurm(executor, folder)


SLURM = Engine(_open, "submitit", pause=1.0)


@dataclass(frozen=True)
class _SlurmProcess:
    job: Any
    stage: StageJob

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # submitit raises several kinds, one for each way a job may end
            self.stage.note(f"job {self.job.job_id}: {_line(error)}")
            return 1

    def stop(self) -> None:
        self.job.cancel(check=False)


class _Slurm:
    """Submits stages, and joins jobs that a driver which was killed has left.

    Args:
        executor: submitit's.
        folder: receives `jobs.json`: stage -> its latest job, and what that was asked to do.
    """

    def __init__(self, executor: Any, folder: Path):
        self._executor, self._file = executor, folder / _JOBS_FILE

    def start(self, jobs: Sequence[StageJob]) -> Sequence[Process]:
        known = self._known()
        found = {job.stage: self._left(job, known.get(job.stage)) for job in jobs}
        new = [job for job in jobs if found[job.stage] is None]
        for job, submitted in zip(new, self._submitted(new), strict=True):
            found[job.stage] = _SlurmProcess(submitted, job)
            known[job.stage] = {"job": submitted.job_id, "asked": _asked(job)}
        write_json(self._file, known)
        return [one for one in found.values() if one is not None]

    def _known(self) -> dict[str, dict[str, str]]:
        with suppress(FileNotFoundError, ValueError):
            return read_json(self._file)
        return {}

    def _left(self, job: StageJob, known: Mapping[str, str] | None) -> "_SlurmProcess | None":
        """Return the job that an earlier driver left, if it still waits or runs."""
        from submitit import SlurmJob  # pyright: ignore[reportMissingImports]

        if known is None or known["asked"] != _asked(job) or self._executor.cluster != "slurm":
            return None
        there = SlurmJob(self._executor.folder, known["job"])
        # What Slurm has forgotten, submitit would wait for without end.
        gone = not there.get_info() or there.done()
        return None if gone else _SlurmProcess(there, job)

    def _submitted(self, jobs: Sequence[StageJob]) -> Sequence[Any]:
        if not jobs:
            return []
        try:
            with self._executor.batch():
                return [self._executor.submit(SlurmStage(job)) for job in jobs]
        except (RuntimeError, OSError) as error:
            raise ValueError(f"Slurm takes no job: {_line(error)}") from None


def _asked(job: StageJob) -> str:
    """Return a hash of what a job does: its stage as the plan has it, and the flags."""
    from grasp_lora.plans.stored import (
        read_plan_file,  # loads torch, which a job's parent is spared
    )

    (stage,) = (one for one in read_plan_file(job.place)["stages"] if one["name"] == job.stage)
    text = json.dumps([stage, job.flags], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(error: Exception, number: int = -1) -> str:
    """Return a line of an error's message: of a traceback the last one says most."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shortened(lines[number] if lines else type(error).__name__)
