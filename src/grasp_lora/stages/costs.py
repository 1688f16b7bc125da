"""Upper bounds on the cost of a training, from its settings and the sizes of the sets."""

from grasp_lora.config.sections import Training
from grasp_lora.stages.stage import Cost, Sizes, Split
from grasp_lora.training.trainer import planned_steps


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
    steps = planned_steps(
        count, training.epochs, training.batch_size, training.accumulation, training.max_steps
    )
    batch = min(count, training.batch_size * training.accumulation)
    return Cost(steps, round(steps * batch * sizes.length(*train)))
