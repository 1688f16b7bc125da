"""A run is killed, its disk is full, or a second one is started beside it: nothing is lost."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_disturbed_run_ends_as_an_undisturbed_one():
    # A process that has trained cannot be forked, so that this needs one of its own.
    command = [sys.executable, "-m", "benchmarks.torture_runs", "--tries", "1", "--kind", "grasp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout.count("LOST")) == (0, 0), done.stdout[-2000:]
    for way in ("kill", "full disk", "two owners"):
        assert way in done.stdout
