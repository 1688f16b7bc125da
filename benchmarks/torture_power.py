"""The power is cut: what of a folder is on the disk then, as promised at least and on a real disk.

`Disk` follows what a process syncs and writes down what a disk must hold after a cut, and no more.
`Ext4` is a file system in an image of its own; a cut takes the image as it is, without what the
machine still holds in memory. It needs the right to mount.
"""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

LOST = ("zeros", "empty", "names")
"""What becomes of what was not synced: the content is zeros or empty, or the name is gone too."""
OPTIONS = ("data=ordered,commit=300", "data=writeback,nodelalloc,commit=1")
"""How ext4 is mounted: names and contents wait for a sync, or names get to the disk first."""
_SIZE = 256 * 2**20


class Disk:
    """What of a folder is on the disk: contents that were synced, and names in synced folders.

    Real file systems keep more than that, but promise no more.
    """

    def __init__(self) -> None:
        self.syncs = 0
        self._contents: set[tuple[int, int, int]] = set()
        self._names: dict[int, set[tuple[str, int]]] = {}

    @contextmanager
    def watching(self, before_sync: Callable[[int], None] = lambda _count: None) -> Iterator[None]:
        """Follow the syncs of this process; call `before_sync` with the number of each."""
        real_fsync, real_mkdir = os.fsync, os.mkdir

        def fsync(handle: int) -> None:
            self.syncs += 1
            before_sync(self.syncs)
            real_fsync(handle)
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                with os.scandir(handle) as entries:
                    self._names[found.st_ino] = {(one.name, one.inode()) for one in entries}
            else:
                self._contents.add(_key_of(found))

        def mkdir(path: str, *given: int, **named: int) -> None:
            real_mkdir(path, *given, **named)
            self._names.pop(os.stat(path).st_ino, None)  # that of a folder that is gone

        with patch.object(os, "fsync", fsync), patch.object(os, "mkdir", mkdir):
            yield

    def survivors(self, folder: Path, into: Path, lost: str) -> None:
        """Copy what is left of a folder after a cut.

        Args:
            folder: the folder.
            into: the copy.
            lost: one of `LOST`.
        """
        into.mkdir(parents=True)
        known = self._names.get(folder.stat().st_ino, set())
        for one in folder.iterdir():
            if lost == "names" and (one.name, one.stat().st_ino) not in known:
                continue
            if one.is_dir():
                self.survivors(one, into / one.name, lost)
                continue
            content = one.read_bytes()
            if _key_of(one.stat()) not in self._contents:
                content = bytes(len(content)) if lost == "zeros" else b""
            (into / one.name).write_bytes(content)


def _key_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size


class CannotMount(Exception):
    """This machine lets nobody, or not this user, make and mount a file system."""


class Ext4:
    """A file system of its own, whose power can be cut.

    Args:
        folder: an empty folder for the image and the mount point.
        options: one of `OPTIONS`.

    Raises:
        CannotMount: not on this machine.
    """

    def __init__(self, folder: Path, options: str):
        self.root, self._options = folder / "disk", options
        self._image, self._cuts = folder / "0.img", 0
        self.root.mkdir()
        with self._image.open("wb") as image:
            image.truncate(_SIZE)
        _done("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount()

    def _mount(self) -> None:
        _done("mount", "-o", f"loop,{self._options}", str(self._image), str(self.root))

    def cut(self, end: Callable[[], None]) -> None:
        """Cut the power; then mount what the disk holds in the place of what was.

        Args:
            end: ends every process that has files open here. It is called after the cut.
        """
        self._cuts += 1
        left = self._image.with_name(f"{self._cuts}.img")
        _done("cp", "--sparse=always", str(self._image), str(left))
        end()
        _done("umount", str(self.root))
        self._image.unlink()
        self._image = left
        self._mount()

    def close(self) -> None:
        """Unmount it."""
        _done("umount", str(self.root))


def _done(*command: str) -> None:
    name = command[0]
    place = shutil.which(name) or shutil.which(name, path="/sbin:/usr/sbin")
    if place is None:
        raise CannotMount(f"{name} is not installed")
    done = subprocess.run([place, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise CannotMount(f"{name}: {' '.join(done.stderr.split())}")
