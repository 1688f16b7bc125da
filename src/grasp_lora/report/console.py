"""Print a report in a terminal: its sentences and tables."""

from rich.console import Console
from rich.table import Table as Grid

from grasp_lora.base.words import printable
from grasp_lora.report.document import Document, Lines, Table
from grasp_lora.scoring.cells import cell


def print_document(document: Document, console: Console) -> None:
    """Print the decision, then the sentences and tables that Markdown would have."""
    console.print(printable(" | ".join(document.decision)), markup=False, style="bold")
    for section in document.sections:
        for part in section.parts:
            if isinstance(part, Lines) and not part.whole:
                for text in part.texts:
                    console.print(printable(text), markup=False)
            elif isinstance(part, Table) and not part.whole and part.rows:
                console.print(_grid(part, section.title))


def _grid(table: Table, title: str) -> Grid:
    grid = Grid(title=cell(title))
    for number, name in enumerate(table.titles):
        right = number > 0 and not table.texts
        grid.add_column(cell(name), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(cell(one.text) for one in row))
    return grid
