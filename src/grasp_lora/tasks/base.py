"""The task table: one row per task; a new task is one render function and one row."""

from collections.abc import Mapping
from types import MappingProxyType

from grasp_lora.metrics import exact_match, token_f1
from grasp_lora.tasks.prompts import render_question
from grasp_lora.tasks.records import Example, Prompt, Task, first_line, normalize_text, text_key

__all__ = [
    "TASKS",
    "Example",
    "Prompt",
    "Task",
    "first_line",
    "normalize_text",
    "task_named",
    "text_key",
]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "qa": Task(
            name="qa",
            render=render_question,
            metrics={"exact_match": exact_match, "token_f1": token_f1},
            max_new_tokens=32,
        ),
    }
)


def task_named(name: str) -> Task:
    """Return the row of the task table.

    Raises:
        ValueError: if there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[name]
