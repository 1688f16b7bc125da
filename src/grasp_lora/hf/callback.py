"""Trainer callbacks: rounds of the controller, the best checkpoint, state that survives a crash.

The order of one optimizer step in transformers: clip -> `on_pre_optimizer_step` -> step ->
`on_optimizer_step` (`global_step` not yet incremented) -> scheduler -> zero_grad ->
`global_step += 1` -> `on_step_end` -> save -> `on_save`. Probes therefore run in `on_step_end`,
when gradients are gone, and zeros are enforced in `on_optimizer_step`.

The callbacks hold live references, so their state does not go through the Trainer's own callback
states (which rebuild such objects without them) but through `CheckpointCallback`.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from grasp_lora.core import rounds
from grasp_lora.core.rounds import ControllerConfig, ControllerState, RoundRecord
from grasp_lora.hf.live import LiveAdapter, Score, preserved
from grasp_lora.hf.probe import Rows, row_losses

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


class LiveState:
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


class MaskCallback(TrainerCallback):
    """Keeps pruned entries at zero after every optimizer step; re-prunes at a fixed ratio if asked.

    Args:
        live: the adapter.
        reprune: called every `every` optimizer steps with the optimizer, or None for a fixed mask.
        every: optimizer steps between two calls of `reprune`.
    """

    def __init__(
        self,
        live: LiveAdapter,
        reprune: Callable[[torch.optim.Optimizer | None], None] | None = None,
        every: int = 1,
    ):
        self._live = live
        self._reprune = reprune
        self._every = every

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enforce the zeros."""
        self._live.enforce()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the mask anew where the schedule says so."""
        if self._reprune is not None and state.global_step % self._every == 0:
            self._reprune(kwargs.get("optimizer"))


@dataclass(frozen=True)
class ProbePool:
    """The rows that rounds draw from.

    Attributes:
        rows: the encoded rows.
        fresh: draw new rows each round; otherwise the first `config.rows` are used every time.
    """

    rows: Rows
    fresh: bool


class SearchCallback(TrainerCallback):
    """Runs a controller round at the steps the settings name.

    Args:
        live: the adapter.
        config: the controller's settings.
        pool: rows to probe.
        score: importance rule.
        norms: input norms of the rule, or None.
        seed: seed of the controller's own generator.
        total_steps: optimizer steps of the whole run.
        planned: rounds of the whole run.
        on_round: called with every round's record after it is closed.
        discard: probe, but never commit and never move (the probes' side effects can then be
            measured: there are none).
    """

    name = "search"

    def __init__(
        self,
        live: LiveAdapter,
        config: ControllerConfig,
        pool: ProbePool,
        score: Score,
        norms: Mapping[str, Tensor] | None,
        seed: int,
        total_steps: int,
        planned: int,
        on_round: Callable[[ControllerState, RoundRecord], None],
        discard: bool = False,
    ):
        self._live = live
        self._config = config
        self._pool = pool
        self._score = score
        self._norms = norms
        self._total_steps = total_steps
        self._on_round = on_round
        self._discard = discard
        self._generator = torch.Generator().manual_seed(seed)
        self._first_ranks: dict[str, Tensor] = {}
        self._fixed: list[tuple[list[int], Any]] | None = None
        self.controller = rounds.begin(config, planned)
        self.flipped: list[int] = []
        self.forwards = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open, run and close a round when one is due."""
        if rounds.is_due(state.global_step, self._total_steps, self._config):
            self._round(state.global_step, kwargs.get("optimizer"))

    def _rows(self) -> tuple[tuple[int, ...], list[tuple[list[int], Any]]]:
        rows = self._pool.rows
        if self._pool.fresh:
            groups = [e.group for e in rows.encoded]
            drawn = rounds.draw_rows(groups, self._config.rows, self._generator)
            return drawn, rows.batches(drawn)
        drawn = tuple(range(min(self._config.rows, len(rows.encoded))))
        if self._fixed is None:
            self._fixed = rows.batches(drawn)
        return drawn, self._fixed

    def _ranks(self) -> dict[str, Tensor]:
        if self._config.refresh_importance or not self._first_ranks:
            self._first_ranks = self._live.rank(self._score, self._norms)
        return self._first_ranks

    def _round(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        drawn, batches = self._rows()
        candidates = rounds.propose(self.controller, self._config, self._generator)
        ranks = self._ranks()
        live = self._live
        losses: list[list[float]] = []
        with preserved(live.model, live.params):
            live.model.eval()
            baseline = row_losses(live.model, batches, len(drawn))
        for ratio in candidates:
            with live.trial(live.masks(ranks, ratio), optimizer):
                losses.append(row_losses(live.model, batches, len(drawn)))
        self.forwards += len(drawn) * (1 + len(candidates))
        if self._discard:
            return
        self.controller, record = rounds.conclude(
            self.controller, self._config, candidates, baseline, losses, drawn, step
        )
        flipped = 0
        if record.committed:
            flipped = live.commit(live.masks(ranks, record.mask_ratio), optimizer)
        self.flipped.append(flipped)
        self._on_round(self.controller, record)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return generator, importance of the first round where it is kept, and history."""
        tensors = {"generator": self._generator.get_state()}
        if not self._config.refresh_importance:
            tensors |= {f"ranks.{n}": r.cpu() for n, r in self._first_ranks.items()}
        values = {
            "controller": rounds.state_to_json(self.controller),
            "flipped": self.flipped,
            "forwards": self.forwards,
        }
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a state; rounds after it are forgotten."""
        self._generator.set_state(tensors["generator"])
        self._first_ranks = {
            n.removeprefix("ranks."): t.to(self._live.params[n.removeprefix("ranks.")].device)
            for n, t in tensors.items()
            if n.startswith("ranks.")
        }
        self.controller = rounds.state_from_json(values["controller"])
        self.flipped = list(values["flipped"])
        self.forwards = int(values["forwards"])


@dataclass(frozen=True)
class Evaluation:
    """Dev loss at one step (nats; mean over rows of the mean over answer tokens)."""

    step: int
    loss: float


class BestCallback(TrainerCallback):
    """Measures the dev loss before the first step and after every epoch; keeps the best adapter.

    Step 0 takes part: a start that training only makes worse is what comes out. Training stops
    after `patience` evaluations in a row without a new best.

    Args:
        live: the adapter.
        rows: the dev rows.
        every: optimizer steps of an epoch.
        patience: evaluations without a new best before training stops; None never stops.
        on_evaluation: called with every evaluation.
    """

    name = "best"

    def __init__(
        self,
        live: LiveAdapter,
        rows: Rows,
        every: int,
        patience: int | None,
        on_evaluation: Callable[[Evaluation], None],
    ):
        self._live = live
        self._batches = rows.batches(range(len(rows.encoded)))
        self._count = len(rows.encoded)
        self._every = every
        self._patience = patience
        self._on_evaluation = on_evaluation
        self._best: dict[str, Tensor] = {}
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, unless the run goes on from a checkpoint."""
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the end of an epoch and of the run; stop when patience has run out."""
        # Not in on_epoch_end: a checkpoint of an epoch's last step is written before that event,
        # and a run resumed from it would never see the evaluation.
        step = state.global_step
        if not self._exhausted() and (step % self._every == 0 or step == state.max_steps):
            self._evaluate(step)
        if self._exhausted():
            control.should_training_stop = True

    def _exhausted(self) -> bool:
        if self._patience is None or self.best is None:
            return False
        steps = [e.step for e in self.evaluations]
        return len(steps) - 1 - steps.index(self.best.step) >= self._patience

    def _evaluate(self, step: int) -> None:
        with preserved(self._live.model, self._live.params):
            self._live.model.eval()
            losses = row_losses(self._live.model, self._batches, self._count)
        evaluation = Evaluation(step, sum(losses) / len(losses))
        self.evaluations.append(evaluation)
        if self.best is None or _better(evaluation.loss, self.best.loss):
            self.best = evaluation
            self._best = self._live.snapshot()
        self._on_evaluation(evaluation)

    def restore(self) -> Evaluation:
        """Put the best adapter into the model and return its evaluation."""
        assert self.best is not None
        self._live.load(self._best)
        return self.best

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the best adapter and all evaluations."""
        values = {"evaluations": [asdict(e) for e in self.evaluations]}
        if self.best is not None:
            values["best"] = asdict(self.best)  # type: ignore[assignment]
        return dict(self._best), values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a state, patience included (it is counted from the evaluations)."""
        self._best = dict(tensors)
        self.evaluations = [Evaluation(**e) for e in values["evaluations"]]
        self.best = Evaluation(**values["best"]) if "best" in values else None


def _better(loss: float, best: float) -> bool:
    return math.isfinite(loss) and not loss >= best


class CheckpointCallback(TrainerCallback):
    """Writes the parts' state into each of the Trainer's checkpoints, and reads it back.

    The Trainer's own saving is not atomic. The marker file is written last, by rename: a folder
    that has it is complete. Must be the first callback of the list, so that the others find their
    state in place when training begins.

    Args:
        parts: what goes into a checkpoint.
        on_resume: called after a state was taken over.
    """

    def __init__(self, parts: Sequence[Stateful], on_resume: Callable[[], None] = lambda: None):
        self._parts = parts
        self._on_resume = on_resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the state of the checkpoint that the Trainer resumed from."""
        if state.global_step == 0:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (folder / MARKER).exists():
            raise ValueError(
                f"training resumed at step {state.global_step} but {folder} is not a complete"
                " checkpoint of this run; resume from a folder inside the run's own output"
            )
        tensors = load_file(folder / TENSORS)
        values = json.loads((folder / MARKER).read_text())
        for part in self._parts:
            prefix = f"{part.name}/"
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            part.load_state(own, values[part.name])
        self._on_resume()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that the Trainer has just written."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for part in self._parts:
            own, values[part.name] = part.state()
            tensors |= {f"{part.name}/{n}": t.contiguous() for n, t in own.items()}
        save_file(tensors, folder / TENSORS)
        draft = folder / f"{MARKER}.tmp"
        with draft.open("w") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, folder / MARKER)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove newer ones that a crash left incomplete."""
    folders = sorted(
        (p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit()),
        key=lambda p: int(p.name.split("-")[1]),
        reverse=True,
    )
    for folder in folders:
        if (folder / MARKER).exists():
            return folder
        shutil.rmtree(folder)
    return None
