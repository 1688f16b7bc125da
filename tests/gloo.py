"""Work done by several processes together, as a launcher starts them, on the CPU."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

# A fork has imported torch already, which takes a process of its own many seconds.
_FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    """Return the number of a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment that a launcher gives process `rank` of `size`."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return {name: str(value) for name, value in (numbers | meeting).items()}


def together(size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list:
    """Return what `work(*arguments)` returns in each of `size` processes of one launch.

    An exception is returned in the place of a result. A process that ends without one gives None.
    All processes are gone when this returns.
    """
    port = free_port()
    pairs = [_FORK.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _FORK.Process(target=_work, args=(send, launched(rank, size, port), work, arguments))
        for rank, (_, send) in enumerate(pairs)
    ]
    for process, (_, send) in zip(processes, pairs, strict=True):
        process.start()
        send.close()
    try:
        return [_received(receive, seconds) for receive, _ in pairs]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(pipe: Connection, seconds: float) -> Any:
    assert wait([pipe], seconds), f"a process was not done after {seconds} seconds"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None


def _work(
    send: Connection, environment: dict[str, str], work: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    try:
        PartialState(cpu=True)
        # What is done at once would leave the others without a connection.
        PartialState().wait_for_everyone()
        found = work(*arguments)
    except Exception as error:
        found = error
    # As bytes: torch would hand tensors over in files of this process, which is about to end.
    send.send_bytes(pickle.dumps(found))
    send.close()
    os._exit(0)  # leaves out what the tests' own process has still to do at its end
