"""One owner a folder: a lock that the system frees when its holder dies.

The lock file says who holds it. What a process that died has left there counts for nothing: only
the lock of the system tells whether somebody holds it.
"""

import errno
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grasp_lora.base.files import FOLDER_LOCK, sweep
from grasp_lora.base.words import shown, shown_path

Say = Callable[[str], object]
"""Receives a line for the user."""

_MOMENT = 0.2
"""Seconds that a lock is tried for: another process may hold it just to see whether it is free."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_LONGEST_NOTE = 200
_held = threading.local()
_said_no_locks: set[int] = set()


class Owned(ValueError):
    """Another process works in the folder."""


@contextmanager
def owned(folder: Path, say: Say) -> Iterator[None]:
    """Be the only process that works in a folder during the body.

    Temporary files that a killed owner left are removed.

    Args:
        folder: made if absent, and removed again if the body leaves it empty.
        say: told once of a file system that has no locks.

    Raises:
        Owned: another process works in the folder.
        OSError: the folder cannot be written.
    """
    with held(folder / FOLDER_LOCK, folder, say):
        sweep(folder)
        yield


@contextmanager
def owned_place(out: Path, say: Say) -> Iterator[None]:
    """Be the only process that writes the result `out`, a folder that is renamed into its place.

    Args:
        out: the place of the result; the folder above it is made if absent.
        say: as in `owned`.

    Raises:
        Owned: another process writes this result, or works in a folder above it.
        OSError: the folder above cannot be written.
    """
    for folder in out.absolute().parents:
        if (folder / FOLDER_LOCK).exists():
            with held(folder / FOLDER_LOCK, folder, say):
                pass
    with held(lock_beside(out), out, say):
        yield


def lock_beside(out: Path) -> Path:
    """Return the lock file of a result, which lies beside its place."""
    return out.with_name(f".{out.name}.grasp-lora.lock")


@contextmanager
def held(lock: Path, place: Path, say: Say, wait: bool = False) -> Iterator[None]:
    """Hold a lock file during the body, and remove it at the end. A thread may hold one twice.

    Args:
        lock: the file; folders above it are made, and removed again if they are left empty.
        place: what the lock stands for, named in messages.
        say: told once of a file system that has no locks, and whom is waited for.
        wait: wait for another holder in place of an error.

    Raises:
        Owned: another process or thread holds it, and `wait` is not set.
        OSError: the file cannot be written.
    """
    key, mine = os.path.realpath(lock), _held.__dict__
    if key in mine:
        yield
        return
    made = [one for one in lock.absolute().parents if not one.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        kept = FileLock(lock, thread_local=False, on_acquired=_write_note)
        locked = _acquired(kept, place, say, wait)
        mine[key] = kept
        try:
            yield
        finally:
            del mine[key]
            with suppress(OSError):
                lock.unlink()  # whoever has opened it finds that it has no name
            if locked:
                kept.release()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def holder_of(lock: Path) -> tuple[str, float] | None:
    """Return who holds a lock file, and since when (Unix time); None if nobody does.

    Where the lock cannot be tried, because the file system has none or the folder is another
    user's, what the file says is believed.
    """
    try:
        since = lock.stat().st_mtime
    except OSError:
        return None
    kept = FileLock(lock, thread_local=False)
    try:
        kept.acquire(timeout=0)
    except (Timeout, NotImplementedError, OSError):
        return _holder(lock), since
    kept.release()
    return None


def _acquired(lock: FileLock, place: Path, say: Say, wait: bool) -> bool:
    """Acquire a lock; return False where the file system has none."""
    try:
        try:
            lock.acquire(timeout=_MOMENT)
        except Timeout:
            holder = _holder(Path(lock.lock_file))
            if not wait:
                raise Owned(
                    f"{shown_path(place)} is in use by {holder}; wait until that has ended, or "
                    "choose another folder"
                ) from None
            say(f"{shown_path(place)} is in use by {holder}: waiting until that has ended")
            lock.acquire()
    except NotImplementedError:
        return _without_locks(place, say)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return _without_locks(place, say)
    return True


def _without_locks(place: Path, say: Say) -> bool:
    device = place.absolute()
    while not device.exists():
        device = device.parent
    number = device.stat().st_dev
    if number not in _said_no_locks:
        _said_no_locks.add(number)
        say(
            f"the file system of {shown_path(place)} has no locks: do not start a second command "
            "in this folder"
        )
    return False


def _write_note(file: int) -> None:
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())


def _holder(lock: Path) -> str:
    try:
        note = lock.read_bytes()[:_LONGEST_NOTE].decode(errors="replace")
    except OSError:
        note = ""
    return note if note.startswith("process ") and shown(note) == repr(note) else "another process"
