"""Everything that may befall a run, and odd input: how often was it tried, how often survived?

    python -m benchmarks.torture

does the parts below with one seed, as many at a time as there are cores, and prints one table. It
ends with exit code 1 if anything was lost. The parts say what each word means and can be run alone:
`benchmarks.torture_runs`, `torture_damage`, `torture_input`.

Needs the tiny models of `tests/`: run it from the root of a checkout.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from benchmarks import torture_damage, torture_input, torture_runs
from benchmarks.torture_damage import KINDS, Tally, of_tiny_models, shown
from benchmarks.torture_power import CannotMount


def _disturbed(kind: str, tries: int, seed: int) -> Tally:
    with of_tiny_models() as laboratory:
        return torture_runs.torture(laboratory, tries, seed, kinds=[kind])


def _ext4(kind: str, tries: int, seed: int) -> Tally:
    try:
        return torture_runs.torture_ext4(tries, seed, [kind])
    except CannotMount as error:
        print(f"{kind}: no power cut on ext4 here ({error}); the simulated one stands for it")
        return {}


def _damaged(kind: str, tries: int, seed: int) -> Tally:
    with of_tiny_models() as laboratory:
        chosen = torture_damage.cases(laboratory, [kind], tries, seed)
        found = torture_damage.torture(laboratory, chosen, seed)
    return {(f"damaged file, {state} run", kind): counts for (kind, state), counts in found.items()}


def _odd(kind: str, seed: int) -> Tally:
    return torture_input.torture(1.0, seed, [kind])


def parts(tries: int, damages: int, seed: int) -> list[Callable[[], Tally]]:
    """Return the parts, the longest first.

    Args:
        tries: disturbances of each way on each kind of run; power cuts on ext4 are half as many.
        damages: damaged files of each kind of run.
        seed: seed of all draws.
    """
    made: list[Callable[[], Tally]] = [partial(_disturbed, kind, tries, seed) for kind in KINDS]
    made += [partial(_ext4, kind, max(1, tries // 2), seed) for kind in KINDS]
    made += [partial(_damaged, kind, damages, seed) for kind in KINDS]
    return made + [partial(_odd, kind, seed) for kind in torture_input.COUNTS]


def main(given: Sequence[str] | None = None) -> int:
    """Print what was tried and what survived; return the exit code."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--tries", type=int, default=6, help="of each way on each kind of run")
    made.add_argument("--damages", type=int, default=60, help="damaged files of each kind of run")
    made.add_argument("--seed", type=int, default=1)
    options = made.parse_args(given)
    began = time.monotonic()
    # Each part has a process of its own: one that has trained cannot be forked.
    started = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), started, max_tasks_per_child=1) as pool:
        asked = [pool.submit(part) for part in parts(options.tries, options.damages, options.seed)]
        found: Tally = {}
        for number, part in enumerate(asked):
            try:
                found |= part.result()
                print(f"part {number + 1} of {len(asked)} done, {_since(began)}", flush=True)
            except Exception as error:
                print(f"LOST part {number + 1} as a whole: {type(error).__name__}: {error}")
                found[f"part {number + 1}", "as a whole"] = 1, 0
    return shown(f"tried and survived, in {_since(began)}", found)


def _since(began: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    return f"{minutes}:{seconds:02d}"


if __name__ == "__main__":
    sys.exit(main())
