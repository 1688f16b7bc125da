"""Draw pictures of runs: a search, the times of a run, and a comparison of methods."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from grasp_lora.base.files import machine_names
from grasp_lora.base.words import in_picture
from grasp_lora.report.run import NATIVE

INK, GRID, BLUE, ORANGE, GREEN = "#22313f", "#d8dee6", "#1f6fb4", "#d9730d", "#2e8b57"
# Orange is worse and blue is better than the reference of the round. Colour-blind readers can
# distinguish these two.
REWARDS: Colormap = LinearSegmentedColormap.from_list("rewards", [ORANGE, "#e9ecef", BLUE])
# Related parts have related hues; the order in the bar also distinguishes the parts.
PART_COLOURS: Mapping[str, str] = {
    "step": BLUE,
    "baseline": "#f5c08a",
    "probe": ORANGE,
    "masks": "#a33b20",
    "dev": GREEN,
    "generate": "#7b5ea7",
    "score": "#c5b3e0",
    "checkpoint": "#17616b",
    "load": "#4fa3a5",
    "write": "#a9d6d5",
    "idle": "#dfdcd5",
}


def plot_search(
    rounds: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    ratio: Mapping[str, Any],
    path: Path,
) -> None:
    """Draw a search as a PNG: ratio, rewards and losses over the optimizer steps.

    Args:
        rounds: the controller's round records, in order; may be empty.
        log: training loss of the search; each entry has `step` and `loss` (nats per token).
        evaluations: dev losses of the final run; each entry has `step` and `loss` (nats).
        ratio: the outcome, with `ratio` and `verdict`.
        path: path of the PNG; its folder is made.
    """
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    tops = figure.subplots(3, 1, sharex=True, height_ratios=[5, 3, 3])
    steps = [float(entry["step"]) for entry in (*rounds, *log)]
    last = max(steps, default=1.0)
    _ratio_panel(tops[0], rounds, ratio, last)
    _reward_panel(tops[1], rounds)
    _loss_panel(tops[2], rounds, log, evaluations)
    for axes in tops:
        _style_axes(axes)
    tops[2].set_xlabel("optimizer step")
    tops[2].set_xlim(0, max([last, *(float(e["step"]) for e in evaluations)]) * 1.02)
    outcome = f"Search for the prune ratio: {ratio['ratio']:.3f} ({ratio['verdict']})"
    figure.suptitle(outcome, color=INK, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


_TRIALS = (BLUE, ORANGE, GREEN, "#7b5ea7", "#17616b")


def plot_choice(choice: Mapping[str, Any], path: Path) -> None:
    """Draw a choice as a PNG: the held loss of each trial by epoch, and the best without training.

    Args:
        choice: the content of `recipe.json`.
        path: path of the PNG; its folder is made.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    trials = [one for one in choice["tried"] if one["curve"] and not one["refused"]]
    for one, colour in zip(trials, _TRIALS, strict=False):
        shipped = "shipped: " if one["shipped"] else ""
        # JSON has null for a loss that is not finite.
        points = [(n, loss) for n, loss in enumerate(one["curve"]) if loss is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=shipped + one["says"])
        if one["epochs"] is not None:
            marked = ([one["epochs"]], [one["dev_loss"]])
            axes.plot(*marked, color=colour, marker="*", markersize=16, linestyle="none")
    simple = choice["simple"]
    if simple is not None:
        axes.axhline(simple["dev_loss"], color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"best without training: {simple['name']}",
            (1, simple["dev_loss"]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=INK,
        )
    axes.set_xlabel("epochs on the train examples")
    axes.set_ylabel("loss of the held examples (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if trials:
        axes.legend(loc="upper right", fontsize=9)
    _style_axes(axes)
    figure.suptitle("What was tried; a star marks the best epoch", color=INK, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


class _Point(NamedTuple):
    ratio: float
    score: float
    cost: float
    interval: tuple[float | None, float | None]


def plot_comparison(found: Mapping[str, Any], folder: Path) -> None:
    """Draw a `comparison.json` as three PNGs: score against cost, score against ratio, and cost.

    The score is the first metric of the first test set. The cost is in seconds, or in tokens if the
    runs were made on more than one machine. Of the points only those of the Pareto front have a
    name. The files are `pareto.png`, `ratios.png` and
    `cost.png`. Nothing is written if no row has scores.
    """
    rows = [row for row in found["rows"] if row["scores"]]
    if not rows:
        return
    test = next(iter(rows[0]["scores"]))
    metric = next(iter(rows[0]["scores"][test]))
    runs: dict[str, list[_Point]] = {}
    unit = "seconds" if len(machine_names(rows)) < 2 else "tokens"
    for row in rows:
        point = _Point(
            row["ratio"],
            row["scores"][test][metric],
            row[unit],
            row["intervals"][test][metric],
        )
        runs.setdefault(row["method"], []).append(point)
    folder.mkdir(parents=True, exist_ok=True)
    front = pareto_front(_means(runs), lower=metric in NATIVE)
    for draw, name, height in (
        (partial(_pareto_panel, unit=unit, front=front), "pareto.png", 5.0),
        (partial(_ratios_panel, front=front), "ratios.png", 5.0),
        (partial(_cost_panel, unit=unit), "cost.png", 1 + 0.28 * len(runs)),
    ):
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots()
        draw(axes, runs, in_picture(f"{metric}, {test}"))
        _style_axes(axes)
        _separate_names(figure, axes)
        figure.savefig(folder / name, dpi=130)


_Runs = Mapping[str, Sequence[_Point]]
"""Method -> points of its runs."""
_CHOSEN_FROM = ("grid-0", "adaptive-0")
_NAME_GID = "name"
_NAME_STEP = 2
"""Distance in points by which a name is moved at once."""
_OUR_METHODS = ("grasp", "late")


def _pareto_panel(axes: Axes, runs: _Runs, label: str, unit: str, front: Sequence[str]) -> None:
    means = _means(runs)
    for method, (cost, score) in means.items():
        colour = _method_colour(method)
        faint = 1.0 if method in front else 0.45
        ends = (p.interval for p in runs[method])
        known = [(low, high) for low, high in ends if low is not None]
        if known:
            low, high = (_mean_of(ends) for ends in zip(*known, strict=True))
            axes.plot([cost] * 2, [low, high], color=colour, linewidth=0.8, alpha=0.5 * faint)
        axes.plot(cost, score, "o", color=colour, alpha=faint)
    axes.plot(*zip(*(means[name] for name in front), strict=True), color=INK, linewidth=0.6)
    # The names of all methods would overlap; `cost.png` has them all.
    for name in front:
        _name_point(axes, name, *means[name])
    axes.set_xlim(left=0)
    axes.margins(0.1)
    axes.set_xlabel(f"{unit} from the two adapters to the final one")
    axes.set_ylabel(f"{label} (lines: 95 % intervals of a run)")


def _means(runs: _Runs) -> dict[str, tuple[float, float]]:
    """Return method -> mean cost and mean score, without the runs that a method chooses from."""
    return {
        name: (_mean_of(p.cost for p in points), _mean_of(p.score for p in points))
        for name, points in runs.items()
        if not name.startswith(_CHOSEN_FROM)
    }


def pareto_front(means: Mapping[str, tuple[float, float]], lower: bool = False) -> list[str]:
    """Return the names that no other beats in cost and score at once, cheapest first.

    Args:
        means: name -> (cost, score).
        lower: whether a lower score is better.
    """
    sign = 1 if lower else -1
    front: list[str] = []
    least = math.inf
    for name in sorted(means, key=lambda name: (means[name][0], sign * means[name][1])):
        if sign * means[name][1] < least:
            least = sign * means[name][1]
            front.append(name)
    return front


def _ratios_panel(axes: Axes, runs: _Runs, label: str, front: Sequence[str]) -> None:
    for prefix, colour in zip(_CHOSEN_FROM, (BLUE, GREEN), strict=True):
        grid = [points for method, points in runs.items() if method.startswith(prefix)]
        if grid:
            means = [(points[0].ratio, _mean_of(p.score for p in points)) for points in grid]
            axes.plot(*zip(*means, strict=True), "-", color=colour, label=prefix[:-2])
        for points in grid:
            for point in points:
                axes.plot(point.ratio, point.score, ".", color=colour)
    for point in runs.get("average-finetuned", ()):
        axes.axhline(point.score, color=INK, linestyle=":", linewidth=0.8, zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate("unpruned", (1.0, point.score), fontsize=8, color=INK, **place)
    for method, points in runs.items():
        if method.startswith("grasp"):
            for point in points:
                axes.plot(point.ratio, point.score, "*", color=ORANGE, markersize=11)
            if method in front:
                _name_point(axes, method, points[0].ratio, points[0].score)
    axes.set_xlim(left=-0.02)
    axes.set_xlabel("ratio (fraction removed)")
    axes.set_ylabel(label)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def _cost_panel(axes: Axes, runs: _Runs, _label: str, unit: str) -> None:
    means = {method: _mean_of(p.cost for p in points) for method, points in runs.items()}
    dear = {m: s for m, s in means.items() if s > 0 and not m.startswith(_CHOSEN_FROM)}
    axes.barh(list(dear), list(dear.values()), color=[_method_colour(method) for method in dear])
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} from the two adapters to the final one")


def _method_colour(method: str) -> str:
    return ORANGE if method.startswith(_OUR_METHODS) else BLUE


def _name_point(axes: Axes, name: str, x: float, y: float) -> None:
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.4, "relpos": (0, 0)}
    line |= {"shrinkA": 0, "shrinkB": 0}
    named = axes.annotate(
        name, (x, y), fontsize=7, color=INK, xytext=(4, 3), textcoords="offset points",
        arrowprops=line,
    )  # fmt: skip
    named.set_gid(_NAME_GID)


def _separate_names(figure: Figure, axes: Axes) -> None:
    """Move the names of points up until none overlaps; a line joins each name to its point."""
    figure.draw_without_rendering()  # text positions are known only after the layout
    names = [
        text for text in axes.texts if isinstance(text, Annotation) and text.get_gid() == _NAME_GID
    ]
    placed: list[Bbox] = []
    for named in sorted(names, key=lambda one: one.xy[1]):
        box = Text.get_window_extent(named)
        while any(box.overlaps(other) for other in placed):
            right, up = named.xyann
            named.xyann = (right, up + _NAME_STEP)
            box = Text.get_window_extent(named)
        placed.append(box)


def _mean_of(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def plot_profile(profile: Mapping[str, Any], path: Path) -> None:
    """Draw a `profile.json` as a PNG: one bar per stage in seconds, made of its parts.

    Args:
        profile: `wall_seconds`, `stages` (stage -> part -> `seconds`) and `parts`, in order.
        path: path of the PNG; its folder is made.
    """
    wall = profile["wall_seconds"]
    stages = {in_picture(name): parts for name, parts in profile["stages"].items() if parts}
    figure = Figure(figsize=(9, 2.4 + 0.34 * len(stages)), layout="constrained")
    axes = figure.subplots()
    ends = _part_bars(axes, stages, profile["parts"], wall)
    for row, end in enumerate(ends):
        label = f"{end:.{2 if end < 10 else 1}f} s, {_percentage(end, wall)}"
        axes.annotate(
            label,
            (end, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(ends))
    axes.set_xlabel("wall time (s)")
    _style_axes(axes)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"Where the time went: {wall:.1f} s", color=INK, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _part_bars(
    axes: Axes, stages: Mapping[str, Mapping[str, Any]], parts: Iterable[str], wall: float
) -> list[float]:
    """Draw the parts of every stage; return the end of each stage's bar, in seconds."""
    ends = [0.0] * len(stages)
    for part in parts:
        widths = [found[part]["seconds"] if part in found else 0.0 for found in stages.values()]
        if sum(widths) > 0:
            axes.barh(
                list(stages),
                widths,
                left=ends,
                color=PART_COLOURS[part],
                edgecolor="white",
                linewidth=0.4,
                label=f"{part} {_percentage(sum(widths), wall)}",
            )
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    return ends


def _percentage(seconds: float, wall: float) -> str:
    return f"{100 * seconds / wall:.1f} %"


def _ratio_panel(
    axes: Axes, rounds: Sequence[Mapping[str, Any]], ratio: Mapping[str, Any], last: float
) -> None:
    axes.set_ylabel("prune ratio")
    axes.axhline(ratio["ratio"], color=GREEN, linestyle=(0, (5, 3)), linewidth=1.6, zorder=2)
    axes.annotate(
        f"ρ* = {ratio['ratio']:.3f}",
        (1.0, ratio["ratio"]),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=GREEN,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    if not rounds:
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "no round fired", transform=axes.transAxes, ha="center", color=INK)
        return
    steps = [r["step"] for r in rounds]
    mu, sigma = [r["mu"] for r in rounds], [r["sigma"] for r in rounds]
    low = [max(0.0, m - s) for m, s in zip(mu, sigma, strict=True)]
    high = [min(1.0, m + s) for m, s in zip(mu, sigma, strict=True)]
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.10, linewidth=0, label="policy μ ± σ")
    axes.plot(steps, mu, color=BLUE, alpha=0.45, linewidth=1)
    path = [rounds[0]["ratio_before"], *(r["ratio"] for r in rounds), rounds[-1]["ratio"]]
    axes.step([0, *steps, last], path, where="post", color=INK, linewidth=2, label="current ratio")
    masks = [0.0, *(r["mask_ratio"] for r in rounds), rounds[-1]["mask_ratio"]]
    if masks != path:
        axes.step(
            [0, *steps, last],
            masks,
            where="post",
            color=INK,
            linewidth=1.2,
            linestyle=":",
            label="ratio of the mask in force",
        )
    _candidates(axes, rounds)
    axes.set_ylim(-0.03, max(0.85, *high, *(c for r in rounds for c in r["candidates"])) + 0.04)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=4, frameon=False, fontsize=9)


def _candidates(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    trials = [
        (r["step"], candidate, reward)
        for r in rounds
        for candidate, reward in zip(r["candidates"], r["rewards"], strict=True)
    ]
    seen = [trial for trial in trials if trial[2] is not None]
    lost = [trial for trial in trials if trial[2] is None]
    reach = max((abs(reward) for *_, reward in seen), default=0.0) or 1.0
    norm = SymLogNorm(_linear_range(rounds), vmin=-reach, vmax=reach)
    axes.scatter(
        [step for step, _, _ in seen],
        [candidate for _, candidate, _ in seen],
        c=[reward for *_, reward in seen],
        cmap=REWARDS,
        norm=norm,
        s=46,
        edgecolors=INK,
        linewidths=0.7,
        zorder=4,
        label="candidate",
    )
    if lost:
        axes.scatter(
            [step for step, _, _ in lost],
            [candidate for _, candidate, _ in lost],
            marker="x",
            color=INK,
            zorder=4,
            label="lost trial (NaN)",
        )
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes made by subplots belong to a figure"
    bar = figure.colorbar(ScalarMappable(norm, REWARDS), ax=axes, pad=0.01, aspect=28)
    bar.set_label("reward (nats)")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _linear_range(rounds: Sequence[Mapping[str, Any]]) -> float:
    """Return the absolute reward, in nats, up to which the symlog scale is linear.

    Over-pruning loses a hundred times as much as good pruning gains, so a fully linear scale would
    show only the losses.
    """
    sizes = sorted(abs(x) for r in rounds for x in r["rewards"] if x)
    return max(sizes[len(sizes) // 4], sizes[-1] / 100) if sizes else 1.0


def _reward_panel(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    axes.set_ylabel("reward (nats, symlog)")
    axes.set_yscale("symlog", linthresh=_linear_range(rounds))
    axes.axhline(0, color=INK, linewidth=0.8)
    best: list[tuple[float, float]] = []
    for r in rounds:
        rewards = [reward for reward in r["rewards"] if reward is not None]
        axes.plot([r["step"]] * len(rewards), rewards, "o", color=BLUE, alpha=0.35, markersize=5)
        if rewards:
            best.append((r["step"], max(rewards)))
            axes.vlines(r["step"], min(rewards), max(rewards), color=BLUE, alpha=0.35)
    steps, tops = [step for step, _ in best], [reward for _, reward in best]
    axes.plot(steps, tops, color=BLUE, linewidth=1.4, label="best of the round")
    held = [(r["step"], max(x for x in r["rewards"] if x is not None)) for r in _committed(rounds)]
    axes.plot(
        [step for step, _ in held],
        [reward for _, reward in held],
        "o",
        color=BLUE,
        markeredgecolor=INK,
        markersize=7,
        label="committed",
    )
    if rounds:
        axes.legend(loc="best", frameon=False, fontsize=9)


def _committed(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [r for r in rounds if r["committed"] and any(x is not None for x in r["rewards"])]


def _loss_panel(
    axes: Axes,
    rounds: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
) -> None:
    axes.set_ylabel("loss (nats)")
    steps, losses = [e["step"] for e in log], [e["loss"] for e in log]
    axes.plot(steps, losses, color=INK, alpha=0.25, linewidth=1, label="train, each step")
    based = any(r["baseline"] is not None for r in rounds)
    references = [(r["step"], r["baseline"] if based else _lowest_trial(r)) for r in rounds]
    probed = [(step, loss) for step, loss in references if loss is not None]
    axes.plot(
        [step for step, _ in probed],
        [loss for _, loss in probed],
        "o-",
        color=BLUE,
        markersize=5,
        label=f"probing examples, {'before each round' if based else 'lowest ratio of each round'}",
    )
    axes.plot(
        [e["step"] for e in evaluations],
        [e["loss"] for e in evaluations],
        "s--",
        color=GREEN,
        markersize=5,
        label="dev, final run (its own steps)",
    )
    axes.legend(loc="best", frameon=False, fontsize=9)


def _lowest_trial(record: Mapping[str, Any]) -> float | None:
    """Return the loss at the lowest finite ratio of a round, the reference of its rewards."""
    tried = zip(record["candidates"], record["losses"], strict=True)
    finite = [(ratio, loss) for ratio, loss in tried if loss is not None]
    return min(finite)[1] if finite else None


def _style_axes(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
