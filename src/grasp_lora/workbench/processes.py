"""Several processes as one job: one of them decides about files and writes them."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from grasp_lora.base.files import cpu_name
from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.devices import choose_device
from grasp_lora.training.trainer import refuse_unsupported_launch

T = TypeVar("T")


def join(config: RunConfig) -> None:
    """Meet the other processes of the launch. Every recipe begins here.

    Raises:
        ValueError: the launch is none that works here, with what to use instead.
    """
    # Said outright where "auto" means the CPU: accelerate would take each process for a lone one.
    on_cpu = choose_device(config.model.device).type == "cpu"
    refuse_unsupported_launch(on_cpu)
    PartialState(cpu=on_cpu)


def machine() -> dict[str, Any]:
    """Return what this process runs on: processor, cores, threads of torch, GPU (None without)."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def is_main() -> bool:
    """Return whether this process writes files and prints."""
    return PartialState().is_main_process


def wait_for_all() -> None:
    """Wait until every process is here."""
    PartialState().wait_for_everyone()


def decided_by_main(decide: Callable[[], T]) -> T:
    """Run `decide` in the main process and return its result in every process.

    For whatever looks at files: a slower process would see those that the faster one has written
    since, and take another way. And for what need not give the same twice.

    Raises:
        ValueError, FileNotFoundError: `decide` did; raised in every process.
        RuntimeError: `decide` raised something else in one of several processes.
    """
    if PartialState().num_processes == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = decide()
        except Exception as error:
            # Not every exception can be sent, and the others must not wait for one that cannot.
            sendable = isinstance(error, ValueError | FileNotFoundError)
            outcome[1] = error if sendable else RuntimeError(f"{type(error).__name__}: {error}")
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
