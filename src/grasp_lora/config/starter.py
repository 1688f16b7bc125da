"""A first configuration: the few settings that nobody can guess, with what may be changed next."""

import json
from dataclasses import dataclass

SCHEMA_FILE = "grasp-lora.schema.json"
"""File beside the configuration that its first line names."""


@dataclass(frozen=True)
class Start:
    """What a first configuration says.

    Attributes:
        model: the backbone.
        task: name of the task.
        language: language code of the labelled examples.
        data: file of the labelled examples.
        source: adapter of the source language; None trains one on `source_data`.
        target: adapter of the target language; None trains one on the labelled examples.
        source_language: language code of the source.
        source_data: file of the source's examples; None where its adapter is given.
        prompt: the prompt template of task and language; "" leaves the line open.
        output: the run folder.
    """

    model: str
    task: str
    language: str
    data: str
    source: str | None = None
    target: str | None = None
    source_language: str = "en"
    source_data: str | None = None
    prompt: str = ""
    output: str = "runs/first"


def starter_yaml(start: Start) -> str:
    """Return a commented configuration of fewer than 25 lines."""
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# grasp-lora plan FILE shows the cost, grasp-lora run FILE does the work.",
        f"output: {_scalar(start.output)}",
        f"model: {_scalar(start.model)}  # the backbone both adapters were trained on",
        "budget: 5  # plain fine-tuning runs that trials may cost",
    ]
    given = {"source": start.source, "target": start.target}
    named = [f"  {role}: {_scalar(place)}" for role, place in given.items() if place is not None]
    if named:
        lines += ["adapters:  # one that is not named here is trained first", *named]
    lines += ["data:", f"  task: {start.task}"]
    if start.source_data is not None:
        lines += [
            "  source:",
            f"    language: {_scalar(start.source_language)}",
            f"    files: {_scalar(start.source_data)}",
        ]
    lines += [
        "  target:",
        f"    language: {_scalar(start.language)}",
        f"    files: {_scalar(start.data)}  # divided into train, dev and micro-dev by context",
        "    # rows: {train: 50, dev: 50, micro_dev: 16, test: 100}  # with test rows to be scored",
        "    # The prompt in force; write the one that your adapters know, if it is another.",
        f"    # prompt: {_scalar(start.prompt or '...')}",
    ]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """Return a text as YAML; JSON's quotes keep one like 1e3 or "no" a text."""
    return json.dumps(text, ensure_ascii=False)
