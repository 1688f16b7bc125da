"""What the commands share: their options, how faults are told, how a result is announced."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from grasp_lora.config.run_config import RunConfig


def at_home(given: Any) -> Any:
    """Return the path, or paths, that a user gave, with the sign for the home folder resolved.

    Quoted, or behind an equals sign, it reaches us as it is.
    """
    if isinstance(given, list):
        return [at_home(one) for one in given]
    return given.expanduser() if isinstance(given, Path) else given


AS_PATH: dict[str, Any] = {"callback": at_home}
"""What every option and argument that is a path has."""

Config = Annotated[Path, typer.Argument(help="YAML configuration.", show_default=False, **AS_PATH)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Run folder, in place of the configuration's.", **AS_PATH),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed, in place of the configuration's.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there instead of resuming.")
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile", help="Also write where the time went: profile.md, profile.png, profile.json."
    ),
]
AllowLeakage = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Go on, and record it, where two splits share rows."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False, **AS_PATH)]
Jobs = Annotated[
    int, typer.Option("--jobs", help="Stages at once, each a process; 0 does all in this one.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Threads of each process; by default the cores over --jobs, kept for the folder.",
    ),
]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a mendable fault without traceback and exit with 2; with 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; run the same command to resume", err=True)
        sys.exit(130)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("GRASP_LORA_DEBUG") == "1":
            raise
        where = "" if prints() else f" in process {os.environ['RANK']}"
        typer.echo(f"error{where}: {error}", err=True)
        sys.exit(2)


class Commands(TyperGroup):
    """The commands, with mendable faults turned into messages before click sees them."""

    def invoke(self, ctx: Any) -> Any:
        with user_errors():
            return super().invoke(ctx)


def load(
    path: Path,
    settings: list[str] | None,
    output: Path | None,
    seed: int | None,
    allow_leakage: bool = False,
    training: bool = True,
) -> "RunConfig":
    """Return the configuration in a file, the command's options on top of it."""
    from grasp_lora.config.run_config import load_config

    options = overrides(settings, seed, allow_leakage)
    # JSON text is YAML text: quoting keeps a folder called 1e3 or "no" a text.
    if output is not None:
        import json

        options.append(f"output={json.dumps(str(output))}")
    return load_config(path, options, training)


def overrides(
    settings: list[str] | None, seed: int | None, allow_leakage: bool = False
) -> list[str]:
    """Return the options that stand for settings as `key=value` texts."""
    found = list(settings or [])
    if seed is not None:
        found.append(f"seed={seed}")
    if allow_leakage:
        found.append("data.allow_leakage=true")
    return found


def numbers_in(text: str) -> tuple[int, ...]:
    """Return the whole numbers of a text like `42,1337`.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds {text}: give whole numbers, comma between, as 42,1337") from None


def report_failures(failed: Mapping[str, str]) -> None:
    """Leave with exit code 1 where runs have no result, naming them."""
    for name, why in failed.items():
        typer.echo(f"{name}: {why}", err=True)
    if failed:
        raise typer.Exit(1)


def stage(out: Path, overwrite: bool, work: Callable[[], Path]) -> None:
    before = (out / "stage.json").exists() and not overwrite
    folder = work()
    if before and prints():
        typer.echo(f"{folder} holds this result already; --overwrite makes it again")
    elif not before:
        wrote(folder)


def wrote(folder: Path) -> None:
    if prints():
        typer.echo(f"wrote {folder}")


def prints() -> bool:
    """Whether this is the process that speaks: torchrun starts the command once per device."""
    return os.environ.get("RANK", "0") == "0"
