"""What `benchmarks.landscape` recorded, as tables and a picture.

    python -m benchmarks.landscape_report docs/results/records/en-*.parquet --picture landscape.png

Of every pair: the final runs by ratio, probes against them (rank correlation, and the regret of
taking the ratio where the probes are lowest), and the rivals of pruning. Differences are paired by
test row, over the seeds that both runs have, a row's values averaged over them first. The standard
error is that of the rows: what other adapters would give is not in it.
"""

import argparse
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import records
from benchmarks.recorded import final_runs
from grasp_lora.report.pictures import BLUE, GREEN, GRID, INK, ORANGE
from grasp_lora.report.run import TITLES

RIVALS = ("source-finetuned", "shrunk", "weights", "weight-decay")
"""What a picture shows beside the ratios, by the beginnings of the names."""
IN_TABLE = (*RIVALS, "learned-weights", "svd-finetuned")
"""What the table of unpruned runs has; other merges are compared in comparison.md."""


class Recorded:
    """All results of a pair, read from its tables."""

    def __init__(self, table: Path, collection: str = records.RUNS):
        self.name = table.stem
        self.finals: dict[str, list[dict[str, Any]]] = {}
        for one in final_runs(table, collection):
            # What was trained on all labels is no rival: it has seen more than twice the rows.
            if not one["name"].endswith("-labelled"):
                self.finals.setdefault(one["name"], []).append(one)
        probes = records.read_runs(records.beside(table, "probes"), collection)
        self.probes = list(probes.values())

    @property
    def metrics(self) -> tuple[str, str]:
        """The two scores that are shown: those of questions, or of headlines."""
        known = next(iter(self.finals.values()))[0]["test"]
        return ("exact_match", "token_f1") if "token_f1" in known else ("rougeL", "chrf")

    @property
    def titles(self) -> str:
        """The names of `metrics`, for a head of columns."""
        return " | ".join(TITLES[metric] for metric in self.metrics)

    def ratios(self) -> list[float]:
        """Return the ratios with a final run, ascending."""
        firsts = (runs[0] for runs in self.finals.values())
        return sorted({one["ratio"] for one in firsts if one["fixed"]})

    def at(self, ratio: float) -> str:
        """Return the name of the run at a ratio."""
        return f"ratio-{ratio}"

    def test(self, name: str, metric: str, seeds: Collection[int] | None = None) -> np.ndarray:
        """Return each test row's value, averaged over the seeds of a run, or over some of them."""
        runs = [one for one in self.finals[name] if seeds is None or one["seed"] in seeds]
        return np.mean([one["test"][metric] for one in runs], axis=0)

    def shared_seeds(self, name: str, other: str) -> set[int]:
        """Return the seeds that two runs have both been made with."""
        return {one["seed"] for one in self.finals[name]} & {
            one["seed"] for one in self.finals[other]
        }

    def dev(self, name: str, best: bool = True) -> float:
        """Return the dev loss at the best or the last epoch, averaged over the seeds."""
        pick = min if best else (lambda losses: losses[-1])
        return float(np.mean([pick([loss for _, loss in one["dev"]]) for one in self.finals[name]]))

    def best_epochs(self, name: str) -> str:
        """Return the epochs that were kept, a number for every seed."""
        steps = [[step for step, _ in one["dev"]] for one in self.finals[name]]
        kept = [one["best_step"] for one in self.finals[name]]
        return ", ".join(str(s.index(k)) for s, k in zip(steps, kept, strict=True))

    def final_curve(self) -> np.ndarray:
        """Return the mean test loss at every ratio."""
        return np.array([self.test(self.at(r), "loss").mean() for r in self.ratios()])


def paired(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the mean difference and its standard error over rows."""
    gaps = values - reference
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps)))


def finals_table(pair: Recorded) -> Iterator[str]:
    """Yield the final runs at fixed ratios."""
    whole = pair.at(0.0)
    yield (
        "| ratio | zeros | seeds | kept epoch | dev, best epoch | dev, last epoch | test loss | "
        f"against ratio 0 | {pair.titles} |"
    )
    yield "|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    for ratio in pair.ratios():
        yield _row(pair, pair.at(ratio), f"{ratio:g}", whole)


def rivals_table(pair: Recorded) -> Iterator[str]:
    """Yield the best ratio chosen on dev beside everything that is not pruned."""
    whole = pair.at(0.0)
    chosen = min((r for r in pair.ratios() if r > 0), key=lambda r: pair.dev(pair.at(r)))
    yield (
        "| run | zeros | seeds | kept epoch | dev, best epoch | dev, last epoch | test loss | "
        f"against the plain merge | {pair.titles} |"
    )
    yield "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    yield _row(pair, pair.at(chosen), f"pruned at {chosen:g} (lowest dev loss)", whole)
    yield _row(pair, whole, "plain merge, 1/2 + 1/2", whole)
    for name in pair.finals:
        if name.startswith(IN_TABLE):
            yield _row(pair, name, name, whole)


def _row(pair: Recorded, name: str, title: str, reference: str) -> str:
    runs = pair.finals[name]
    seeds = pair.shared_seeds(name, reference)
    against = "–"
    if seeds and name != reference:
        losses = (pair.test(one, "loss", seeds) for one in (name, reference))
        against = "{:+.3f} ± {:.3f}".format(*paired(*losses))
    cells = [
        title,
        "–" if runs[0]["zeros"] is None else f"{np.mean([one['zeros'] for one in runs]):.2f}",
        str(len(runs)),
        pair.best_epochs(name),
        f"{pair.dev(name):.3f}",
        f"{pair.dev(name, best=False):.3f}",
        f"{pair.test(name, 'loss').mean():.3f}",
        against,
        *(f"{pair.test(name, metric).mean():.1f}" for metric in pair.metrics),
    ]
    return f"| {' | '.join(cells)} |"


def probes_table(pair: Recorded) -> Iterator[str]:
    """Yield how well each kind of probe foretells the final curve."""
    ratios, final = pair.ratios(), pair.final_curve()
    span = float(np.ptp(final))
    yield (
        f"| training | after steps | {' | '.join(f'{r:g}' for r in ratios)} "
        "| rank correlation | lowest at | regret (spans) |"
    )
    yield f"|---|---:|{'---:|' * len(ratios)}---:|---:|---:|"
    for one in pair.probes:
        places = [one["ratios"].index(ratio) for ratio in ratios]
        for step, losses in one["losses"].items():
            curve = np.mean(losses, axis=1)[places]
            lowest = int(curve.argmin())
            correlation = stats.spearmanr(curve, final).statistic
            regret = (final[lowest] - final.min()) / span
            cells = [
                f"{one['training']}, seed {one['seed']}",
                step,
                *(f"{value:.3f}" for value in curve),
                f"{correlation:+.2f}",
                f"{ratios[lowest]:g}",
                f"{regret:.3f}",
            ]
            yield f"| {' | '.join(cells)} |"
    cells = ["**final runs, test**", "", *(f"{v:.3f}" for v in final), "", "", ""]
    cells[-2] = f"{ratios[int(final.argmin())]:g}"
    yield f"| {' | '.join(cells)} |"
    dev = np.array([pair.dev(pair.at(r)) for r in ratios])
    correlation = stats.spearmanr(dev, final).statistic
    regret = (final[int(dev.argmin())] - final.min()) / span
    cells = ["final runs, dev", "", *(f"{v:.3f}" for v in dev), f"{correlation:+.2f}"]
    yield f"| {' | '.join([*cells, f'{ratios[int(dev.argmin())]:g}', f'{regret:.3f}'])} |"


def shrinks_table(pair: Recorded) -> Iterator[str]:
    """Yield the untrained merge under a uniform shrink, and pruned, on all probing rows."""
    one = next((p for p in pair.probes if p["shrinks"]), None)
    if one is None:
        return
    losses = np.array(one["losses"]["0"])
    whole = losses[0]
    yield "| untrained merge | loss | against the merge |"
    yield "|---|---:|---:|"
    cases = [
        (f"x {factor:g}", np.array(found))
        for factor, found in zip(one["shrinks"]["factors"], one["shrinks"]["losses"], strict=True)
    ]
    cases += [
        (f"pruned at {ratio:g}", losses[i]) for i, ratio in enumerate(one["ratios"]) if ratio > 0
    ]
    for title, found in cases:
        gap, error = paired(found, whole)
        yield f"| {title} | {found.mean():.3f} | {gap:+.3f} ± {error:.3f} |"


def searches_table(pair: Recorded) -> Iterator[str]:
    """Yield each search of the method beside the grid point that dev rows choose.

    The grid is that of the search's own seed where it has enough points, else that of the seed that
    has most. The regret of the ratio is read off that grid's test losses, joined by lines; that of
    the run is the test loss of the method's own final run less that of the grid's choice. Both are
    in spans of the grid's test losses.
    """
    yield (
        "| search | seed | verdict | ratio | grid of seed | its choice on dev | dev, ours "
        "| dev, grid | test, ours | test, grid | span | regret of the ratio | regret of the run |"
    )
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for runs in pair.finals.values():
        for one in runs if runs[0]["fixed"] else ():
            by_seed.setdefault(one["seed"], []).append(one)
    fullest = max(by_seed, key=lambda seed: len(by_seed[seed]))
    for name in ("grasp-restart", "grasp-continue"):
        for one in pair.finals.get(name, ()):
            own = len(by_seed.get(one["seed"], ())) >= LEAST_POINTS
            seed = one["seed"] if own else fullest
            points = sorted(by_seed[seed], key=lambda point: point["ratio"])
            if len(points) < LEAST_POINTS:
                continue
            chosen = min(points, key=_dev_of)
            ratios = [point["ratio"] for point in points]
            tests = [float(np.mean(point["test"]["loss"])) for point in points]
            ours, theirs = (float(np.mean(run["test"]["loss"])) for run in (one, chosen))
            span = max(tests) - min(tests)
            at_ratio = float(np.interp(one["ratio"], ratios, tests))
            cells = [
                name,
                str(one["seed"]),
                str(one["verdict"]),
                f"{one['ratio']:.3f}",
                str(seed),
                f"{chosen['ratio']:g}",
                f"{_dev_of(one):.3f}",
                f"{_dev_of(chosen):.3f}",
                f"{ours:.3f}",
                f"{theirs:.3f}",
                f"{span:.3f}",
                f"{(at_ratio - theirs) / span:+.3f}",
                f"{(ours - theirs) / span:+.3f}",
            ]
            yield f"| {' | '.join(cells)} |"


def _dev_of(one: dict[str, Any]) -> float:
    return min(loss for _, loss in one["dev"])


LEAST_POINTS = 3
"""Ratios with a final run of a seed, ratio 0 among them, that make a grid to be held against."""

SECTIONS = {
    "Final runs by ratio": finals_table,
    "Do probes foretell them?": probes_table,
    "The method beside the grid": searches_table,
    "The rivals of pruning": rivals_table,
    "Before any training": shrinks_table,
}


def draw(pairs: Sequence[Recorded], path: Path) -> None:
    """Draw probe curves and final curves, a row of two pictures for every pair."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 3.4 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), 2, squeeze=False)
    colours = {"plain": BLUE, "random": ORANGE, "branches": GREEN}
    for pair, (left, right) in zip(pairs, axes, strict=True):
        for one in pair.probes:
            if one["seed"] != pair.probes[0]["seed"]:
                continue
            steps = list(one["losses"])
            for i, step in enumerate(steps):
                left.plot(
                    one["ratios"],
                    np.mean(one["losses"][step], axis=1),
                    color=colours[one["training"]],
                    alpha=(i + 1) / len(steps),
                    label=f"{one['training']}, after {step} steps",
                )
        left.set_title(f"{pair.name}: probes (micro-dev + dev)", fontsize=9)
        left.set_ylabel("loss (nats)")
        left.set_visible(bool(pair.probes))
        if pair.probes:
            left.legend(fontsize=6, frameon=False)
        ratios = pair.ratios()
        right.plot(ratios, pair.final_curve(), "o-", color=INK, label="test, best epoch")
        for best, style in ((True, "o-"), (False, "o--")):
            label = f"dev, {'best' if best else 'last'} epoch"
            values = [pair.dev(pair.at(r), best) for r in ratios]
            right.plot(ratios, values, style, color=BLUE, markersize=3, label=label)
        rivals = [n for n in pair.finals if n.startswith(RIVALS)]
        for i, name in enumerate(rivals):
            value = pair.test(name, "loss").mean()
            right.axhline(value, color=GRID, linewidth=0.8)
            place = 0.02 + 0.13 * (i % 6)
            right.text(place, value, name, fontsize=6, color=INK, va="bottom")
        right.set_title(f"{pair.name}: after the final run (lines: unpruned rivals)", fontsize=9)
        right.legend(fontsize=6, frameon=False)
        for axis in (left, right):
            axis.set_xlabel("ratio")
            axis.grid(color=GRID, linewidth=0.5)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tables", nargs="+", type=Path, help="of recorded pairs")
    parser.add_argument("--collection", default=records.RUNS, help="what is read of them")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    pairs: list[Recorded] = []
    for table in options.tables:
        pair = Recorded(table, options.collection)
        if 0.0 not in pair.ratios() or len(pair.ratios()) < LEAST_POINTS:
            print(f"{table.stem}: no final runs yet at ratio 0 and two others")
            continue
        pairs.append(pair)
    for pair in pairs:
        for title, table in SECTIONS.items():
            print(f"\n### {pair.name}: {title}\n")
            print("\n".join(table(pair)))
    if options.picture is not None and pairs:
        draw(pairs, options.picture)


if __name__ == "__main__":
    main()
