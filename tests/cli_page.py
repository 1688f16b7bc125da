"""The page of the commands: what `--help` of each one says.

`make pages` writes it.
"""

from collections.abc import Iterator

import typer
from typer.testing import CliRunner

from grasp_lora.cli import app

HEAD = """# Commands

This page is for people who look up a command or an option. It shows what `--help` of each says. An
error that you can correct is one line, with exit code 2. The option `--debug` before the name of a
command shows where in the program it arose.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(_about(words) for words in _commands(app))])


def _commands(group: typer.Typer) -> Iterator[list[str]]:
    for one in group.registered_commands:
        assert one.callback is not None
        yield [one.name or one.callback.__name__]
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from ([str(inner.name), *words] for words in _commands(inner.typer_instance))


def _about(words: list[str]) -> str:
    shown = CliRunner().invoke(
        app, [*words, "--help"], prog_name="grasp-lora", env={"COLUMNS": "80"}
    )
    assert shown.exit_code == 0, shown.output
    lines = [line.rstrip() for line in shown.output.strip().splitlines()]
    return "\n".join([f"## `grasp-lora {' '.join(words)}`", "", "```text", *lines, "```", ""])


if __name__ == "__main__":
    print(page(), end="")
