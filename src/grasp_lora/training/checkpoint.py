"""Save and load the state that the Trainer's own checkpoints do not hold.

The Trainer can save callback states, but it rebuilds the callbacks without references to other
objects. Callbacks here need such references, so their state is in two additional files.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from grasp_lora.base.clock import Clock
from grasp_lora.base.files import (
    damage,
    damage_words,
    follow_umask,
    make_folder,
    put_aside,
    write_sealed,
)
from grasp_lora.training.live import LiveAdapter

MARKER_FILE = "grasp.json"
TENSORS_FILE = "grasp.safetensors"


class Stateful(Protocol):
    """An object whose state is part of every checkpoint."""

    name: str

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON-able values)."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load a state that `state` returned."""
        ...


class LiveAdapterState:
    """The adapter's part of a checkpoint: weights, masks and stashed values."""

    name = "adapter"

    def __init__(self, live: LiveAdapter):
        self._live = live

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the adapter's snapshot."""
        return self._live.snapshot(), {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load a snapshot."""
        del values
        self._live.load(tensors)


class CheckpointCallback(TrainerCallback):
    """Writes the state of several objects into the Trainer's checkpoints, and reads it back.

    The Trainer does not save atomically. The marker file is written last, by a rename, so a folder
    with a marker is complete. It seals all files of the checkpoint, those of the Trainer too. This
    must be the first callback, so that the others have their state
    when training begins.

    Args:
        parts: the objects whose state is saved.
        on_resume: called after a state was loaded.
        clock: measures the seconds of loading, as `checkpoint`. The Trainer loads its own files
            before any callback, which counts as idle time. `SaveClock` measures the writing.
    """

    def __init__(
        self,
        parts: Sequence[Stateful],
        on_resume: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ):
        self._parts = parts
        self._on_resume = on_resume
        self._clock = clock or Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state of the checkpoint that the Trainer resumed from."""
        if state.global_step > 0:
            with self._clock.span("checkpoint"):
                self._load(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self._on_resume()

    def _load(self, folder: Path) -> None:
        if not (folder / MARKER_FILE).exists():
            raise ValueError(
                f"training resumed at step {checkpoint_step(folder)}, but {folder} is not a"
                " complete checkpoint of this run; resume from a folder in the run's own output"
            )
        read_state(folder, self._parts)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that the Trainer has just written."""
        PartialState().wait_for_everyone()  # each process saves its own random states
        if not state.is_world_process_zero:
            return
        write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._parts)


def write_state(folder: Path, parts: Sequence[Stateful]) -> None:
    """Write the state of `parts` into a checkpoint folder, and last the marker, which seals it."""
    make_folder(folder)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for part in parts:
        own, values[part.name] = part.state()
        tensors |= {f"{part.name}/{n}": t.contiguous() for n, t in own.items()}
    save_file(tensors, folder / TENSORS_FILE)
    write_sealed(folder / MARKER_FILE, values)
    follow_umask(folder, folder / MARKER_FILE)


def read_state(folder: Path, parts: Sequence[Stateful]) -> None:
    """Load the state of `parts` from a complete checkpoint."""
    tensors = load_file(folder / TENSORS_FILE)
    values = json.loads((folder / MARKER_FILE).read_text())
    for part in parts:
        prefix = f"{part.name}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        part.load_state(own, values[part.name])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders of complete checkpoints, newest first."""
    return [folder for folder in _checkpoints(output_dir) if (folder / MARKER_FILE).exists()]


def newest_whole(output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is as it was written; None if there is none.

    Checkpoints that a crash left incomplete are deleted. A damaged one that is newer is renamed, so
    that it is never gone on from, and said.
    """
    for folder in _checkpoints(output_dir):
        if not (folder / MARKER_FILE).exists():
            shutil.rmtree(folder)
    damaged: list[str] = []
    for folder in complete_checkpoints(output_dir):
        wrong = damage(folder / MARKER_FILE)
        if not wrong:
            if damaged:
                say(f"{'; '.join(damaged)}; going on from {folder.name}")
            return folder
        put_aside(folder, f"damaged-{folder.name}")
        damaged.append(f"{folder.name} is damaged ({damage_words(wrong)})")
    if damaged:
        say(f"{'; '.join(damaged)}; no other is whole, so this begins again at the first step")
    return None


def checkpoint_step(folder: Path) -> int:
    """Return the optimizer step of a checkpoint folder."""
    return int(folder.name.split("-")[1])


def _checkpoints(output_dir: Path) -> list[Path]:
    named = (p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit())
    return sorted(named, key=checkpoint_step, reverse=True)
