"""Stands in for Slurm: sbatch, srun, sacct, scancel and scontrol on one machine.

`install` writes the commands into a folder for PATH. A job is a process group of its own, so it
outlives whoever submitted it. The folder has a line of `calls` for each submission.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


def install(folder: Path) -> None:
    """Write the commands into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        file.chmod(0o755)


def _sbatch(place: Path, script: str) -> None:
    text = Path(script).read_text()
    with open(place / "calls", "a") as file:
        file.write(script + "\n")
    number = 100 + len((place / "calls").read_text().splitlines())
    array = re.search(r"--array=0-(\d+)", text)
    for task in range(int(array[1]) + 1) if array else (None,):
        environment = dict(os.environ) | {"SLURM_JOB_ID": f"{number}"}
        if task is not None:
            environment["SLURM_JOB_ID"] = f"{number}{task}"
            environment |= {"SLURM_ARRAY_JOB_ID": f"{number}", "SLURM_ARRAY_TASK_ID": f"{task}"}
        started = subprocess.Popen(
            ["sh", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        name = f"{number}" if task is None else f"{number}_{task}"
        (place / f"job.{name}").write_text(str(started.pid))
    print(f"Submitted batch job {number}")


def _srun(place: Path, *arguments: str) -> None:
    del place
    rest, log = list(arguments), "/dev/null"
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            value = rest.pop(0)
            log = value if option == "--output" else log
    array = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    for sign, value in zip("jAat", (os.environ["SLURM_JOB_ID"], *array, "0"), strict=True):
        log = log.replace(f"%{sign}", value)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        sys.exit(subprocess.call(rest, stdout=file, stderr=file))


def _sacct(place: Path, *arguments: str) -> None:
    print("JobID|State|NodeList")
    asked = {one for n, one in enumerate(arguments) if arguments[n - 1] == "-j"}
    for file in sorted(place.glob("job.*")):
        name = file.name.removeprefix("job.")
        if name.split("_")[0] in asked:
            print(f"{name}|{'RUNNING' if _runs(int(file.read_text())) else 'COMPLETED'}|here")


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _scancel(place: Path, name: str, *_: str) -> None:
    os.killpg(int((place / f"job.{name}").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    commands = {"sbatch": _sbatch, "srun": _srun, "sacct": _sacct, "scancel": _scancel}
    commands[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), *sys.argv[2:])
