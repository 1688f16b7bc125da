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


def of_adapters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `train` has for values of both adapters' trainings."""
    return {"source": values, "target": values}


TRAINED = 8
"""Target train examples of a `job`."""
TRAIN = of_adapters({"epochs": 1}) | {"search": {"epochs": 2}, "finetune": {"epochs": 2}}


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a job on the backbone in `folder`/base.

    Sections given are replaced whole; of `train`, the values of a training are. With `recipe`
    "auto" there is no `controller`, which a choice does without.
    """
    values = {
        "output": str(folder / "run"),
        "model": {"name": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "data": {
            "max_length": 640,
            "source": {"language": "en", "rows": {"train": 8, "dev": 4}},
            "target": {
                "language": "es",
                "rows": {"train": TRAINED, "dev": 4, "micro_dev": 4, "test": 4},
            },
        },
        "controller": {"rounds": 3, "rows": 4},
        "train": TRAIN,
        "evaluate": QUIET_EVALUATION,
    }
    if changes.get("recipe") == "auto":
        del values["controller"]
    return with_trainings(values | changes)


TRAINING_KEYS = set(Training.model_fields)


def with_trainings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which every training has its place below "train".

    Tests may give the values of the trainings beside each other as well: plain keys of "train" are
    those of both adapters, "search" is that of the search, and "finetune" holds those of the final
    run beside its own settings. The recipe is the published one, unless the values have another.
    """
    found = {"recipe": "grasp"} | dict(values)
    given, search, final = (found.pop(name, {}) for name in ("train", "search", "finetune"))
    plain = {key: value for key, value in given.items() if key in TRAINING_KEYS}
    train = dict(TRAIN) | (of_adapters(plain) if plain else {})
    train |= {key: value for key, value in given.items() if key not in TRAINING_KEYS}
    train |= {"search": search} if search else {}
    trained = {key: value for key, value in final.items() if key in TRAINING_KEYS}
    train |= {"finetune": trained} if trained else {}
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
