"""Errors of the machine in words for people: no right, no space, no memory."""

import errno
import re

from grasp_lora.base.words import shortened, shown_path

_ROOM = "free some space, then give the same command again: it goes on where it stopped"
_ADVICE = {
    errno.ENOSPC: ("no space is left on the disk", _ROOM),
    errno.EDQUOT: ("your share of the disk is used up", _ROOM),
    errno.EACCES: ("permission denied", "get the right to it, or name another path"),
    errno.EPERM: ("permission denied", "get the right to it, or name another path"),
    errno.EROFS: ("the file system is read-only", "name a path that can be written"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "name another path"),
    errno.EEXIST: ("there is something else of this name", "name another path"),
    errno.EISDIR: ("this is a folder, not a file", "name another path"),
    errno.ENAMETOOLONG: ("the name is too long", "name a shorter path"),
    errno.EMFILE: ("too many files are open", "raise the limit of open files (ulimit -n)"),
}
_BY_RUST = re.compile(r"\(os error (\d+)\)")
# torch's writer of archives tells of a failed write by these words alone.
_BY_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory")


class Terminated(BaseException):
    """This process was told to end (SIGTERM), as launchers do when another process has ended."""


def machine_fault(error: BaseException) -> str | None:
    """Return what people are told of an error of the machine, on one line; None for other errors.

    Libraries in other languages hide the error of the system in their texts.
    """
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text.lower()):
        return (
            f"not enough memory ({shortened(text or 'of the computer')}); lower batch_size or "
            "data.max_length, or take a smaller model"
        )
    number, place = _number(error), ""
    if isinstance(error, OSError) and error.filename:
        place = f"{shown_path(str(error.filename))}: "
    if number in _ADVICE:
        return place + "; ".join(_ADVICE[number])
    if isinstance(error, OSError):
        return f"{place}{error.strerror}" if place and error.strerror else text
    return None


def _number(error: BaseException) -> int | None:
    """Return the number of the system's error; None if the error does not come from the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    hidden = _BY_RUST.search(str(error))
    if hidden is not None:
        return int(hidden[1])
    return errno.ENOSPC if _BY_TORCH.search(str(error)) else None
