"""Kills, power cuts, a full disk, two owners: is anything lost, or shown as a traceback?

    python -m benchmarks.torture_runs --tries 20

Each run is a process of its own, forked from this one. Its operations on files (write, sync,
rename, make and remove) are counted. A *kill* ends the process at one of them, without a chance to
tidy up; an *interrupt* (Ctrl-C) ends it in good order. A *power cut* ends it too, and leaves of its
files what a disk promises to hold then; on *ext4*, where this machine may mount one, what that file
system does hold. A *full disk* makes each operation that needs room fail from one of them on: the
command must end in one line and exit code 2. *Two owners*: a run is stopped at one of them while a
second one is started in its folder, which must be refused. After each, the same command is given
again. It must find nothing damaged, and end with the result of an undisturbed run, byte for byte
but for times.

Needs the tiny models of `tests/`: run it from the root of a checkout.
"""

import argparse
import builtins
import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.torture_damage import KINDS, Laboratory, Tally, of_tiny_models, result_of, shown
from benchmarks.torture_power import LOST, OPTIONS, CannotMount, Disk, Ext4
from grasp_lora.base import files

LIMIT = 300
"""Seconds after which a run hangs."""
_KILLED = 137
_OF_OS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
_NEED_ROOM = ("fsync", "mkdir", "open")

_FORK = multiprocessing.get_context("fork")


class Lost(Exception):
    """Something was lost; the message says what."""


@contextmanager
def at_operation(meet: Callable[[str, int], None]) -> Iterator[None]:
    """Call `meet` with the name and the number of each operation on files, before it is done."""
    count = 0

    def met(name: str) -> None:
        nonlocal count
        count += 1
        meet(name, count)

    def before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            met(name)
            return real(*given, **named)

        return operation

    def opened(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        if set(mode) & set("wxa"):
            met("open")
        return real_open(file, mode, *given, **named)

    real_open = builtins.open
    with ExitStack() as stack:
        for name in _OF_OS:
            stack.enter_context(patch.object(os, name, before(name, getattr(os, name))))
        stack.enter_context(patch.object(builtins, "open", opened))
        yield


class Child:
    """A command in a process of its own.

    Args:
        laboratory: does the command.
        kind: the kind of run.
        meet: called before each operation on files, in the process.
        within: entered in the process, around the command.
    """

    def __init__(
        self,
        laboratory: Laboratory,
        kind: str,
        meet: Callable[[str, int], None] = lambda _name, _count: None,
        within: AbstractContextManager[Any] | None = None,
    ):
        self._told, told = _FORK.Pipe(duplex=False)

        def work() -> None:
            os.setpgid(0, 0)
            # A program that was started in the background ignores Ctrl-C, and so do its children.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with within or nullcontext(), at_operation(meet):
                try:
                    answer = laboratory.command(kind)
                except BaseException as error:
                    answer = (-1, f"traceback, {type(error).__name__}: {error}")
            told.send(answer)
            told.close()
            os._exit(0)

        self._process = _FORK.Process(target=work)
        self._process.start()
        told.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the command's exit code and what it said.

        Raises:
            Lost: it hangs.
        """
        if not self._told.poll(LIMIT):
            os.kill(self.pid, signal.SIGKILL)
            raise Lost(f"no end after {LIMIT} s")
        try:
            answer = self._told.recv()
        except EOFError:
            answer = (_KILLED, "")
        self._process.join()
        return answer


def operations_of(laboratory: Laboratory, kind: str) -> int:
    """Return the number of operations on files of an undisturbed run."""
    counter = _FORK.Value("i", 0)

    def meet(_name: str, count: int) -> None:
        counter.value = count

    _cleared(laboratory, kind)
    code, said = Child(laboratory, kind, meet).ended()
    if code != 0:
        raise RuntimeError(f"the undisturbed run of kind {kind} ended with {code}: {said}")
    return counter.value


def _cleared(laboratory: Laboratory, kind: str) -> Path:
    out = laboratory.out(kind)
    shutil.rmtree(out, ignore_errors=True)
    return out


def killed(laboratory: Laboratory, kind: str, at: int) -> None:
    """Kill a run at an operation."""

    def meet(_name: str, count: int) -> None:
        if count == at:
            os._exit(_KILLED)

    Child(laboratory, kind, meet).ended()


def interrupted(laboratory: Laboratory, kind: str, at: int) -> None:
    """Press Ctrl-C at an operation.

    Raises:
        Lost: the command does not end with exit code 130.
    """
    met = _FORK.Value("b", 0)

    def meet(_name: str, count: int) -> None:
        if count == at:
            met.value = 1
            os.kill(os.getpid(), signal.SIGINT)

    code, said = Child(laboratory, kind, meet).ended()
    if met.value and code != 130:
        raise Lost(f"Ctrl-C ended with exit code {code}: {said[-300:]}")


def power_cut(laboratory: Laboratory, kind: str, at: int) -> None:
    """Kill a run at an operation; of its folder, what was not synced is lost."""
    out, disk = laboratory.out(kind), Disk()
    left = out.with_name(f"{out.name}-left")

    def meet(_name: str, count: int) -> None:
        if count == at:
            if out.exists():
                disk.survivors(out, left, LOST[at % len(LOST)])
            os._exit(_KILLED)

    Child(laboratory, kind, meet, disk.watching()).ended()
    if left.exists():
        shutil.rmtree(out)
        left.rename(out)


def full_disk(laboratory: Laboratory, kind: str, at: int) -> None:
    """Let the disk be full from an operation on.

    Raises:
        Lost: the command does not end with one line for people and exit code 2.
    """
    met = _FORK.Value("b", 0)

    def meet(name: str, count: int) -> None:
        if count >= at and name in _NEED_ROOM:
            met.value = 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code, said = Child(laboratory, kind, meet).ended()
    if met.value and (code != 2 or "no space is left on the disk" not in " ".join(said.split())):
        raise Lost(f"a full disk ended with exit code {code}: {said[-300:]}")


def two_owners(laboratory: Laboratory, kind: str, at: int) -> None:
    """Stop a run at an operation and start a second one in its folder; then let the first end.

    Raises:
        Lost: the second one is not refused with the first one's number, or the first one fails.
    """
    stopped = _FORK.Event()

    def meet(_name: str, count: int) -> None:
        if count == at:
            stopped.set()
            os.kill(os.getpid(), signal.SIGSTOP)

    first = Child(laboratory, kind, meet)
    try:
        if stopped.wait(LIMIT):
            time.sleep(0.1)  # the stop follows the event
            began = time.monotonic()
            code, said = Child(laboratory, kind).ended()
            if code != 2 or str(first.pid) not in said:
                raise Lost(f"a second owner ended with exit code {code}: {said[-300:]}")
            if time.monotonic() - began > 20:
                raise Lost("a second owner was refused after 20 s only")
    finally:
        os.kill(first.pid, signal.SIGCONT)
        code, said = first.ended()
    if code != 0:
        raise Lost(f"the first owner ended with exit code {code}: {said[-300:]}")


Disturbance = Callable[[Laboratory, str, int], None]

WAYS: dict[str, Disturbance] = {
    "kill": killed,
    "interrupt": interrupted,
    "power cut": power_cut,
    "full disk": full_disk,
    "two owners": two_owners,
}


def cut_on(disk: Ext4) -> Disturbance:
    """Return what cuts the power of the disk that a laboratory works on."""

    def disturb(laboratory: Laboratory, kind: str, at: int) -> None:
        stopped = _FORK.Event()

        def meet(_name: str, count: int) -> None:
            if count == at:
                stopped.set()
                os.kill(os.getpid(), signal.SIGSTOP)

        child = Child(laboratory, kind, meet)

        def end() -> None:
            os.kill(child.pid, signal.SIGKILL)
            child.ended()

        if not stopped.wait(LIMIT):
            raise Lost(f"operation {at} was not met in {LIMIT} s")
        time.sleep(0.1)  # the stop follows the event
        disk.cut(end)

    return disturb


def tried(
    laboratory: Laboratory, disturb: Disturbance, kind: str, at: int, wanted: dict[str, Any]
) -> str:
    """Disturb a run and give its command again; return what was lost, "" if nothing was.

    What is damaged would be made again with the same result: that is a loss too, of time.
    """
    out = _cleared(laboratory, kind)
    try:
        disturb(laboratory, kind, at)
        code, said = Child(laboratory, kind).ended()
    except Lost as error:
        return str(error)
    found = result_of(out)
    differing = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if code != 0 or differing:
        return f"then exit code {code}, other results: {', '.join(differing[:3])}; {said[-300:]}"
    if " damaged" in said:
        return f"what was called finished was not on the disk: {said[:600]}"
    return ""


def torture(
    laboratory: Laboratory,
    tries: int,
    seed: int,
    ways: Mapping[str, Disturbance] = WAYS,
    kinds: Sequence[str] = KINDS,
    say: Callable[[str], None] = print,
) -> Tally:
    """Try every way on every kind of run; return (way, kind) -> (tried, survived).

    Args:
        laboratory: does the runs.
        tries: of each way on each kind.
        seed: draws the operations.
        ways: name -> what disturbs a run.
        kinds: kinds of run.
        say: gets a line for each loss.
    """
    draw = random.Random(seed)
    found: Tally = {}
    for kind in kinds:
        most = operations_of(laboratory, kind)
        wanted = result_of(laboratory.out(kind))
        for way, disturb in ways.items():
            lost = 0
            for at in [draw.randrange(1, most + 1) for _ in range(tries)]:
                why = tried(laboratory, disturb, kind, at, wanted)
                if why:
                    lost += 1
                    say(f"LOST {kind}, {way} at operation {at} of {most}: {why}")
            found[way, kind] = tries, tries - lost
    return found


def torture_ext4(tries: int, seed: int, kinds: Sequence[str] = KINDS) -> Tally:
    """Cut the power on a file system of its own; return as `torture` does.

    Raises:
        CannotMount: not on this machine.
    """
    found: Tally = {}
    for number, options in enumerate(OPTIONS):
        with tempfile.TemporaryDirectory() as folder:
            disk = Ext4(Path(folder), options)
            try:
                with of_tiny_models(disk.root) as laboratory:
                    ways = {f"power cut, ext4 {options.split(',')[0]}": cut_on(disk)}
                    found |= torture(laboratory, tries, seed + number, ways, kinds)
            finally:
                disk.close()
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Print what was tried and what survived; return the exit code."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--tries", type=int, default=4, help="of each way on each kind of run")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--way", choices=[*WAYS, "ext4"], action="append", help="only this")
    made.add_argument("--kind", choices=KINDS, action="append", help="only this kind of run")
    made.add_argument(
        "--without-syncs", action="store_true", help="nothing is synced: power cuts must be losses"
    )
    options = made.parse_args(given)
    if options.without_syncs:
        files._sync_file = files.sync_folder = lambda _path: None
    asked, kinds = options.way or [*WAYS, "ext4"], options.kind or KINDS
    found: Tally = {}
    with of_tiny_models() as laboratory:
        ways = {name: disturb for name, disturb in WAYS.items() if name in asked}
        if ways:
            found |= torture(laboratory, options.tries, options.seed, ways, kinds)
    if "ext4" in asked:
        try:
            found |= torture_ext4(options.tries, options.seed, kinds)
        except CannotMount as error:
            print(f"no power cut on ext4 here: {error}")
    return shown("disturbed runs", found)


if __name__ == "__main__":
    sys.exit(main())
