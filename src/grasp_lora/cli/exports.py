"""The commands export, push and cost: adapters for others, and what they cost to run."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.base.words import printable
from grasp_lora.cli.common import AS_PATH, wrote
from grasp_lora.scoring.cells import cell


def export(
    adapter: Annotated[
        Path, typer.Argument(help="PEFT LoRA folder.", show_default=False, **AS_PATH)
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", help="peft, merged, gguf, gguf-merged or mlx.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write.", show_default=False, **AS_PATH),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format: bfloat16, float16 or float32.")
    ] = "bfloat16",
    rank: Annotated[int | None, typer.Option(help="Trim to this rank, by singular values.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Trim to the lowest rank that loses at most this share of any module."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model; replaces the one that the adapter names.")
    ] = None,
    public_name: Annotated[
        str | None,
        typer.Option(
            "--public-name", metavar="OWNER/NAME", help="Name the base model so in the result."
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="ENGINE",
            help="Write nothing; say what llama.cpp, vllm, sglang or mlx would get wrong.",
        ),
    ] = None,
) -> None:
    """Write an adapter in the form that another program reads, or check it for an engine.

    Reads the adapter, and the base model for merged, gguf and gguf-merged. Writes the folder of
    --out with serve.txt, the command that serves it; then loads it again and prints how far it is
    from the adapter. With --check it writes nothing and exits with 1 if the engine would fail or
    compute something else.
    """
    if check is not None:
        if to is not None or out is not None:
            raise ValueError("--check writes nothing; leave --to and --out out")
        _check(check, adapter)
        return
    if to is None or out is None:
        raise ValueError("give --to and --out, or --check ENGINE")
    from grasp_lora.sharing.export import Request, write_export

    request = Request(
        adapter=adapter,
        to=to,
        out=out,
        dtype=dtype,
        rank=rank,
        tolerance=tolerance,
        model=model,
        public_name=public_name,
    )
    wrote(write_export(request, lambda line: typer.echo(printable(line))))


def _check(engine: str, adapter: Path) -> None:
    from grasp_lora.sharing.engines import faults_for

    faults = faults_for(engine, adapter)
    for fault in faults:
        typer.echo(printable(f"{engine}: {fault}"))
    if faults:
        raise typer.Exit(1)
    typer.echo(printable(f"{engine} reads {adapter} as PEFT does"))


def push(
    repo: Annotated[str, typer.Argument(help="Repository on the hub, owner/name.")],
    place: Annotated[
        Path,
        typer.Argument(metavar="[FOLDER]", help="Adapter folder or run folder.", **AS_PATH),
    ] = Path("."),
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody read a new repository.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the upload.")] = False,
) -> None:
    """Upload an adapter with its card to the Hugging Face hub; of a run its reports too.

    Reads the folder, and who is logged in (hf auth login, or HF_TOKEN). Shows what would be
    uploaded, after looking through it for absolute paths and tokens, and asks. Writes one commit
    to the repository, which is private unless --public; its other files stay.
    """
    from grasp_lora.sharing.upload import look_at, look_through, parcel_of, preview, upload

    parcel = parcel_of(place)
    look_through(parcel)
    where = look_at(repo, public)
    for line in preview(parcel, where):
        typer.echo(printable(line))
    if not yes:
        if not asked_at_a_terminal():
            raise ValueError("no terminal is there to ask; pass --yes to upload these files")
        typer.confirm("Upload these files?", abort=True)
    typer.echo(f"uploaded: {printable(upload(parcel, where))}")


def asked_at_a_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin.isatty()


def cost(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="PEFT LoRA folders of one backbone.", show_default=False, **AS_PATH),
    ],
    model: Annotated[
        str | None, typer.Option(help="Base model; replaces the one that the first adapter names.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of the base model, as model.dtype.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure what adapters cost: bytes on disk and in memory, time to load and switch, speed.

    Reads the adapters and their base model, and prints a table, with the energy where the machine
    tells it. Writes nothing.
    """
    from rich.console import Console
    from rich.table import Table

    from grasp_lora.sharing.cost import READ, costs_on

    place = None if model is None else os.path.expanduser(model)
    name, rows = costs_on(place, adapters, dtype, device, typer.echo)
    table = Table(title=f"on {cell(name)}")
    table.add_column("adapter", overflow="fold")
    known = all(row.energy is not None for row in rows)
    titles = ("rank", "zeros", "disk", "memory", "load", "switch", "tokens/s")
    for title in (*titles, *(["J/1,000 tokens"] if known else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = [
            *(str(row.rank), f"{row.zeros:.0%}"),
            *(f"{size / 1e6:.2f} MB" for size in (row.disk, row.memory)),
            *(f"{1000 * seconds:.1f} ms" for seconds in (row.load, row.switch)),
            f"{row.speed:,.0f}",
            *([f"{row.energy:.2f}"] if known else []),
        ]
        table.add_row(cell(row.name), *values)
    Console(highlight=False).print(table)
    typer.echo(
        f"Speed: {READ} tokens read at once. Zeros alone make nothing smaller or faster; a lower "
        "rank (grasp-lora export --rank) or bfloat16 does."
    )
