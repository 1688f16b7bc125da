"""What a command costs whose result is there already, beside `grasp-lora --help`.

    python -m benchmarks.done --json done.json

Whole commands as processes of their own, on a tiny model. Each is done once, and then given again,
which finds its result done. The table has the first call, and medians of the later ones: seconds by
the clock, and CPU seconds of the process.

JSON: `done_seconds`, by the clock, and `done_cpu_seconds`, by command; `help_cpu_seconds`.

Needs the tiny models of `tests/`: run it from the root of a checkout.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

COMMANDS = ("train", "merge", "evaluate", "run")


def call(arguments: Sequence[str]) -> dict[str, float]:
    """Return what a command costs.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, "-m", "grasp_lora", *arguments]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        said.seek(0)
        if child.returncode:
            end = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with code {child.returncode}:\n{end}")
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}


def commands(folder: Path) -> dict[str, list[str]]:
    """Return name -> arguments of commands on a tiny model and its adapters, made in a folder."""
    sys.path.insert(0, str(common.ROOT / "tests"))
    from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
    from jobs import job

    tiny_backbone_folder(folder / "base")
    places = [tiny_adapter_folder(folder / name, tiny_model()) for name in ("one", "two")]
    config = folder / "config.json"
    config.write_text(json.dumps(job(folder)), encoding="utf-8")  # JSON is YAML
    one, two, settings = *map(str, places), str(config)
    out = {name: str(folder / f"{name}-result") for name in ("train", "merge", "evaluate")}
    adapters = ["--adapter", one, "--adapter", two]
    return {
        "train": ["train", settings, "--role", "target", "--out", out["train"]],
        "merge": ["merge", settings, *adapters, "--out", out["merge"]],
        "evaluate": ["evaluate", one, "--config", settings, "--out", out["evaluate"]],
        "run": ["run", settings],
    }


def measure(repeat: int, only: Sequence[str] = COMMANDS) -> list[dict[str, Any]]:
    """Return for each command what its first and its later calls cost, and the same of `--help`.

    Args:
        repeat: later calls of each.
        only: which of `COMMANDS`.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        made = commands(Path(place))
        for name in ("--help", *only):
            arguments = made.get(name, [name])
            first = call(arguments)
            later = [call(arguments) for _ in range(repeat)]
            again = {key: common.median([one[key] for one in later]) for key in first}
            rows.append({"command": name, "first": first, "again": again})
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and return the result."""
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="later calls of each command")
    options = parser.parse_args(argv)
    rows = measure(1 if options.quick else options.repeat)
    common.table(
        "a command whose result is done",
        ["command", "first (s)", "CPU (s)", "again (s)", "CPU (s)"],
        [
            [row["command"]]
            + [row["first"][key] for key in ("seconds", "cpu_seconds")]
            + [row["again"][key] for key in ("seconds", "cpu_seconds")]
            for row in rows
        ],
    )
    again = {row["command"]: row["again"] for row in rows}
    helped = again.pop("--help")["cpu_seconds"]
    figures = {
        "done_seconds": {name: one["seconds"] for name, one in again.items()},
        "done_cpu_seconds": {name: one["cpu_seconds"] for name, one in again.items()},
        "help_cpu_seconds": helped,
    }
    return common.write_result(options.json, figures, rows, options)


if __name__ == "__main__":
    main()
