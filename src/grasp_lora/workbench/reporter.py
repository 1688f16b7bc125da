"""What the user sees while a stage runs: lines of text, a progress bar, the time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from grasp_lora.base.words import printable

WARM_UP = 3  # steps before the projected time is printed: the first ones are slower
QUIET_FRACTION = 0.25  # without a terminal, a line is printed per quarter


def clock(seconds: float) -> str:
    """Return seconds as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def duration(seconds: float) -> str:
    """Return a time in words: seconds below two minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Reporter:
    """Prints for the user on standard error.

    Args:
        quiet: print nothing, as in other processes, in tests and when used as a library.
    """

    def __init__(self, quiet: bool = False):
        self._console = Console(quiet=quiet, stderr=True, highlight=False)

    def say(self, message: str) -> None:
        """Print one line."""
        self._console.print(printable(message), markup=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar during the body; yield a function that sets how many are done.

        On a terminal the bar shows the time left. Elsewhere, as in a log file, a projected time is
        printed after the first steps, and then a line per quarter.
        """
        start = time.perf_counter()
        state = {"first": 0, "since": start, "next": QUIET_FRACTION}
        progress = self._progress(MofNCompleteColumn())
        task = progress.add_task(title, total=total)
        said = False

        def done(count: int) -> None:
            nonlocal said
            progress.update(task, completed=count)
            now = time.perf_counter()
            if state["first"] == 0 and count > 0:
                state["first"], state["since"] = count, now
            elif not said and count - state["first"] >= WARM_UP:
                said = True
                pace = (now - state["since"]) / (count - state["first"])
                left = pace * (total - count)
                self.say(f"{title}: about {clock(left + now - start)} ({total} at {pace:.2f} s)")
            if not self._console.is_terminal and count >= state["next"] * total and count < total:
                state["next"] = count / total + QUIET_FRACTION
                self.say(f"{title}: {count}/{total}, {clock(now - start)}")

        with progress:
            yield done
        self.say(f"{title}: done in {clock(time.perf_counter() - start)}")

    @contextmanager
    def long_bar(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a progress bar in percent on a terminal, and nothing elsewhere.

        Yields a function that sets how much of `total` is done.
        """
        progress = self._progress(TextColumn("{task.percentage:>3.0f}%"))
        task = progress.add_task(title, total=total)
        with progress:
            yield lambda seconds: progress.update(task, completed=seconds)

    def _progress(self, count: ProgressColumn) -> Progress:
        """Return a progress bar with the column `count`; it is disabled without a terminal."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            count,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )


class BarCallback(TrainerCallback):
    """Advances a progress bar with the Trainer's steps.

    Args:
        done: function that sets how many steps are done.
    """

    def __init__(self, done: Callable[[int], None]):
        self._done = done

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the bar to the step that the run starts or resumes at."""
        self._done(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the bar to the number of steps done."""
        self._done(state.global_step)
