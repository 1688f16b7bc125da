"""Print the tables of docs/performance.md from results that benchmarks have written.

    python -m benchmarks.goals docs/performance [FOLDER OF ANOTHER MACHINE ...]

A folder holds a JSON file per benchmark, named like it; a missing one is named as not measured. The
goals have a column for each folder. The tables below them are of the first.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import median
from grasp_lora.base.files import read_json

Result = Mapping[str, Any]

GOALS: tuple[tuple[str, str, str, float, str], ...] = (
    ("step", "step_matmul_fraction", "at least", 0.60, "step: share of the matrix rate"),
    ("step", "step_speedup_vs_trainer", "at least", 2.0, "step: times plain Trainer + PEFT"),
    ("step", "probe_over_forward", "at most", 1.1, "probe: times the bare forward"),
    ("search", "search_overhead", "at most", 0.30, "search: extra time over plain fine-tuning"),
    ("search", "memory_ratio", "at most", 1.1, "search: peak memory over plain fine-tuning"),
    ("masks", "masks_1b_fraction", "at most", 0.02, "masks, 1B entries: share of 10 steps"),
    ("masks", "masks_1b_extra_memory", "at most", 1.1, "masks, 1B entries: extra, in adapters"),
    ("end_to_end", "speedup_vs_grid_continue", "at least", 6.0, "against the grid, continue"),
    ("end_to_end", "speedup_vs_grid_restart", "at least", 3.4, "against the grid, restart"),
    (
        "end_to_end",
        "speedup_vs_authors_schedule_continue",
        "at least",
        20.0,
        "against the authors' schedule, continue",
    ),
    (
        "end_to_end",
        "speedup_vs_authors_schedule",
        "at least",
        12.0,
        "against the authors' schedule, restart",
    ),
    ("processes", "probe_efficiency", "at least", 0.85, "probes by 2 processes: efficiency"),
    ("loading", "load_seconds.smollm2", "at most", 3.0, "loading SmolLM2 after imports, s"),
    ("loading", "load_seconds.gemma3-270m", "at most", 3.0, "loading Gemma 3 270M, s"),
    ("loading", "help_seconds", "at most", 0.5, "`grasp-lora --help`, s"),
)
"""(benchmark, figure or table.figure, direction, bound, what it is)."""


def goals(machines: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    """Yield the table of goals and of the figures of each machine."""
    yield f"| goal | bound | {' | '.join(machines)} |"
    yield f"|---|---:|{'---:|' * len(machines)}"
    for benchmark, figure, direction, bound, title in GOALS:
        cells = [title, f"{direction} {bound:g}"]
        for results in machines.values():
            value: Any = results.get(benchmark, {})
            for key in figure.split("."):
                value = (value or {}).get(key)
            if value is None:
                cells.append("–")
                continue
            met = value >= bound if direction == "at least" else value <= bound
            cells.append(f"{value:.3g} {'met' if met else 'missed'}")
        yield f"| {' | '.join(cells)} |"


def steps(result: Result) -> Iterator[str]:
    """Yield the table of steps and probes."""
    columns = "case|step (s)|plain (s)|times|GFLOP/s|of the product|in products|probe / bare"
    yield f"| {columns.replace('|', ' | ')} |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in result["rows"]:
        step, plain = median(row["step_seconds"]), row["plain_seconds"]
        cells = [
            row["case"],
            f"{step:.2f}",
            f"{median(plain):.2f}" if plain else "–",
            _or_dash(row["speedup_vs_trainer"]),
            f"{row['flops'] / step / 1e9:.0f}" if "flops" in row else "–",
            _or_dash(row.get("matmul_fraction")),
            _or_dash(row.get("products_share")),
            _or_dash(row.get("probe_over_forward")),
        ]
        yield f"| {' | '.join(cells)} |"


def search(result: Result) -> Iterator[str]:
    """Yield where the extra time of a search goes."""
    plain = result["plain_seconds"]
    yield "| part | seconds | of the plain fine-tuning |"
    yield "|---|---:|---:|"
    yield f"| plain fine-tuning | {plain:.1f} | 100 % |"
    for part, seconds in result["split_seconds"].items():
        yield f"| {part} | {seconds:.1f} | {100 * seconds / plain:.1f} % |"
    yield f"| extra in all | | {100 * result['search_overhead']:.1f} % |"


def masks(result: Result) -> Iterator[str]:
    """Yield a round of masks by size."""
    yield "| entries | ours (s) | plain (s) | times | extra memory | plain way's |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in result["rows"]:
        ours, plain = (median(row["seconds"][way]) for way in ("ours", "plain"))
        extra = {way: max(found.values()) for way, found in row["extra_memory"].items()}
        yield (
            f"| {row['size']} | {ours:.3g} | {plain:.3g} | {plain / ours:.2f} "
            f"| {extra['ours']:.2f} | {extra['plain']:.2f} |"
        )


def end_to_end(result: Result) -> Iterator[str]:
    """Yield runs and costs of the ways from two adapters to the final one."""
    yield "| way | runs | seconds a run | seconds | |"
    yield "|---|---:|---:|---:|---|"
    for way, seconds in result["seconds"].items():
        how = "projected" if way == "authors" else "measured"
        if way == "grid" and result["measured_points"] < result["grid_points"]:
            how = f"{result['measured_points']} of {result['grid_points']} points measured"
        yield (
            f"| {way} | {result['runs'][way]} | {result['seconds_per_run'][way]:.0f} "
            f"| {seconds:.0f} | {how} |"
        )
    if "parts_seconds" not in result:  # of an earlier version
        return
    yield ""
    yield "| part of `continue` | seconds | share |"
    yield "|---|---:|---:|"
    parts = result["parts_seconds"]["continue"]
    for part, seconds in sorted(parts.items(), key=lambda one: -one[1]):
        yield f"| {part} | {seconds:.1f} | {100 * seconds / sum(parts.values()):.1f} % |"


def growth(result: Result) -> Iterator[str]:
    """Yield the slope of every quantity."""
    yield "| quantity | slope (ms) | intercept (s) | R² |"
    yield "|---|---:|---:|---:|"
    for row in result["rows"]:
        yield (
            f"| {row['quantity']} | {1000 * row['slope']:.0f} | {row['intercept']:.3g} "
            f"| {row['r2']:.3f} |"
        )


TABLES: Mapping[str, Callable[[Result], Iterator[str]]] = {
    "step": steps,
    "search": search,
    "masks": masks,
    "end_to_end": end_to_end,
    "growth": growth,
}


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Print all tables."""
    machines: dict[str, dict[str, Result]] = {}
    for folder in sys.argv[1:]:
        found = {p.stem: read_json(p) for p in sorted(Path(folder).glob("*.json"))}
        # Benchmarks without a figure among the goals may write rows alone.
        results = {name: one for name, one in found.items() if "machine" in one}
        machines[next(iter(results.values()))["machine"]["cpu"]] = results
    print("\n".join(goals(machines)))
    for name, result in next(iter(machines.values())).items():
        where = result["machine"]
        print(f"\n{name}: `{result['command']}`, commit {result['versions']['commit'][:7]}")
        print(
            f"{where['cpu']}, {where['torch_threads']} threads, torch {result['versions']['torch']}"
        )
        benchmark = result["command"].split()[2].removeprefix("benchmarks.")
        if benchmark in TABLES:
            print()
            print("\n".join(TABLES[benchmark](result)))


if __name__ == "__main__":
    main()
