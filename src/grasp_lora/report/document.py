"""What a report says, before it is written as Markdown or as a page: sections made of parts.

Texts are as they came, not escaped; each writer escapes what it writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grasp_lora.report.charts import Chart


@dataclass(frozen=True)
class Lines:
    """Sentences, each on its own; a list where `listed`.

    Attributes:
        texts: the sentences.
        listed: whether they are items of a list.
        whole: whether only the page has them.
    """

    texts: tuple[str, ...]
    listed: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: what the column is sorted by; None sorts by the text.
        outside: whether the text came from rows of data, so that its direction is its own.
    """

    text: str
    value: float | None = None
    outside: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column has names, the others are numbers unless `texts`.

    Attributes:
        titles: titles of the columns.
        rows: rows of cells.
        texts: whether all columns hold texts.
        folded: title under which a page folds the table away; "" shows it.
        whole: whether only the page has the table.
        marked: numbers of the rows that stand out.
        most: rows that Markdown has at most.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    texts: bool = False
    folded: str = ""
    whole: bool = False
    marked: tuple[int, ...] = ()
    most: int = 10


@dataclass(frozen=True)
class Dots:
    """Values with their intervals on one axis, a row each; only the page has them.

    Attributes:
        title: what the values are.
        rows: name, value, and both ends of the interval, None where there is none.
        marked: numbers of the rows that stand out.
    """

    title: str
    rows: tuple[tuple[str, float, float | None, float | None], ...]
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture in a file beside the report, for Markdown alone; the page draws its own."""

    about: str
    file: str


@dataclass(frozen=True)
class Code:
    """Lines of code to copy."""

    text: str


Part = Lines | Table | Dots | Chart | Picture | Code


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: its title.
        decision: the outcome in one sentence, in parts.
        sections: the sections, most important first; one without parts is left out.
    """

    title: str
    decision: tuple[str, ...]
    sections: tuple[Section, ...]


def cells(texts: Sequence[str]) -> tuple[Cell, ...]:
    """Return plain cells."""
    return tuple(Cell(text) for text in texts)
