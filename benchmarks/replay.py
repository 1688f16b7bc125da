"""The history curve of recorded searches, with steep losses compressed and as they are.

    python -m benchmarks.replay docs/results/records/rounds/embedded.parquet --collection former
    python -m benchmarks.replay RUN/rounds.jsonl

Reads the rounds of searches with the default controller, of a table (`--jobs` takes some of its
searches) or of a file that a run wrote, and prints, for each, where the curve
is lowest and how high it is elsewhere; compressed by several multiples of the median distance of a
trial to the best of its round (`grasp_lora.core.evidence.history.compressed`; the default is 4).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import records
from grasp_lora.base.files import read_jsonl
from grasp_lora.core.controller.rounds import ControllerConfig
from grasp_lora.core.evidence.history import (
    RoundRecord,
    compressed,
    curve_minimum,
    fit_curve,
    grid,
    observations_by_round,
    records_of,
)

MULTIPLES = (1, 2, 4, math.inf)
SHOWN = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def searches_in(
    file: Path, collection: str, jobs: Sequence[str]
) -> Iterator[tuple[str, list[RoundRecord]]]:
    """Yield the name and the rounds of each search of a table, or of the one of a JSONL file."""
    if file.suffix == ".jsonl":
        yield file.stem, records_of(read_jsonl(file))[0]
        return
    for job, lines in records.read(file, collection).items():
        if not jobs or job in jobs:
            yield job, records_of(lines)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for every search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path, help="tables, or rounds.jsonl of searches")
    parser.add_argument("--collection", default=records.RUNS, help="what is read of a table")
    parser.add_argument("--jobs", nargs="+", default=[], help="of the searches of a table")
    options = parser.parse_args(argv)
    for file in options.files:
        for name, rounds in searches_in(file, options.collection, options.jobs):
            print(f"\n{name}\n\n{curves(rounds)}")


def curves(rounds: Sequence[RoundRecord]) -> str:
    """Return a table of a search's curve, compressed by each multiple."""
    config = ControllerConfig()
    at = grid(config)
    lines = [f"| curve | lowest at | {' | '.join(f'{r:g}' for r in SHOWN)} |"]
    lines.append(f"|---|---:|{'---:|' * len(SHOWN)}")
    for multiple in MULTIPLES:
        seen = compressed(observations_by_round(rounds), multiple)
        values = fit_curve(seen, len(rounds)).values(at)
        values = values - values.min()
        places = [int((at - ratio).abs().argmin()) for ratio in SHOWN]
        cells = [f"{float(values[place]):.3f}" for place in places]
        name = "as it is" if math.isinf(multiple) else f"compressed, {multiple} x median"
        lines.append(
            f"| {name} | {curve_minimum(seen, len(rounds), config):.3f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
