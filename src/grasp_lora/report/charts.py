"""Charts of a page, as numbers: where lines, bands and points go in an SVG of 400 by 260 units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
COLOURS = 8
"""Colours of series; a series beyond them has that of an earlier one."""


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        name: its name in the legend.
        points: (x, y); those that are not finite are left out.
        band: (x, low, high) around the points.
        line: whether the points are joined.
        dots: whether the points are drawn.
        colour: number of its colour, in [0, COLOURS).
    """

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    line: bool = True
    dots: bool = True
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: what it shows; also its text for those who cannot see it.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        series: what is drawn, the last on top.
        marker: (x, name) of a vertical line; None draws none.
        note: how to read it.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    marker: tuple[float, str] | None = None
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: place of the lowest value, in units of the SVG.
        end: place of the highest value.
        ticks: values with a label.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Return the place of a value, in units of the SVG to one decimal."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def labels(self) -> list[tuple[float, str]]:
        """Return (place, text) of the ticks."""
        return [(self.at(one), f"{one + 0.0:.6g}") for one in self.ticks]


@dataclass(frozen=True)
class Drawn:
    """A series in units of the SVG: the path of its line, that of its band, and its points."""

    series: Series
    path: str
    band: str
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Drawing:
    """A chart in units of the SVG."""

    chart: Chart
    x: Axis
    y: Axis
    series: tuple[Drawn, ...]


def axis(values: Sequence[float], start: float, end: float, counts: bool = False) -> Axis:
    """Return an axis over all finite values, with ticks at round numbers.

    Args:
        values: the values.
        start: place of the lowest, in units of the SVG.
        end: place of the highest.
        counts: whether ticks are whole numbers where all values are.
    """
    known = [one for one in values if math.isfinite(one)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    room = 0.04 * (high - low)
    low, high = low - room, high + room
    counts = counts and all(float(one).is_integer() for one in known)
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=counts)
    ticks = locator.tick_values(low, high)
    # Ends of floating-point steps, such as 0.30000000000000004, are no labels.
    inside = tuple(round(float(one), 12) for one in ticks if low <= one <= high)
    return Axis(low, high, start, end, inside)


def drawing(chart: Chart) -> Drawing:
    """Return a chart in units of the SVG."""
    points = [one for series in chart.series for one in series.points]
    bands = [one for series in chart.series for one in series.band]
    across = [x for x, *_ in (*points, *bands)]
    across += [] if chart.marker is None else [chart.marker[0]]
    x = axis(across, _LEFT, WIDTH - _RIGHT, counts=True)
    y = axis([v for _, *values in (*points, *bands) for v in values], HEIGHT - _BOTTOM, _TOP)
    return Drawing(chart, x, y, tuple(_drawn(series, x, y) for series in chart.series))


def _drawn(series: Series, x: Axis, y: Axis) -> Drawn:
    finite = [(a, b) for a, b in series.points if math.isfinite(a) and math.isfinite(b)]
    places = [(x.at(a), y.at(b)) for a, b in finite]
    known = [one for one in series.band if all(map(math.isfinite, one))]
    edge = [(x.at(a), y.at(high)) for a, _, high in known]
    edge += [(x.at(a), y.at(low)) for a, low, _ in reversed(known)]
    told = [f"{series.name}: {a:.4g}, {b:.4g}" for a, b in finite]
    return Drawn(
        series,
        _path(places) if series.line else "",
        f"{_path(edge)}Z" if edge else "",
        tuple((*place, text) for place, text in zip(places, told, strict=True)),
    )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g},{b:g}" for a, b in places) if places else ""
