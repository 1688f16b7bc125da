"""Trainer callbacks that measure the seconds of optimizer steps and of checkpoints."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from grasp_lora.base.clock import Clock


class StepClock(TrainerCallback):
    """Measures each optimizer step as `step`: forward and backward passes, clipping, optimizer.

    It must precede every callback that works in `on_step_end`, so that their work is not part of
    the step. The batches of all forward passes of a step are drawn and collated before the step
    begins and are not part of it.

    Args:
        clock: receives the seconds.
    """

    def __init__(self, clock: Clock):
        self._clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step."""
        self._clock.start("step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the step."""
        self._clock.stop("step")


class SaveClock(TrainerCallback):
    """Measures each checkpoint as `checkpoint`: the Trainer's files and the additional ones.

    The Trainer has no event for the beginning of a save. The time from the end of a step to the end
    of its checkpoint is measured, so it includes the step's log entry and, with `report_to`, the
    work of the loggers. This must be the last callback.

    Args:
        clock: receives the seconds.
        on_saved: called after every checkpoint.
    """

    def __init__(self, clock: Clock, on_saved: Callable[[], Any] = lambda: None):
        self._clock = clock
        self._on_saved = on_saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the checkpoint if one follows this step."""
        if control.should_save:
            self._clock.start("checkpoint")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the checkpoint, since all other callbacks have saved."""
        self._clock.stop("checkpoint")
        self._on_saved()
