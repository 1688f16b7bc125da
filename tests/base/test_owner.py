"""One owner a folder: who is refused, what a dead owner leaves, what lies there afterwards."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grasp_lora.base import owner
from grasp_lora.base.files import FOLDER_LOCK, holds_something
from grasp_lora.base.owner import Owned, held, lock_beside, owned, owned_place

HOLD = """
import sys, time
from pathlib import Path
from grasp_lora.base.owner import owned, owned_place
way = {"owned": owned, "owned_place": owned_place}[sys.argv[1]]
with way(Path(sys.argv[2]), print):
    print("holds", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def silent(_line: str) -> None:
    """Take a line for the user."""


@contextmanager
def another(way: str, place: Path, seconds: float = 120) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold a folder or a place."""
    command = [sys.executable, "-c", HOLD, way, str(place), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("way", ["owned", "owned_place"])
def test_a_second_owner_is_refused_at_once_with_the_process_and_host_of_the_first(tmp_path, way):
    place, take = tmp_path / "deep" / "run", {"owned": owned, "owned_place": owned_place}[way]
    with another(way, place) as process:
        began = time.monotonic()
        said = f"in use by process {process.pid} on {platform.node()}; wait .* another folder"
        with pytest.raises(Owned, match=said), take(place, silent):
            raise AssertionError("it has an owner")
        assert time.monotonic() - began < 5


def test_the_lock_of_a_killed_owner_stands_in_nobodys_way_and_is_gone_afterwards(tmp_path):
    place = tmp_path / "run"
    with another("owned", place) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(place) == [FOLDER_LOCK], "a killed process removes nothing"
    with owned(place, silent):
        assert (place / FOLDER_LOCK).read_text() == f"process {os.getpid()} on {platform.node()}"
        (place / "result").touch()
    assert names(place) == ["result"]


def test_a_folder_that_is_left_empty_is_removed_with_those_above_it(tmp_path):
    with owned(tmp_path / "a" / "b", silent):
        assert not holds_something(tmp_path / "a" / "b"), "the lock is nothing of a user"
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with owned(tmp_path / "mine", silent):
        pass
    assert names(tmp_path) == ["mine"], "a folder that was there stays"


def test_one_owner_may_ask_twice_but_not_another_thread(tmp_path):
    found: list[Exception] = []

    def take() -> None:
        try:
            with owned(tmp_path, silent):
                pass
        except Owned as error:
            found.append(error)

    with owned(tmp_path, silent):
        with owned(tmp_path / ".." / tmp_path.name, silent):
            pass
        assert (tmp_path / FOLDER_LOCK).exists(), "the first still holds it"
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert [f"process {os.getpid()} on" in str(error) for error in found] == [True]
    take()
    assert len(found) == 1


def test_a_stage_in_the_folder_of_another_owner_is_refused(tmp_path):
    with another("owned", tmp_path) as process:
        with pytest.raises(Owned, match=f"process {process.pid} on"):
            with owned_place(tmp_path / "deep" / "final", silent):
                raise AssertionError("the folder above has an owner")
        process.kill()
        process.wait()
        with owned_place(tmp_path / "deep" / "final", silent):
            pass
    assert names(tmp_path) == []


def test_who_waits_says_for_whom_and_goes_on(tmp_path):
    said: list[str] = []
    with another("owned_place", tmp_path / "out", 1.0) as process:
        with held(lock_beside(tmp_path / "out"), tmp_path / "out", said.append, wait=True):
            assert process.wait() == 0
    (line,) = said
    assert f"in use by process {process.pid} on" in line
    assert names(tmp_path) == []


def test_a_file_of_the_user_with_the_name_of_a_result_is_left_alone(tmp_path):
    mine = tmp_path / "poetry.lock"
    mine.write_text("mine")
    with owned_place(tmp_path / "poetry", silent):
        pass
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_once_and_used(tmp_path, monkeypatch, number):
    def absent(*_given: object) -> bool:
        raise OSError(number, os.strerror(number))

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", absent)
    monkeypatch.setattr(owner, "_said_no_locks", set())
    for _ in range(2):
        with owned(tmp_path / "run", said.append):
            (tmp_path / "run" / "result").touch()
    (line,) = said
    assert "has no locks: do not start a second command" in line
    assert names(tmp_path / "run") == ["result"]


def test_a_folder_that_cannot_be_written_is_refused_as_such(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), owned(tmp_path / "file" / "run", silent):
        raise AssertionError("it cannot be made")
    assert names(tmp_path) == ["file"]


def test_the_next_owner_sweeps_what_killed_writers_left_but_not_what_others_still_write(tmp_path):
    for name in (".ratio.json.12ab.part", "job/.result.json.34cd.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    alive = tmp_path / "final.work" / ".stage.json.56ef.part"
    alive.parent.mkdir()
    alive.touch()
    (tmp_path / "my.part").touch()
    with owned(tmp_path, silent):
        pass
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["final.work/.stage.json.56ef.part", "my.part"]
