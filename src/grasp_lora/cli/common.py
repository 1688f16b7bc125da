"""Shared parts of the commands: options, error messages, the line on what was written."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from grasp_lora.base.files import protect
from grasp_lora.base.machine import Terminated, machine_fault
from grasp_lora.base.words import check_path, printable, shown

if TYPE_CHECKING:
    from grasp_lora.config.run_config import RunConfig
    from grasp_lora.plans.pool import Pool
    from grasp_lora.plans.receipt import Request


def at_home(given: Any) -> Any:
    """Return the path or paths that a user gave, with `~` replaced by the home folder.

    The shell does not replace `~` in quotes or after an equals sign. Other values are returned as
    they are.

    Raises:
        ValueError: as in `check_path`.
    """
    if isinstance(given, list):
        return [at_home(one) for one in given]
    if isinstance(given, Path):
        check_path(given)
        return given.expanduser()
    return given


AS_PATH: dict[str, Any] = {"callback": at_home}
"""Settings of every option and argument that is a path."""

Config = Annotated[Path, typer.Argument(help="YAML configuration.", show_default=False, **AS_PATH)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Run folder; replaces the configuration's.", **AS_PATH),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed; replaces the configuration's.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the program an error arose.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing result instead of resuming.")
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Also write the times of all parts: profile.md, profile.png, profile.json.",
    ),
]
AllowLeakage = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Continue if two splits share examples, and record it."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False, **AS_PATH)]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs", help="Stages done at once, each in a process; 0 uses this process alone."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Threads of each process; default: cores / --jobs, or with --jobs 0 what it has. "
        "Later starts keep the number.",
    ),
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        help="Where the stages of --jobs are done: local, slurm or ray (grasp-lora[slurm], [ray]).",
    ),
]
EngineFile = Annotated[
    Path | None,
    typer.Option(
        "--engine",
        metavar="FILE",
        help="YAML with the engine's own parameters: of submitit's AutoExecutor, or of ray.remote.",
        **AS_PATH,
    ),
]


_CORRECTED = (ValueError, FloatingPointError)
"""Errors whose message says what the user can do."""


@contextmanager
def user_errors(debug: bool = False) -> Iterator[None]:
    """Print an error of the user or the machine and exit with code 2, or with 130 on Ctrl-C.

    Args:
        debug: show where the error was raised instead.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except KeyboardInterrupt:
        if prints():
            typer.echo("\ninterrupted; run the same command to resume", err=True)
        sys.exit(130)
    except BrokenPipeError:
        raise  # whoever reads the output has enough: click ends without a word
    except (Exception, Terminated) as error:
        told = str(error) if isinstance(error, _CORRECTED) else machine_fault(error)
        if several and not debug:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until the last word is said
            from grasp_lora.workbench.processes import last_words

            told = last_words(error, told)
            if told == "":
                sys.exit(2)
        if debug or told is None or os.environ.get("GRASP_LORA_DEBUG") == "1":
            raise
        where = "" if prints() else f" in process {os.environ['RANK']}"
        typer.echo(f"error{where}: {printable(told)}", err=True)
        sys.exit(2)


def _end(_number: int, _frame: Any) -> None:
    raise Terminated


class Commands(TyperGroup):
    """The group of commands; it prints errors that the user can correct before click sees them."""

    def invoke(self, ctx: Any) -> Any:
        with user_errors(ctx.params.get("debug", False)):
            return super().invoke(ctx)


class SeveralWeights(TyperCommand):
    """A command whose option --weights takes all numbers that follow it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, one_by_one(args, "--weights"))


def one_by_one(args: Sequence[str], option: str) -> list[str]:
    """Return a command line in which every number that follows an option has it before itself.

    click gives an option one value, and would take the others for arguments.
    """
    found: list[str] = []
    after = False
    for word in args:
        if after and (_is_number(word) or found[-1] == option):
            found += [word] if found[-1] == option else [option, word]
            continue
        after = word == option
        found.append(word)
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def load(
    path: Path,
    settings: list[str] | None,
    output: Path | None,
    seed: int | None,
    allow_leakage: bool = False,
    training: bool = True,
) -> "RunConfig":
    """Return the configuration in a file, with the settings changed by the command's options."""
    from grasp_lora.config.run_config import load_config

    options = overrides(settings, seed, allow_leakage)
    # JSON is YAML too; its quotes keep a folder called 1e3 or "no" a string.
    if output is not None:
        import json

        options.append(f"output={json.dumps(str(output))}")
    return load_config(path, options, training)


def overrides(
    settings: list[str] | None, seed: int | None, allow_leakage: bool = False
) -> list[str]:
    """Return the command's options that change settings, as `key=value` strings."""
    found = list(settings or [])
    if seed is not None:
        found.append(f"seed={seed}")
    if allow_leakage:
        found.append("data.allow_leakage=true")
    return found


def numbers_in(text: str) -> tuple[int, ...]:
    """Return the whole numbers in a string like `42,1337`.

    Raises:
        ValueError: the string holds anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--seeds {shown(text)}: give whole numbers separated by commas, like 42,1337"
        ) from None


def pool_of(jobs: int, threads: int | None, on: str, engine: Path | None) -> "Pool":
    """Return the pool that the options of a command ask for.

    Raises:
        FileNotFoundError, ValueError: the file of the engine's parameters cannot be read.
    """
    from grasp_lora.config.run_config import read_mapping
    from grasp_lora.plans.pool import Pool

    return Pool(jobs, threads, on, {} if engine is None else read_mapping(engine)[0])


def report_failures(failed: Mapping[str, str]) -> None:
    """Print the runs without a result, if any, and exit with code 1."""
    for name, why in failed.items():
        typer.echo(printable(f"{name}: {why}"), err=True)
    if failed:
        raise typer.Exit(1)


def done(request: "Request", overwrite: bool, work: Callable[[], Path]) -> Path:
    """Return the folder of a result; the work is done unless its receipt says that it is done."""
    if not overwrite and request.is_done():
        return request.place
    before = request.content()
    folder = work()
    request.keep(before)
    return folder


def stage(
    out: Path,
    overwrite: bool,
    work: Callable[[], Path],
    reads: Sequence[Path | None],
    request: "Request | None" = None,
) -> None:
    """Do the work of a stage command, and print whether its folder was written or already done.

    Args:
        out: the folder.
        overwrite: whether a result there is replaced.
        work: does the work; returns the folder. It is what loads the libraries.
        reads: files that the command itself has read, which must not lie in what is replaced.
        request: what the result depends on; None where that is not known before the work.
    """
    if overwrite:
        protect([one for one in reads if one is not None], [out])
    before = (out / "stage.json").exists() and not overwrite
    folder = work() if request is None else done(request, overwrite, work)
    if before and prints():
        typer.echo(
            f"{printable(str(folder))} holds this result already; --overwrite makes it again"
        )
    elif not before:
        wrote(folder)


def wrote(folder: Path) -> None:
    """Print that a folder was written."""
    if prints():
        typer.echo(f"wrote {printable(str(folder))}")


def prints() -> bool:
    """Return whether this process prints; torchrun starts the command once per device."""
    return os.environ.get("RANK", "0") == "0"
