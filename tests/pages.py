"""The pages for people, taken apart: their code blocks, the commands in them, their links.

A block says what it is: `sh` (commands alone), `console` (`$ command`, then what it prints),
`python`, `yaml` (a configuration or part of one), `text` (what is printed or written; nothing is
checked) or `mermaid`.
"""

import argparse
import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from grasp_lora.cli import app
from grasp_lora.cli.common import numbers_in
from grasp_lora.config.run_config import RunConfig, load_config, make_config
from grasp_lora.config.sweep import Sweep
from grasp_lora.plans.ablate import CHANGES
from grasp_lora.plans.methods import METHODS
from grasp_lora.sharing.engines import ENGINES
from grasp_lora.sharing.export import TARGETS
from grasp_lora.tasks.base import TASKS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
NOTEBOOKS = tuple(sorted((ROOT / "examples").glob("*.ipynb")))
LANGUAGES = ("sh", "console", "python", "yaml", "text", "mermaid")
MARKDOWN = MarkdownIt("commonmark").enable("table")
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What the command line raises for anything that it does not take."""
INCOMPLETE = ("MissingParameter", "BadOptionUsage", "NoArgsIsHelpError")
"""Names of those that only say that something is left out."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence (from 1), its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """Return the fenced blocks of a page, from first to last."""
    return [
        Block(page, one.map[0] + 1, one.info.strip(), one.content)
        for one in MARKDOWN.parse(text)
        if one.type == "fence" and one.map is not None
    ]


def all_blocks() -> list[Block]:
    """Return the fenced blocks of all pages."""
    return [one for path in PAGES for one in blocks_of(path.read_text("utf-8"), _name(path))]


def inline_commands() -> list[tuple[str, str]]:
    """Return (page, command) of every `grasp-lora ...` inside a line of text."""
    found = []
    for path in PAGES:
        for token in _inline(path.read_text("utf-8")):
            if token.type == "code_inline" and token.content.startswith("grasp-lora "):
                found.append((_name(path), token.content))
    return found


def _inline(text: str) -> Iterator[Token]:
    for token in MARKDOWN.parse(text):
        yield from token.children or []


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- commands


def commands_in(block: Block) -> str:
    """Return the commands of a block, without what they print."""
    if block.language == "sh":
        return block.text
    typed = [one[2:] for one in block.text.splitlines() if one.startswith("$ ")]
    return "\n".join(typed)


PROGRAMS = ("grasp-lora", "python", "make", "pip", "torchrun", "mkdocs", "npm")


def called(script: str, folder: Path) -> list[list[str]]:
    """Return every command that a script calls, with its arguments, by running it in bash.

    The programs are stand-ins that only note how they were called. Another program is an error, and
    so is a redirection: the shell is a restricted one, as what it sees is the repository itself.

    Args:
        script: the lines of a block.
        folder: an empty folder; the script sees what lies in the root of the repository.
    """
    stubs, seen = folder / "stubs", folder / "seen"
    stubs.mkdir()
    for name in PROGRAMS:
        note = f'#!/bin/bash\nprintf "%s\\0" "$#" {name} "$@" >> "{seen}"\n'
        (stubs / name).write_text(note, encoding="utf-8")
        (stubs / name).chmod(0o755)
    place = folder / "here"
    place.mkdir()
    for one in ROOT.iterdir():
        (place / one.name).symlink_to(one)
    done = subprocess.run(
        ["/bin/bash", "-r", "-eu", "-c", script],
        cwd=place,
        env={"PATH": str(stubs)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"not a script that runs: {done.stderr}")
    words = seen.read_text("utf-8").split("\0")[:-1] if seen.exists() else []
    found = []
    while words:
        count = int(words[0]) + 1
        found.append(words[1 : 1 + count])
        words = words[1 + count :]
    return found


def check_command(words: Sequence[str], whole: bool = True) -> None:
    """Parse a command without running it.

    Args:
        words: the program and its arguments.
        whole: every required argument has to be there too.

    Raises:
        ValueError, UsageError: the program would not take it.
    """
    program, *rest = words
    CHECKS[program](rest, whole)


def _grasp_lora(arguments: Sequence[str], whole: bool) -> None:
    command = typer.main.get_command(app)
    taken: list[dict[str, Any]] = []
    _unhook(command, taken)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["grasp-lora", *arguments])
            command.main(list(arguments), "grasp-lora", standalone_mode=False)
    except UsageError as error:
        if whole or type(error).__name__ not in INCOMPLETE:
            raise
    for values in taken:
        _check_values(str(arguments[0]), values)


def _unhook(command: Any, taken: list[dict[str, Any]]) -> None:
    """Make every command note its values and do nothing."""
    for one in getattr(command, "commands", {}).values():
        _unhook(one, taken)
    for option in command.params:
        if option.name in ("install_completion", "show_completion"):
            option.callback = _end  # its own would change the shell's files
    command.callback = lambda **values: taken.append(values)


def _end(context: Any, _option: Any, given: Any) -> None:
    if given:
        context.exit()


ONLY: Mapping[str, Mapping[str, Any]] = {"compare": METHODS, "ablate": CHANGES}
CHOICES: Mapping[str, Mapping[str, Any]] = {"to": TARGETS, "check": ENGINES, "task": TASKS}


def _check_values(command: str, values: Mapping[str, Any]) -> None:
    """Check what the command itself would look at first."""
    for name, known in CHOICES.items():
        given = values.get(name)
        if given is not None and given not in known:
            raise ValueError(f"--{name} {given}: choose from {', '.join(known)}")
    for name in values.get("only") or ():
        if name not in ONLY[command]:
            raise ValueError(f"--only {name} is none of {command}")
    if values.get("seeds"):
        numbers_in(values["seeds"])
    settings = list(values.get("settings") or ())
    file = values.get("config")
    with nothing_missing():
        if file is not None and (ROOT / file).is_file():
            load_config(ROOT / file, settings)
        elif settings:
            make_config(_sample(), settings)


def _python(arguments: Sequence[str], whole: bool) -> None:
    if arguments[0] != "-m":
        if not (ROOT / arguments[0]).is_file():
            raise ValueError(f"there is no script {arguments[0]}")
        return
    module, *rest = arguments[1:]
    if module == "grasp_lora":
        _grasp_lora(rest, whole)
    elif module == "pip":
        _pip(rest, whole)
    elif module.startswith("benchmarks."):
        _benchmark(module, rest)
    else:
        raise ValueError(f"python -m {module}: not a module of this project")


class _ParsedError(Exception):
    """Ends a benchmark once its options are read."""


def _benchmark(module: str, arguments: Sequence[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(self, args, namespace)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "error", _refuse)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.chdir(ROOT)
        try:
            importlib.import_module(module).main()
        except _ParsedError:
            return
    if module != "benchmarks.goals":  # prints what is recorded, and reads no options
        raise ValueError(f"{module} ran without reading options")


def _refuse(parser: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(f"{parser.prog}: {message}")


def _torchrun(arguments: Sequence[str], whole: bool) -> None:
    start = list(arguments).index("-m")
    _python(arguments[start:], whole)


def _make(arguments: Sequence[str], _whole: bool) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    for target in arguments:
        if not re.search(rf"^{re.escape(target)}:", text, re.MULTILINE):
            raise ValueError(f"make {target}: the Makefile has no such target")


LOCAL = re.compile(r"^(?:\.|grasp[-_]lora|dist/grasp_lora-[\w.]+\.whl)(?:\[([\w,-]+)\])?$")


def _pip(arguments: Sequence[str], _whole: bool) -> None:
    """Check extras; the package is on no index, so that its bare name installs nothing."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
    for word in arguments[1:]:
        local = LOCAL.match(word)
        if word.startswith("grasp") and (local is None or local[1] is None):
            raise ValueError(f"pip install {word}: it is on no package index")
        if local is not None and local[1] is not None:
            for extra in local[1].split(","):
                if extra not in extras:
                    raise ValueError(f"pip install {word}: there is no extra {extra}")


def _others(_arguments: Sequence[str], _whole: bool) -> None:
    """Take what is no program of this project as it is."""


CHECKS: Mapping[str, Callable[[Sequence[str], bool], None]] = {
    "grasp-lora": _grasp_lora,
    "python": _python,
    "torchrun": _torchrun,
    "make": _make,
    "pip": _pip,
    "mkdocs": _others,
    "npm": _others,
}


# --- configurations


@contextmanager
def nothing_missing() -> Iterator[None]:
    """Take every file that a configuration names as there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "missing_files", lambda _config: [])
        yield


def _sample() -> dict[str, Any]:
    """Return a whole configuration, of which a block may show a part."""
    roles = {role: {"language": "es", "files": "builtin"} for role in ("source", "target")}
    return {"model": "smollm2", "data": {"task": "qa", **roles}}


def check_yaml(text: str) -> None:
    """Check a configuration, or a sweep; what a part leaves out is taken from a sample.

    Raises:
        ValueError: it would be refused.
    """
    given = yaml.safe_load(text)
    if isinstance(given, dict) and "languages" in given:
        _check_sweep(Sweep.model_validate(given))
        return
    with nothing_missing():
        config = make_config(_beneath(_sample(), yaml.safe_load(text)))
    if config.data.task not in TASKS:
        raise ValueError(f"data.task {config.data.task}: choose from {', '.join(TASKS)}")


def _check_sweep(sweep: Sweep) -> None:
    for own in sweep.languages.values():
        for variant in sweep.configurations.values():
            changes = own | variant.settings
            with nothing_missing():
                make_config(_sample(), [f"{key}={value}" for key, value in changes.items()])
            for name in variant.methods:
                if name not in METHODS:
                    raise ValueError(f"methods {name}: choose from {', '.join(METHODS)}")


def _beneath(below: Any, above: Any) -> Any:
    """Return `above` with what it lacks of `below`, key by key."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _beneath(below.get(key), one) for key, one in above.items()}}


# --- links


def broken_links(path: Path) -> list[str]:
    """Return the relative links of a page or a notebook that lead nowhere."""
    found = []
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    for token in _inline(text):
        target = str(token.attrGet("href") or token.attrGet("src") or "")
        if target == "" or re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            found.append(target)
    return found


@functools.cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of a page: those of its headings, as code hosts make them, and its own."""
    text = path.read_text("utf-8")
    found: set[str] = set()
    tokens = MARKDOWN.parse(text)
    for heading, inner in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            words = "".join(one.content for one in inner.children or [])
            found.add(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
