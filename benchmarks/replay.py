"""The history curve of recorded searches, as it is and with steep losses compressed.

    python -m benchmarks.replay docs/results/runs/embedded/searches/*.jsonl

Reads `rounds.jsonl` of searches with the default controller and prints, for each, where the curve
is lowest and how high it is elsewhere. Compressed means that a trial's distance d to the best of
its round becomes s log(1 + d / s), where s is a multiple of the median distance of the search: a
cliff then no longer sets the scale of the whole curve.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from grasp_lora.core.history import RoundRecord, fit_curve, grid, lowest, observations
from grasp_lora.core.rounds import ControllerConfig
from grasp_lora.runs import read_jsonl

MULTIPLES = (1, 2, 4)
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


def compressed(records: Sequence[RoundRecord], multiple: float) -> list[RoundRecord]:
    """Return rounds whose trials are drawn nearer to the best of their round; all finite."""
    far = [x - min(r.losses) for r in records for x in r.losses if x > min(r.losses)]  # type: ignore[type-var, operator]
    scale = multiple * statistics.median(far)
    found: list[RoundRecord] = []
    for record in records:
        best = min(range(len(record.losses)), key=lambda i: record.losses[i])  # type: ignore[arg-type, return-value]
        rows = [
            [low + _share(loss - record.losses[best], scale) * (own - low) for own, low in pairs]  # type: ignore[operator]
            for loss, pairs in (
                (loss, list(zip(losses, record.per_row[best], strict=True)))
                for loss, losses in zip(record.losses, record.per_row, strict=True)
            )
        ]
        found.append(replace(record, per_row=tuple(tuple(one) for one in rows)))
    return found


def _share(distance: float, scale: float) -> float:
    return scale * math.log1p(distance / scale) / distance if distance > 0 else 1.0


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
        ways = {"as it is": records}
        ways |= {f"compressed, {m} x median": compressed(records, m) for m in MULTIPLES}
        for name, ones in ways.items():
            seen = observations(ones)
            values = fit_curve(seen, len(records)).values(at)
            values = values - values.min()
            places = [int((at - ratio).abs().argmin()) for ratio in SHOWN]
            cells = [f"{float(values[place]):.3f}" for place in places]
            print(f"| {name} | {lowest(seen, len(records), config):.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
