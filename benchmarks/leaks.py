"""The search for leaks among many texts: seconds and peak memory by the number of rows.

Three kinds of rows, half of them in train and half in dev: *copies* are one text with a few words
changed, each a near-duplicate of all others; *almost* are texts that share a frame and are just
below the threshold; *different* share nothing. `--brute ROWS` also compares all pairs, and fails if
another set of leaking rows comes out.

Each count is measured in a process of its own, as memory that was used once stays with a process.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time

from grasp_lora.data.leaks import find_leaks
from grasp_lora.data.repeats import drop_repeated_texts
from grasp_lora.tasks.records import Example

KINDS = ("copies", "almost", "different")
ROWS = (1_000, 4_000, 10_000)
WORDS = 150
THRESHOLD = 0.8


def rows_of(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Return examples with a context of `WORDS` words each.

    Args:
        kind: one of `KINDS`.
        count: number of rows.
        seed: seed of the words.
    """
    draw = random.Random(f"{kind} {seed}")
    frame = [f"w{draw.randrange(5_000)}" for _ in range(WORDS)]
    changed = {"copies": 3, "almost": 9, "different": WORDS}[kind]
    rows: list[Example] = []
    for number in range(count):
        text = list(frame)
        for place in draw.sample(range(WORDS), changed):
            text[place] = f"w{draw.randrange(100_000)}"
        fields = {"context": " ".join(text), "question": "?"}
        rows.append(Example(str(number), f"g{number}", "en", fields, ("a",)))
    return rows


def measure(kind: str, count: int) -> dict[str, float]:
    """Return seconds of the search and of the removal, and the pairs found.

    Also the peak memory of this process: before, with the rows, and after, in MB.
    """
    rows = rows_of(kind, count)
    parts = {"train": rows[: count // 2], "dev": rows[count // 2 :]}
    before, start = _peak(), time.perf_counter()
    leaks = find_leaks(parts, threshold=THRESHOLD)
    found = time.perf_counter()
    drop_repeated_texts(parts, threshold=THRESHOLD)
    return {
        "rows": count,
        "leaks": len(leaks),
        "find_seconds": found - start,
        "drop_seconds": time.perf_counter() - found,
        "peak_before_mb": before,
        "peak_mb": _peak(),
    }


def check(kind: str, count: int) -> None:
    """Compare the rows found with those that comparing all pairs finds.

    Raises:
        AssertionError: they are not the same.
    """
    rows = rows_of(kind, count)
    halves = rows[: count // 2], rows[count // 2 :]
    leaks = find_leaks({"train": halves[0], "dev": halves[1]}, threshold=THRESHOLD)
    texts = {row.id: row.fields["context"].split() for row in rows}
    sets = {name: set(zip(t, t[1:], t[2:], strict=False)) for name, t in texts.items()}
    wanted: set[str] = set()
    for one in halves[0]:
        for two in halves[1]:
            a, b = sets[one.id], sets[two.id]
            if len(a & b) / len(a | b) >= THRESHOLD:
                wanted |= {one.id, two.id}
    assert {name for leak in leaks for _, name in (leak.first, leak.second)} == wanted


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="200 rows, all pairs compared too")
    parser.add_argument("--brute", type=int, metavar="ROWS", help="compare all pairs of ROWS rows")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ROWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]))))
        return
    if given.quick:
        given.rows, given.brute = (200,), 200
    for kind in KINDS if given.brute else ():
        check(kind, given.brute)
    print("| texts | rows | leaks | find (s) | drop repeats (s) | peak memory (MB) |")
    print("|---|---:|---:|---:|---:|---:|")
    figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for count in given.rows:
            command = [sys.executable, "-m", "benchmarks.leaks", "--one", kind, str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            one = json.loads(done.stdout)
            figures[kind].append(one)
            print(
                f"| {kind} | {count} | {one['leaks']} | {one['find_seconds']:.2f} | "
                f"{one['drop_seconds']:.2f} | {one['peak_mb']:.0f} |"
            )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
