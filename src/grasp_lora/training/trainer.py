"""Build a `transformers.Trainer` from plain settings, without a subclass."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from grasp_lora.base.words import shown
from grasp_lora.models.batches import Beside, EpochExamples
from grasp_lora.models.example_losses import IGNORED, answer_logits
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
    logits, targets = answer_logits(outputs.logits, labels)
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    loss = total / items
    if not torch.isfinite(loss):
        raise Diverged(f"training loss is {loss.item()}; {_cause(logits, int(items))}")
    return loss


def _cause(logits: Tensor, items: int) -> str:
    """Return why a loss is not finite, from the logits and the number of answer tokens."""
    if items == 0:
        return "there are no answer tokens to learn from: check for an example without an answer"
    if not torch.isfinite(logits).all():
        return "the model's own logits are not finite"
    return f"the logits, of up to {float(logits.abs().max()):.3g}, are too large for it"


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


def processes() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_unsupported_launch(on_cpu: bool) -> None:
    """Refuse FSDP, DeepSpeed ZeRO and, unless the run is `on_cpu`, DataParallel.

    Raises:
        ValueError: one of them is active; the message names the alternative.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ValueError("FSDP is not supported yet: launch with plain DDP (torchrun)")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise ValueError("DeepSpeed ZeRO is not supported yet: launch with plain DDP (torchrun)")
    if not on_cpu and torch.cuda.device_count() > 1 and processes() == 1:
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
        ValueError: the launch is not supported; see `refuse_unsupported_launch`.
    """
    refuse_unsupported_launch(settings.on_cpu)
    arguments = _training_arguments(output_dir, settings)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    count, batch_size, accumulation = processes(), settings.batch_size, settings.accumulation
    per_step = batch_size * accumulation * count
    read = EpochExamples(examples, settings.seed, per_step, settings.order, beside)
    per_epoch = steps_per_epoch(len(read), batch_size, accumulation, count)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.lr_decay ** (settings.start_epoch + step // per_epoch)
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=read,
        data_collator=collate,
        compute_loss_func=answer_loss,
        callbacks=list(callbacks),
        optimizers=(optimizer, schedule),
    )
    if settings.report_to:
        for one in callbacks:
            if isinstance(one, SearchCallback):
                one.log = trainer.log
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


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
