"""The commands init and doctor: a first configuration, and what this machine has for a run."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.base.files import protect, touch, write_text
from grasp_lora.base.words import printable, shown_path
from grasp_lora.cli.common import AS_PATH


def init(
    out: Annotated[Path, typer.Argument(help="YAML file to write.", **AS_PATH)] = Path(
        "grasp-lora.yaml"
    ),
    data: Annotated[
        Path | None, typer.Option(help="File of labelled examples of the target.", **AS_PATH)
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language code of these examples.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="PEFT adapter of the source language.", **AS_PATH)
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="PEFT adapter of the target language.", **AS_PATH)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Backbone; default: the one that the adapters name.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task; default: the one that the columns fit.")
    ] = None,
    source_data: Annotated[
        Path | None,
        typer.Option(
            "--source-data", help="Source examples, where there is no source adapter.", **AS_PATH
        ),
    ] = None,
    source_language: Annotated[
        str, typer.Option("--source-language", help="Language code of the source.")
    ] = "en",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the YAML file if it exists.")
    ] = False,
) -> None:
    """Write a first configuration, and describe its examples as `data describe` does.

    Reads the adapters, the examples and the tokenizer, no weights; on a terminal it asks for what
    no option gives. Writes the YAML file, and beside it the schema by which editors check it.
    """
    if out.exists() and not overwrite:
        raise ValueError(
            f"{shown_path(out)} exists; name another file, or pass --overwrite to replace it"
        )
    data = data or _asked_path("File of labelled examples of the target", "--data")
    language = language or _asked("Language code of these examples", "--language")
    if source is None and source_data is None:
        source = _asked_path("PEFT adapter of the source language", "--source or --source-data")
    from grasp_lora.config.languages import language_code
    from grasp_lora.config.reference import settings_schema
    from grasp_lora.config.run_config import load_config
    from grasp_lora.config.starter import SCHEMA_FILE, Start, starter_yaml
    from grasp_lora.workbench.describe import describe_data
    from grasp_lora.workbench.starting import model_of, prompt_of, task_of_file

    given = [str(one) for one in (source, target) if one is not None]
    language = language_code(language)
    task = task or task_of_file(data, language)
    start = Start(
        model=model or model_of(given),
        task=task,
        language=language,
        data=str(data),
        source=None if source is None else str(source),
        target=None if target is None else str(target),
        source_language=language_code(source_language),
        source_data=None if source_data is None else str(source_data),
        prompt=prompt_of(task, language),
    )
    schema = out.with_name(SCHEMA_FILE)
    protect([one for one in (data, source_data) if one is not None], [out, schema])
    touch(out)
    write_text(schema, json.dumps(settings_schema(), indent=2) + "\n")
    write_text(out, starter_yaml(start))
    typer.echo(f"wrote {printable(str(out))} and {printable(str(schema))}")
    typer.echo(printable(describe_data(load_config(out, [], training=False))))
    typer.echo(f"next: grasp-lora plan {printable(str(out))}")


def doctor() -> None:
    """Show versions, devices, memory, optional packages, access to the hub, and what to install.

    Reads the installed packages and asks the hub for one answer. Writes nothing. The exit code is 1
    if something needed is missing.
    """
    from rich.console import Console

    from grasp_lora.report.console import print_document
    from grasp_lora.workbench.doctor import examination

    document, ready = examination()
    print_document(document, Console(highlight=False))
    if not ready:
        raise typer.Exit(1)


def _asked(question: str, option: str) -> str:
    """Return the answer to a question on a terminal.

    Raises:
        ValueError: nobody can be asked.
    """
    if not _terminal():
        raise ValueError(f"{option} is missing, and no terminal is there to ask: give it")
    return typer.prompt(question)


def _terminal() -> bool:
    return sys.stdin.isatty()


def _asked_path(question: str, option: str) -> Path:
    return Path(_asked(question, option)).expanduser()
