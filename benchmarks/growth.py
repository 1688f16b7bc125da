"""How the time of a search grows with what it is given: rows, probes, tokens, candidates, entries.

    OMP_NUM_THREADS=2 python -m benchmarks.growth --json growth.json --picture growth.png

A point is a whole small search (input norms, training, rounds) through the real Trainer. One
quantity is varied at a time, the others stay at the base; the points of a quantity take turns, and
each is the median of `--repeat` searches. A straight line is fitted to the medians: its slope is
the price of one more unit, its R^2 says whether a straight line is the right picture.

JSON: `slopes`, seconds per unit, by quantity; `rows`, a row per quantity with points, slope,
intercept, R^2 and the slope in words.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.search import TARGETS, Sizes, search_side
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.models.backbones import Backbone
from grasp_lora.report.pictures import BLUE, GRID, INK, ORANGE

BASE = Sizes(
    rows=16,
    epochs=1,
    length=96,
    pool=32,
    rank=8,
    controller=ControllerConfig(rounds=1, rows=8),
)
QUICK = replace(BASE, rows=4, batch_size=2, length=12, pool=8, rank=2)


@dataclass(frozen=True)
class Quantity:
    """Something that the time grows with.

    Attributes:
        name: key of the JSON.
        axis: label of the picture's axis.
        unit: of the slope, in the singular.
        values: what is measured.
        quick: what is measured with `--quick`.
        sizes: (base, value) -> sizes of the search.
    """

    name: str
    axis: str
    unit: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    sizes: Callable[[Sizes, int], Sizes]


def _probing(base: Sizes, rows: int) -> Sizes:
    controller = replace(base.controller, rows=rows)
    return replace(base, controller=controller, pool=max(rows, base.pool))


def _candidates(base: Sizes, count: int) -> Sizes:
    return replace(base, controller=replace(base.controller, candidates=count))


QUANTITIES = (
    Quantity(
        "train_rows",
        "training rows (one epoch)",
        "training row",
        (8, 16, 24, 32, 40),
        (4, 8),
        lambda base, value: replace(base, rows=value),
    ),
    Quantity(
        "probing_rows",
        "probing rows of the round",
        "probing row",
        (4, 8, 16, 24, 32),
        (2, 4),
        _probing,
    ),
    Quantity(
        "length",
        "tokens of every row",
        "token of every row",
        (32, 64, 96, 128, 192, 256),
        (12, 24),
        lambda base, value: replace(base, length=value),
    ),
    Quantity(
        "candidates",
        "candidates of the round",
        "candidate",
        (1, 2, 4, 6, 8),
        (1, 2),
        _candidates,
    ),
    Quantity(
        "adapter_entries",
        "adapter entries (millions)",
        "million adapter entries",
        (4, 8, 16, 32, 64),
        (2, 4),
        lambda base, value: replace(base, rank=value),
    ),
)


def measure(backbone: Backbone, quantity: Quantity, options: argparse.Namespace) -> dict[str, Any]:
    """Return a quantity's points and the line through them."""
    base = QUICK if options.quick else BASE
    values = quantity.quick if options.quick else quantity.values
    ways = {
        str(value): partial(run_search, backbone, quantity.sizes(base, value)) for value in values
    }
    seconds = common.in_turns(ways, 1 if options.quick else options.repeat)
    places = [_place(backbone, quantity, value) for value in values]
    points = [
        {"value": value, "x": x, "seconds": found, "median": common.median(found)}
        for value, x, found in zip(values, places, seconds.values(), strict=True)
    ]
    slope, intercept, r2 = line(places, [point["median"] for point in points])
    return {
        "quantity": quantity.name,
        "points": points,
        "slope": slope,
        "intercept": intercept,
        "r2": r2,
        "words": f"one more {quantity.unit}: {duration(slope)}",
    }


def run_search(backbone: Backbone, sizes: Sizes) -> None:
    """Run a search from its beginning to its end."""
    with tempfile.TemporaryDirectory() as folder:
        side = search_side(backbone.model, backbone, sizes, Path(folder))
        side.trainer.train()
        side.live.model.unload()  # type: ignore[operator]


def _place(backbone: Backbone, quantity: Quantity, value: int) -> float:
    """Return where a point lies on its axis: the entries of a rank, else the value itself."""
    if quantity.name != "adapter_entries":
        return float(value)
    merged = common.adapters(backbone.model, TARGETS, value, seed=0)
    return sum(m.A.numel() + m.B.numel() for m in merged.values()) / 1e6


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least-squares line; R^2 is 1 where y is constant."""
    slope, intercept = np.polyfit(x, y, 1)
    left = np.sum((np.asarray(y) - (slope * np.asarray(x) + intercept)) ** 2)
    spread = np.sum((np.asarray(y) - np.mean(y)) ** 2)
    return float(slope), float(intercept), float(1 - left / spread) if spread else 1.0


def duration(seconds: float) -> str:
    """Return seconds as text, in ms below one second."""
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{seconds * 1000:.3g} ms"


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw a panel for every quantity into a PNG."""
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    panels = figure.subplots(1, len(rows))
    for axes, row, quantity in zip(panels, rows, QUANTITIES, strict=True):
        _panel(axes, row, quantity)
    panels[0].set_ylabel("seconds of a search", color=INK)
    figure.suptitle(title, color=INK, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, row: dict[str, Any], quantity: Quantity) -> None:
    x = [point["x"] for point in row["points"]]
    each = [(point["x"], seconds) for point in row["points"] for seconds in point["seconds"]]
    ends = [0.0, max(x)]
    axes.plot(*zip(*each, strict=True), "o", color=GRID, markersize=4, label="each search")
    axes.plot(
        ends,
        [row["slope"] * end + row["intercept"] for end in ends],
        color=ORANGE,
        label="straight line",
    )
    axes.plot(x, [point["median"] for point in row["points"]], "o", color=BLUE, label="median")
    axes.set_xlabel(quantity.axis, color=INK)
    words = row["words"].replace(": ", ":\n")
    axes.set_title(f"{words}, $R^2$ = {row['r2']:.3f}", fontsize=9, color=INK)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if quantity is QUANTITIES[0]:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all quantities, print and draw them and return the result."""
    parser = common.parser(__doc__)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG of all quantities")
    parser.add_argument("--repeat", type=int, default=3, help="searches behind a point")
    options = parser.parse_args(argv)
    common.ready(options)
    backbone = common.open_backbone(options)
    rows = [measure(backbone, quantity, options) for quantity in QUANTITIES]
    title = f"Time of a small search: {backbone.public_name}, {backbone.dtype}".replace(
        "torch.", ""
    )
    common.table(
        title,
        ["quantity", "slope in words", "at none (s)", "R^2"],
        [[row["quantity"], row["words"], row["intercept"], row["r2"]] for row in rows],
    )
    if options.picture is not None:
        draw(rows, title, options.picture)
    figures = {"slopes": {row["quantity"]: row["slope"] for row in rows}}
    base = asdict(QUICK if options.quick else BASE)
    settings = vars(options) | {"base": base}
    return common.write_result(options.json, figures, rows, settings, backbone.device)


if __name__ == "__main__":
    main()
