"""Stages that add numbers: plans for tests of what does them, in many processes and elsewhere."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from grasp_lora.base.files import read_json
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.stored import write_plan
from grasp_lora.stages import table
from grasp_lora.stages.stage import Stage

STAND_IN = '''
import os, signal, sys, time
from pathlib import Path
from grasp_lora.base.files import read_json, write_json
from grasp_lora.stages import table
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Cost, Kind

def add(work):
    """Append a line per start, so that a test can count them."""
    options = work.stage.options
    with open(work.out.parent.parent / f"{work.stage.name}.starts", "a") as file:
        file.write(os.environ.get("OMP_NUM_THREADS", "?") + "\\n")
    again = len(Path(file.name).read_text().splitlines()) > 1
    time.sleep(0 if again and options.get("once") else options.get("sleep", 0))
    if options.get("kill") == "always" or (options.get("kill") and not again):
        os.kill(os.getpid(), signal.SIGKILL)
    if options.get("fail"):
        print("this is why", file=sys.stderr)
        raise ValueError("told to fail")
    if options.get("refuse"):
        raise NotApplicable("told to refuse")
    given = [read_json(folder / "weights.json") for folder in work.inputs.values()]
    write_json(work.out / "weights.json", options["value"] + sum(given))
    return {"seconds": 0.0}

def cost(stage, sizes):
    return Cost(tokens=stage.options.get("tokens", 0))

table.KINDS["add"] = Kind(1, lambda stage: (), lambda stage, known: (), add, cost)
'''

FIRST = """
import sys
# Processes that only start others are spared torch.
if any("grasp_lora" in one for one in sys.orig_argv):
    import kind_add
"""


@contextmanager
def kind_of_work(folder: Path) -> Iterator[None]:
    """Know the stage "add" during the body, in this process and in those that it starts.

    Args:
        folder: receives a file that every Python process reads first.
    """
    (folder / "sitecustomize.py").write_text(FIRST)
    (folder / "kind_add.py").write_text(STAND_IN)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setattr(table, "KINDS", dict(table.KINDS))
        exec(STAND_IN, {})
        for module in ("executor", "plan"):
            patch.setattr(f"grasp_lora.plans.{module}.KINDS", table.KINDS)
        yield


def added(config, name, value=1, needs=(), **options):
    """Return a stage that adds `value` to the numbers of the stages that it needs."""
    inputs = {f"input {n}": need for n, need in enumerate(needs)}
    return Stage(name, "add", config, inputs, {"value": value, **options})


def plan_of(stages):
    return Plan({stage.name: stage for stage in stages})


def starts(folder, name):
    """Return how often a stage was begun."""
    return len((folder / f"{name}.starts").read_text().splitlines())


def sums(folder, names):
    """Return stage -> the number that it wrote."""
    return {name: read_json(folder / name / "weights.json") for name in names}


DRIVER = """
import json, signal, sys
from pathlib import Path
# A shell's background job is started with interrupts ignored, and hands that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.launch import Pool, work_off_many
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.stored import write_plan
from grasp_lora.plans.session import Session
from grasp_lora.plans.stored import read_plan_file, read_stage
from grasp_lora.stages.stage import Sizes
from grasp_lora.workbench.rows import load_run_data
place = Path(sys.argv[1])
names = [one["name"] for one in read_plan_file(place)["stages"]]
plan = Plan({name: read_stage(place, name) for name in names})
config = next(iter(plan.stages.values())).config
data = load_run_data(config, lambda line: None)
pool = Pool(**({"jobs": 1, "threads": 1} | json.loads(sys.argv[2])))
work_off_many(plan, place, Session(config, data), Sizes({}, {}), pool)
"""


def driver(place, stages, **pool):
    """Start a process that does stages in a folder, and return it."""
    write_plan(place, plan_of(stages), 1)
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(place), json.dumps(pool)])


def wait_until(reached):
    deadline = time.monotonic() + 600
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(*words):
    """Return the processes with all of these words in their command line."""
    found = []
    for one in psutil.process_iter(["cmdline"]):
        line = " ".join(one.info["cmdline"] or ())
        if all(word in line for word in words):
            found.append(one)
    return found
