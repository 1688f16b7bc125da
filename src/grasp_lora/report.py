"""A finished run for people: the search as a picture, the scores as a table.

Reads records and dictionaries; computes nothing that a number of the run depends on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from rich.table import Table

from grasp_lora.runs import read_json, write_text

INK, GRID, BLUE, ORANGE, GREEN = "#22313f", "#d8dee6", "#1f6fb4", "#d9730d", "#2e8b57"
# Orange for worse than the baseline, blue for better: told apart by colour-blind readers too.
REWARDS: Colormap = LinearSegmentedColormap.from_list("rewards", [ORANGE, "#e9ecef", BLUE])

# scores.json key -> column title, digits after the point, factor to the unit of the title
COLUMNS: dict[str, tuple[str, int, float]] = {
    "exact_match": ("exact match", 1, 1.0),
    "token_f1": ("token F1", 1, 1.0),
    "loss": ("loss", 3, 1.0),
    "zeros": ("zeros (%)", 1, 100.0),
}


def plot_search(
    rounds: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    ratio: Mapping[str, Any],
    path: Path,
) -> None:
    """Draw a search into a PNG: ratio, rewards and losses over the optimizer steps.

    Args:
        rounds: the controller's round records, in order; may be empty.
        log: training loss of the search, `step` and `loss` each (nats per token).
        evaluations: dev losses of the final run, `step` and `loss` each (nats).
        ratio: the outcome, `ratio` and `verdict`.
        path: the PNG.
    """
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    tops = figure.subplots(3, 1, sharex=True, height_ratios=[5, 3, 3])
    steps = [float(entry["step"]) for entry in (*rounds, *log)]
    last = max(steps, default=1.0)
    _ratio_panel(tops[0], rounds, ratio, last)
    _reward_panel(tops[1], rounds)
    _loss_panel(tops[2], rounds, log, evaluations)
    for axes in tops:
        _plain(axes)
    tops[2].set_xlabel("optimizer step")
    tops[2].set_xlim(0, max([last, *(float(e["step"]) for e in evaluations)]) * 1.02)
    outcome = f"Search for the prune ratio: {ratio['ratio']:.3f} ({ratio['verdict']})"
    figure.suptitle(outcome, color=INK, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def scores_table(scores: Mapping[str, Any]) -> Table:
    """The systems of a `scores.json` as a table for the terminal, in the order given."""
    table = Table(title=_title(scores))
    table.add_column("system", overflow="fold")
    for title in _titles():
        table.add_column(title, justify="right", no_wrap=True)
    for row in _rows(scores):
        table.add_row(*row)
    return table


def scores_markdown(scores: Mapping[str, Any]) -> str:
    """The same table in Markdown."""
    lines = [f"| system | {' | '.join(_titles())} |", f"|---|{'---:|' * len(COLUMNS)}"]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in _rows(scores))
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def write_report(run: Path) -> Path:
    """Write `report.md` into a finished run folder: outcome, picture and scores.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    ratio, scores = read_json(run / "ratio.json"), read_json(run / "scores.json")
    lines = ["# Prune ratio and scores", "", _outcome(ratio), ""]
    if (run / "ratio.png").exists():
        lines += ["![ratio, rewards and losses over the search](ratio.png)", ""]
    lines += [f"{_title(scores)}. Loss in nats, mean over examples.", "", scores_markdown(scores)]
    lines += [sentence for sentence in (comparison(scores),) if sentence]
    write_text(run / "report.md", "\n".join(lines))
    return run / "report.md"


def comparison(scores: Mapping[str, Any]) -> str:
    """Say in words whether pruning paid, by the test loss; empty without the baselines."""
    losses = {row["slug"]: row["loss"] for row in scores["systems"]}
    names = {row["slug"]: row["name"] for row in scores["systems"]}
    if not {"final", "merged-finetuned"} <= losses.keys():
        return ""
    gap = losses["final"] - losses["merged-finetuned"]
    side = "above" if gap > 0 else "below"
    said = (
        f"The pruned adapter's loss is {abs(gap):.3f} {side} that of the same merge fine-tuned "
        f"unpruned: pruning {'did not help' if gap >= 0 else 'may have helped'} here."
    )
    best = min(losses, key=lambda slug: losses[slug])
    if best != "final":
        said += f" The lowest loss is that of: {names[best]}."
    return said + " One seed and few rows: read small gaps as none.\n"


def _outcome(ratio: Mapping[str, Any]) -> str:
    verdicts = {
        "learned": "while searching, a gain over the lowest ratio was shown on rows the choice "
        "had not seen; what training makes of it, the scores say",
        "flat": "no gain over the lowest ratio could be shown; the ratio is a guess",
        "never-fired": "the search was too short for one round; nothing was learned",
    }
    verdict = ratio["verdict"]
    return f"Ratio **{ratio['ratio']:.3f}**, verdict **{verdict}**: {verdicts.get(verdict, '')}."


def _title(scores: Mapping[str, Any]) -> str:
    counts = {row["n"] for row in scores["systems"] if row.get("n") is not None}
    rows = f", {max(counts)} test rows" if counts else ""
    return f"{scores['task']}, {scores['language']}{rows}, seed {scores['seed']}"


def _titles() -> list[str]:
    return [title for title, _, _ in COLUMNS.values()]


def _rows(scores: Mapping[str, Any]) -> list[list[str]]:
    return [
        [row["name"], *(_cell(row.get(key), *COLUMNS[key][1:]) for key in COLUMNS)]
        for row in scores["systems"]
    ]


def _cell(value: float | None, digits: int, factor: float) -> str:
    return "\N{EN DASH}" if value is None else f"{value * factor:.{digits}f}"


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
    norm = SymLogNorm(_linear_reach(rounds), vmin=-reach, vmax=reach)
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


def _linear_reach(rounds: Sequence[Mapping[str, Any]]) -> float:
    """Return up to which reward the scale is linear: over-pruning costs a hundred times as much
    as good pruning gains, and a linear scale would show the first alone."""
    sizes = sorted(abs(x) for r in rounds for x in r["rewards"] if x)
    return max(sizes[len(sizes) // 4], sizes[-1] / 100) if sizes else 1.0


def _reward_panel(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    axes.set_ylabel("reward (nats, symlog)")
    axes.set_yscale("symlog", linthresh=_linear_reach(rounds))
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
    probed = [(r["step"], r["baseline"]) for r in rounds if r["baseline"] is not None]
    axes.plot(
        [step for step, _ in probed],
        [loss for _, loss in probed],
        "o-",
        color=BLUE,
        markersize=5,
        label="probing rows, before each round",
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


def _plain(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
