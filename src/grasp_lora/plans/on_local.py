"""Stages as processes of this machine."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from grasp_lora.plans.pool import Engine, Launcher, Pool, Process, StageJob


@contextmanager
def _open(place: Path, pool: Pool, threads: int) -> Iterator[Launcher]:
    del place, pool, threads
    yield _Local()


LOCAL = Engine(_open)


@dataclass(frozen=True)
class _LocalProcess:
    process: "subprocess.Popen[bytes]"

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class _Local:
    def __init__(self) -> None:
        self._gpus = _gpus()
        self._slots: dict[int, _LocalProcess] = {}

    def start(self, jobs: Sequence[StageJob]) -> Sequence[Process]:
        return [self._started(job) for job in jobs]

    def _started(self, job: StageJob) -> Process:
        busy = {slot for slot, one in self._slots.items() if one.poll() is None}
        slot = min(set(range(len(busy) + 1)) - busy)
        job = replace(job, environment={**job.environment, **gpu_of(slot, self._gpus)})
        self._slots[slot] = _LocalProcess(job.started())
        return self._slots[slot]


def gpu_of(place: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment that gives a process its GPU.

    Args:
        place: of the process, from 0.
        gpus: names of the machine's GPUs as CUDA knows them.
    """
    return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if len(gpus) > 1 else {}


def _gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(n) for n in range(torch.cuda.device_count())]
