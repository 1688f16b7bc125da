"""One training run on a live adapter: the call that every stage and every baseline goes through."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from grasp_lora.base.clock import Clock
from grasp_lora.base.files import check_disk
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import TrainSettings
from grasp_lora.models.devices import repeatable_attention
from grasp_lora.models.example_losses import example_losses
from grasp_lora.models.preserve import preserved
from grasp_lora.tasks.encoding import Collator
from grasp_lora.training.best import BestCallback, Evaluation
from grasp_lora.training.checkpoint import (
    CheckpointCallback,
    LiveAdapterState,
    Stateful,
    checkpoint_step,
    complete_checkpoints,
    read_state,
    remove_incomplete,
)
from grasp_lora.training.clock_callbacks import SaveClock, StepClock
from grasp_lora.training.live import LiveAdapter
from grasp_lora.training.search_callback import MaskCallback
from grasp_lora.training.trainer import (
    Diverged,
    TrainerSettings,
    answer_loss,
    build_trainer,
    planned_steps,
    processes,
    steps_per_epoch,
)
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.folders import begin_stage, work_folder
from grasp_lora.workbench.processes import is_main, wait_for_all
from grasp_lora.workbench.reporter import BarCallback

COPIES_PER_CHECKPOINT = 8


class Spent:
    """Seconds that a stage has taken, those up to the checkpoint it went on from among them."""

    name = "spent"

    def __init__(self) -> None:
        self._before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far; what a killed process did after its last checkpoint is not counted."""
        return self._before + time.perf_counter() - self._began

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the seconds."""
        return {}, {"seconds": self.seconds}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Count on from a state; what this process did up to now that one did as well."""
        del tensors
        self._before, self._began = values["seconds"], time.perf_counter()


@dataclass(frozen=True)
class FitResult:
    """How a training run went.

    Attributes:
        evaluations: dev losses, step 0 first; empty where the run has no dev rows.
        rows: loss of each dev row, in nats, at each evaluation.
        best: the evaluation whose weights were kept, None where there was nothing to choose by.
        log: the Trainer's log: training loss, learning rate and gradient norm per step.
        steps: optimizer steps done.
    """

    evaluations: tuple[Evaluation, ...]
    rows: tuple[tuple[float, ...], ...]
    best: Evaluation | None
    log: tuple[dict[str, Any], ...]
    steps: int

    @property
    def best_rows(self) -> tuple[float, ...]:
        """Loss of each dev row at the best evaluation; empty without dev rows."""
        return self.rows[self.evaluations.index(self.best)] if self.best is not None else ()

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            "evaluations": [asdict(e) for e in self.evaluations],
            "rows": [list(losses) for losses in self.rows],
            "best": asdict(self.best) if self.best else None,
            "best_rows": list(self.best_rows),
            "steps": self.steps,
            "log": list(self.log),
        }


def run_steps(context: Context, section: TrainSettings, role: str) -> int:
    """Return the optimizer steps that `section` plans on the rows of `role`."""
    rows = len(context.examples(role, "train"))
    return planned_steps(
        rows, section.epochs, section.batch_size, section.accumulation, section.max_steps
    )


def fit(
    context: Context,
    live: LiveAdapter,
    section: TrainSettings,
    out: Path,
    key: Mapping[str, Any],
    title: str,
    *,
    role: str = "target",
    extra: Sequence[TrainerCallback] = (),
    stateful: Sequence[Stateful] = (),
    choose_best: bool = True,
    measure_whole: bool = False,
    patience: int | None = None,
    reprune: Callable[[Any], None] | None = None,
    reprune_every: int = 1,
    start_epoch: float = 0.0,
    on_resume: Callable[[], None] = lambda: None,
) -> FitResult:
    """Train the live adapter; resume from the newest complete checkpoint if there is one.

    Args:
        context: data and backbone.
        live: the adapter, its masks as they are to be held.
        section: training settings.
        out: result folder of the stage; checkpoints are kept beside it until the stage is done.
        key: of the stage, kept with the checkpoints.
        title: what the progress bar says.
        role: whose rows are trained on and measured.
        extra: callbacks that run before the best checkpoint is chosen.
        stateful: their state, for the checkpoints.
        choose_best: measure the dev rows and end with the best adapter (step 0 included).
        measure_whole: measure them with nothing pruned.
        patience: stop after so many epochs without a better dev loss.
        reprune: cuts the masks anew, every `reprune_every` steps.
        start_epoch: epochs trained before, for the learning-rate schedule.
        on_resume: called after a resumed run has its state back.

    Raises:
        Diverged: the training loss is not finite; names the last good checkpoint.
        ValueError: no disk space for the checkpoints.
    """
    work = work_folder(out)
    rows = context.encoded(role, "train")
    config: RunConfig = context.config
    per_epoch = steps_per_epoch(len(rows), section.batch_size, section.accumulation, processes())
    total = run_steps(context, section, role)
    clock, masks = context.clock, MaskCallback(live, reprune, reprune_every)
    parts: list[Stateful] = [LiveAdapterState(live), *stateful]
    callbacks: list[TrainerCallback] = [StepClock(clock), masks, *extra]
    best: BestCallback | None = None
    dev = context.rows(role, ["dev"])
    if choose_best and dev.encoded:
        best = BestCallback(
            live, dev, per_epoch, patience, lambda _e: None, clock, unpruned=measure_whole
        )
        callbacks.append(best)
        parts.append(best)
    if choose_best and not dev.encoded:
        context.narrator.say(f"{title}: no {role} dev rows, so the last step is kept")
    check_disk(work.parent, checkpoint_bytes(sum(p.numel() for p in live.params.values())))
    begin_stage(out, key)
    with context.narrator.bar(title, total) as done:
        trainer = build_trainer(
            live.model,
            rows,
            _timed(context.collator, clock),
            [
                CheckpointCallback(parts, on_resume, clock),
                *callbacks,
                BarCallback(done),
                SaveClock(clock, context.on_saved),
            ],
            work,
            TrainerSettings(
                seed=config.seed,
                epochs=section.epochs,
                max_steps=section.max_steps,
                batch_size=section.batch_size,
                accumulation=section.accumulation,
                learning_rate=section.learning_rate,
                lr_decay=section.lr_decay,
                weight_decay=section.weight_decay,
                max_grad_norm=section.max_grad_norm,
                save_every=section.save_every or per_epoch,
                start_epoch=start_epoch,
                order=section.order,
                report_to=config.report_to,
                on_cpu=context.backbone.device.type == "cpu",
            ),
        )
        checkpoint = _agreed_checkpoint(work)
        if checkpoint is not None:
            context.narrator.say(f"{title}: resuming from {checkpoint.name}")
        device, say = context.backbone.device, context.narrator.say
        try:
            if checkpoint is not None and best is not None and _ran_out(checkpoint, best):
                read_state(checkpoint, parts)
                on_resume()
                trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            else:
                with repeatable_attention(
                    device, lambda: _one_gradient(context, live, rows[0]), say
                ):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Diverged as error:
            step = trainer.state.global_step
            raise Diverged(f"{title}, step {step + 1}: {error}; {_last_good(work, step)}") from None
    kept_best = best.restore() if best is not None else None
    evaluations = tuple(best.evaluations) if best is not None else ()
    rows_then = tuple(tuple(one) for one in best.example_losses) if best is not None else ()
    log = tuple(entry for entry in trainer.state.log_history if "loss" in entry)
    return FitResult(evaluations, rows_then, kept_best, log, trainer.state.global_step)


def _one_gradient(context: Context, live: LiveAdapter, row: Any) -> None:
    """Do what a training step does with one row, but for its update."""
    with preserved(live.model, live.params):
        live.model.train()
        batch = {k: v.to(context.backbone.device) for k, v in context.collator([row]).items()}
        labels = batch.pop("labels")
        answer_loss(live.model(**batch), labels).backward()


def measured(context: Context, live: LiveAdapter) -> FitResult:
    """Return what `fit` would say of an adapter that is kept as it is: its dev loss, at step 0."""
    dev = context.rows("target", ["dev"])
    if not dev.encoded:
        return FitResult((), (), None, (), 0)
    with context.clock.span("dev"), preserved(live.model, live.params):
        live.model.eval()
        losses = example_losses(live.model, dev.batches(range(len(dev.encoded))), len(dev.encoded))
    kept = Evaluation(0, sum(losses) / len(losses))
    return FitResult((kept,), (tuple(losses),), kept, (), 0)


def _timed(collate: Collator, clock: Clock) -> Callable[[list[Any]], Any]:
    def batch(rows: list[Any]) -> Any:
        with clock.span("load"):
            return collate(rows)

    return batch


def checkpoint_bytes(entries: int) -> int:
    """Return the disk space of a stage's three checkpoints of an adapter with that many entries.

    Each holds fp32 copies of the adapter: the Trainer's, our own, the best, two Adam moments, and
    masks and stash.
    """
    return 3 * entries * 4 * COPIES_PER_CHECKPOINT


def _agreed_checkpoint(work: Path) -> Path | None:
    # The main process tidies first, so that every process then sees the same folders.
    if is_main():
        remove_incomplete(work)
    wait_for_all()
    return next(iter(complete_checkpoints(work)), None)


def _ran_out(checkpoint: Path, best: BestCallback) -> bool:
    # The Trainer asks whether to stop after a step only, so it would do one too many.
    read_state(checkpoint, [best])
    return best.out_of_patience()


def _last_good(work: Path, step: int) -> str:
    # The checkpoint of this very step, if there is one, holds the weights that gave the bad loss.
    before = [p for p in complete_checkpoints(work) if checkpoint_step(p) < step]
    return (
        f"the last good checkpoint is {before[0]}" if before else "no good checkpoint was written"
    )
