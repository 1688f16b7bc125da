"""Stages as tasks of Ray, each around a child process.

`RAY_ADDRESS` names a cluster to join (`auto`: the one of this machine). Without it a cluster of
this machine's cores and GPUs starts, and ends with the command.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.base.words import shortened
from grasp_lora.plans.pool import Engine, Launcher, Pool, Process, StageJob

RETRIES = 3
"""How often a stage is tried again whose process was killed, or whose node died."""


class Killed(RuntimeError):
    """The process of a stage ended by a signal; its stage goes on from its checkpoints."""


def _do(job: StageJob) -> int:
    code = job.done_in_child()
    if code < 0:
        raise Killed(f"the process of {job.stage} ended by signal {-code}")
    return code


@contextmanager
def _open(place: Path, pool: Pool, threads: int) -> Iterator[Launcher]:
    import ray  # pyright: ignore[reportMissingImports]

    del place
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {} if address else {"address": "local", "include_dashboard": False}
        try:
            ray.init(logging_level="warning", log_to_driver=False, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"no Ray cluster at {address or 'this machine'}: {shortened(str(error))}; set "
                "RAY_ADDRESS to a cluster that runs (with RAY_AUTH_MODE=token if it asks for a "
                "token), or unset it"
            ) from None
    try:
        share = gpu_share(pool.jobs, ray.cluster_resources().get("GPU", 0.0))
        usual = {"num_cpus": threads, "num_gpus": share, "max_retries": RETRIES}
        kept = {"max_calls": 1, "retry_exceptions": [Killed]}
        try:
            task = ray.remote(**(usual | dict(pool.options) | kept))(_do)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Ray refuses the parameters of --engine: {shortened(str(error))}"
            ) from None
        yield _Ray(ray, task)
    finally:
        if ours:
            ray.shutdown()


RAY = Engine(_open, "ray")


def gpu_share(jobs: int, gpus: float) -> float:
    """Return the part of a GPU that each of `jobs` stages gets, so that all run at once.

    A stage gets a whole GPU at most.
    """
    return 1 / math.ceil(jobs / gpus) if gpus else 0.0


@dataclass(frozen=True)
class _RayProcess:
    ray: Any
    task: Any
    job: StageJob

    def poll(self) -> int | None:
        ready, _ = self.ray.wait([self.task], timeout=0)
        if not ready:
            return None
        try:
            return self.ray.get(self.task)
        except (self.ray.exceptions.RayError, Killed) as error:
            lines = str(error).strip().splitlines()
            self.job.note(f"given up: {lines[-1] if lines else repr(error)}")
            return 1

    def stop(self) -> None:
        self.ray.cancel(self.task, force=True)


@dataclass(frozen=True)
class _Ray:
    ray: Any
    task: Any

    def start(self, jobs: Sequence[StageJob]) -> Sequence[Process]:
        return [
            _RayProcess(self.ray, self.task.options(name=job.stage).remote(job), job)
            for job in jobs
        ]
