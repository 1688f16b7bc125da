"""Length of a training and upper bounds on its cost, from settings and sizes of the sets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from grasp_lora.config.sections import Training
from grasp_lora.models.batches import epoch_order
from grasp_lora.stages.stage import Cost, Sizes, Split
from grasp_lora.training.trainer import planned_steps, processes, steps_per_epoch
from grasp_lora.workbench.beside import read_beside


@dataclass(frozen=True)
class Rows:
    """The sets that a training reads.

    Attributes:
        labelled: sets that every epoch reads whole.
        beside: set that stands beside them -> rows of it for every labelled row.
        seed: decides in which epoch a row beside the labelled ones is read.
    """

    labelled: tuple[Split, ...]
    beside: Mapping[Split, float] = field(default_factory=dict)
    seed: int = 0

    def turns(self, sizes: Sizes) -> list[tuple[int, int]]:
        """Return (examples, those of them that an epoch reads) of each set of `beside`."""
        labelled = sizes.examples(*self.labelled)
        there = {split: sizes.examples(split) for split in self.beside}
        return [
            (there[split], read_beside(weight, labelled, there[split]))
            for split, weight in self.beside.items()
        ]

    def epoch(self, sizes: Sizes) -> int:
        """Return how many examples an epoch reads."""
        return sizes.examples(*self.labelled) + sum(read for _, read in self.turns(sizes))


def training_cost(training: Training, sizes: Sizes, rows: Rows, *dev: Split) -> Cost:
    """Return the cost of a training without early stopping.

    It includes the dev losses, measured at step 0 and at the end of every epoch.

    Args:
        training: settings of the training.
        sizes: the sizes of all sets of examples.
        rows: the sets that are trained on.
        dev: the sets that are measured.
    """
    return steps_cost(training, sizes, rows) + sizes.reading(1 + training.epochs, *dev)


def steps_cost(training: Training, sizes: Sizes, rows: Rows) -> Cost:
    """Return the cost of the optimizer steps alone."""
    if not sizes.examples(*rows.labelled):
        return Cost()
    count = rows.epoch(sizes)
    steps = steps_of(training, count)
    if rows.beside:
        tokens = round(_tokens_of(training, sizes, rows, steps))
    else:
        batch = min(count, training.batch_size * training.accumulation)
        tokens = round(steps * batch * sizes.length(*rows.labelled))
    return Cost(steps, tokens, trained=tokens)


def _tokens_of(training: Training, sizes: Sizes, rows: Rows, steps: int) -> float:
    """Return the tokens of the rows that so many steps read, epoch by epoch.

    The rows beside the labelled ones differ from epoch to epoch, and may differ in length from
    those that are not read.
    """
    per_step = training.batch_size * training.accumulation * processes()
    per_epoch = _per_epoch(training, rows.epoch(sizes))
    lengths = sizes.each(*rows.labelled, *rows.beside)
    read = 0.0
    for epoch in range(math.ceil(steps / per_epoch)):
        order = epoch_order(lengths, epoch, rows.seed, per_step, training.order, rows.turns(sizes))
        left = steps - epoch * per_epoch
        read += sum(lengths[place] for place in order[: left * per_step])
    return read


def steps_of(training: Training, examples: int) -> int:
    """Return the optimizer steps of a training without early stopping."""
    return planned_steps(
        examples, training.epochs, training.batch_size, training.accumulation, training.max_steps
    )


def passes_of(training: Training, examples: int) -> Fraction:
    """Return how often a training without early stopping passes over its examples."""
    return Fraction(steps_of(training, examples), _per_epoch(training, examples))


def lasting(training: Training, passes: Fraction, examples: int) -> Training:
    """Return the training with the length of so many passes, rounded to at least one step."""
    per_epoch = _per_epoch(training, examples)
    steps = max(1, round(passes * per_epoch))
    epochs = math.ceil(steps / per_epoch)
    whole = steps == epochs * per_epoch
    return training.model_copy(update={"epochs": epochs, "max_steps": None if whole else steps})


def _per_epoch(training: Training, examples: int) -> int:
    return steps_per_epoch(examples, training.batch_size, training.accumulation, processes())
