"""Tables of a terminal, and the texts in them.

A finished evaluation is shown again without what computes scores.
"""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from grasp_lora.base.files import read_json
from grasp_lora.base.words import printable


def cell(text: str) -> Text:
    """Return a text so that a rich table shows it as it is: no markup, nothing a terminal obeys."""
    return Text(printable(text).replace("\n", "\\n"))


def evaluation_tables(folder: Path) -> list[Table]:
    """Return the scores of an evaluation as tables for the terminal: one per set, then the mean."""
    scores = read_json(folder / "scores.json")
    tables: list[Table] = []
    for name, one in scores["sets"].items():
        empty = f", {one['empty']} empty answers" if one.get("empty") else ""
        table = Table(title=cell(f"{name}: {one['language']}, {one['n']} rows{empty}"))
        for title in ("score", "value", "95 % interval"):
            table.add_column(title, justify="left" if title == "score" else "right")
        for metric, found in one["scores"].items():
            ends = "" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"
            table.add_row(metric, f"{found['value']:.2f}", ends)
        tables.append(table)
    if "mean" in scores:
        table = Table(title="over the test sets")
        for title in ("score", "mean", "worst", "of"):
            table.add_column(title, justify="right" if title in ("mean", "worst") else "left")
        for metric, value in scores["mean"].items():
            worst = scores["worst"][metric]
            table.add_row(metric, f"{value:.2f}", f"{worst['value']:.2f}", cell(worst["set"]))
        tables.append(table)
    return tables
