"""The table of tasks. A new task needs an entry here and its prompts."""

from collections.abc import Mapping
from types import MappingProxyType

from grasp_lora.base.words import shown
from grasp_lora.tasks.prompts import QA_PROMPTS, SUMMARY_PROMPTS, TEXT_PROMPTS
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

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_LIKELIHOOD = ("loss", "perplexity")
_QA = Task(
    name="qa",
    fields=("context", "question"),
    answer="answers",
    prompts=QA_PROMPTS,
    metrics=("exact_match", "token_f1", "bleu", "chrf", *_ROUGE, *_LIKELIHOOD),
    max_new_tokens=64,
    aliases={
        "context": ("passage", "paragraph"),
        "question": ("query",),
        "answers": ("answer",),
    },
)
_SUMMARIZATION = Task(
    name="summarization",
    fields=("article",),
    answer="summary",
    prompts=SUMMARY_PROMPTS,
    metrics=(*_ROUGE, "bleu", "chrf", *_LIKELIHOOD),
    max_new_tokens=96,
    # Prompts of 2200 tokens (arXiv 2601.06702), then the longest answer and its end token.
    max_length=2200 + 128 + 1,
    new_tokens_by_language={"ar": 128},
    aliases={
        "article": ("text", "document", "body", "content"),
        "summary": ("headline", "highlights", "target"),
    },
)
_TEXT_TO_TEXT = Task(
    name="text-to-text",
    fields=(),
    answer="completion",
    prompts=TEXT_PROMPTS,
    metrics=("chrf", "bleu", "rougeL", "exact_match", *_LIKELIHOOD),
    max_new_tokens=128,
    aliases={"completion": ("target", "output", "response")},
    clean=str.strip,
    one_line=False,
)

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (_QA, _SUMMARIZATION, _TEXT_TO_TEXT)}
)


def task_named(name: str) -> Task:
    """Return the task with a name.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {shown(name)}; choose one of: {', '.join(TASKS)}")
    return TASKS[name]
