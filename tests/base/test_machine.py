"""Errors of the machine in words; what is a fault of the program is none of them."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from grasp_lora.base.machine import machine_fault


def of_system(number: int, place: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), place)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (of_system(errno.ENOSPC, "a/x.json"), "'a/x.json': no space is left on the disk; free"),
        (of_system(errno.ENOSPC), "no space is left on the disk; free some space"),
        (of_system(errno.EACCES, "/data/x"), "'/data/x': permission denied; get the right to it"),
        (of_system(errno.EROFS, "/x"), "'/x': the file system is read-only; name a path that can"),
        (of_system(errno.ENOTDIR, "a/b"), "'a/b': a part of this path is a file, not a folder;"),
        (of_system(errno.EIO, "x"), "'x': Input/output error"),
        (FileNotFoundError("no configuration file at 'x'; give one"), "no configuration file at"),
        (MemoryError(), "not enough memory (of the computer); lower batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory (CUDA out of"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory"), "not enough me"),
    ],
)
def test_errors_of_the_machine_say_what_to_do(error, said):
    told = machine_fault(error)
    assert told is not None
    assert told.startswith(said)
    assert "\n" not in told


def test_a_full_disk_is_known_by_the_words_of_those_who_write_weights():
    """/dev/full fails every write as a full disk does."""
    with pytest.raises(RuntimeError) as caught:
        torch.save({"a": torch.zeros(1000)}, "/dev/full")
    assert str(machine_fault(caught.value)).startswith("no space is left on the disk; free")
    told = SafetensorError("I/O error: No space left on device (os error 28)")
    assert str(machine_fault(told)).startswith("no space is left on the disk; free")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x"), TypeError("no")])
def test_faults_of_the_program_are_no_errors_of_the_machine(error):
    assert machine_fault(error) is None
