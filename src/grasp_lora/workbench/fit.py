"""One training run on a live adapter. Every stage that trains uses it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from grasp_lora.base.choice import not_finite
from grasp_lora.base.clock import Clock
from grasp_lora.base.files import check_disk
from grasp_lora.config.sections import Training
from grasp_lora.core.pruning.masks import NotANumber
from grasp_lora.models.attention import can_pack
from grasp_lora.models.batches import Beside
from grasp_lora.models.devices import repeatable_attention
from grasp_lora.models.example_losses import EncodedExamples, can_share_prefix, example_losses
from grasp_lora.models.modules import forward_accepts
from grasp_lora.models.preserve import preserved
from grasp_lora.tasks.encoding import PackingCollator
from grasp_lora.training.best import BestCallback, Evaluation
from grasp_lora.training.checkpoint import (
    CheckpointCallback,
    LiveAdapterState,
    Stateful,
    checkpoint_step,
    complete_checkpoints,
    newest_whole,
    read_state,
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
from grasp_lora.workbench.beside import NOTHING, Weights, read_beside, wanted_beside
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.processes import decided_by_main
from grasp_lora.workbench.reporter import BarCallback

Collate = Callable[[list[Any]], Any]
"""Turns a list of encoded examples into one batch."""

COPIES_PER_CHECKPOINT = 8


class Stopwatch:
    """Measures the seconds of a stage. Checkpoints keep them, so a resume counts all of them."""

    name = "spent"

    def __init__(self) -> None:
        self._before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far, without the work a killed process did after its last checkpoint."""
        return self._before + time.perf_counter() - self._began

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return no tensors, and the seconds so far."""
        return {}, {"seconds": self.seconds}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Resume from a checkpoint; its seconds include the work of the process that wrote it."""
        del tensors
        self._before, self._began = values["seconds"], time.perf_counter()


@dataclass(frozen=True)
class FitResult:
    """How a training run went.

    Attributes:
        evaluations: dev losses, step 0 first; empty where the run has no dev examples.
        rows: loss of each dev example, in nats, at each evaluation.
        best: the evaluation whose weights were kept; None where the run has no dev examples, or
            does not choose.
        log: the Trainer's log: training loss, learning rate and gradient norm of each step.
        steps: optimizer steps done.
        groups: group of each dev example, such as its context; empty where the run has none.
    """

    evaluations: tuple[Evaluation, ...]
    rows: tuple[tuple[float, ...], ...]
    best: Evaluation | None
    log: tuple[dict[str, Any], ...]
    steps: int
    groups: tuple[str, ...] = ()

    @property
    def best_rows(self) -> tuple[float, ...]:
        """Loss of each dev example at the best evaluation; empty without dev examples."""
        return self.rows[self.evaluations.index(self.best)] if self.best is not None else ()

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            "evaluations": [asdict(e) for e in self.evaluations],
            "rows": [list(losses) for losses in self.rows],
            "best": asdict(self.best) if self.best else None,
            "best_rows": list(self.best_rows),
            "groups": list(self.groups),
            "steps": self.steps,
            "log": list(self.log),
        }


NOTHING_TRAINED = FitResult((), (), None, (), 0)


@dataclass(frozen=True)
class FitOptions:
    """The options in which one training differs from another.

    Attributes:
        training: settings of the training.
        title: text of the progress bar.
        role: "source" or "target": whose examples are trained on and measured.
        extra: callbacks that run before the best checkpoint is chosen.
        stateful: objects whose state the checkpoints keep.
        choose_best: measure the dev examples and end with the best adapter (step 0 included).
        measure_whole: measure the dev examples with nothing pruned.
        reprune: computes the masks again and applies them; gets the optimizer. None keeps the
            masks.
        reprune_every: steps between two calls of `reprune`.
        start_epoch: epochs trained before, for the learning-rate schedule.
        on_resume: called after a resumed run has its state back.
        beside: sets that are trained on beside the examples of `role`.
    """

    training: Training
    title: str
    role: str = "target"
    extra: tuple[TrainerCallback, ...] = ()
    stateful: tuple[Stateful, ...] = ()
    choose_best: bool = True
    measure_whole: bool = False
    reprune: Callable[[Any], None] | None = None
    reprune_every: int = 1
    start_epoch: float = 0.0
    on_resume: Callable[[], None] = lambda: None
    beside: Weights = field(default_factory=dict)


def rows_beside(context: Context, role: str, beside: Weights) -> list[Beside]:
    """Return what a training on the examples of `role` reads of the sets beside them."""
    labelled, found = len(context.encoded(role, "train")), list[Beside]()
    for (other, split), weight in beside.items():
        rows = context.encoded(other, split)
        found.append(Beside(rows, read_beside(weight, labelled, len(rows))))
    return found


def epoch_rows(context: Context, role: str, beside: Weights) -> int:
    """Return the rows that an epoch reads: the train examples of `role` and those beside them."""
    read = [one.per_epoch for one in rows_beside(context, role, beside)]
    return len(context.encoded(role, "train")) + sum(read)


def epoch_steps(context: Context, training: Training, role: str, beside: Weights) -> int:
    """Return the optimizer steps of an epoch on the examples of `role` and those beside them."""
    count = epoch_rows(context, role, beside)
    return steps_per_epoch(count, training.batch_size, training.accumulation, processes())


def run_steps(context: Context, training: Training, role: str, beside: Weights = NOTHING) -> int:
    """Return the optimizer steps planned for a training on the examples of `role`."""
    count = epoch_rows(context, role, beside)
    return planned_steps(
        count, training.epochs, training.batch_size, training.accumulation, training.max_steps
    )


def fit(context: Context, live: LiveAdapter, options: FitOptions, checkpoints: Path) -> FitResult:
    """Train the live adapter; resume from the newest whole checkpoint if there is one.

    Args:
        context: examples and backbone.
        live: the adapter. Its masks are kept during the training, unless `options.reprune` is set.
        options: how it is trained.
        checkpoints: folder for the checkpoints.

    Raises:
        Diverged: the training loss is not finite, where the message names the last good
            checkpoint; or no dev loss is.
        ValueError: there is too little disk space for the checkpoints.
    """
    best = _best_callback(context, live, options)
    parts: list[Stateful] = [LiveAdapterState(live), *options.stateful, *([best] if best else [])]
    check_disk(checkpoints.parent, checkpoint_bytes(sum(p.numel() for p in live.params.values())))
    total = run_steps(context, options.training, options.role, options.beside)
    _say_what_is_short(context, options)
    largest = max(float(p.detach().abs().max()) for p in live.params.values())
    with context.reporter.bar(options.title, total) as done:
        trainer = _trainer(context, live, options, checkpoints, (parts, best, done))
        checkpoint = checkpoint_to_resume(context, checkpoints, options.title)
        if checkpoint is not None:
            context.reporter.say(f"{options.title}: resuming from {checkpoint.name}")
        try:
            if checkpoint is not None and best is not None and _ran_out(checkpoint, best):
                read_state(checkpoint, parts)
                options.on_resume()
                trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            else:
                first = context.encoded(options.role, "train")[0]
                device, say = context.backbone.device, context.reporter.say
                with repeatable_attention(device, lambda: _one_gradient(context, live, first), say):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (Diverged, NotANumber) as error:
            step, title = trainer.state.global_step, options.title
            why = f"step {step + 1}: {error}: {_advice(step, largest)}"
            raise Diverged(
                f"{title}, {why}; {_last_good(checkpoints, step)}", why, step + 1
            ) from None
    kept = None if best is None else _restored(context, best, options.title)
    return FitResult(
        tuple(best.evaluations) if best is not None else (),
        tuple(tuple(one) for one in best.example_losses) if best is not None else (),
        kept,
        tuple(entry for entry in trainer.state.log_history if "loss" in entry),
        trainer.state.global_step,
        _groups(context.rows(options.role, ["dev"])) if best is not None else (),
    )


_HUGE = 1e3
"""A value that no training gives a factor of an adapter; usual ones are below 10."""


def _advice(step: int, largest: float) -> str:
    """Return what to do about a training that diverged.

    Args:
        step: optimizer steps that were done.
        largest: largest value of the adapter that it started from.
    """
    half = "model.dtype float32 if this model overflows in half precision"
    if step == 0 or largest > _HUGE:
        return (
            f"what it starts from, with values up to {largest:.3g}, is too large or does not "
            f"belong to this backbone: check the adapters, or use {half}"
        )
    return f"lower the learning rate, or use {half}"


def _say_what_is_short(context: Context, options: FitOptions) -> None:
    """Say for which sets beside the labelled rows an epoch reads fewer rows than it should."""
    labelled = len(context.encoded(options.role, "train"))
    for (role, split), weight in options.beside.items():
        there, wanted = len(context.encoded(role, split)), wanted_beside(weight, labelled)
        if there < wanted:
            context.reporter.say(
                f"{options.title}: {role} {split} has {there} rows of the {wanted} that an epoch "
                f"should read beside {labelled} labelled rows; it reads all of them, once"
            )


def _restored(context: Context, best: BestCallback, title: str) -> Evaluation:
    """Put the best state back; a state whose dev loss is not finite is none, and is named."""
    losses = {evaluation.step: evaluation.loss for evaluation in best.evaluations}
    out = not_finite(losses)
    if len(out) == len(losses):
        why = (
            f"no dev loss is finite, at none of the steps {list(losses)}, so there is no state to "
            "keep: lower the learning rate, or use dtype float32 if this model overflows in half "
            "precision"
        )
        raise Diverged(f"{title}: {why}", why, max(losses))
    if out:
        context.reporter.say(f"{title}: the dev loss is not finite at steps {out}; none is kept")
    return best.restore()


def _groups(examples: EncodedExamples) -> tuple[str, ...]:
    return tuple(example.group for example in examples.encoded)


def _per_epoch(context: Context, options: FitOptions) -> int:
    return epoch_steps(context, options.training, options.role, options.beside)


def _best_callback(context: Context, live: LiveAdapter, options: FitOptions) -> BestCallback | None:
    if not options.choose_best:
        return None
    dev = context.rows(options.role, ["dev"])
    if not dev.encoded:
        context.reporter.say(
            f"{options.title}: no {options.role} dev examples, so the last step is kept"
        )
        return None
    return BestCallback(
        live,
        dev,
        _per_epoch(context, options),
        options.training.patience,
        lambda _evaluation: None,
        context.clock,
        unpruned=options.measure_whole,
    )


def _trainer(
    context: Context,
    live: LiveAdapter,
    options: FitOptions,
    checkpoints: Path,
    watched: tuple[Sequence[Stateful], BestCallback | None, Callable[[int], None]],
) -> Trainer:
    """Return the Trainer; `watched` is (stateful parts, callback of the best adapter, progress)."""
    parts, best, done = watched
    clock, training = context.clock, options.training
    masks = MaskCallback(live, options.reprune, options.reprune_every)
    return build_trainer(
        live.model,
        context.encoded(options.role, "train"),
        _timed(_collator(context, live, training.batch_size), clock),
        [
            CheckpointCallback(parts, options.on_resume, clock),
            *(StepClock(clock), masks, *options.extra),
            *([best] if best is not None else []),
            *(BarCallback(done), SaveClock(clock, context.on_saved)),
        ],
        checkpoints,
        TrainerSettings(
            seed=context.config.seed,
            epochs=training.epochs,
            max_steps=training.max_steps,
            batch_size=training.batch_size,
            accumulation=training.accumulation,
            learning_rate=training.learning_rate,
            lr_decay=training.lr_decay,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            save_every=training.save_every or _per_epoch(context, options),
            start_epoch=options.start_epoch,
            order=training.order,
            report_to=context.config.report_to,
            on_cpu=context.backbone.device.type == "cpu",
        ),
        rows_beside(context, options.role, options.beside),
    )


def _collator(context: Context, live: LiveAdapter, batch_size: int) -> Collate:
    """Return a collator that packs examples where the model computes them apart, else pads them."""
    model, padding = context.backbone.model, context.collator
    if batch_size == 1 or not can_share_prefix(model, context.longest):
        return padding
    if not forward_accepts(model, "logits_to_keep"):
        return padding
    with preserved(live.model, live.params):
        live.model.eval()
        return PackingCollator() if can_pack(model) else padding


def _one_gradient(context: Context, live: LiveAdapter, row: Any) -> None:
    """Do the forward and backward pass of a training step on one example, without the update."""
    with preserved(live.model, live.params):
        live.model.train()
        batch = {k: v.to(context.backbone.device) for k, v in context.collator([row]).items()}
        labels = batch.pop("labels")
        answer_loss(live.model(**batch), labels).backward()


def measured(context: Context, live: LiveAdapter) -> FitResult:
    """Return the result of an adapter that is not trained: its dev loss, at step 0."""
    dev = context.rows("target", ["dev"])
    if not dev.encoded:
        return NOTHING_TRAINED
    with context.clock.span("dev"), preserved(live.model, live.params):
        live.model.eval()
        losses = example_losses(live.model, dev.batches(range(len(dev.encoded))), len(dev.encoded))
    kept = Evaluation(0, sum(losses) / len(losses))
    return FitResult((kept,), (tuple(losses),), kept, (), 0, _groups(dev))


def _timed(collate: Collate, clock: Clock) -> Callable[[list[Any]], Any]:
    def batch(rows: list[Any]) -> Any:
        with clock.span("load"):
            return collate(rows)

    return batch


def checkpoint_bytes(entries: int) -> int:
    """Return the bytes on disk of a stage's three checkpoints, from the adapter's entries.

    Each checkpoint holds fp32 copies of the adapter: the Trainer's, our own, the best one, two Adam
    moments, the masks, and the values that are masked out.
    """
    return 3 * entries * 4 * COPIES_PER_CHECKPOINT


def checkpoint_to_resume(context: Context, checkpoints: Path, title: str) -> Path | None:
    """Return the newest whole checkpoint; None to begin at the first step.

    The main process looks, so that all processes go on from the same one.
    """

    def say(line: str) -> None:
        context.reporter.say(f"{title}: {line}")

    return decided_by_main(lambda: newest_whole(checkpoints, say))


def _ran_out(checkpoint: Path, best: BestCallback) -> bool:
    # The Trainer checks whether to stop only after a step, so it would do one step too many.
    read_state(checkpoint, [best])
    return best.out_of_patience()


def _last_good(checkpoints: Path, step: int) -> str:
    # A checkpoint of this step would hold the weights that gave the bad loss.
    before = [p for p in complete_checkpoints(checkpoints) if checkpoint_step(p) < step]
    return (
        f"the last good checkpoint is {before[0]}" if before else "no good checkpoint was written"
    )
