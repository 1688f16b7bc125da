"""Damage to files of half-done and finished runs: is any of it carried into a result unseen?

A small model is run once in each kind, whole and up to the middle of a training. Then one file of
one of these folders is damaged, and the same command is given again. It must end with the result of
the undamaged folder, byte for byte but for times, or with one error (exit code 2) that names the
file. Prints for each kind how often that was tried and how often it held, and each case that was
lost; ends with exit code 1 if there is one.

Needs the tiny models of `tests/`: run it from the root of a checkout.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from typer.testing import CliRunner

from benchmarks.common import ROOT, table
from grasp_lora.base.files import read_json
from grasp_lora.cli import app
from grasp_lora.training import checkpoint

KINDS = ("grasp", "auto", "compare")
STATES = ("half", "whole")
WAYS = ("gone", "cut", "emptied", "flip", "zeros")
METHODS = ("average-finetuned", "grasp-restart")
"""Methods of the comparison: one that trains, and one that searches and trains."""
SAVES = {"grasp": 21, "auto": 18, "compare": 21}
"""Kind -> checkpoints that are written before a half-done run ends."""

STOPPED = -1

Tally = dict[tuple[str, str], tuple[int, int]]
"""(what was done, to what) -> (times tried, times survived)."""

_TIMES = {"sha256", "files", "finished", "machine", "machines", "peak_memory_bytes", "provenance"}
_APART = {"timing.json", "done.json", "receipt.json", "provenance.json", "plan.json"}
"""Files that tell times and machines, not results."""


@dataclass(frozen=True)
class Case:
    """One damage: the kind and the state of the run, the file in its folder, and the way."""

    kind: str
    state: str
    file: str
    way: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.state}: {self.file} {self.way}"


class Stop(BaseException):
    """The process ends here."""


class Laboratory:
    """Runs of each kind, kept as they were half-done and whole.

    Args:
        folder: an empty folder to work in.
        base: folder of the backbone.
        job: settings of a small job, as `tests/jobs.py: job` returns them.
    """

    def __init__(self, folder: Path, base: Path, job: Callable[..., dict[str, Any]]):
        self._folder, self._job, self._base = folder, job, base
        self._results: dict[str, dict[str, Any]] = {}

    def out(self, kind: str) -> Path:
        """Return the folder that a kind of run writes to."""
        return self._folder / kind

    def kept(self, kind: str, state: str) -> Path:
        """Return a copy of a run's folder, half-done or whole, made at the first call."""
        place = self._folder / f"{kind}-{state}"
        if not place.exists():
            shutil.rmtree(self.out(kind), ignore_errors=True)
            with stopped(SAVES[kind] if state == "half" else None):
                code, said = self.command(kind)
            if code != (0 if state == "whole" else STOPPED):
                raise RuntimeError(f"the undamaged run of kind {kind} ended with {code}: {said}")
            self.out(kind).rename(place)
        return place

    def result(self, kind: str) -> dict[str, Any]:
        """Return what an undamaged run of a kind ends with."""
        if kind not in self._results:
            self._results[kind] = result_of(self.kept(kind, "whole"))
        return self._results[kind]

    def command(self, kind: str, name: str = "run") -> tuple[int, str]:
        """Do the command of a kind; return its exit code, or `STOPPED`, and what it said.

        Args:
            kind: the kind of run.
            name: the command, where the kind is no comparison.

        Raises:
            Exception: the command ended with a traceback.
        """
        config, arguments = self._folder / f"{kind}.json", [name]
        values = self._job(self._base.parent, output=str(self.out(kind)), **_settings(kind))
        config.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        if kind == "compare":
            arguments = ["compare", "--out", str(self.out(kind)), "--seeds", "1", "--jobs", "0"]
            arguments += [text for name in METHODS for text in ("--only", name)]
        try:
            done = CliRunner().invoke(app, [*arguments, str(config)])
        except Stop:
            return STOPPED, ""
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output

    def files(self, kind: str, state: str) -> list[str]:
        """Return the files of a run's folder, relative to it."""
        place = self.kept(kind, state)
        return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())

    def tried(self, case: Case, seed: int) -> str:
        """Damage a copy and go on; return what was lost, "" if nothing was."""
        out = self.out(case.kind)
        kept, wanted = self.kept(case.kind, case.state), self.result(case.kind)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        damage(out / case.file, case.way, seed)
        try:
            code, said = self.command(case.kind)
        except Exception as error:
            return f"traceback, {type(error).__name__}: {error}"
        named = Path(case.file).name in said
        found = result_of(out)
        differing = [n for n in sorted(wanted | found) if wanted.get(n) != found.get(n)]
        if not differing and code in (0, 2):
            return ""
        if code == 2 and named:
            return ""
        return f"exit code {code}, named: {named}, other results: {', '.join(differing[:3])}"


def _settings(kind: str) -> dict[str, Any]:
    quick = {"epochs": 2, "batch_size": 2, "save_every": 1}
    changes: dict[str, Any] = {"train": dict.fromkeys(("source", "target", "search"), quick)}
    changes["train"]["finetune"] = quick
    return changes | ({"recipe": "auto", "budget": 5} if kind == "auto" else {})


@contextmanager
def stopped(saves: int | None) -> Iterator[None]:
    """End the body with `Stop` once so many checkpoints are complete; None lets it end."""
    write, count = checkpoint.write_state, 0

    def counted(*given: Any) -> None:
        nonlocal count
        write(*given)
        count += 1
        if count == saves:
            raise Stop

    with patch.object(checkpoint, "write_state", counted):
        yield


def damage(file: Path, way: str, seed: int = 0) -> None:
    """Delete a file, cut it in half, empty it, turn one of its bits, or fill it with zeros."""
    content = file.read_bytes()
    file.unlink()
    drawn, changed = random.Random(seed), bytearray(content)
    if content:
        changed[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    left = {"cut": content[: len(content) // 2], "emptied": b"", "flip": bytes(changed)}
    left["zeros"] = bytes(len(content))
    if way != "gone":
        file.write_bytes(left[way])


def result_of(out: Path) -> dict[str, Any]:
    """Return file name -> content of what a run or comparison ended with, without its times."""
    found: dict[str, Any] = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.name in _APART or ".damaged" in name or ".work/" in name or not file.is_file():
            continue
        if file.suffix in (".safetensors", ".jsonl"):
            found[name] = file.read_bytes()
        elif file.suffix == ".json":
            try:
                found[name] = _timeless(read_json(file))
            except ValueError:
                found[name] = None
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _timeless(one)
            for name, one in value.items()
            if name not in _TIMES and not name.startswith("seconds")
        }
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def cases(laboratory: Laboratory, kinds: Sequence[str], most: int | None, seed: int) -> list[Case]:
    """Return every damage to every file of the kinds, or as many drawn at random."""
    every = [
        Case(kind, state, file, way)
        for kind in kinds
        for state in STATES
        for file in laboratory.files(kind, state)
        for way in WAYS
    ]
    return every if most is None else random.Random(seed).sample(every, min(most, len(every)))


def torture(
    laboratory: Laboratory, chosen: Sequence[Case], seed: int, say: Callable[[str], None] = print
) -> Tally:
    """Try every case; return (kind, state) -> (tried, survived). Each loss is said."""
    found: Tally = {}
    for number, case in enumerate(chosen):
        lost = laboratory.tried(case, seed + number)
        if lost:
            say(f"LOST {case}: {lost}")
        tried, survived = found.get((case.kind, case.state), (0, 0))
        found[case.kind, case.state] = tried + 1, survived + (not lost)
    return found


@contextmanager
def of_tiny_models(runs: Path | None = None) -> Iterator[Laboratory]:
    """A laboratory on the tiny models and jobs of `tests/`.

    Args:
        runs: existing folder for the runs; None takes a temporary one.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import tiny_backbone_folder
    from jobs import job

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_backbone_folder(Path(folder) / "base")
        yield Laboratory(runs or Path(folder), base, job)


def shown(title: str, found: Tally) -> int:
    """Print a table of what was tried and survived; return the exit code, 1 for any loss."""
    rows = [(*name, str(tried), str(survived)) for name, (tried, survived) in found.items()]
    table(title, ("what", "to what", "tried", "survived"), rows)
    return int(any(tried != survived for tried, survived in found.values()))


def main(given: Sequence[str] | None = None) -> int:
    """Print what was tried and what survived; return the exit code."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--tries", type=int, default=60, help="damages; 0 tries every one")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--kind", choices=KINDS, action="append", help="only this kind of run")
    options = made.parse_args(given)
    with of_tiny_models() as laboratory:
        chosen = cases(laboratory, options.kind or KINDS, options.tries or None, options.seed)
        found = torture(laboratory, chosen, options.seed)
    return shown("damaged files", found)


if __name__ == "__main__":
    sys.exit(main())
