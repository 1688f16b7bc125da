"""Write a report as Markdown of a bounded length; what does not fit is on the page."""

from collections.abc import Iterator, Sequence

from grasp_lora.base.words import fenced, in_markdown, shortened
from grasp_lora.report.document import Cell, Code, Document, Lines, Part, Picture, Section, Table

MOST_LINES = 80
_MOST_ROWS = 10
_LEAST_ROWS = 2


def to_markdown(document: Document, elsewhere: str = "report.html") -> str:
    """Return a report as Markdown in at most `MOST_LINES` lines.

    Tables and lists are cut to the same number of rows until it fits, and say how much is missing.

    Args:
        document: the report.
        elsewhere: the file that has the rest.
    """
    lines: list[str] = []
    for most in range(_MOST_ROWS, _LEAST_ROWS - 1, -1):
        lines = list(_lines(document, most, elsewhere))
        if len(lines) <= MOST_LINES:
            break
    return "\n".join(_cut(lines, elsewhere)) + "\n"


def _cut(lines: Sequence[str], elsewhere: str) -> list[str]:
    """Return lines that are not too many, without a block of code that would have no end."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    kept = list(lines[: MOST_LINES - 2])
    fences = [place for place, line in enumerate(kept) if line.startswith("```")]
    if len(fences) % 2:
        kept = kept[: fences[-1]]
    return [*kept, "", f"More: {elsewhere}"]


def _lines(document: Document, most: int, elsewhere: str) -> Iterator[str]:
    yield f"# {in_markdown(document.title)}"
    yield ""
    yield f"**{in_markdown(' | '.join(document.decision))}**"
    for section in document.sections:
        parts = [one for part in section.parts if (one := list(_part(part, most, elsewhere)))]
        if parts:
            yield ""
            yield from _headed(section, parts)


def _headed(section: Section, parts: Sequence[Sequence[str]]) -> Iterator[str]:
    if section.title:
        yield f"## {in_markdown(section.title)}"
    for number, part in enumerate(parts):
        # A blank line would only cost one of the few: a heading ends itself.
        if number:
            yield ""
        yield from part


def _part(part: Part, most: int, elsewhere: str) -> Iterator[str]:
    if isinstance(part, Lines) and not part.whole:
        mark = "- " if part.listed else ""
        shown = part.texts[:most] if part.listed else part.texts
        yield from (mark + in_markdown(text) for text in shown)
        if len(shown) < len(part.texts):
            yield f"- {len(part.texts) - len(shown)} more: {elsewhere}"
    elif isinstance(part, Table) and not part.whole and part.rows:
        yield from _table(part, most, elsewhere)
    elif isinstance(part, Picture):
        yield f"![{in_markdown(part.about)}]({part.file})"
    elif isinstance(part, Code):
        yield from "\n".join(fenced(part.text)).split("\n")


def _table(table: Table, most: int, elsewhere: str) -> Iterator[str]:
    yield f"| {' | '.join(map(in_markdown, table.titles))} |"
    yield f"|---|{('---|' if table.texts else '---:|') * (len(table.titles) - 1)}"
    most = min(most, table.most)
    for row in table.rows[:most]:
        yield f"| {' | '.join(map(_cell, row))} |"
    if len(table.rows) > most:
        left = f"{len(table.rows) - most} more: {elsewhere}"
        yield f"| {' | '.join([left] + [''] * (len(table.titles) - 1))} |"


def _cell(cell: Cell) -> str:
    # Texts of rows are as long as rows are; other cells are short.
    return in_markdown(shortened(cell.text) if cell.outside else cell.text)
