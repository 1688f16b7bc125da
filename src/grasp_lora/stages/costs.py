"""Length of a training and upper bounds on its cost, from settings and sizes of the sets."""

import math
from fractions import Fraction

from grasp_lora.config.sections import Training
from grasp_lora.stages.stage import Cost, Sizes, Split
from grasp_lora.training.trainer import planned_steps, processes, steps_per_epoch


def training_cost(training: Training, sizes: Sizes, train: Split, *dev: Split) -> Cost:
    """Return the cost of a training without early stopping.

    It includes the dev losses, measured at step 0 and at the end of every epoch.

    Args:
        training: settings of the training.
        sizes: the sizes of all sets of examples.
        train: the set that is trained on.
        dev: the sets that are measured.
    """
    return steps_cost(training, sizes, train) + sizes.reading(1 + training.epochs, *dev)


def steps_cost(training: Training, sizes: Sizes, *train: Split) -> Cost:
    """Return the cost of the optimizer steps alone, for a training on all examples of the sets."""
    count = sizes.examples(*train)
    if not count:
        return Cost()
    steps = steps_of(training, count)
    batch = min(count, training.batch_size * training.accumulation)
    return Cost(steps, round(steps * batch * sizes.length(*train)))


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
