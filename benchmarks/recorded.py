"""Recorded runs of real pairs: small files that stay when the folders of the runs are gone.

    python -m benchmarks.recorded keep runs/compare/en-es docs/results/runs/en-es
    python -m benchmarks.recorded restore docs/results/runs/en-es runs/compare/en-es

`keep` copies the result of every finished run of `grasp-lora compare`, without places of this
machine. `restore` puts them back below a comparison's folder, which then does not run again what
has the same inputs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from grasp_lora.recipes.job import RESULT_FILE
from grasp_lora.runs import read_json, read_jsonl, write_json, write_jsonl

UNPRUNED = "average-finetuned"


def keep(queue: Path, out: Path) -> int:
    """Write `out`/<run>.json for every finished run of a comparison; return how many are new."""
    new = 0
    for file in sorted(queue.glob(f"*/{RESULT_FILE}")):
        found = read_json(file)
        result = dict(found["result"])
        place = out / f"{file.parent.name}.json"
        if "scores" not in result or place.exists():
            continue
        result.pop("adapter", None)
        record = {"job": file.parent.name} | result
        record |= {name: found[name] for name in ("key", "seconds", "peak_memory_bytes")}
        write_jsonl(place, [record | {"machine": common.machine(), "versions": common.versions()}])
        new += 1
    return new


def restore(folder: Path, queue: Path) -> int:
    """Write the results of `keep` back, where a comparison has none; return how many."""
    count = 0
    for record in runs_in(folder):
        place = queue / record["job"] / RESULT_FILE
        if place.exists():
            continue
        about = ("job", "key", "seconds", "peak_memory_bytes", "machine", "versions")
        result = {name: value for name, value in record.items() if name not in about}
        whole = {name: record[name] for name in ("key", "seconds", "peak_memory_bytes")}
        write_json(place, whole | {"result": result | {"adapter": None}})
        count += 1
    return count


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded runs of a pair, in the order of their names."""
    files = sorted(file for file in folder.glob("*.json") if file.name != "precheck.json")
    return [read_jsonl(file)[0] for file in files]


def final_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the fine-tuning runs of a pair, as its tables need them.

    Each has `name` (ratio-R for a fixed ratio, the method's name for the rest), `seed`, `ratio`,
    `dev` (step, loss), `best_step`, `zeros`, and `test`, metric -> value of each test row.
    """
    found: list[dict[str, Any]] = []
    for run in runs_in(folder):
        method, _, seed = run["job"].rpartition("-s")
        if not run["dev"] or not method:
            continue
        fixed = method == UNPRUNED or method.startswith("grid-0")
        found.append(
            {
                "name": f"ratio-{run['ratio']}" if fixed else method,
                "seed": int(seed),
                "ratio": run["ratio"],
                "dev": run["dev"],
                "best_step": run["best"]["step"],
                "zeros": run["zeros"],
                "test": run["rows"]["test"]["values"],
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Keep or restore, and say how many."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", choices=["keep", "restore"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    count = {"keep": keep, "restore": restore}[options.what](options.source, options.out)
    print(f"{options.out}: {count} runs written")


if __name__ == "__main__":
    main()
