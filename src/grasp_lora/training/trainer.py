"""Plain settings -> a configured `transformers.Trainer` (no subclass)."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from grasp_lora.models.batches import EpochExamples
from grasp_lora.models.example_losses import IGNORED, answer_logits


class Diverged(FloatingPointError):
    """The training loss is NaN or infinite; raised before the optimizer step."""


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the cross-entropy summed over answer tokens, over the tokens of the whole step.

    Dividing by `num_items_in_batch` (answer tokens of all accumulated batches) is ours to do: the
    Trainer does not divide by the accumulation steps when a loss function is given.

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
        logits_finite = bool(torch.isfinite(logits).all())
        cause = (
            "the logits are finite, so the labels are: a row without answer tokens?"
            if logits_finite
            else "the model's own logits are not finite: lower the learning rate, or use"
            " dtype float32 if this model overflows in half precision"
        )
        raise Diverged(f"training loss is {loss.item()}; {cause}")
    return loss


def steps_per_epoch(rows: int, batch_size: int, accumulation: int, processes: int = 1) -> int:
    """Return the optimizer steps of one epoch, counted as the Trainer counts them."""
    batches = math.ceil(math.ceil(rows / batch_size) / processes)
    return max(batches // accumulation + int(batches % accumulation > 0), 1)


def planned_steps(
    rows: int, epochs: float, batch_size: int, accumulation: int, max_steps: int | None
) -> int:
    """Return the optimizer steps of a whole run in this process group."""
    if max_steps is not None:
        return max_steps
    return math.ceil(epochs * steps_per_epoch(rows, batch_size, accumulation, processes()))


def processes() -> int:
    """Return how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_unsupported_launch(on_cpu: bool) -> None:
    """Refuse FSDP, ZeRO and, unless the run keeps `on_cpu`, DataParallel.

    Raises:
        ValueError: one of them is active, with what to use instead.
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


def build_trainer(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    callbacks: Sequence[TrainerCallback],
    output_dir: Path,
    *,
    seed: int,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    accumulation: int,
    learning_rate: float,
    lr_decay: float,
    weight_decay: float,
    max_grad_norm: float,
    save_every: int,
    start_epoch: float = 0.0,
    order: str = "by-step",
    report_to: Sequence[str] = (),
    on_cpu: bool = True,
) -> Trainer:
    """Return a Trainer for the trainable parameters of `model`.

    AdamW with the published schedule: the learning rate is multiplied by `lr_decay` after each
    epoch. Logging, saving and resuming are the Trainer's; progress bars are the caller's.

    Args:
        model: the model to train.
        rows: encoded rows.
        collate: list of rows -> batch.
        callbacks: in calling order.
        output_dir: folder of checkpoints.
        seed: seed of dropout and of the sample order.
        epochs: epochs to train, unless `max_steps` is given.
        max_steps: optimizer steps to train.
        batch_size: rows per forward and process.
        accumulation: forwards per optimizer step.
        learning_rate: of the first epoch.
        lr_decay: factor per epoch.
        weight_decay: AdamW's.
        max_grad_norm: gradient clipping norm.
        save_every: optimizer steps between checkpoints.
        start_epoch: epochs already trained elsewhere, for the schedule.
        order: which rows share a step, see `hf.batches.epoch_order`.
        report_to: loggers of the Trainer (`tensorboard`, `wandb`, ...).
        on_cpu: keep off any accelerator.
    """
    refuse_unsupported_launch(on_cpu)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps if max_steps is not None else -1,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # the rows come in the order of `EpochExamples`
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=list(report_to) or "none",
        use_cpu=on_cpu,
        bf16=False,
        fp16=False,
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
    per_epoch = steps_per_epoch(len(rows), batch_size, accumulation, processes())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_decay ** (start_epoch + step // per_epoch)
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=EpochExamples(rows, seed, batch_size * accumulation * processes(), order),
        data_collator=collate,
        compute_loss_func=answer_loss,
        callbacks=list(callbacks),
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
