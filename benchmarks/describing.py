"""What `grasp-lora data describe` costs on many rows: CPU seconds, seconds, and peak memory.

    python -m benchmarks.describing --rows 20000 200000

The rows are questions on contexts of 80 made-up words, no two alike, drawn as words are in texts:
the one of rank n comes with a chance of 1/n. Each count is described by a process of its own.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROWS = (2_000, 20_000, 200_000)
WORDS, KNOWN = 80, 20_000
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Write a file of JSON lines, questions on contexts.

    Args:
        path: the file.
        count: number of rows.
        seed: seed of the words.
    """
    draw = random.Random(seed)
    words = sorted({"".join(draw.choices(_SYLLABLES, k=3)) for _ in range(KNOWN)})
    draw.shuffle(words)
    chances = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            context = draw.choices(words, cum_weights=chances, k=WORDS)
            start = draw.randrange(WORDS - 2)
            row = {
                "id": f"q{number}",
                "context": " ".join(context) + ".",
                "question": " ".join(draw.choices(words, cum_weights=chances, k=8)) + "?",
                "answers": [" ".join(context[start : start + 2])],
            }
            file.write(json.dumps(row) + "\n")


def measure(count: int, model: str) -> dict[str, float]:
    """Return what the command costs on `count` rows; memory in MB, of the whole process."""
    with tempfile.TemporaryDirectory() as place:
        rows, config = Path(place, "rows.jsonl"), Path(place, "config.yaml")
        write_rows(rows, count)
        data = {"target": {"language": "en", "files": str(rows)}}
        config.write_text(json.dumps({"model": model, "data": data}), encoding="utf-8")
        command = [sys.executable, "-m", "grasp_lora", "data", "describe", str(config)]
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with code {child.returncode}")
    return {
        "rows": count,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds": time.perf_counter() - began,
        "peak_mb": used.ru_maxrss / 1024,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Measure, print a table and return its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer is used")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="200 rows")
    given = parser.parse_args(argv)
    print("| rows | CPU (s) | time (s) | peak memory (MB) |")
    print("|---:|---:|---:|---:|")
    found: list[dict[str, float]] = []
    for count in (200,) if given.quick else given.rows:
        one = measure(count, given.model)
        found.append(one)
        print(
            f"| {count} | {one['cpu_seconds']:.1f} | {one['seconds']:.1f} | {one['peak_mb']:.0f} |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
