"""A report as Markdown keeps within its length."""

import pytest

from grasp_lora.report.document import Code, Document, Lines, Section, Table, cells
from grasp_lora.report.markdown import MOST_LINES, to_markdown


def table(count: int, **settings) -> Table:
    return Table(("a", "b"), tuple(cells((f"row {n}", str(n))) for n in range(count)), **settings)


@pytest.mark.parametrize("count", [1, 5, 40, 1000])
def test_no_report_is_longer_than_80_lines(count):
    parts = (table(count), Lines(tuple(map(str, range(count))), listed=True))
    sections = tuple(Section(f"section {n}", parts) for n in range(7))
    text = to_markdown(Document("t", ("d",), sections))
    assert text.count("\n") <= MOST_LINES == 80
    assert [f"## section {n}" in text for n in range(7)] == [True] * 7


def test_what_is_cut_says_how_much_is_missing_and_where_it_is():
    document = Document("t", ("d",), (Section("s", (table(25),)),))
    lines = to_markdown(document).splitlines()
    assert lines[-2:] == ["| row 9 | 9 |", "| 15 more: report.html |  |"]
    short = to_markdown(Document("t", ("d",), (Section("s", (table(25, most=3),)),)))
    assert short.splitlines()[-2:] == ["| row 2 | 2 |", "| 22 more: report.html |  |"]


def test_a_section_that_only_the_page_has_leaves_no_heading():
    section = Section("s", (table(2, whole=True), Lines(("x",), whole=True)))
    assert to_markdown(Document("t", ("a", "b"), (section,))) == "# t\n\n**a \\| b**\n"


@pytest.mark.parametrize("before", [70, 75, 77, 78, 90])
def test_a_report_that_cannot_be_short_ends_no_block_of_code_in_its_middle(before):
    sentences = Lines(tuple(f"sentence {n}" for n in range(before)))
    code = Code("\n".join(f"line {n}" for n in range(9)))
    text = to_markdown(Document("t", ("d",), (Section("s", (sentences, code)),)))
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES
    assert sum(line.startswith("```") for line in lines) in (0, 2)
    whole = 3 + 2 + before + 1 + 11  # title and decision, heading, sentences, a blank, the code
    assert (lines[-1] == "More: report.html") == (whole > MOST_LINES)
