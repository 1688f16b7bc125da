"""Command line: arguments -> RunConfig -> one recipe; prints the folder that was written.

torch and transformers are imported inside the commands, so that `--help` answers at once. Faults
the user can mend are printed as `error: ...` with exit code 2; set GRASP_LORA_DEBUG=1 to see the
traceback instead.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from grasp_lora.config import RunConfig


@contextmanager
def _user_errors() -> Iterator[None]:
    """Print a mendable fault without traceback and exit with 2; with 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; run the same command to resume", err=True)
        sys.exit(130)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("GRASP_LORA_DEBUG") == "1":
            raise
        where = "" if _prints() else f" in process {os.environ['RANK']}"
        typer.echo(f"error{where}: {error}", err=True)
        sys.exit(2)


class _Commands(TyperGroup):
    """The commands, with mendable faults turned into messages before click sees them."""

    def invoke(self, ctx: Any) -> Any:
        with _user_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="grasp-lora",
    cls=_Commands,
    help="Merge a source and a target language LoRA adapter, learn how much of the merge to prune, "
    "and fine-tune it at that ratio. The result is an ordinary PEFT adapter.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="YAML configuration.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Run folder, in place of the configuration's.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed, in place of the configuration's.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there instead of resuming.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]


@app.command()
def run(
    config: Config,
    settings: Set = None,
    output: Output = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Do the whole job: adapters, merge, search, final fine-tuning, evaluation.

    Reads the configuration and the rows or adapters it names. Writes the run folder: final/ (the
    adapter), ratio.json, rounds.jsonl, ratio.png, scores.json, report.md. The same command again
    resumes an interrupted run.
    """
    _run(_load(config, settings, output, seed), overwrite)


@app.command()
def demo(
    settings: Set = None,
    output: Output = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Run English -> Spanish on an embedded question set with a small backbone, on the CPU.

    Reads nothing but the packages of `pip install grasp-lora[demo]`. Writes runs/demo, as `run`.
    """
    with resources.as_file(resources.files("grasp_lora") / "configs" / "demo.yaml") as path:
        config = _load(path, settings, output, seed)
    _run(config, overwrite)


@app.command()
def train(
    config: Config,
    role: Annotated[
        Literal["source", "target"], typer.Option(help="Whose rows.", show_default=False)
    ],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one adapter.

    Reads the rows of data.source or data.target. Writes a PEFT adapter folder.
    """
    loaded = _load(config, settings, None, seed)
    from grasp_lora.recipes.train import train_adapter

    _stage(out, overwrite, lambda: train_adapter(loaded, role, out, overwrite=overwrite))


@app.command()
def merge(
    config: Config,
    out: Out,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", help="PEFT adapter folder; repeat it, source first."),
    ] = None,
    settings: Set = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge adapters of one backbone.

    Reads the adapters given, or else adapters.source and adapters.target of the configuration.
    Writes a PEFT adapter folder.
    """
    loaded = _load(config, settings, None, seed)
    named = (loaded.adapters.source, loaded.adapters.target)
    folders = adapter or [folder for folder in named if folder is not None]
    if not folders:
        raise ValueError(
            "no adapter to merge; give --adapter DIR, or set adapters.source and adapters.target"
        )
    from grasp_lora.recipes.merge import merge_adapters

    _stage(out, overwrite, lambda: merge_adapters(loaded, folders, out, overwrite=overwrite))


@app.command()
def search(
    config: Config,
    merged: Annotated[Path, typer.Option(help="Merged adapter folder.", show_default=False)],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Learn the prune ratio while fine-tuning a merged adapter.

    Reads the merged adapter and the target rows. Writes ratio.json, rounds.jsonl and adapter/.
    """
    loaded = _load(config, settings, None, seed)
    from grasp_lora.recipes.search import search_ratio

    _stage(out, overwrite, lambda: search_ratio(loaded, merged, out, overwrite=overwrite))


@app.command()
def finetune(
    config: Config,
    start: Annotated[Path, typer.Option(help="Adapter folder to prune.", show_default=False)],
    ratio: Annotated[
        str, typer.Option(help="Fraction to remove, or a ratio.json.", show_default=False)
    ],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Prune an adapter at a ratio and fine-tune it.

    Reads the adapter and the target rows. Writes a PEFT adapter folder.
    """
    fraction = _ratio(ratio)
    loaded = _load(config, settings, None, seed)
    from grasp_lora.recipes.finetune import finetune_at

    _stage(out, overwrite, lambda: finetune_at(loaded, start, fraction, out, overwrite=overwrite))


@app.command()
def evaluate(
    config: Config,
    adapter: Annotated[
        str, typer.Option(help="Adapter folder, or none: the bare backbone.", show_default=False)
    ],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Answer the target test rows and score the answers.

    Reads the adapter and the test rows. Writes scores.json and predictions.jsonl.
    """
    loaded = _load(config, settings, None, seed)
    from grasp_lora.recipes.evaluate import evaluate_adapter

    folder = None if adapter == "none" else Path(adapter)
    _stage(out, overwrite, lambda: evaluate_adapter(loaded, folder, out, overwrite=overwrite))


@app.command(name="settings")
def list_settings() -> None:
    """List every setting with its default and what it does.

    Reads nothing and writes nothing.
    """
    from grasp_lora.reference import settings_markdown

    typer.echo(settings_markdown(), nl=False)


def main() -> None:
    """Entry point of the `grasp-lora` command."""
    app()


def _load(
    path: Path, settings: list[str] | None, output: Path | None, seed: int | None
) -> "RunConfig":
    from grasp_lora.config import load_config

    overrides = list(settings or [])
    # JSON text is YAML text: quoting keeps a folder called 1e3 or "no" a text.
    if output is not None:
        import json

        overrides.append(f"output={json.dumps(str(output))}")
    if seed is not None:
        overrides.append(f"seed={seed}")
    return load_config(path, overrides)


def _run(config: "RunConfig", overwrite: bool) -> None:
    from grasp_lora.recipes.run import run as run_all

    folder = run_all(config, overwrite=overwrite)
    if not _prints():
        return
    from rich.console import Console

    from grasp_lora.report import comparison, scores_table
    from grasp_lora.runs import read_json

    scores, ratio = read_json(folder / "scores.json"), read_json(folder / "ratio.json")
    console = Console(highlight=False)
    console.print(scores_table(scores))
    console.print(f"ratio {ratio['ratio']:.3f}, verdict {ratio['verdict']}")
    console.print(comparison(scores), markup=False, end="")
    _wrote(folder)


def _stage(out: Path, overwrite: bool, work: Callable[[], Path]) -> None:
    before = (out / "stage.json").exists() and not overwrite
    folder = work()
    if before and _prints():
        typer.echo(f"{folder} holds this result already; --overwrite makes it again")
    elif not before:
        _wrote(folder)


def _wrote(folder: Path) -> None:
    if _prints():
        typer.echo(f"wrote {folder}")


def _prints() -> bool:
    """Whether this is the process that speaks: torchrun starts the command once per device."""
    return os.environ.get("RANK", "0") == "0"


def _ratio(text: str) -> float:
    """A fraction from `0.4`, or from a `ratio.json`."""
    try:
        ratio = float(text)
    except ValueError:
        from grasp_lora.runs import read_json

        stored = read_json(Path(text))
        if not isinstance(stored, dict) or not isinstance(stored.get("ratio"), int | float):
            raise ValueError(f"'{text}' holds no ratio; give the ratio.json of a search") from None
        ratio = float(stored["ratio"])
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {text} is outside [0, 1]; give the fraction to remove, like 0.4")
    return ratio
