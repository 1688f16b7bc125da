"""The command report: finished runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.base.files import protect, touch, write_text
from grasp_lora.base.words import printable, shown_path
from grasp_lora.cli.common import AS_PATH


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs.", show_default=False, **AS_PATH)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file that receives it too.", **AS_PATH)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file that --out names.")
    ] = False,
) -> None:
    """Show finished runs side by side: decisions, scores, ratio, cost, settings that differ.

    Reads the records in the run folders; of one run it shows the report. Writes the file of --out,
    if given: one page that needs no network.
    """
    from rich.console import Console

    from grasp_lora.report.console import print_document
    from grasp_lora.report.page import to_page
    from grasp_lora.report.run_report import run_document
    from grasp_lora.report.runs import read_runs, runs_document

    if out is not None:
        if out.exists() and not overwrite:
            raise ValueError(f"{shown_path(out)} exists; pass --overwrite to replace it")
        protect(runs, [out], whole=True)
        touch(out)
    read_runs(runs)
    document = runs_document(runs) if len(runs) > 1 else run_document(runs[0])
    print_document(document, Console(highlight=False))
    if out is not None:
        write_text(out, to_page(document))
        typer.echo(f"wrote {printable(str(out))}")
