"""Present a sweep to people: scores of every language, configuration and system, over all seeds."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from grasp_lora.base.words import in_markdown
from grasp_lora.report.comparison import mean_and_deviation
from grasp_lora.report.run import HEADLINES, NATIVE, TITLES, narrow_table

SHIPPED = (
    "What each run of `auto` shipped, by the loss on the test examples. What is expected is the "
    "difference in loss to the best system that needs no training, with its interval."
)


def sweep_markdown(found: Mapping[str, Any]) -> str:
    """Return `sweep.json` as a Markdown document: one table, and the cells without a result."""
    titles, rows = sweep_rows(found)
    lines = ["# Sweep", "", "Means over seeds, with their deviation where there are several.", ""]
    lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(map(in_markdown, row))} |" for row in rows]
    titles, rows = shipped_rows(found)
    if rows:
        lines += ["", SHIPPED, ""]
        lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
        lines += [f"| {' | '.join(map(in_markdown, row))} |" for row in rows]
    lines += ["", "Configurations:", ""]
    lines += [f"- `{name}`: {in_markdown(what)}" for name, what in found["configurations"].items()]
    for title, named in (("Not applicable", "not_applicable"), ("Without a result", "failed")):
        if found[named]:
            lines += ["", f"{title}:", ""]
            lines += [f"- `{cell}`: {in_markdown(why)}" for cell, why in found[named].items()]
    return "\n".join([*lines, ""])


def sweep_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the table for the terminal."""
    titles, rows = sweep_rows(found)
    return [narrow_table("sweep", titles, rows, titles)]


def sweep_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return column titles and rows: one for each language, configuration, system and test set.

    The system is a method, or the recipe of a run. What runs of `auto` ship may differ by seed;
    `sweep.json` says it of each.
    """
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for cell in found["cells"]:
        for test, scores in cell["scores"].items():
            key = (cell["language"], cell["configuration"], cell["system"], test)
            groups.setdefault(key, []).append(cell | {"found": scores})
    known = {metric for cells in groups.values() for one in cells for metric in one["found"]}
    wanted = dict.fromkeys(name for task in found["tasks"] for name in HEADLINES.get(task, ()))
    metrics = [name for name in wanted if name in known] or sorted(known)
    several = len({test for *_, test in groups}) > 1
    titles = ["language", "configuration", "system", *(["test set"] if several else []), "seeds"]
    titles += ["ratio", *(TITLES.get(name, name) for name in metrics), "dev loss"]
    rows: list[list[str]] = []
    for (*about, test), cells in groups.items():
        row = [*about, *([test] if several else []), str(len(cells))]
        row.append(mean_and_deviation([one["ratio"] for one in cells], 3))
        for name in metrics:
            digits = 3 if name in NATIVE else 1
            row.append(mean_and_deviation([one["found"].get(name) for one in cells], digits))
        rows.append([*row, mean_and_deviation([one["dev_loss"] for one in cells], 3)])
    return titles, rows


def shipped_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return column titles and rows: what each run of `auto` had before, and what it ships.

    Runs differ in the number of solved examples of their prompt; all are in one column.
    """
    cells = [cell for cell in found["cells"] if cell["system"] == "auto"]
    before = list(dict.fromkeys(_column(name) for cell in cells for name in cell["before"]))
    titles = ["language", "configuration", "seed", "test set", *before, "shipped", "expected"]
    rows: list[list[str]] = []
    for cell in cells:
        expected = "–"
        if cell["gain"] is not None:
            low, high = cell["gain"]["interval"]
            expected = f"{-cell['gain']['gain']:+.3f} [{-high:+.3f}, {-low:+.3f}]"
        for test, scores in cell["scores"].items():
            losses = {_column(name): one[test]["loss"] for name, one in cell["before"].items()}
            shown = (f"{losses[name]:.3f}" if name in losses else "–" for name in before)
            row = [cell["language"], cell["configuration"], str(cell["seed"]), test, *shown]
            rows.append([*row, f"{scores['loss']:.3f}: {cell['ships']}", expected])
    return titles, rows


def _column(name: str) -> str:
    return name.partition(",")[0]
