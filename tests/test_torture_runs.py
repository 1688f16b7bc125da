"""A run is killed, loses power or room on the disk, or gets a second owner: nothing is lost."""

import subprocess
import sys
from pathlib import Path

from benchmarks.torture_runs import WAYS

ROOT = Path(__file__).parents[1]


def test_a_disturbed_run_ends_as_an_undisturbed_one():
    # A process that has trained cannot be forked, so that this needs one of its own.
    ways = [word for way in WAYS for word in ("--way", way)]
    command = ["-m", "benchmarks.torture_runs", "--tries", "1", "--kind", "grasp", *ways]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert (done.returncode, done.stdout.count("LOST")) == (0, 0), done.stdout[-2000:]
    for way in WAYS:
        assert way in done.stdout
