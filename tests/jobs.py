"""Small whole jobs: their settings, their row files, and the command that runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lora.config.sections import Training

QUIET_EVALUATION = {"max_new_tokens": 2, "baselines": False}


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a job on the backbone in `folder`/base, sections replaced whole."""
    values = {
        "output": str(folder / "run"),
        "model": {"name": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "data": {
            "max_length": 640,
            "source": {"language": "en", "rows": {"train": 8, "dev": 4}},
            "target": {"language": "es", "rows": {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}},
        },
        "controller": {"rounds": 3, "rows": 4},
        "train": {"epochs": 1},
        "search": {"epochs": 2},
        "finetune": {"epochs": 2},
        "evaluate": QUIET_EVALUATION,
    }
    return with_trainings(values | changes)


TRAINING_KEYS = set(Training.model_fields)


def with_trainings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which the trainings have their place.

    Tests give the values of the trainings beside each other: "train" (of both adapters), "search",
    and, in "finetune", those of the final run beside its own settings.
    """
    found = dict(values)
    adapters, search = found.pop("train", {}), found.pop("search", {})
    final = found.pop("finetune", {})
    train = {"source": adapters, "target": adapters, "search": search}
    train["finetune"] = {key: value for key, value in final.items() if key in TRAINING_KEYS}
    own = {key: value for key, value in final.items() if key not in TRAINING_KEYS}
    return found | {"train": train} | ({"finetune": own} if own else {})


def write_job(path: Path, values: Mapping[str, Any]) -> Path:
    """Write settings as a configuration file; return its path."""
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def write_rows(path: Path, numbers: Sequence[int], prefix: str = "q") -> Path:
    """Write questions of one's own, a context each; return the file."""
    rows = [
        {
            "id": f"{prefix}{n}",
            "context": f"{prefix} house number {n} has {n + 2} rooms.",
            "question": f"How many rooms has {prefix} house {n}?",
            "answers": [f"{n + 2} rooms"],
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def start(*arguments: str | Path, module: Sequence[str] = ("grasp_lora",)) -> subprocess.Popen[str]:
    """Start `python -m module arguments` on one thread; its output is kept."""
    return subprocess.Popen(
        [sys.executable, "-m", *module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
