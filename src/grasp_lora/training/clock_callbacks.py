"""Trainer callbacks that tell a clock when the Trainer steps and when it saves."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from grasp_lora.base.clock import Clock


class StepClock(TrainerCallback):
    """Charges each optimizer step as `step`: its forwards, backwards, clipping and the optimizer.

    Must come before every callback that works in `on_step_end`, so that their work is not charged
    to the step. The batches of a step are drawn and collated before it begins, those of all its
    accumulated forwards together, and are not in it.

    Args:
        clock: is charged.
    """

    def __init__(self, clock: Clock):
        self._clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to charge."""
        self._clock.start("step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Charge the step no longer."""
        self._clock.stop("step")


class SaveClock(TrainerCallback):
    """Charges each checkpoint as `checkpoint`: the Trainer's files and ours.

    The Trainer tells no callback that it begins to save. What lies between the end of a step and
    the end of its checkpoint is charged, so the log entry of that step is in it too (with
    `report_to`, what its loggers do). Must be the last callback of the list.

    Args:
        clock: is charged.
        on_saved: called after every checkpoint.
    """

    def __init__(self, clock: Clock, on_saved: Callable[[], Any] = lambda: None):
        self._clock = clock
        self._on_saved = on_saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to charge where a checkpoint follows."""
        if control.should_save:
            self._clock.start("checkpoint")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Charge the checkpoint no longer: all callbacks have saved."""
        self._clock.stop("checkpoint")
        self._on_saved()
