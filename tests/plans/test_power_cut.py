"""The power is cut in the middle of a run: what was not synced is lost, and the run goes on."""

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.torture_damage import result_of
from typer.testing import CliRunner

from grasp_lora.cli import app
from helpers import tiny_backbone_folder
from jobs import job, write_job

if os.name == "nt":
    pytest.skip("folders cannot be synced here", allow_module_level=True)


class Disk:
    """What of a folder is on the disk: contents that were synced, and names in synced folders.

    Real file systems keep more than that, but promise no more.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.syncs = 0
        self.before_sync: Callable[[int], None] = lambda _count: None
        self._contents: set[tuple[int, int, int]] = set()
        self._names: dict[int, set[tuple[str, int]]] = {}
        self._fsync, self._mkdir = os.fsync, os.mkdir
        patch.setattr(os, "fsync", self._synced)
        patch.setattr(os, "mkdir", self._made)

    def _synced(self, handle: int) -> None:
        self.syncs += 1
        self.before_sync(self.syncs)
        self._fsync(handle)
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(handle) as entries:
                self._names[found.st_ino] = {(one.name, one.inode()) for one in entries}
        else:
            self._contents.add(key_of(found))

    def _made(self, path, *given, **named) -> None:
        self._mkdir(path, *given, **named)
        self._names.pop(os.stat(path).st_ino, None)  # that of a folder that is gone

    def survivors(self, folder: Path, into: Path, lost: str) -> None:
        """Copy what is left of a folder after a cut.

        Args:
            folder: the folder.
            into: the copy.
            lost: what becomes of a content that was not synced: "zeros", "empty", or "names" where
                names that were not synced are lost too.
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
            if key_of(one.stat()) not in self._contents:
                content = bytes(len(content)) if lost == "zeros" else b""
            (into / one.name).write_bytes(content)


def key_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size


def test_a_run_after_a_power_cut_ends_as_if_there_had_been_none(tmp_path, monkeypatch):
    tiny_backbone_folder(tmp_path / "base")
    steps = {"epochs": 1, "batch_size": 2, "save_every": 2}
    train = dict.fromkeys(("source", "target", "search", "finetune"), steps)
    out = tmp_path / "run"
    config = write_job(tmp_path / "run.json", job(tmp_path, train=train, controller={"rounds": 2}))

    def run() -> str:
        done = CliRunner().invoke(app, ["run", str(config)])
        assert done.exit_code == 0, done.output
        return done.output

    with monkeypatch.context() as patch:
        disk = Disk(patch)
        run()
    moments, wanted = disk.syncs, result_of(out)
    out.rename(tmp_path / "first")

    drawn, cuts = random.Random(5), {}
    for number, lost in enumerate(("zeros", "empty", "names") * 2):
        cuts[drawn.randrange(number * moments // 6, (number + 1) * moments // 6)] = lost
    with monkeypatch.context() as patch:
        disk = Disk(patch)

        def cut(count: int) -> None:
            if count in cuts:
                disk.survivors(out, tmp_path / f"cut-{count}", cuts[count])

        disk.before_sync = cut
        run()
    assert result_of(out) == wanted
    finished = 0
    for count, lost in cuts.items():
        out.rename(tmp_path / f"before-{count}")
        (tmp_path / f"cut-{count}").rename(out)
        finished += len(list(out.glob("*/stage.json")))
        said = run()
        assert result_of(out) == wanted, (count, lost)
        assert "damaged" not in said, "what a marker stands for was on the disk before it"
        assert not list(out.rglob("*.work"))
    assert finished > 6, "what was finished before a cut is not done again"
