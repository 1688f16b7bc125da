"""Several processes that share one job: the main process decides about files and writes them."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from grasp_lora.base.files import cpu_name
from grasp_lora.base.machine import Terminated
from grasp_lora.base.words import shown_path
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import TrainingName
from grasp_lora.models.devices import choose_device
from grasp_lora.training.trainer import (
    launched,
    processes,
    refuse_unsupported_launch,
    share_of_step,
)

T = TypeVar("T")


def join(config: RunConfig) -> None:
    """Connect this process with the others of the same launch. Every job calls this first.

    Raises:
        ValueError: this kind of launch is not supported; the message says what to use instead.
    """
    # `cpu` must be passed where device "auto" means the CPU: without it accelerate treats every
    # process as the only one.
    on_cpu = choose_device(config.model.device).type == "cpu"
    refuse_unsupported_launch(on_cpu)
    PartialState(cpu=on_cpu)


def machine() -> dict[str, Any]:
    """Return the machine's processor, cores, torch threads and GPU; "gpu" is None without one."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def is_main() -> bool:
    """Return whether this is the process that writes files and prints."""
    return PartialState().is_main_process


def wait_for_all() -> None:
    """Wait until every process has called this function."""
    PartialState().wait_for_everyone()


def decided_by_main(decide: Callable[[], T]) -> T:
    """Run `decide` in the main process and return its result in every process.

    Use it for decisions that depend on files: a slower process could see files that a faster one
    has just written, and decide differently. Use it also for functions whose result may vary.

    Raises:
        ValueError, OSError: `decide` raised it; every process then raises it.
        RuntimeError: `decide` raised another exception, and there are several processes.
    """
    if PartialState().num_processes == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = decide()
        except Exception as error:
            # Some exceptions cannot be sent to other processes, which would then wait for ever.
            sendable = isinstance(error, ValueError | OSError)
            outcome[1] = error if sendable else RuntimeError(f"{type(error).__name__}: {error}")
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|ProcessGroup")
_ENDED = (
    "this launch has ended, because one of its processes was killed, ran out of memory or was told "
    "to end; run the same command to go on from the last checkpoint"
)
_PATIENCE = timedelta(seconds=2)


def last_words(error: BaseException, told: str | None) -> str | None:
    """Return what this process of several says about the error that ends it, so that one speaks.

    The process that had the fault is heard before those that lost it by that.

    Args:
        error: the error.
        told: what people are told of it; None if it is a fault of the program.

    Returns:
        The text; "" if another process has spoken; None for a fault of the program.
    """
    lost = isinstance(error, Terminated) or (told is None and bool(_LOST.search(str(error))))
    if not _speaks_first(lost):
        return ""
    return _ENDED if lost else told


def _speaks_first(lost: bool) -> bool:
    try:
        where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            *where, is_master=False, timeout=_PATIENCE
        )
        if lost:
            try:
                store.wait(["spoken"], _PATIENCE)
            except RuntimeError:  # nobody with a fault of its own has said anything
                pass
        first = store.add("speakers", 1) == 1
        store.set("spoken", "1")
        return first
    except (RuntimeError, KeyError):  # the store has ended with the first process, which kept it
        return not lost or os.environ.get("RANK") == "1"


@contextmanager
def kept_by_main(holding: AbstractContextManager[Any]) -> Iterator[None]:
    """Let the main process enter a context for the body, such as the ownership of a folder.

    Raises:
        ValueError, OSError, RuntimeError: as `decided_by_main`, in every process.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(holding)

        decided_by_main(enter)
        yield


def check_share(config: RunConfig, folder: Path, say: Callable[[str], object]) -> None:
    """Check that the launched processes can share the optimizer steps of all trainings.

    Args:
        config: the settings of the trainings.
        folder: the folder that was begun with `processes()`, for the message.
        say: told of another number of processes than was launched.

    Raises:
        ValueError: they cannot.
    """
    for name in get_args(TrainingName):
        training = config.training(name)
        share_of_step(training.batch_size, training.accumulation)
    if processes() != launched():
        say(
            f"{shown_path(folder)} was begun with {processes()} processes; the {launched()} of now "
            "share the examples of each step"
        )


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give this process its own number of threads back after the body."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_threads(kept: int | None, folder: Path, say: Callable[[str], object]) -> int:
    """Compute with the threads that a folder was begun with; return their number.

    Sums in another number of threads differ in their last digits, and training carries that on.

    Args:
        kept: the number of the first start; None takes that of this process.
        folder: the folder, for the message.
        say: told of another number than this process has.
    """
    own = torch.get_num_threads()
    if kept is None or kept == own:
        return own
    torch.set_num_threads(kept)
    say(
        f"{shown_path(folder)} was begun with {kept} threads, so {kept} are used again in place of "
        f"{own}: another number changes last digits"
    )
    return kept
