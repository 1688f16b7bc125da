"""State that survives a crash: what the Trainer's own checkpoints do not hold.

Our callbacks hold live references, so their state does not go through the Trainer's callback
states (which rebuild such objects without them) but into two files of our own.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from grasp_lora.base.clock import Clock
from grasp_lora.training.live import LiveAdapter

MARKER = "grasp.json"
TENSORS = "grasp.safetensors"


class Stateful(Protocol):
    """Something whose state goes into every checkpoint."""

    name: str

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON-able values)."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a state."""
        ...


class LiveAdapterState:
    """The live adapter's part of a checkpoint: weights, masks, stash."""

    name = "adapter"

    def __init__(self, live: LiveAdapter):
        self._live = live

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the adapter's snapshot."""
        return self._live.snapshot(), {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a snapshot."""
        del values
        self._live.load(tensors)


class CheckpointCallback(TrainerCallback):
    """Writes the parts' state into each of the Trainer's checkpoints, and reads it back.

    The Trainer's own saving is not atomic. The marker file is written last, by rename: a folder
    that has it is complete. Must be the first callback of the list, so that the others find their
    state in place when training begins.

    Args:
        parts: what goes into a checkpoint.
        on_resume: called after a state was taken over.
        clock: charged with taking over a state, as `checkpoint`. The Trainer's own reading comes
            before any event and is idle time; writing is measured by `hf.clock.SaveClock`.
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
        """Take over the state of the checkpoint that the Trainer resumed from."""
        if state.global_step > 0:
            with self._clock.span("checkpoint"):
                self._take_over(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self._on_resume()

    def _take_over(self, folder: Path) -> None:
        if not (folder / MARKER).exists():
            raise ValueError(
                f"training resumed at step {checkpoint_step(folder)} but {folder} is not a complete"
                " checkpoint of this run; resume from a folder inside the run's own output"
            )
        read_state(folder, self._parts)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that the Trainer has just written."""
        PartialState().wait_for_everyone()  # each process saves its own random generators
        if not state.is_world_process_zero:
            return
        write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._parts)


def write_state(folder: Path, parts: Sequence[Stateful]) -> None:
    """Write the parts' state into a checkpoint's folder; the marker, last, makes it complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for part in parts:
        own, values[part.name] = part.state()
        tensors |= {f"{part.name}/{n}": t.contiguous() for n, t in own.items()}
    save_file(tensors, folder / TENSORS)
    draft = folder / f"{MARKER}.tmp"
    with draft.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / MARKER)


def read_state(folder: Path, parts: Sequence[Stateful]) -> None:
    """Give the parts their state in a complete checkpoint back."""
    tensors = load_file(folder / TENSORS)
    values = json.loads((folder / MARKER).read_text())
    for part in parts:
        prefix = f"{part.name}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        part.load_state(own, values[part.name])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints, newest first."""
    return [folder for folder in _checkpoints(output_dir) if (folder / MARKER).exists()]


def remove_incomplete(output_dir: Path) -> None:
    """Remove the checkpoints that a crash left incomplete."""
    for folder in _checkpoints(output_dir):
        if not (folder / MARKER).exists():
            shutil.rmtree(folder)


def checkpoint_step(folder: Path) -> int:
    """Return the optimizer step of a checkpoint folder."""
    return int(folder.name.split("-")[1])


def _checkpoints(output_dir: Path) -> list[Path]:
    named = (p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit())
    return sorted(named, key=checkpoint_step, reverse=True)
