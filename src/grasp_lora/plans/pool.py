"""What a plan's stages are done in, and what an engine that starts them must offer.

An engine does a stage by `python -m grasp_lora.plans.worker FOLDER STAGE`, where the plan's folder
is visible. The engines are rows of `grasp_lora.plans.launch.LAUNCHERS`. What is imported here is
light, because jobs of an engine import it only to start the worker.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

OVERWRITE, AGAIN, WITH_PARENT = "--overwrite", "--again", "--with-parent"
"""Flags of the worker: replace a result made from other inputs; do the stage again even if it is
done; end when standard input ends, which the parent process holds open."""


@dataclass(frozen=True)
class Pool:
    """The processes that stages are done in.

    Attributes:
        jobs: stages at once, each in a process; 0 does all in this process, where the loaded
            backbone stays. On a machine with several GPUs each process gets one of them in turn.
        threads: of each process; None is the machine's cores over `jobs` for "local", what this
            process has where it does all stages, and 1 elsewhere. The choice of the first start is
            kept for the folder: sums in another number of threads differ in their last digits, and
            training carries that on.
        on: row of `LAUNCHERS`.
        options: the engine's own parameters, in its own words.
    """

    jobs: int = 0
    threads: int | None = None
    on: str = "local"
    options: Mapping[str, Any] = field(default_factory=dict)


HERE = Pool()


@dataclass(frozen=True)
class StageJob:
    """A stage to be done in a process.

    Attributes:
        place: the plan's folder, absolute.
        stage: name of the stage.
        log: receives what the process prints, absolute.
        environment: additional variables.
        flags: of the worker.
        below: the folder that relative paths of the settings start from.
    """

    place: Path
    stage: str
    log: Path
    environment: Mapping[str, str]
    flags: tuple[str, ...]
    below: Path

    def started(self) -> "subprocess.Popen[bytes]":
        """Start the process on this machine; it may outlive this one."""
        return self._started((), subprocess.DEVNULL, False)

    def done_in_child(self) -> int:
        """Do the stage in a child process that does not outlive this one; return its exit code.

        The memory of a GPU is free again once the child has ended. The child is in a session of its
        own, so signals by which an engine announces the end of a job reach this process alone.
        """
        with self._started((WITH_PARENT,), subprocess.PIPE, True) as child:
            try:
                return child.wait()
            finally:
                child.kill()

    def note(self, line: str) -> None:
        """Append a line to the log."""
        with self._open_log() as file:
            file.write(f"{line}\n".encode())

    def _started(
        self, flags: tuple[str, ...], given: int, own_session: bool
    ) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "grasp_lora.plans.worker", str(self.place), self.stage]
        with self._open_log() as file:
            return subprocess.Popen(
                [*command, *self.flags, *flags],
                stdin=given,
                stdout=file,
                stderr=file,
                env=os.environ | dict(self.environment),
                cwd=self.below,
                start_new_session=own_session,
            )

    def _open_log(self) -> IO[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return open(self.log, "ab")


class Process(Protocol):
    """A stage that an engine was told to do."""

    def poll(self) -> int | None:
        """Return the exit code; None while the stage waits or runs."""
        ...

    def stop(self) -> None:
        """End it. A local process has ended then; another engine may take its time."""
        ...


class Launcher(Protocol):
    """An engine that is ready."""

    def start(self, jobs: Sequence[StageJob]) -> Sequence[Process]:
        """Start stages that do not need each other."""
        ...


@dataclass(frozen=True)
class Engine:
    """A row of `LAUNCHERS`.

    Attributes:
        open: (plan's folder, pool, threads of a process) -> the engine, ready during the body.
        package: the package that it needs, which the extra of the row's name installs; None for
            none.
        pause: seconds between two looks at the stages.
    """

    open: Callable[[Path, Pool, int], AbstractContextManager[Launcher]]
    package: str | None = None
    pause: float = 0.2
