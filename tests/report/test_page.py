"""A report as an HTML page: harmless, self-contained, and with all that there is to say."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from grasp_lora.base.words import legible
from grasp_lora.report.charts import Chart, Series
from grasp_lora.report.document import (
    Cell,
    Code,
    Document,
    Dots,
    Lines,
    Picture,
    Section,
    Table,
)
from grasp_lora.report.page import to_page
from hostile import HALF, HOSTILE

TURNING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Read(HTMLParser):
    """The elements, attributes and texts of a page, as Python's own parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = [tag]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def document_of(text: str) -> Document:
    """Return a document that has a text in every place that a text can have."""
    series = (Series(text, ((0.0, 1.0), (1.0, 2.0)), ((0.0, 0.5, 1.5),)), Series("b", ((0, 1),)))
    parts = (
        Lines((text,)),
        Lines((text,), listed=True),
        Table((text, "n"), ((Cell(text, outside=True), Cell("1", 1.0)),), marked=(0,)),
        Table((text,), ((Cell(text),),), folded=text),
        Dots(text, ((text, 1.0, 0.5, 2.0), ("b", 2.0, None, None)), (0,)),
        Chart(text, text, text, series, (0.5, text), text),
        Code(text),
    )
    return Document(text, (text, text), (Section(text, parts),))


@pytest.mark.parametrize("text", [*HOSTILE, HALF, "\" onmouseover='x", "</style></title>"])
def test_a_page_shows_a_text_as_it_is_wherever_it_stands(text):
    page = to_page(document_of(text))
    plain = Read(to_page(document_of("plain")))
    read = Read(page)
    assert not TURNING.search(page)
    assert [tag for tag, _ in read.elements] == [tag for tag, _ in plain.elements]
    names = [sorted(attributes) for _, attributes in read.elements]
    assert names == [sorted(attributes) for _, attributes in plain.elements]
    whole = "".join(read.texts)
    assert whole.count(legible(text)) >= "".join(plain.texts).count("plain") > 10


def test_a_page_asks_for_nothing_and_runs_only_its_own_script():
    page = to_page(document_of("plain"))
    read = Read(page)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", page.split("<script>")[0])
    for _, attributes in read.elements:
        assert not {"src", "href", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    (policy,) = [a["content"] for a in read.named("meta") if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("text", ["می\u200cخواهم", "北京\u200f!", "क\u094d\u200dष"])
def test_letters_keep_their_joiners_and_their_direction_marks(text):
    assert legible(text) == text
    assert text in to_page(document_of(text))


def test_texts_of_rows_have_their_own_direction():
    read = Read(to_page(document_of("القاهرة")))
    assert all(one["dir"] == "auto" for one in read.named("td"))
    assert len(read.named("bdi")) >= 4


def test_columns_are_sorted_by_their_numbers():
    cells = (Cell("1,234 [1, 2]", 1234.5), Cell("none"))
    read = Read(to_page(Document("t", ("d",), (Section("s", (Table(("a", "b"), (cells,)),)),))))
    assert [one.get("data-value") for one in read.named("td")] == ["1234.5", None]


def test_what_has_nothing_to_show_is_left_out():
    parts = (Picture("p", "p.png"), Table(("a",), ()), Lines(()), Dots("d", ()))
    page = to_page(Document("t", ("d",), (Section("empty", parts),)))
    assert "empty" not in page
    assert "p.png" not in page
