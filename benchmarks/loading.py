"""How long a cached backbone takes to load once its libraries are imported, and a bare `--help`.

    python -m benchmarks.loading --json loading.json

Every measurement is a process of its own, on files that the system has in its memory already: each
backbone is loaded once beforehand, which also converts it where the cache has none. A backbone
whose package is not installed is left out and named.

JSON: `load_seconds` (model and tokenizer, after imports) by backbone and `help_seconds`
(`grasp-lora --help`, the whole process), medians both.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from grasp_lora.models.sources import SHORT_NAMES


def load_once(model: str, dtype: str, device: str, threads: int | None) -> float:
    """Return the seconds of loading; meant for a fresh process."""
    options = argparse.Namespace(model=model, dtype=dtype, device=device, threads=threads)
    common.ready(options)
    began = time.perf_counter()
    common.open_backbone(options)
    return time.perf_counter() - began


def help_once() -> float:
    """Return the seconds of `grasp-lora --help`, from start to end of the process."""
    command = [sys.executable, "-m", "grasp_lora", "--help"]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(__doc__)
    parser.set_defaults(model=None)
    parser.add_argument("--repeat", type=int, default=5, help="processes of each kind")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result; without `--model` all packaged backbones."""
    options = parsed(argv)
    repeat = 1 if options.quick else options.repeat
    given = {name: getattr(options, name) for name in ("dtype", "device", "threads")}
    rows: list[dict[str, Any]] = []
    for model in [options.model] if options.model else SHORT_NAMES:
        asked = given | {"model": model}
        if options.model is None:
            try:
                SHORT_NAMES[model]()
            except ValueError as error:
                print(f"left out: {error}")
                continue
        common.isolated("benchmarks.loading:load_once", asked)
        found = [
            common.isolated("benchmarks.loading:load_once", asked).value for _ in range(repeat)
        ]
        rows.append({"model": common.shown(model), "load_seconds": found})
    helped = [help_once() for _ in range(repeat + 1)][1:]
    figures = {
        "load_seconds": {row["model"]: common.median(row["load_seconds"]) for row in rows},
        "help_seconds": common.median(helped),
    }
    lines = [*figures["load_seconds"].items(), ("grasp-lora --help", figures["help_seconds"])]
    common.table("medians", ["what", "seconds"], lines)
    rows.append({"help_seconds": helped})
    return common.write_result(options.json, figures, rows, options)


if __name__ == "__main__":
    main()
