"""Measure the wall time of a run: at any moment, one clock charges one part of one stage.

The clock belongs to one process and one thread. In a run of several processes, the clock of the
main process is reported; its waiting for the other processes is idle time.
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
    "baseline": "losses of the probing examples under the mask in force",
    "probe": "losses of the probing examples under the candidates",
    "masks": "importance, selection, pruning and commits",
    "dev": "losses of the dev examples",
    "generate": "answers to the test examples, with their losses",
    "score": "scores, intervals and paired tests",
    "checkpoint": "checkpoints, written and read",
    "load": "backbone, tokenizer, adapters, examples, encoding, batches",
    "write": "adapters, records and pictures",
    IDLE: "everything else: setup, progress bars, waiting for other processes",
}
"""Part -> description. `idle` is the time outside all spans, so no span can be idle."""

SUMMARY_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "step": ("step",),
    "probe": ("baseline", "probe"),
    "masks": ("masks",),
    "dev": ("dev",),
    "evaluation": ("generate", "score"),
    "I/O": ("checkpoint", "load", "write"),
    IDLE: (IDLE,),
}
"""Column of the time summary -> parts that it adds up."""


def _wait_for_nothing() -> None:
    pass


@dataclass
class SpanTotals:
    """Wall time in seconds and number of spans of one part of one stage (0 spans for idle time)."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class Clock:
    """A clock that charges every moment to the innermost open span; all parts sum to the wall time.

    Attributes:
        synchronize: function that waits for the device. It is called at both ends of every span,
            which slows down a GPU, so set it only for a detailed profile. Without it, asynchronous
            work of a device is charged to the part that waits for the result.
        now: function that returns the seconds of a clock that never goes back.
        resumed: number of earlier processes whose times were added.
    """

    synchronize: Callable[[], None] = _wait_for_nothing
    now: Callable[[], float] = time.perf_counter
    resumed: int = 0
    _totals: dict[str, dict[str, SpanTotals]] = field(default_factory=dict)
    _open: list[tuple[str, str]] = field(default_factory=lambda: [(OUTSIDE, IDLE)])
    _earlier_wall: float = 0.0

    def __post_init__(self) -> None:
        self._started = self._charged = self.now()
        self._synchronized = self.synchronize is not _wait_for_nothing

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Charge the body, without the spans inside it, to `part` of the open stage.

        Raises:
            ValueError: `part` is not in `PARTS`, or is idle.
        """
        with self._opened((self._stage(), _known(part))):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the spans of the body to stage `name`; the rest of the body is its idle time."""
        with self._opened((name, IDLE)):
            yield

    def skip(self, name: str) -> None:
        """List a stage that an earlier process finished; its times are the added times, if any."""
        self._totals.setdefault(name, {})

    def start(self, part: str) -> None:
        """Open a span that `stop` ends, for code that cannot use `span`."""
        self._enter((self._stage(), _known(part)))

    def stop(self, part: str) -> None:
        """End the innermost open span of `part` and all spans inside it.

        If no span of `part` is open, nothing changes: an error may have ended it together with an
        outer span.
        """
        key = (self._stage(), part)
        if key in self._open:
            self._leave(len(self._open) - 1 - self._open[::-1].index(key))

    def wall(self) -> float:
        """Return the seconds since the clock was made, plus those of earlier processes."""
        self._charge()
        return self._wall()

    def times(self) -> dict[str, dict[str, SpanTotals]]:
        """Return stage -> part -> totals up to now, idle time included."""
        self._charge()
        return {
            stage: {part: SpanTotals(s.seconds, s.calls) for part, s in parts.items()}
            for stage, parts in self._totals.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return wall time and all times as JSON values.

        `synchronized` is true if all times, also those of earlier processes, waited for the device.
        """
        times = self.times()
        stages = {
            stage: {part: asdict(totals) for part, totals in times[stage].items()}
            for stage in sorted(times, key=lambda stage: stage == OUTSIDE)
        }
        return {
            "wall_seconds": self._wall(),
            "resumed": self.resumed,
            "synchronized": self._synchronized,
            "stages": stages,
        }

    def add(self, earlier: Mapping[str, Any]) -> None:
        """Add the times of an earlier process.

        Args:
            earlier: `to_json()` of its clock.
        """
        self.resumed += 1 + earlier["resumed"]
        self._synchronized = self._synchronized and earlier["synchronized"]
        self._earlier_wall += earlier["wall_seconds"]
        for stage, parts in earlier["stages"].items():
            self.skip(stage)
            for part, found in parts.items():
                totals = self._entry(stage, part)
                totals.seconds += found["seconds"]
                totals.calls += found["calls"]

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

    def _entry(self, stage: str, part: str) -> SpanTotals:
        return self._totals.setdefault(stage, {}).setdefault(part, SpanTotals())

    def _stage(self) -> str:
        return self._open[-1][0]


def _known(part: str) -> str:
    if part == IDLE or part not in PARTS:
        names = ", ".join(name for name in PARTS if name != IDLE)
        raise ValueError(f"no part of a run has the name {part!r}; name one of {names}")
    return part


def time_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of a run's time for its report.

    Args:
        record: `Clock.to_json()` with a wall time above 0.

    Returns:
        The record with two changes. `shares` is added: column of `SUMMARY_COLUMNS` -> fraction of
        the wall time, in [0, 1]. `stages` has the seconds of each stage instead of its parts, or
        None for a stage without times.
    """
    wall = record["wall_seconds"]
    stages: Mapping[str, Mapping[str, Mapping[str, float]]] = record["stages"]

    def seconds(parts: tuple[str, ...]) -> float:
        return sum(
            s["seconds"] for found in stages.values() for p, s in found.items() if p in parts
        )

    return dict(record) | {
        "shares": {name: seconds(p) / wall for name, p in SUMMARY_COLUMNS.items()},
        "stages": {
            name: sum(s["seconds"] for s in parts.values()) if parts else None
            for name, parts in stages.items()
        },
    }
