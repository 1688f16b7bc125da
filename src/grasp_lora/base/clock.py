"""Where the wall time of a run goes: one clock, at any moment charged to one part of one stage.

The clock belongs to one process and one thread. In a run of several processes the main process's
clock is the one that is reported; what it waits for the others is idle.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

IDLE = "idle"
OUTSIDE = "outside the stages"

PARTS: Mapping[str, str] = {
    "step": "training: forward, backward and optimizer",
    "baseline": "losses of the probing rows under the mask in force",
    "probe": "losses of the probing rows under the candidates",
    "masks": "importance, selection, cutting and committing",
    "dev": "losses of the dev rows",
    "generate": "answers to the test rows, with their losses",
    "score": "scores, intervals and paired tests",
    "checkpoint": "checkpoints, written and read",
    "load": "backbone, tokenizer, adapters, rows, encoding, batches",
    "write": "adapters, records and pictures",
    IDLE: "all the rest: setting up, progress bars, waiting for other processes",
}
"""The parts that time is charged to. `idle` is what no span took, and has no span of its own."""

SHORT: Mapping[str, tuple[str, ...]] = {
    "step": ("step",),
    "probe": ("baseline", "probe"),
    "masks": ("masks",),
    "dev": ("dev",),
    "evaluation": ("generate", "score"),
    "I/O": ("checkpoint", "load", "write"),
    IDLE: (IDLE,),
}
"""The short form's columns, and the parts that each adds up."""


def _wait_for_nothing() -> None:
    pass


@dataclass
class Spent:
    """Seconds of wall time, and how many spans they were spent in (0 for idle time)."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class Clock:
    """Charges every moment to the innermost open span, so that all parts add up to the wall time.

    Attributes:
        synchronize: waits for the device. Called at both edges of every span, which slows a GPU
            down: give it for a detailed profile only. Without it, work that a device does on its
            own is charged to the part that waited for the result.
        now: seconds of a clock that never goes back.
        resumed: earlier processes whose times were added.
    """

    synchronize: Callable[[], None] = _wait_for_nothing
    now: Callable[[], float] = time.perf_counter
    resumed: int = 0
    _spent: dict[str, dict[str, Spent]] = field(default_factory=dict)
    _open: list[tuple[str, str]] = field(default_factory=lambda: [(OUTSIDE, IDLE)])
    _earlier_wall: float = 0.0

    def __post_init__(self) -> None:
        self._started = self._charged = self.now()
        self._synchronized = self.synchronize is not _wait_for_nothing

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Charge the body to `part` of the stage that is open, less the spans inside it.

        Raises:
            ValueError: `part` is none of `PARTS`, or idle.
        """
        with self._opened((self._stage(), _known(part))):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Gather the spans of the body below `name`; the rest of the body is idle time there."""
        with self._opened((name, IDLE)):
            yield

    def skip(self, name: str) -> None:
        """Name a stage that an earlier process has finished: its times are those added, if any."""
        self._spent.setdefault(name, {})

    def start(self, part: str) -> None:
        """Open a span that an event of its own ends, see `stop` and `span`."""
        self._enter((self._stage(), _known(part)))

    def stop(self, part: str) -> None:
        """End the innermost open span of `part`, and what is still open inside it.

        Where none is open, nothing changes: an error may have ended the span with its outer one.
        """
        key = (self._stage(), part)
        if key in self._open:
            self._leave(len(self._open) - 1 - self._open[::-1].index(key))

    def wall(self) -> float:
        """Return the seconds since the clock was made, and those added from earlier processes."""
        self._charge()
        return self._wall()

    def times(self) -> dict[str, dict[str, Spent]]:
        """Return stage -> part -> what was spent up to now, idle time included."""
        self._charge()
        return {
            stage: {part: Spent(s.seconds, s.calls) for part, s in parts.items()}
            for stage, parts in self._spent.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return wall time and times as JSON-able values.

        `synchronized` says whether the device was waited for all along.
        """
        times = self.times()
        stages = {
            stage: {part: asdict(spent) for part, spent in times[stage].items()}
            for stage in sorted(times, key=lambda stage: stage == OUTSIDE)
        }
        return {
            "wall_seconds": self._wall(),
            "resumed": self.resumed,
            "synchronized": self._synchronized,
            "stages": stages,
        }

    def add(self, earlier: Mapping[str, Any]) -> None:
        """Add what the clock of an earlier process had measured.

        Args:
            earlier: its `to_json()`.
        """
        self.resumed += 1 + earlier["resumed"]
        self._synchronized = self._synchronized and earlier["synchronized"]
        self._earlier_wall += earlier["wall_seconds"]
        for stage, parts in earlier["stages"].items():
            self.skip(stage)
            for part, found in parts.items():
                spent = self._entry(stage, part)
                spent.seconds += found["seconds"]
                spent.calls += found["calls"]

    @contextmanager
    def _opened(self, key: tuple[str, str]) -> Iterator[None]:
        depth = len(self._open)
        self._enter(key)
        try:
            yield
        finally:
            self._leave(depth)

    def _enter(self, key: tuple[str, str]) -> None:
        self._charge()
        self._open.append(key)
        self._entry(*key).calls += key[1] != IDLE

    def _leave(self, depth: int) -> None:
        self._charge()
        del self._open[depth:]

    def _charge(self) -> None:
        """Charge the time since the last charge to the innermost open span."""
        self.synchronize()
        now = self.now()
        self._entry(*self._open[-1]).seconds += now - self._charged
        self._charged = now

    def _wall(self) -> float:
        return self._earlier_wall + self._charged - self._started

    def _entry(self, stage: str, part: str) -> Spent:
        return self._spent.setdefault(stage, {}).setdefault(part, Spent())

    def _stage(self) -> str:
        return self._open[-1][0]


def _known(part: str) -> str:
    if part == IDLE or part not in PARTS:
        names = ", ".join(name for name in PARTS if name != IDLE)
        raise ValueError(f"no part of a run is called {part!r}; name one of {names}")
    return part


def short_form(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's report says of its time.

    Args:
        record: `Clock.to_json()` of a clock that has gone on.

    Returns:
        The record, with `shares`, the fraction of the wall time per column of `SHORT`, and with
        the seconds of each stage in place of its parts; None for a stage without times.
    """
    wall = record["wall_seconds"]
    stages: Mapping[str, Mapping[str, Mapping[str, float]]] = record["stages"]

    def seconds(parts: tuple[str, ...]) -> float:
        return sum(
            s["seconds"] for found in stages.values() for p, s in found.items() if p in parts
        )

    return dict(record) | {
        "shares": {name: seconds(p) / wall for name, p in SHORT.items()},
        "stages": {
            name: sum(s["seconds"] for s in parts.values()) if parts else None
            for name, parts in stages.items()
        },
    }
