"""Build a `transformers.Trainer` from plain settings, without a subclass."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from grasp_lora.base.words import shown
from grasp_lora.models.batches import Beside, EpochExamples, Filler
from grasp_lora.models.example_losses import IGNORED, answer_logits
from grasp_lora.models.shards import is_sharded, take_over_fsdp
from grasp_lora.training.search_callback import SearchCallback


class Diverged(FloatingPointError):
    """The training loss is NaN or infinite. It is raised before the optimizer step.

    Attributes:
        why: the cause, without the place of the run.
        steps: optimizer steps that were begun; 0 where they are not known.
    """

    def __init__(self, message: str, why: str | None = None, steps: int = 0) -> None:
        super().__init__(message)
        self.why, self.steps = why or message, steps


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return a batch's summed cross-entropy divided by the answer tokens of the optimizer step.

    The Trainer does not divide by the number of accumulated batches if it is given a loss function.
    Dividing by the answer tokens of all accumulated batches gives the mean over the step.

    Args:
        outputs: the model's outputs.
        labels: [batch, length], with `IGNORED` outside the answers.
        num_items_in_batch: answer tokens of all accumulated batches; None means of this batch.

    Raises:
        Diverged: the loss is not finite.
    """
    loss, why = _loss_and_fault(outputs, labels, num_items_in_batch)
    if why is not None:
        raise Diverged(why)
    return loss


def _loss_and_fault(
    outputs: Any, labels: Tensor, num_items_in_batch: Any
) -> tuple[Tensor, str | None]:
    """Return the loss of `answer_loss`, and why it is not finite, if so."""
    logits, targets = answer_logits(outputs.logits, labels)
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    loss = total / items
    if torch.isfinite(loss):
        return loss, None
    return loss, f"training loss is {loss.item()}; {_cause(logits, int(items))}"


def _cause(logits: Tensor, items: int) -> str:
    """Return why a loss is not finite, from the logits and the number of answer tokens."""
    if items == 0:
        return "there are no answer tokens to learn from: check for an example without an answer"
    if not torch.isfinite(logits).all():
        return "the model's own logits are not finite"
    return f"the logits, of up to {float(logits.abs().max()):.3g}, are too large for it"


class AgreedLoss(TrainerCallback):
    """The `answer_loss` of a training by several processes, which all end if one of them must.

    A process that ended by itself would leave the others waiting for its gradients. So all compare
    what they found before the optimizer step, and raise the fault of the first one that has one.

    Raises:
        Diverged: the loss of a process is not finite.
    """

    def __init__(self) -> None:
        self._fault: str | None = None

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss, also one that is not finite."""
        loss, why = _loss_and_fault(outputs, labels, num_items_in_batch)
        self._fault = self._fault or why
        return loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise what any process found wrong."""
        faulty = torch.tensor(float(self._fault is not None), device=args.device)
        dist.all_reduce(faulty)
        if faulty:
            found: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, self._fault)
            raise Diverged(next(why for why in found if why is not None))


def steps_per_epoch(examples: int, batch_size: int, accumulation: int, processes: int = 1) -> int:
    """Return the optimizer steps of one epoch, counted like the Trainer.

    Args:
        examples: training examples.
        batch_size: examples per forward pass and process.
        accumulation: forward passes per optimizer step and process.
        processes: number of processes.
    """
    batches = math.ceil(math.ceil(examples / batch_size) / processes)
    return max(batches // accumulation + int(batches % accumulation > 0), 1)


def planned_steps(
    examples: int, epochs: float, batch_size: int, accumulation: int, max_steps: int | None
) -> int:
    """Return the optimizer steps of a whole run: `max_steps`, or those of `epochs` if it is None.

    The other arguments are those of `steps_per_epoch`, for the processes of this launch.
    """
    if max_steps is not None:
        return max_steps
    return math.ceil(epochs * steps_per_epoch(examples, batch_size, accumulation, processes()))


_BEGUN_WITH: ContextVar[int | None] = ContextVar("begun with", default=None)


def launched() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes() -> int:
    """Return the number of processes whose batches make up an optimizer step.

    It is the number that the work was begun with; see `counted_as`.
    """
    return _BEGUN_WITH.get() or launched()


@contextmanager
def counted_as(number: int | None) -> Iterator[None]:
    """Let a step have the examples of so many processes in the body, whatever was launched.

    So work that another number of processes resumes reads the examples that it would have read.

    Args:
        number: the number of processes that the work was begun with; None changes nothing.
    """
    token = _BEGUN_WITH.set(number or _BEGUN_WITH.get())
    try:
        yield
    finally:
        _BEGUN_WITH.reset(token)


def share_of_step(batch_size: int, accumulation: int) -> tuple[int, int]:
    """Return batch size and accumulation with which the launched processes share a step.

    Args:
        batch_size: examples per forward pass of each process that the work was begun with.
        accumulation: forward passes per optimizer step of each of them.

    Raises:
        ValueError: the examples of a step cannot be divided evenly.
    """
    now, begun = launched(), processes()
    if now == begun:
        return batch_size, accumulation
    per_step = batch_size * accumulation * begun
    share, left = divmod(per_step, now)
    if left:
        able = [n for n in range(1, per_step + 1) if per_step % n == 0]
        raise ValueError(
            f"this was begun with {begun} processes, whose optimizer steps have {per_step} "
            f"examples; {now} processes cannot share them evenly. Go on with as many processes as "
            f"one of {able}"
        )
    size = max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
    return size, share // size


def refuse_unsupported_launch(on_cpu: bool) -> None:
    """Refuse FSDP 1, DeepSpeed ZeRO and, unless the run is `on_cpu`, DataParallel.

    FSDP2 is taken over: the backbone will be loaded in shards.

    Raises:
        ValueError: one of them is active; the message names the alternative.
    """
    take_over_fsdp()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise ValueError(
            "DeepSpeed ZeRO is not supported: it keeps LoRA factors and their moments as flat "
            "slices, while masks need whole factors; launch with FSDP2 "
            "(--use_fsdp --fsdp_version 2), or with plain DDP (torchrun)"
        )
    if not on_cpu and torch.cuda.device_count() > 1 and launched() == 1:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible to one process, which would start"
            " DataParallel (not supported): set CUDA_VISIBLE_DEVICES=0, or launch one process per"
            " GPU with torchrun"
        )


PACKAGES = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
"""Tracker -> its name where transformers asks whether it is installed, if that is another one."""


def tracker_faults(trackers: Sequence[str]) -> list[str]:
    """Return one message for each tracker that transformers does not know or that is not installed.

    Args:
        trackers: the setting `report_to`.
    """
    found: list[str] = []
    for name in trackers:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            found.append(f"report_to: there is no tracker {shown(name)}; choose from {known}")
            continue
        there = getattr(integration_utils, f"is_{PACKAGES.get(name, name)}_available", None)
        if there is not None and not there():
            found.append(
                f"report_to: the tracker {name} is not installed; install its package with pip, or "
                "leave it out"
            )
    return found


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of one training run.

    Attributes:
        seed: seed of dropout and of the order of examples.
        epochs: epochs to train if `max_steps` is None.
        max_steps: optimizer steps to train, or None.
        batch_size: examples per forward pass and process.
        accumulation: forward passes per optimizer step.
        learning_rate: learning rate of the first epoch.
        lr_decay: factor of the learning rate after each epoch.
        weight_decay: AdamW's weight decay.
        max_grad_norm: norm to which gradients are clipped.
        save_every: optimizer steps between checkpoints.
        start_epoch: epochs already trained elsewhere, for the learning rate schedule.
        order: rule for the examples of a step; see `models.batches.epoch_order`.
        report_to: the Trainer's loggers (`tensorboard`, `wandb`, ...).
        on_cpu: train on the CPU even if there is an accelerator.
    """

    seed: int
    epochs: float
    max_steps: int | None
    batch_size: int
    accumulation: int
    learning_rate: float
    lr_decay: float
    weight_decay: float
    max_grad_norm: float
    save_every: int
    start_epoch: float = 0.0
    order: str = "by-step"
    report_to: Sequence[str] = ()
    on_cpu: bool = True


def build_trainer(
    model: nn.Module,
    examples: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    callbacks: Sequence[TrainerCallback],
    output_dir: Path,
    settings: TrainerSettings,
    beside: Sequence[Beside] = (),
) -> Trainer:
    """Return a Trainer for the trainable parameters of `model`.

    The optimizer is AdamW with the published schedule (arXiv 2601.06702): the learning rate is
    multiplied by `lr_decay` after each epoch. The Trainer does logging, saving and resuming. Its
    progress bars are removed, since the caller shows its own. Trackers are given the rounds of a
    search among the callbacks too.

    Args:
        model: the model to train.
        examples: encoded training examples, which every epoch reads whole.
        collate: turns a list of examples into a batch.
        callbacks: callbacks in calling order.
        output_dir: folder of checkpoints.
        settings: settings of the run.
        beside: further training examples, of which an epoch reads a part.

    Raises:
        ValueError: the launch is not supported, see `refuse_unsupported_launch`; or the processes
            cannot share a step, see `share_of_step`.
    """
    refuse_unsupported_launch(settings.on_cpu)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    count = launched()
    batch_size, accumulation = share_of_step(settings.batch_size, settings.accumulation)
    per_step = batch_size * accumulation * count
    filled = batch_size * count if count > 1 else 1
    read = EpochExamples(examples, settings.seed, per_step, settings.order, beside, filled)
    per_epoch = steps_per_epoch(len(read), batch_size, accumulation, count)
    shared = replace(settings, batch_size=batch_size, accumulation=accumulation)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.lr_decay ** (settings.start_epoch + step // per_epoch)
    )
    if is_sharded(model):
        frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
        # DDP would copy the main process's shards to the others.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    agreed = [AgreedLoss()] if count > 1 else []
    trainer = Trainer(
        model=model,
        args=_training_arguments(output_dir, shared),
        train_dataset=read,
        data_collator=_with_fillers(collate) if count > 1 else collate,
        compute_loss_func=agreed[0] if agreed else answer_loss,
        callbacks=[*agreed, *callbacks],
        optimizers=(optimizer, schedule),
    )
    if settings.report_to:
        for one in callbacks:
            if isinstance(one, SearchCallback):
                one.log = trainer.log
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _with_fillers(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a `collate` that takes `Filler` examples too, and leaves their labels out."""

    def batch(rows: list[Any]) -> Any:
        found = collate([row.example if isinstance(row, Filler) else row for row in rows])
        found["labels"][[isinstance(row, Filler) for row in rows]] = IGNORED
        return found

    return batch


def _training_arguments(output_dir: Path, settings: TrainerSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps if settings.max_steps is not None else -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # `EpochExamples` orders the examples
        label_names=["labels"],
        dataloader_pin_memory=not settings.on_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
        use_cpu=settings.on_cpu,
        bf16=False,
        fp16=False,
    )
