"""Plans stored in a file, so that another process or another machine can do a stage.

The path of an input folder that lies in the plan's folder is stored relative to it, so the plan's
folder may be moved. In other paths `~` stands for the home folder.
"""

import os
from pathlib import Path
from typing import Any

from grasp_lora.base.files import damage, jsonable, read_json, write_sealed
from grasp_lora.base.words import shown, shown_path, without_home
from grasp_lora.config.run_config import RunConfig
from grasp_lora.plans.plan import Plan
from grasp_lora.stages.stage import Input, Stage

PLAN_FILE = "plan.json"
_FORMAT = "grasp-lora plan"


def write_plan(place: Path, plan: Plan, threads: int | None = None) -> None:
    """Write a plan into its folder.

    Args:
        place: the folder of the stages' results.
        plan: the stages.
        threads: threads of each process that does a stage; later starts use the same number.
    """
    stages = [_to_json(stage, place) for stage in plan.stages.values()]
    whole = {"format": _FORMAT, "threads": threads, "stages": stages}
    write_sealed(place / PLAN_FILE, jsonable(whole), ())


def read_stage(place: Path, name: str) -> Stage:
    """Return a stage of the plan in a folder.

    Raises:
        FileNotFoundError: the folder holds no plan.
        ValueError: the file is no plan, or the plan has no such stage.
    """
    stored = read_plan_file(place)
    for one in stored["stages"]:
        if one["name"] == name:
            return _from_json(one, place)
    raise ValueError(f"the plan in {shown_path(place)} has no stage {shown(name)}")


def read_plan_file(place: Path) -> dict[str, Any]:
    """Return the content of the plan's file.

    Raises:
        FileNotFoundError: the folder holds no plan.
        ValueError: the file was not written by grasp-lora, or is damaged.
    """
    stored = read_json(place / PLAN_FILE)
    if damage(place / PLAN_FILE):
        raise ValueError(
            f"{shown_path(place / PLAN_FILE)} is damaged; start the command that wrote it again"
        )
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise ValueError(
            f"{shown_path(place / PLAN_FILE)} was not written by grasp-lora; choose another folder"
        )
    return stored


def _to_json(stage: Stage, place: Path) -> dict[str, Any]:
    inputs: dict[str, dict[str, str]] = {}
    for role, one in stage.inputs.items():
        if isinstance(one, str):
            inputs[role] = {"stage": one}
        else:
            inputs[role] = {"folder": _relative(one, place)}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "title": stage.title,
        "options": jsonable(stage.options),
        "inputs": inputs,
        "config": {k: v for k, v in stage.config.to_record().items() if k != "output"},
    }


def _from_json(stored: dict[str, Any], place: Path) -> Stage:
    inputs: dict[str, Input] = {
        role: one["stage"] if "stage" in one else place / Path(one["folder"]).expanduser()
        for role, one in stored["inputs"].items()
    }
    return Stage(
        stored["name"],
        stored["kind"],
        RunConfig(**stored["config"]),
        inputs,
        stored["options"],
        stored["title"],
    )


def _relative(folder: Path, place: Path) -> str:
    whole, root = folder.absolute(), place.absolute()
    return os.path.relpath(whole, root) if whole.is_relative_to(root) else without_home(whole)
