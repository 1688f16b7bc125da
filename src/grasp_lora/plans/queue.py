"""A queue of independent runs in one folder, each a process of its own with explicit inputs.

A job whose inputs have a result is not run again, so a queue that was killed goes on where it
stopped. A job that fails keeps its log, and the others go on.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.base.files import holds_something, jsonable, read_json, write_json
from grasp_lora.plans.job import JOB_FILE, RESULT_FILE, do_job, result_of
from grasp_lora.workbench.reporter import Narrator, clock, duration

QUEUE_FILE = "queue.json"
LOG_FILE = "log.txt"
_FORMAT = "grasp-lora queue"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_GONE = ".old"
_PAUSE = 0.2
"""Seconds between two looks at the running jobs."""


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        name: folder of the run below the queue's.
        work: `MODULE:FUNCTION` of `grasp_lora.plans`, see `job.Work`.
        inputs: JSON-able; all that the result depends on beside the jobs it needs.
        needs: names of jobs whose results it is given.
    """

    name: str
    work: str
    inputs: Mapping[str, Any]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        result: what its work returned, None where it failed or was not run.
        seconds: its work's wall time.
        peak_memory_bytes: of its process.
        error: why there is no result.
        machine: what it ran on, see `job.machine`.
    """

    result: Mapping[str, Any] | None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    error: str | None = None
    machine: Mapping[str, Any] | None = None


def run_queue(
    folder: Path,
    jobs: Sequence[Job],
    workers: int = 1,
    threads: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    expected: Mapping[str, float] | None = None,
) -> dict[str, Outcome]:
    """Run every job that has no result yet.

    Args:
        folder: holds `queue.json` and a folder for each job.
        jobs: in the order they are started; a job may need earlier ones only.
        workers: processes at once. On a machine with several GPUs each gets one of them in turn.
            0 does the jobs in this process, one after the other, which a debugger can follow.
        threads: of each process; None is the machine's cores over `workers`. The first start's
            choice is kept for the folder: sums in another number of threads differ in their last
            digits, and training carries that on.
        overwrite: do jobs again whose folder holds a result of other inputs.
        quiet: print nothing.
        expected: job name -> seconds it is projected to take; the time left is said by it.

    Returns:
        Job name -> outcome, in the order of `jobs`.

    Raises:
        ValueError: the jobs are no queue, or the folder holds something else; before any work.
    """
    keys = check_queue(folder, jobs, workers, threads, overwrite)
    _remove_others(folder, jobs, keys)
    threads = threads_of(folder, threads, workers)
    write_json(folder / QUEUE_FILE, {"format": _FORMAT, "threads": threads})
    _write_jobs(folder, jobs, keys)
    narrator = Narrator(quiet)
    outcomes = {job.name: _outcome(folder / job.name, keys[job.name]) for job in jobs}
    done = {name: found for name, found in outcomes.items() if found is not None}
    if done:
        narrator.say(f"{len(done)} of {len(jobs)} runs are done already")
    pace = _Pace(expected or dict.fromkeys(keys, 1.0), done, workers)
    with narrator.long_bar(f"{len(jobs)} runs", pace.total) as show:
        show(pace.total - pace.left)

        def ended(name: str, outcome: Outcome) -> None:
            done[name] = outcome
            pace.end(name, outcome)
            log = folder / name / LOG_FILE
            state = outcome.error or "done in " + clock(outcome.seconds or 0)
            rest = f", about {duration(pace.seconds_left)} left" if pace.left else ""
            narrator.say(f"{name}: {state} ({len(done)} of {len(jobs)} runs{rest})")
            if outcome.error is not None and log.exists():
                narrator.say(_tail(log))
            show(pace.total - pace.left)

        if workers == 0:
            _work_here(folder, jobs, keys, done, ended)
        else:
            _work_off(folder, jobs, keys, done, ended, workers, threads)
    return {job.name: done[job.name] for job in jobs}


def check_queue(
    folder: Path, jobs: Sequence[Job], workers: int, threads: int | None, overwrite: bool
) -> dict[str, str]:
    """Refuse, before any work, what `run_queue` cannot do; return the jobs' keys.

    Raises:
        ValueError: as `run_queue`.
    """
    _check(jobs, workers)
    keys = keys_of(jobs)
    _look(folder, jobs, keys, overwrite)
    _check_threads(folder, threads)
    return keys


class _Pace:
    """What is left of a queue, by the projection and by how this start keeps to it.

    Args:
        expected: job name -> projected seconds, or ones where nothing is projected.
        done: jobs that have a result already.
        workers: processes at once.
    """

    def __init__(self, expected: Mapping[str, float], done: Iterable[str], workers: int):
        self._expected, self._workers = dict(expected), max(1, workers)
        self.total = sum(expected.values())
        self.left = self.total - sum(expected.get(name, 0.0) for name in done)
        self._spent = self._projected = 0.0

    def end(self, name: str, outcome: Outcome) -> None:
        """Take a job as ended."""
        projected = self._expected.get(name, 0.0)
        self.left = max(0.0, self.left - projected)
        if outcome.seconds is not None:
            self._spent += outcome.seconds
            self._projected += projected

    @property
    def seconds_left(self) -> float:
        """Wall time, once something has ended; before that as projected."""
        factor = self._spent / self._projected if self._projected else 1.0
        return self.left * factor / self._workers


def keys_of(jobs: Sequence[Job]) -> dict[str, str]:
    """Return job name -> 16 hex digits of all that its result depends on."""
    keys: dict[str, str] = {}
    for job in jobs:
        content = [job.work, jsonable(job.inputs), [keys[name] for name in job.needs]]
        text = json.dumps(content, sort_keys=True)
        keys[job.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return keys


def results_in(folder: Path, jobs: Sequence[Job]) -> dict[str, Outcome]:
    """Return the outcomes of those jobs that a queue's folder has a result of, same inputs only."""
    found: dict[str, Outcome] = {}
    for name, key in keys_of(jobs).items():
        file = folder / name / RESULT_FILE
        if file.exists() and read_json(file)["key"] == key:
            outcome = _outcome(folder / name, key)
            assert outcome is not None, "its result is there"
            found[name] = outcome
    return found


def gpu_of(place: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment that gives a worker its GPU.

    Args:
        place: of the worker, from 0.
        gpus: names of the machine's GPUs as CUDA knows them.
    """
    return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if len(gpus) > 1 else {}


def _check(jobs: Sequence[Job], workers: int) -> None:
    if workers < 0:
        raise ValueError(f"jobs must be at least 0, got {workers}; 0 is this process alone")
    seen: set[str] = set()
    for job in jobs:
        if not _NAME.fullmatch(job.name) or job.name in seen:
            raise ValueError(f"{job.name!r} cannot name a run: names are unique folder names")
        missing = [name for name in job.needs if name not in seen]
        if missing:
            raise ValueError(f"{job.name} needs {', '.join(missing)}, not among the earlier runs")
        seen.add(job.name)


def _look(folder: Path, jobs: Sequence[Job], keys: Mapping[str, str], overwrite: bool) -> None:
    marker = folder / QUEUE_FILE
    if folder.exists() and not marker.exists() and (not folder.is_dir() or holds_something(folder)):
        raise ValueError(
            f"'{folder}' is not empty and holds no runs of this command (it has no {QUEUE_FILE}); "
            "choose another folder, or empty it yourself"
        )
    if marker.exists() and read_json(marker).get("format") != _FORMAT:
        raise ValueError(f"'{marker}' was not written by grasp-lora; choose another folder")
    others = _others(folder, jobs, keys)
    if others and not overwrite:
        raise ValueError(
            f"'{folder}' holds runs with other settings or data ({', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}); choose another folder, or pass --overwrite to "
            "do them again"
        )


def _others(folder: Path, jobs: Sequence[Job], keys: Mapping[str, str]) -> list[str]:
    """Return the jobs whose folder is that of other inputs."""

    def differs(name: str) -> bool:
        files = (folder / name / file for file in (JOB_FILE, RESULT_FILE))
        return any(file.exists() and read_json(file)["key"] != keys[name] for file in files)

    return [job.name for job in jobs if differs(job.name)]


def _remove_others(folder: Path, jobs: Sequence[Job], keys: Mapping[str, str]) -> None:
    for name in _others(folder, jobs, keys):
        # Moved first: of a folder that is half removed nobody could tell what it was of.
        gone = folder / f"{name}{_GONE}"
        shutil.rmtree(gone, ignore_errors=True)
        (folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _kept_threads(folder: Path) -> int | None:
    marker = folder / QUEUE_FILE
    return read_json(marker)["threads"] if marker.exists() else None


def _check_threads(folder: Path, asked: int | None) -> None:
    kept = _kept_threads(folder)
    if asked is not None and asked < 1:
        raise ValueError(f"threads must be at least 1, got {asked}")
    if kept is not None and asked not in (None, kept):
        raise ValueError(
            f"'{folder}' was begun with {kept} threads a run, and {asked} would change the last "
            "digits of what is left; leave --threads out, or choose another folder"
        )


def threads_of(folder: Path, asked: int | None, workers: int) -> int:
    """Return the threads of each process: what the folder was begun with, else as `run_queue`."""
    return _kept_threads(folder) or asked or max(1, (os.cpu_count() or 1) // max(1, workers))


def _write_jobs(folder: Path, jobs: Sequence[Job], keys: Mapping[str, str]) -> None:
    for job in jobs:
        needs = {name: str(folder / name / RESULT_FILE) for name in job.needs}
        write_json(
            folder / job.name / JOB_FILE,
            {"key": keys[job.name], "work": job.work, "needs": needs, "inputs": job.inputs},
        )


def _outcome(folder: Path, key: str) -> Outcome | None:
    found = result_of(folder, key)
    if found is None:
        return None
    return Outcome(
        found["result"],
        found["seconds"],
        found["peak_memory_bytes"],
        machine=found.get("machine"),
    )


def _work_here(
    folder: Path,
    jobs: Sequence[Job],
    keys: Mapping[str, str],
    done: dict[str, Outcome],
    ended: Callable[[str, Outcome], None],
) -> None:
    for job in jobs:
        lost = _lost(job, done)
        if lost is not None:
            ended(job.name, lost)
        elif job.name not in done:
            place = folder / job.name
            try:
                do_job(place)
            except Exception as error:
                # One run's fault, whatever it is, must not stop the others: its log keeps it.
                with open(place / LOG_FILE, "a") as log:
                    traceback.print_exc(file=log)
                ended(job.name, Outcome(None, error=f"failed ({error}), see {place / LOG_FILE}"))
            else:
                found = _outcome(place, keys[job.name])
                assert found is not None, "a job that ends has a result"
                ended(job.name, found)


def _lost(job: Job, done: Mapping[str, Outcome]) -> Outcome | None:
    """Return the outcome of a job that waits for a result that will not come."""
    lost = [name for name in job.needs if name in done and done[name].error]
    if job.name in done or not lost:
        return None
    return Outcome(None, error=f"not run, {lost[0]} has no result")


def _work_off(
    folder: Path,
    jobs: Sequence[Job],
    keys: Mapping[str, str],
    done: dict[str, Outcome],
    ended: Callable[[str, Outcome], None],
    workers: int,
    threads: int,
) -> None:
    waiting = [job for job in jobs if job.name not in done]
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    gpus = _gpus()
    before = _exit_on_termination()
    try:
        while waiting or running:
            for job in list(waiting):
                lost = _lost(job, done)
                if lost is not None:
                    waiting.remove(job)
                    ended(job.name, lost)
                elif len(running) < workers and all(name in done for name in job.needs):
                    waiting.remove(job)
                    place = min(set(range(workers)) - running.keys())
                    running[place] = (job, _start(folder / job.name, threads, gpu_of(place, gpus)))
            time.sleep(_PAUSE if running else 0)
            for place, (job, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[place]
                outcome = _outcome(folder / job.name, keys[job.name]) if code == 0 else None
                log = folder / job.name / LOG_FILE
                failed = Outcome(None, error=f"failed (exit code {code}), see {log}")
                ended(job.name, outcome or failed)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _exit_on_termination() -> Any:
    """Let SIGTERM end this process as Ctrl-C does, so that it takes its running jobs along.

    Returns:
        What SIGTERM did before; None in a thread, which may not say what signals do.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def _start(folder: Path, threads: int, gpu: Mapping[str, str]) -> subprocess.Popen[bytes]:
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count} | dict(gpu)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    with open(folder / LOG_FILE, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "grasp_lora.plans.job", str(folder)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def _gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(n) for n in range(torch.cuda.device_count())]


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-3:])
