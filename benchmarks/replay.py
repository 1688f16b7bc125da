"""The history curve of recorded searches, with steep losses compressed and as they are.

    python -m benchmarks.replay docs/results/former/embedded/searches/*.jsonl

Reads `rounds.jsonl` of searches with the default controller and prints, for each, where the curve
is lowest and how high it is elsewhere; compressed by several multiples of the median distance of a
trial to the best of its round (`grasp_lora.core.evidence.history.compressed`; the default is 4).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from grasp_lora.base.files import read_jsonl
from grasp_lora.core.controller.rounds import ControllerConfig
from grasp_lora.core.evidence.history import (
    RoundRecord,
    compressed,
    curve_minimum,
    fit_curve,
    grid,
    observations_by_round,
)

MULTIPLES = (1, 2, 4, math.inf)
SHOWN = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def read_rounds(file: Path) -> list[RoundRecord]:
    """Return the rounds of a search; rows are numbered in the order they come up."""
    places: dict[str, int] = {}
    records: list[RoundRecord] = []
    known = {field.name for field in fields(RoundRecord)}
    for line in read_jsonl(file):
        rows = tuple(places.setdefault(row, len(places)) for row in line["rows"])
        values = {name: value for name, value in line.items() if name in known} | {"rows": rows}
        for name in ("candidates", "rewards", "losses", "baseline_rows"):
            values[name] = tuple(values[name])
        values["per_row"] = tuple(tuple(losses) for losses in values["per_row"])
        records.append(RoundRecord(**values))
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for every search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path, help="rounds.jsonl of searches")
    config = ControllerConfig()
    at = grid(config)
    for file in parser.parse_args(argv).files:
        records = read_rounds(file)
        print(f"\n{file.stem}\n\n| curve | lowest at | {' | '.join(f'{r:g}' for r in SHOWN)} |")
        print(f"|---|---:|{'---:|' * len(SHOWN)}")
        for multiple in MULTIPLES:
            seen = compressed(observations_by_round(records), multiple)
            values = fit_curve(seen, len(records)).values(at)
            values = values - values.min()
            places = [int((at - ratio).abs().argmin()) for ratio in SHOWN]
            cells = [f"{float(values[place]):.3f}" for place in places]
            name = "as it is" if math.isinf(multiple) else f"compressed, {multiple} x median"
            lowest = curve_minimum(seen, len(records), config)
            print(f"| {name} | {lowest:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
