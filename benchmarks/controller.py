"""The laboratory: how well each way to search finds the ratio, without any model.

    OMP_NUM_THREADS=1 python -m benchmarks.controller --json controller.json --picture FILE.png
    python -m benchmarks.controller --json controller.json --add --only TPE GP   # into that file
    python -m benchmarks.controller --recordings docs/results/records/en-ar.parquet  # and a pair
    python -m benchmarks.controller --recordings docs/results/records/en-ar.parquet --recorded-only

Curves, rows and the seeds of the searches are the same for every way. Regret is the loss at the
ratio found less the least loss after the final run, in spans of the curve between 0 and 0.8; of
`shallow`, whose gain is 0.02 nats, and `steep`, whose rise is several, in nats; flat families have
none. With `--on dev` it is that on the curve that all probed rows give together at the end of the
search.

The `floor` is the exact minimum of the rows, without roughness: `fixed` of the 16 micro-dev rows,
`all` of micro-dev and dev. Verdicts are judged at 24 probes: `flat_called_flat` on the families
without any slope, `clear_called_flat` on all searches whose gain is at least 3 standard errors of
66 new rows; the power table has the verdict by that gain. The constants of the library were set on
seeds below 8000; these start at 20000.

JSON: `default`, the name of the default; `controllers`, by name: `regret_24`, `regret_51`,
`regret_150` (by family, and `mean` over those in spans), `forwards` likewise by number of probes,
`flat_called_flat`, `clear_called_flat`, `interval_covers` (a ratio as good as the best lies in the
interval), `power`; `floor`, likewise.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.controllers import CONTROLLERS, DEFAULT, available, floor, limited
from benchmarks.worlds import (
    FAMILIES,
    IN_NATS,
    IN_SPANS,
    MICRO_DEV,
    Recording,
    read_recording,
    worlds,
)
from grasp_lora.base.files import read_json
from grasp_lora.report.pictures import BLUE, INK, ORANGE

PROBES = (24, 51, 150)
FLAT = ("flat", "flat, heavy")
CLEAR = 3.0
EFFECTS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, float("inf"))
"""Borders of the power table, in standard errors of a gain over ratio 0."""


def one_search(
    name: str,
    recordings: Sequence[Recording],
    on_dev: bool,
    task: tuple[str, int, int],
) -> dict[str, Any]:
    """Return what one search found; `task` is (family, probes, seed)."""
    torch.set_num_threads(1)
    family, probes, seed = task
    world = worlds(recordings)[family](seed)
    effect = world.effect()
    found = CONTROLLERS[name].search(world, probes, seed)
    regret = world.regret_on_dev if on_dev else world.regret
    return {
        "family": family,
        "probes": probes,
        "seed": seed,
        "ratio": found.ratio,
        "regret": regret(found.ratio),
        "verdict": found.verdict,
        "forwards": found.forwards,
        "effect": effect,
        "covered": None if found.interval is None else _covers(world.regret, found.interval),
    }


def _covers(regret: Callable[[float], float], interval: tuple[float, float]) -> bool:
    """Return whether an interval holds a ratio that is the best, or within 0.1 % of the span."""
    return min(regret(float(ratio)) for ratio in np.linspace(*interval, 81)) <= 0.001


def searches(
    name: str,
    families: Sequence[str],
    probes: Sequence[int],
    seeds: Sequence[int],
    recordings: Sequence[Recording],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return all searches of a way."""
    tasks = [
        (family, count, seed)
        for count in probes
        if count <= CONTROLLERS[name].most_probes
        for family in families
        for seed in limited(CONTROLLERS[name], seeds)
    ]
    work = partial(one_search, name, recordings, options.on == "dev")
    if options.jobs == 1:
        return [work(task) for task in tasks]
    with ProcessPoolExecutor(options.jobs) as pool:
        return list(pool.map(work, tasks, chunksize=8))


def by_family(
    rows: Sequence[Mapping[str, Any]], probes: int, recorded: Sequence[str]
) -> dict[str, float] | None:
    """Return the mean regret of every family, their mean and its standard error over seeds."""
    kept = [row for row in rows if row["probes"] == probes]
    if not kept:
        return None
    families = dict.fromkeys(row["family"] for row in kept)
    named = [f for f in families if f not in FLAT and f not in ("cliff, heavy",)]
    means = {f: fmean(r["regret"] for r in kept if r["family"] == f) for f in named}
    counted = [f for f in named if f in IN_SPANS]
    by_seed: dict[int, list[float]] = {}
    for row in kept:
        if row["family"] in counted:
            by_seed.setdefault(row["seed"], []).append(row["regret"])
    over_seeds = [fmean(values) for values in by_seed.values()]
    figures = means | {"mean": fmean(means[f] for f in counted)} if counted else dict(means)
    if len(over_seeds) > 1:
        figures["standard_error"] = stdev(over_seeds) / len(over_seeds) ** 0.5
    on_pairs = [means[f] for f in recorded if f in means]
    return figures | ({"recorded_mean": fmean(on_pairs)} if on_pairs else {})


def power(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how often a gain of each size is called learned."""
    table: list[dict[str, Any]] = []
    for low, high in zip(EFFECTS, EFFECTS[1:], strict=False):
        kept = [row for row in rows if low <= row["effect"] < high]
        if kept:
            learned = fmean(row["verdict"] == "learned" for row in kept)
            to = high if high < float("inf") else None
            table.append({"from": low, "to": to, "searches": len(kept), "learned": learned})
    return table


def summary(rows: Sequence[Mapping[str, Any]], recorded: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a way."""
    figures: dict[str, Any] = {}
    for probes in PROBES:
        figures[f"regret_{probes}"] = by_family(rows, probes, recorded)
    figures["forwards"] = {
        str(n): fmean(r["forwards"] for r in rows if r["probes"] == n)
        for n in dict.fromkeys(r["probes"] for r in rows)
    }
    judged = [row for row in rows if row["probes"] == PROBES[0] and row["verdict"] is not None]
    if not judged:
        return figures | {"flat_called_flat": None, "clear_called_flat": None, "power": None}
    flat = [row for row in judged if row["family"] in FLAT]
    clear = [row for row in judged if row["effect"] >= CLEAR]
    return figures | {
        "flat_called_flat": _share_flat(flat),
        "clear_called_flat": _share_flat(clear),
        "interval_covers": fmean(
            row["covered"] for row in judged if row["family"] in (*IN_SPANS, *recorded)
        ),
        "no_gain_called_flat": {
            family: _share_flat([r for r in judged if r["family"] == family])
            for family in ("cliff", "rising", *FLAT, "cliff, heavy")
        },
        "power": power(judged),
    }


def _share_flat(rows: Sequence[Mapping[str, Any]]) -> float | None:
    return fmean(row["verdict"] != "learned" for row in rows) if rows else None


def floors(
    families: Sequence[str], seeds: Sequence[int], recordings: Sequence[Recording], on_dev: bool
) -> dict[str, Any]:
    """Return the regret of an exact search on the micro-dev rows, and on all rows."""
    recorded = [one.name for one in recordings]
    figures: dict[str, Any] = {}
    for name in ("fixed", "all"):
        rows: list[dict[str, Any]] = []
        for family in families:
            for seed in seeds:
                world = worlds(recordings)[family](seed)
                ratio = floor(world, MICRO_DEV if name == "fixed" else world.pool)
                regret = world.regret_on_dev if on_dev else world.regret
                rows.append({"family": family, "probes": 0, "seed": seed, "regret": regret(ratio)})
        found = by_family(rows, 0, recorded)
        figures[name] = {f"regret_{probes}": found for probes in PROBES}
    return figures


def markdown(figures: Mapping[str, Any], recorded: Sequence[str]) -> str:
    """Return the figures as Markdown tables."""
    synthetic = "mean" in figures["floor"]["all"][f"regret_{PROBES[0]}"]
    columns = [*([*IN_SPANS, "mean", *IN_NATS] if synthetic else []), *recorded]
    parts: list[str] = []
    for probes in PROBES:
        lines = [
            f"\n{probes} probes\n",
            f"| way | forwards | {' | '.join(columns)} |",
            f"|---|---:|{'---:|' * len(columns)}",
        ]
        ways = dict(figures["controllers"]) | {
            f"floor, {n}": one for n, one in figures["floor"].items()
        }
        for name, one in ways.items():
            found = one[f"regret_{probes}"]
            if found is None:
                continue
            read = one.get("forwards", {}).get(str(probes))
            cells = [_cell(found.get(column)) for column in columns]
            shown = f"{read:.0f}" if read is not None else ""
            lines.append(f"| {name} | {shown} | {' | '.join(cells)} |")
        parts += lines
    parts += [
        f"\nVerdicts at {PROBES[0]} probes\n",
        "| way | flat called flat | clear called flat | interval covers | "
        + " | ".join(_effect(low, high) for low, high in zip(EFFECTS, EFFECTS[1:], strict=False))
        + " |",
        f"|---|---:|---:|---:|{'---:|' * (len(EFFECTS) - 1)}",
    ]
    for name, one in figures["controllers"].items():
        if one["power"] is None:
            continue
        by_effect = {row["from"]: row["learned"] for row in one["power"]}
        cells = [f"{by_effect[e]:.0%}" if e in by_effect else "–" for e in EFFECTS[:-1]]
        parts.append(
            f"| {name} | {_percent(one['flat_called_flat'])} "
            f"| {_percent(one['clear_called_flat'])} "
            f"| {one['interval_covers']:.0%} | {' | '.join(cells)} |"
        )
    return "\n".join(parts)


def _effect(low: float, high: float | None) -> str:
    return f"over {low:g} s.e." if high in (None, float("inf")) else f"{low:g}-{high:g} s.e."


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def draw(figures: Mapping[str, Any], recorded: Sequence[str], path: Path) -> None:
    """Draw regret by family for every way, and the power of the default's verdict."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    families = [*IN_SPANS, *recorded]
    for name, one in figures["controllers"].items():
        found = one[f"regret_{PROBES[0]}"]
        values = [found.get(f) for f in families]
        mine = name == DEFAULT
        left.plot(
            values,
            range(len(families)),
            marker="o" if mine else ".",
            linewidth=2 if mine else 0.7,
            color=BLUE if mine else None,
            zorder=3 if mine else 1,
            label=name,
        )
    for name, one in figures["floor"].items():
        values = [one[f"regret_{PROBES[0]}"].get(f) for f in families]
        style = ":" if name == "all" else "--"
        left.plot(
            values, range(len(families)), style, color=INK, linewidth=0.9, label=f"floor, {name}"
        )
    left.set_yticks(range(len(families)), families)
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=0.01)
    left.set_xlabel(f"regret after the final run, in spans ({PROBES[0]} probes)")
    left.legend(fontsize=7, frameon=False)
    table = figures["controllers"][DEFAULT]["power"] or []
    right.bar(
        [_effect(row["from"], row["to"]) for row in table],
        [row["learned"] for row in table],
        color=ORANGE,
    )
    right.set_ylim(0, 1)
    right.tick_params(axis="x", labelrotation=60)
    right.set_ylabel("share called learned")
    right.set_xlabel("gain over ratio 0 (standard errors)")
    figure.savefig(path, dpi=120)


def _added_to(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the ways that are in the file already, where they are to stay."""
    if not options.add:
        return {}
    if options.json is None or not options.json.exists():
        raise SystemExit(f"--add needs the file that is added to, and {options.json} is none")
    found = read_json(options.json)
    for name in ("seeds", "quick", "first_seed", "on", "training"):
        if found["settings"][name] != getattr(options, name):
            raise SystemExit(
                f"{options.json} was made with {name} {found['settings'][name]}, not"
                f" {getattr(options, name)}: give the same, or leave out --add"
            )
    return found["controllers"]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--add", action="store_true", help="keep the other ways that are in it")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where a picture is drawn")
    parser.add_argument("--quick", action="store_true", help="few seeds, 24 probes")
    parser.add_argument("--seeds", type=int, default=60, help="searches of each kind")
    parser.add_argument("--first-seed", type=int, default=20000, help="of those searches")
    parser.add_argument("--probes", type=int, nargs="+", choices=PROBES, default=PROBES)
    parser.add_argument("--only", nargs="+", choices=CONTROLLERS, metavar="WAY", help="of the ways")
    parser.add_argument("--on", choices=("final", "dev"), default="final", help="curve of regrets")
    parser.add_argument("--recordings", nargs="*", type=Path, default=[], help="tables of pairs")
    parser.add_argument("--training", default="plain", help="which probes of the recordings")
    parser.add_argument("--recorded-only", action="store_true", help="no synthetic families")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--jobs", type=int, default=cores or 1, help="processes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Simulate every way, print the tables and return the result."""
    options = parsed(argv)
    common.versions()
    count = 3 if options.quick else options.seeds
    probes = PROBES[:1] if options.quick else tuple(options.probes)
    seeds = range(options.first_seed, options.first_seed + count)
    recordings = [read_recording(table, options.training) for table in options.recordings]
    recorded = [one.name for one in recordings]
    families = recorded if options.recorded_only else [*FAMILIES, *recorded]
    known = _added_to(options)
    controllers: dict[str, Any] = {}
    for name in options.only or available():
        began = time.perf_counter()
        found = searches(name, families, probes, seeds, recordings, options)
        controllers[name] = summary(found, recorded)
        print(f"{name}: {len(found)} searches, {time.perf_counter() - began:.0f} s", flush=True)
    together = known | controllers
    controllers = {name: together[name] for name in CONTROLLERS if name in together}
    rows = [
        {"way": name, "family": family, "probes": n, "regret": regret}
        for name, figures in controllers.items()
        for n in PROBES
        if (one := figures[f"regret_{n}"]) is not None
        for family, regret in one.items()
    ]
    figures = {
        "default": DEFAULT,
        "controllers": controllers,
        "floor": floors(families, seeds, recordings, options.on == "dev"),
    }
    print(markdown(figures, recorded))
    if options.picture is not None:
        draw(figures, recorded, options.picture)
    return common.write_result(options.json, figures, rows, options)


if __name__ == "__main__":
    main()
