"""One run of a queue, as a process of its own: `python -m grasp_lora.plans.job FOLDER`.

The folder's `job.json` says which function of this package does the work and on what; its
`result.json` is written last and says that it is done. Everything a run needs is in the two places
that `job.json` names, inputs and results of other jobs, so any machine that sees them can do it.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grasp_lora.base.files import cpu_name, peak_memory_bytes, provenance, read_json, write_json

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
LOCK_FILE = "lock"

Work = Callable[[Mapping[str, Any], Mapping[str, Any], Path], Mapping[str, Any]]
"""(inputs, job name -> result of the jobs it needs, folder to write to) -> JSON-able result."""


def do_job(folder: Path) -> None:
    """Do the job of a folder unless it is done; a second process waits for the first."""
    job = read_json(folder / JOB_FILE)
    with _alone(folder):
        if result_of(folder, job["key"]) is not None:
            return
        needed = {name: read_json(Path(path))["result"] for name, path in job["needs"].items()}
        began = time.perf_counter()
        result = work_named(job["work"])(job["inputs"], needed, folder)
        about = {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes()}
        made = {"key": job["key"], "machine": machine(), "provenance": provenance()}
        write_json(folder / RESULT_FILE, {"result": result} | about | made)


def machine() -> dict[str, Any]:
    """Return what a job ran on: processor, cores, threads of torch, and GPU (None without)."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def result_of(folder: Path, key: str) -> dict[str, Any] | None:
    """Return what `result.json` holds, None where there is none.

    Raises:
        ValueError: it is the result of a job with another key.
    """
    file = folder / RESULT_FILE
    if not file.exists():
        return None
    found = read_json(file)
    if found["key"] != key:
        raise ValueError(f"'{file}' is the result of other inputs")
    return found


def work_named(name: str) -> Work:
    """Return the function that `MODULE:FUNCTION` names, a module of this folder.

    Raises:
        ValueError: there is none.
    """
    module, _, function = name.partition(":")
    if not module.isidentifier():
        raise ValueError(f"work {name!r} is no MODULE:FUNCTION of grasp_lora.plans")
    found = getattr(importlib.import_module(f"grasp_lora.plans.{module}"), function, None)
    if found is None:
        raise ValueError(f"grasp_lora.plans.{module} has no function {function!r}")
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the body; the system frees it when a process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two starts of one queue apart there
        yield
        return
    with open(folder / LOCK_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    do_job(Path(sys.argv[1]))
