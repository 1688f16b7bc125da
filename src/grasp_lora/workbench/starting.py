"""Look into adapters and a file of examples, for a first configuration."""

from collections.abc import Iterable
from pathlib import Path

from grasp_lora.adapters.opening import is_adapter, named_base_model
from grasp_lora.base.words import shown, shown_path
from grasp_lora.data.columns import input_names, match_columns
from grasp_lora.data.forms import open_records
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.prompts import template_for


def model_of(adapters: Iterable[str]) -> str:
    """Return the base model that all these adapters name.

    Raises:
        FileNotFoundError, ValueError: a folder is no adapter, names no base model that can be
            found, or two name different ones.
    """
    found: dict[str, str] = {}
    for adapter in adapters:
        if not is_adapter(adapter):
            raise ValueError(
                f"{shown_path(adapter)} is no PEFT adapter; give the folder that save_pretrained "
                "wrote"
            )
        found.setdefault(named_base_model(adapter), adapter)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{shown_path(first)} was trained on {shown(one)}, {shown_path(second)} on "
            f"{shown(other)}; adapters of one backbone can be merged, so give --model if both "
            "names mean the same weights"
        )
    if not found:
        raise ValueError("no adapter names the backbone: give --model")
    return next(iter(found))


def prompt_of(task: str, language: str) -> str:
    """Return the built-in prompt template of a task in a language; "" for an unknown task."""
    return template_for(TASKS[task], language)[0] if task in TASKS else ""


def task_of_file(file: Path, language: str) -> str:
    """Return the first task whose columns the rows of a file have.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, has no rows, or its columns fit no
            task.
    """
    first = next(open_records(file).records, None)
    if first is None:
        raise ValueError(f"{shown_path(file)} has no rows; give a file of labelled examples")
    columns = list(first.values)
    for name, task in TASKS.items():
        try:
            match_columns(columns, task, input_names(task, None, language), None, str(file))
        except ValueError:
            continue
        return name
    raise ValueError(
        f"{shown_path(file)} has the columns {shown(columns)}, which fit no task "
        f"({', '.join(TASKS)}); rename them, or give --task and map them in data.target.columns"
    )
