"""Worlds without a model, for controllers to search: curves over the ratio, and rows that see them.

Synthetic: a curve of a family, and 66 rows that have a smooth random function of the ratio of their
own, the same in every round, whose spread grows with the ratio; the candidates of a round share its
rows. Recorded: the losses that `benchmarks.landscape` measured on a real pair, row by row, and the
test losses after the final runs.

Calibration of the synthetic noise, from the recorded searches (seen as shares
of the span between the best and the worst ratio, which was extrapolated to 0.8 by eye): the spread
over rows of loss less loss at ratio 0 was 0.04-0.06 at 0.27, 0.2-0.5 at 0.53 and 0.5-0.9 at 0.7
(here 0.12, 0.38, 0.78); two ratios of one round agree over rows by 0.3-0.9 (here by a length of
0.3), one row in two rounds by 0.6-0.8; two nearly equal ratios differ by 0.025-0.05 per row (here
0.035).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import records
from benchmarks.recorded import final_runs

HIGH = 0.8
RATIOS = np.linspace(0.0, HIGH, 161)
MICRO_DEV = 16
POOL = 66
"""16 micro-dev and 50 dev rows; the first 16 are micro-dev."""

SPREAD = 0.06 * 20 ** ((RATIOS - 0.1) / 0.7) * (1 - np.exp(-RATIOS / 0.05))
LENGTH = 0.3
ROUGHNESS = 0.025
SMOOTH = np.linalg.cholesky(
    np.exp(-((RATIOS[:, None] - RATIOS) ** 2) / (2 * LENGTH**2)) + 1e-8 * np.eye(len(RATIOS))
)

Curve = Callable[[float], np.ndarray]  # share of the run that is over -> loss at RATIOS
Random = np.random.Generator


class World(Protocol):
    """What a controller can ask, and what its answer is judged by.

    Attributes:
        pool: how many rows there are.
    """

    pool: int

    def losses(self, ratio: float, rows: Sequence[int], done: float) -> list[float]:
        """Return the loss of each row at the ratio when a share `done` of the run is over."""
        ...

    def regret(self, ratio: float) -> float:
        """Return how much worse the ratio is than the best, after the final run."""
        ...

    def regret_on_dev(self, ratio: float) -> float:
        """Return how much worse it is on the curve that all rows give at the end of the search."""
        ...

    def exact(self, rows: Sequence[int]) -> float:
        """Return the ratio that is best on these rows at the end of the search."""
        ...

    def effect(self) -> float:
        """Return the gain of the best ratio over ratio 0, in standard errors of `pool` new rows."""
        ...


def _scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def quadratic(random: Random) -> Curve:
    """A parabola."""
    curve = _scaled((RATIOS - random.uniform(0.1, 0.7)) ** 2)
    return lambda done: curve


def cliff(random: Random) -> Curve:
    """No gain at all, then a cliff."""
    curve = _scaled(np.maximum(0, RATIOS - random.uniform(0.3, 0.6)) ** 2)
    return lambda done: curve


def _before_a_cliff(random: Random, least: float, most: float) -> Curve:
    edge, depth = random.uniform(0.25, 0.55), random.uniform(least, most)
    falling, rising = depth * ((RATIOS - edge) / edge) ** 2, ((RATIOS - edge) / (HIGH - edge)) ** 2
    curve = np.where(edge > RATIOS, falling, rising)
    return lambda done: curve


def dip(random: Random) -> Curve:
    """A gain of 2-6 % of the span before a cliff."""
    return _before_a_cliff(random, 0.02, 0.06)


def valley(random: Random) -> Curve:
    """A gain of 10-30 % of the span before a cliff."""
    return _before_a_cliff(random, 0.1, 0.3)


def rising(random: Random) -> Curve:
    """Pruning only harms."""
    curve = (RATIOS / HIGH) ** random.uniform(1, 3)
    return lambda done: curve


def falling(random: Random) -> Curve:
    """The more is pruned the better, as for a sum that overshoots."""
    curve = (1 - RATIOS / HIGH) ** random.uniform(1, 3)
    return lambda done: curve


def two_optima(random: Random) -> Curve:
    """Two wells, one 10-30 % deeper."""
    wells = [random.uniform(0.1, 0.25), random.uniform(0.5, 0.7)]
    random.shuffle(wells)
    less = random.uniform(0.1, 0.3)
    deep, other = (np.exp(-((RATIOS - well) ** 2) / (2 * 0.15**2)) for well in wells)
    curve = _scaled(-deep - (1 - less) * other)
    return lambda done: curve


def drifting(random: Random) -> Curve:
    """A parabola whose optimum moves by 0.1-0.25 over the run."""
    start = random.uniform(0.1, 0.7)
    end = start + random.uniform(0.1, 0.25) * random.choice((-1, 1))
    end = min(max(end, 0.05), 0.75)
    span = ((RATIOS - end) ** 2).max()
    return lambda done: (RATIOS - start - (end - start) * done) ** 2 / span


def shallow(random: Random) -> Curve:
    """A dip of 0.02 nats in a flat curve."""
    curve = 0.02 * np.minimum(1, ((RATIOS - random.uniform(0.1, 0.7)) / 0.3) ** 2)
    return lambda done: curve


def flat(random: Random) -> Curve:
    """Nothing to be learned."""
    del random
    return lambda done: np.zeros_like(RATIOS)


def steep(random: Random) -> Curve:
    """A gain of 0.02-0.06 nats before a rise of 3-6 nats."""
    edge, depth = random.uniform(0.1, 0.35), random.uniform(0.02, 0.06)
    height = random.uniform(3, 6)
    falling = depth * ((RATIOS - edge) / edge) ** 2
    rising = height * np.maximum(0, (RATIOS - edge) / (HIGH - edge)) ** 2.5
    curve = np.where(edge > RATIOS, falling, rising)
    return lambda done: curve


@dataclass(frozen=True)
class Family:
    """Kind of curve, span of the noise in nats, and whether single rows have wild functions."""

    make: Callable[[Random], Curve]
    scale: float = 1.0
    heavy: bool = False


FAMILIES = {
    "quadratic": Family(quadratic),
    "cliff": Family(cliff),
    "dip": Family(dip),
    "valley": Family(valley),
    "rising": Family(rising),
    "falling": Family(falling),
    "two optima": Family(two_optima),
    "drifting": Family(drifting),
    "heavy tails": Family(quadratic, heavy=True),
    "shallow": Family(shallow, 0.1),
    "flat": Family(flat, 0.1),
    "flat, heavy": Family(flat, 0.1, heavy=True),
    "cliff, heavy": Family(cliff, heavy=True),
    "steep": Family(steep),
}
IN_SPANS = tuple(FAMILIES)[:9]
IN_NATS = ("shallow", "steep")
NO_GAIN = ("cliff", "rising", "flat", "flat, heavy", "cliff, heavy")
CLEAR_GAIN = ("quadratic", "valley", "falling", "two optima", "drifting", "heavy tails")


class SyntheticWorld:
    """One curve of a family and the rows that see it, each in its own way."""

    pool = POOL

    def __init__(self, family: str, seed: int):
        kind = FAMILIES[family]
        self._random = np.random.default_rng((seed, list(FAMILIES).index(family)))
        self._curve = kind.make(self._random)
        own = self._random.standard_normal((POOL, len(RATIOS))) @ SMOOTH.T
        if kind.heavy:
            own *= np.abs(self._random.standard_t(2.5, size=(POOL, 1))) / 1.5
        self._own = kind.scale * SPREAD * own
        self._hardness = self._random.standard_normal(POOL)
        self._roughness = ROUGHNESS * kind.scale

    def losses(self, ratio: float, rows: Sequence[int], done: float) -> list[float]:
        """Return the loss of each row at the ratio."""
        below = min(int(ratio / HIGH * (len(RATIOS) - 1)), len(RATIOS) - 2)
        share = (ratio - RATIOS[below]) / (RATIOS[1] - RATIOS[0])
        chosen = list(rows)
        seen = self._curve(done)[below : below + 2] + self._own[chosen, below : below + 2]
        rough = self._roughness * self._random.standard_normal(len(chosen))
        mixed = (1 - share) * seen[:, 0] + share * seen[:, 1]
        return (2.0 + self._hardness[chosen] + mixed + rough).tolist()

    def regret(self, ratio: float) -> float:
        """Return how much worse the ratio is than the best one at the end of the run."""
        return _above_lowest(RATIOS, self._curve(1.0), ratio)

    def regret_on_dev(self, ratio: float) -> float:
        """Return the same on the curve that the pool's rows give together."""
        return _above_lowest(RATIOS, self._curve(1.0) + self._own.mean(0), ratio)

    def exact(self, rows: Sequence[int]) -> float:
        """Return the lowest point of the mean over the rows, without roughness."""
        seen = self._curve(1.0) + self._own[list(rows)].mean(0)
        return float(RATIOS[int(seen.argmin())])

    def effect(self) -> float:
        """Return the gain of the best ratio in standard errors; 0 where ratio 0 is the best."""
        curve = self._curve(1.0)
        best = int(curve.argmin())
        rough = 2 * self._roughness**2
        spread = math.sqrt(float((self._own[:, best] - self._own[:, 0]).var(ddof=1)) + rough)
        return float(curve[0] - curve[best]) / (spread / math.sqrt(POOL))


@dataclass(frozen=True)
class Recording:
    """What `benchmarks.landscape` measured on a pair.

    Attributes:
        name: of the pair.
        done: [phases] shares of the search run at which the rows were probed.
        ratios: [probed] ratios.
        losses: [phases, probed, rows] losses, micro-dev first, in nats.
        final_ratios: [finals] ratios of the final runs.
        final: [finals] test loss after the final run, mean over rows and seeds, in nats.
    """

    name: str
    done: np.ndarray
    ratios: np.ndarray
    losses: np.ndarray
    final_ratios: np.ndarray
    final: np.ndarray


def read_recording(table: Path, training: str = "plain", seed: int = 42) -> Recording:
    """Return the recording of a pair.

    Args:
        table: of a pair, as `benchmarks.recorded keep` writes it; that of `benchmarks.landscape`
            lies in the folder `probes` beside it.
        training: how the search run trained.
        seed: of the search run.

    Raises:
        FileNotFoundError: the probes or all final runs at fixed ratios are missing.
    """
    place, job = records.beside(table, "probes"), f"{training}-s{seed}"
    probes = records.read_runs(place).get(job)
    if probes is None:
        raise FileNotFoundError(f"'{place}' holds no {job}; record the probes first")
    finals = [run for run in final_runs(table) if run["fixed"]]
    if not finals:
        raise FileNotFoundError(f"'{table}' holds no run at a fixed ratio; record the runs first")
    by_ratio: dict[float, list[float]] = {}
    for one in finals:
        by_ratio.setdefault(one["ratio"], []).append(float(np.mean(one["test"]["loss"])))
    ratios = sorted(by_ratio)
    steps = sorted(map(int, probes["losses"]))
    return Recording(
        table.stem,
        np.array(steps) / probes["steps"],
        np.array(probes["ratios"]),
        np.array([probes["losses"][str(step)] for step in steps]),
        np.array(ratios),
        np.array([np.mean(by_ratio[ratio]) for ratio in ratios]),
    )


class RecordedWorld:
    """A recording, interpolated between its ratios and phases, with a little roughness.

    Args:
        recording: of a pair.
        seed: of the rows: they are drawn with replacement from the recorded ones, micro-dev from
            micro-dev and dev from dev, so that every seed has rows of its own; seed 0 has the
            recorded ones.
    """

    def __init__(self, recording: Recording, seed: int):
        self._recording = recording
        self._random = np.random.default_rng((seed, 77))
        self.pool = recording.losses.shape[2]
        rows = np.arange(self.pool)
        if seed:
            rows[:MICRO_DEV] = self._random.integers(0, MICRO_DEV, MICRO_DEV)
            rows[MICRO_DEV:] = self._random.integers(MICRO_DEV, self.pool, self.pool - MICRO_DEV)
        self._losses = recording.losses[:, :, rows]
        self._roughness = ROUGHNESS * float(np.ptp(recording.final))

    def _seen(self, ratio: float, done: float) -> np.ndarray:
        """Return every row's loss, [rows]."""
        phase, share = _between(self._recording.done, done)
        before, after = self._losses[phase], self._losses[phase + 1]
        curve = (1 - share) * before + share * after
        place, share = _between(self._recording.ratios, ratio)
        return (1 - share) * curve[place] + share * curve[place + 1]

    def losses(self, ratio: float, rows: Sequence[int], done: float) -> list[float]:
        """Return the loss of each row at the ratio."""
        rough = self._roughness * self._random.standard_normal(len(rows))
        return (self._seen(ratio, done)[list(rows)] + rough).tolist()

    def regret(self, ratio: float) -> float:
        """Return the regret on the test loss after the final runs, in spans."""
        span = float(np.ptp(self._recording.final))
        return _above_lowest(self._recording.final_ratios, self._recording.final, ratio) / span

    def regret_on_dev(self, ratio: float) -> float:
        """Return the regret on the mean of all probed rows at the end of the search, in spans."""
        curve = self._losses[-1].mean(1)
        return _above_lowest(self._recording.ratios, curve, ratio) / float(np.ptp(curve))

    def exact(self, rows: Sequence[int]) -> float:
        """Return the best recorded ratio on these rows at the end of the search."""
        curve = self._losses[-1][:, list(rows)].mean(1)
        return float(self._recording.ratios[int(curve.argmin())])

    def effect(self) -> float:
        """Return the gain of the best ratio at the end of the search, in standard errors."""
        curve = self._losses[-1]
        best = int(curve.mean(1).argmin())
        gaps = curve[0] - curve[best]
        error = float(gaps.std(ddof=1)) / math.sqrt(self.pool)
        return float(gaps.mean()) / error if error > 0 else 0.0


def _between(places: np.ndarray, at: float) -> tuple[int, float]:
    """Return the place at or below `at` and the share of the way to the next."""
    below = int(np.clip(np.searchsorted(places, at, side="right") - 1, 0, len(places) - 2))
    return below, float((at - places[below]) / (places[below + 1] - places[below]))


def _above_lowest(ratios: np.ndarray, curve: np.ndarray, ratio: float) -> float:
    return float(np.interp(ratio, ratios, curve) - curve.min())


def worlds(recordings: Sequence[Recording]) -> dict[str, Callable[[int], Any]]:
    """Return family -> (seed -> world), the recorded pairs after the synthetic families."""
    made: dict[str, Callable[[int], Any]] = {
        family: lambda seed, f=family: SyntheticWorld(f, seed) for family in FAMILIES
    }
    return made | {one.name: lambda seed, r=one: RecordedWorld(r, seed) for one in recordings}
