"""Several processes do the stages of a plan; each process does one stage.

This process says which stages are ready, and an entry of `LAUNCHERS` does them, here or elsewhere.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grasp_lora.base.files import RUN_CONFIG_FILE, damage, holds_something, put_aside
from grasp_lora.base.owner import owned
from grasp_lora.base.words import shown, shown_path
from grasp_lora.plans.executor import (
    FAILED,
    Options,
    Outcome,
    check,
    log_of,
    refused_outcome,
    state_of,
    without_result,
    work_off,
)
from grasp_lora.plans.on_local import LOCAL
from grasp_lora.plans.on_ray import RAY
from grasp_lora.plans.on_slurm import SLURM
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.pool import AGAIN, HERE, OVERWRITE, Engine, Pool, Process, StageJob
from grasp_lora.plans.session import Session
from grasp_lora.plans.stored import PLAN_FILE, read_plan_file, write_plan
from grasp_lora.plans.worker import NOT_APPLICABLE
from grasp_lora.stages.folder import STAGE_FILE
from grasp_lora.stages.stage import Cost, Sizes
from grasp_lora.workbench.processes import threads_restored, use_threads
from grasp_lora.workbench.reporter import Reporter, duration

LAUNCHERS: Mapping[str, Engine] = {"local": LOCAL, "slurm": SLURM, "ray": RAY}
"""Name -> engine that does the stages."""


def work_off_many(
    plan: Plan,
    place: Path,
    session: Session,
    sizes: Sizes,
    pool: Pool = HERE,
    overwrite: bool = False,
) -> dict[str, Outcome]:
    """Do every stage of a plan that is not done; a stage that fails does not stop the others.

    Args:
        plan: the stages.
        place: the folder of their results.
        session: examples, and the backbone for stages that are done in this process.
        sizes: of all sets of examples, for the progress in tokens.
        pool: the processes.
        overwrite: replace results that other inputs made; where there are none, do all again.

    Returns:
        Stage -> outcome, in the order of the plan.

    Raises:
        ValueError: as `plan_folder`, or as `executor.check`; raised before any work.
    """
    with plan_folder(place, pool, session.quiet) as threads:
        return _worked_off(plan, place, session, sizes, (pool, threads, overwrite))


@contextmanager
def plan_folder(place: Path, pool: Pool, quiet: bool) -> Iterator[int]:
    """Be the only process that works in a plan's folder during the body.

    This process then computes with the folder's number of threads, if it does the stages itself.

    Args:
        place: the folder; made if absent, and removed again if it is left empty.
        pool: the processes that do the stages.
        quiet: print nothing.

    Yields:
        The threads of each process.

    Raises:
        ValueError: the pool is none, the folder holds something else or was begun with another
            number of threads, or another process works in it.
        OSError: the folder cannot be written.
    """
    kept, say = _checked(place, pool), Reporter(quiet).say
    with owned(place, say), threads_restored():
        wanted = kept or pool.threads
        if pool.jobs == 0:
            wanted = use_threads(wanted, place, say)
        yield wanted or (max(1, (os.cpu_count() or 1) // pool.jobs) if pool.on == "local" else 1)


def _worked_off(
    plan: Plan, place: Path, session: Session, sizes: Sizes, how: tuple[Pool, int, bool]
) -> dict[str, Outcome]:
    pool, threads, overwrite = how
    again = check(plan, place, session, overwrite)
    reporter = Reporter(session.quiet)
    done = {n for n, one in plan.stages.items() if state_of(one, place, session).state == "done"}
    waiting = [name for name in plan.stages if again or name not in done]
    if damage(place / PLAN_FILE) and (place / PLAN_FILE).exists():
        kept = shown_path(put_aside(place / PLAN_FILE).name)
        reporter.say(f"{shown_path(place / PLAN_FILE)} is damaged; it is kept as {kept}")
    write_plan(place, plan, threads)
    progress = _Progress(plan.cost(sizes), waiting, reporter)
    with reporter.long_bar(f"{len(waiting)} stages", progress.total) as show:
        options = Options(overwrite, keep_going=True, ended=progress.noting(show))
        if pool.jobs == 0 or not waiting:
            return work_off(plan, place, session, options)
        return _processes(plan, place, session, options, (pool, threads, again))


def _checked(place: Path, pool: Pool) -> int | None:
    """Check the folder and the pool; return the threads that the folder was begun with, if any."""
    if pool.jobs < 0:
        raise ValueError(f"jobs must be at least 0, got {pool.jobs}; 0 is this process alone")
    if pool.threads is not None and pool.threads < 1:
        raise ValueError(f"threads must be at least 1, got {pool.threads}")
    if pool.on not in LAUNCHERS:
        raise ValueError(f"no launcher {shown(pool.on)}; choose from {', '.join(LAUNCHERS)}")
    needed = LAUNCHERS[pool.on].package
    if needed is not None and find_spec(needed) is None:
        raise ValueError(
            f"--on {pool.on} needs {needed}, which is not installed: pip install "
            f'"grasp-lora[{pool.on}]"'
        )
    if pool.on == "local" and pool.options:
        raise ValueError("--on local takes no options of an engine; leave --engine out")
    if pool.jobs == 0 and pool.on != "local":
        raise ValueError(f"--on {pool.on}: give --jobs, the most stages at once, 1 or more")
    there = (place / PLAN_FILE).exists() or _lost_its_plan(place)
    if place.exists() and not there and (not place.is_dir() or holds_something(place)):
        raise ValueError(
            f"{shown_path(place)} is not empty and holds no stages of this command (it has no "
            f"{PLAN_FILE}); choose another folder, or empty it yourself"
        )
    if there and damage(place / PLAN_FILE):
        if pool.jobs and pool.threads is None:
            raise ValueError(
                f"{shown_path(place / PLAN_FILE)} is lost or damaged, and with it the number of "
                "threads of a process, on which the last digits of results depend; give --threads "
                "as at the first start (without it: the cores of the machine over --jobs)"
            )
        there = False
    kept = read_plan_file(place)["threads"] if there else None
    if kept is not None and pool.threads not in (None, kept):
        raise ValueError(
            f"{shown_path(place)} was begun with {kept} threads a process, and {pool.threads} "
            "would change the last digits of what is left; leave --threads out, or choose another "
            "folder"
        )
    return kept


def _lost_its_plan(place: Path) -> bool:
    """Return whether a folder holds stages of a plan that is gone; a run has its own file."""
    if (place / PLAN_FILE).exists() or (place / RUN_CONFIG_FILE).exists():
        return False
    return any(any(place.glob(f"{depth}/{STAGE_FILE}")) for depth in ("*", "*/*"))


_TOLD_FROM = 0.005
"""Share of a plan's tokens after which its pace is known well enough to tell the time left."""


class _Progress:
    """What is left of a plan, in tokens, and the time that takes at the pace so far."""

    def __init__(self, costs: Mapping[str, Cost], waiting: Sequence[str], reporter: Reporter):
        # A stage that reads nothing, such as a merge, still takes a moment.
        self._left = {name: costs[name].tokens + 1 for name in waiting}
        self._count, self._reporter = len(waiting), reporter
        self._began = time.perf_counter()
        self.total = float(sum(self._left.values()))

    def noting(self, show: Callable[[float], None]) -> Callable[[str, Outcome], None]:
        """Return a function that reports every stage that has ended."""

        def ended(name: str, outcome: Outcome) -> None:
            if self._left.pop(name, None) is None:
                return
            self._say(name, outcome)
            show(self.total - sum(self._left.values()))
            log = log_of(outcome.folder)
            if outcome.error is not None and outcome.refused is None and log.exists():
                self._reporter.say(_tail(log))

        return ended

    def _say(self, name: str, outcome: Outcome) -> None:
        left = sum(self._left.values())
        done = self.total - left
        rest = ""
        # Stages without tokens, like merging, say nothing of the pace.
        if self._left and done >= _TOLD_FROM * self.total:
            pace = (time.perf_counter() - self._began) / max(1.0, done)
            rest = f", about {duration(pace * left)} left"
        ended = self._count - len(self._left)
        state = outcome.error or "done"
        self._reporter.say(f"{name}: {state} ({ended} of {self._count} stages{rest})")


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-4:-1])  # the last one says that it failed


def _processes(
    plan: Plan,
    place: Path,
    session: Session,
    options: Options,
    how: tuple[Pool, int, bool],
) -> dict[str, Outcome]:
    """Let the engine do every stage as soon as its inputs are there."""
    pool, threads, again = how
    engine = LAUNCHERS[pool.on]
    flags = (*([OVERWRITE] if options.overwrite else []), *([AGAIN] if again else []))
    outcomes: dict[str, Outcome] = {}
    waiting = dict(plan.stages)
    running: dict[str, Process] = {}

    def end(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        options.ended(name, outcome)

    with engine.open(place, pool, threads) as launcher, _ending_with_this_process(running):
        while waiting or running:
            ready: list[str] = []
            for name, stage in list(waiting.items()):
                lost = without_result(stage, place, outcomes)
                if lost is not None:
                    del waiting[name]
                    end(name, lost)
                elif (
                    all(need in outcomes for need in stage.needs())
                    and len(running) + len(ready) < pool.jobs
                ):
                    del waiting[name]
                    if not again and state_of(stage, place, session).state == "done":
                        end(name, Outcome(place / name))
                        continue
                    ready.append(name)
            jobs = [_job(place, name, threads, flags) for name in ready]
            running |= zip(ready, launcher.start(jobs) if jobs else (), strict=True)
            time.sleep(engine.pause if running else 0)
            for name, process in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[name]
                    end(name, _ended(place / name, code))
    return {name: outcomes[name] for name in plan.stages}


def _job(place: Path, name: str, threads: int, flags: tuple[str, ...]) -> StageJob:
    count = str(threads)
    environment = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    whole = place.absolute()
    return StageJob(whole, name, log_of(whole / name), environment, flags, Path.cwd())


def _ended(out: Path, code: int) -> Outcome:
    log = log_of(out)
    if code == 0:
        log.unlink(missing_ok=True)
        return Outcome(out)
    if code == NOT_APPLICABLE:
        why = log.read_text(errors="replace").splitlines()[-1]
        return refused_outcome(out, why)
    why = f"{FAILED} (exit code {code})"
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{why}\n")
    return Outcome(out, f"{why}, see {log}")


@contextmanager
def _ending_with_this_process(running: Mapping[str, Process]) -> Iterator[None]:
    """Stop the running processes when the body ends; SIGTERM ends the body as Ctrl-C does."""
    before: Any = None
    # Only the main thread may set what signals do.
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for process in list(running.values()):
            process.stop()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
