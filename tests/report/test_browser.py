"""The page in a real browser: it asks for nothing, complains of nothing, and its tables sort."""

import pytest

from browser import CHROMIUM, Page, opened
from grasp_lora.report.charts import Chart, Series
from grasp_lora.report.document import Cell, Code, Document, Dots, Lines, Section, Table
from grasp_lora.report.page import to_page
from hostile import HOSTILE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
BAD = (
    *HOSTILE,
    "<script>document.title = 'mine'</script>",
    "<img src=x onerror=\"document.title='mine'\">",
    '"><svg onload="document.title=\'mine\'">',
    "<a href='javascript:1'>x</a><style>body{display:none}</style>",
)
NUMBERS = (10.5, 9.0, None, 100.0)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return an open page with hostile texts in every place."""
    folder = tmp_path_factory.mktemp("browser")
    sorted_by = tuple(
        (Cell(f"row {n}"), Cell("–" if value is None else f"{value:g}", value))
        for n, value in enumerate(NUMBERS)
    )
    rows = tuple((Cell(text), Cell(text, outside=True)) for text in BAD)
    line = Series("s", ((0, 1), (1, 2)))
    wide = tuple(f"a long title {n}" for n in range(12))
    parts = (
        Lines(BAD),
        Lines(BAD, listed=True),
        Table(("name", "value"), sorted_by),
        Table(("name", "text"), rows, texts=True),
        Table(wide, (tuple(Cell("1.23 [1.11, 1.35]", 1.23) for _ in wide),) * 2, folded="More"),
        Dots("dots", tuple((text, 1.0, 0.5, 2.0) for text in BAD), (0,)),
        *(Chart(text, text, text, (line, Series(text, ((0, 1),))), (0.5, text)) for text in BAD),
        *(Chart("c", "x", "y", (line,), (at, "in force")) for at in (0, 1)),
        Code("x = 1\n" + "\n".join(BAD)),
    )
    file = folder / "report.html"
    document = Document("the title", BAD, (Section("s", parts),))
    file.write_text(to_page(document), encoding="utf-8")
    with opened(file, folder / "profile") as found:
        yield found


def test_the_page_asks_for_nothing_and_the_console_is_empty(page: Page):
    assert page.run("document.readyState") == "complete"
    assert [one.rsplit("/", 1)[-1] for one in page.requests] == ["report.html"]
    assert page.complaints == []


def test_hostile_texts_do_nothing(page: Page):
    assert page.run("document.title") == "the title"
    assert page.run("document.querySelectorAll('img, a, iframe, svg[onload]').length") == 0
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("getComputedStyle(document.body).display") == "block"
    assert page.run("document.querySelector('main').textContent").count("document.title") >= 8


def column(page: Page) -> list[str]:
    cells = "document.querySelectorAll('table')[0].querySelectorAll('tbody td:nth-child(2)')"
    return page.run(f"[...{cells}].map((one) => one.textContent)")


def test_a_table_is_sorted_by_numbers_and_back_by_mouse_and_by_keys(page: Page):
    assert column(page) == ["10.5", "9", "–", "100"]
    head = "document.querySelectorAll('table')[0].querySelectorAll('th')[1]"
    page.run(f"{head}.click()")
    assert column(page) == ["9", "10.5", "100", "–"]
    assert page.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    page.run(f"{head}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter'}}))")
    assert column(page) == ["100", "10.5", "9", "–"]


@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_is_as_wide_as_the_screen_and_wide_tables_scroll(page: Page, width):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.ask("Emulation.setDeviceMetricsOverride", **screen)
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.run("document.documentElement.scrollWidth") <= width
    box = "document.querySelectorAll('details .box')[0]"
    assert page.run(f"{box}.scrollWidth > {box}.clientWidth")


def test_the_name_of_a_marker_stays_inside_its_chart(page: Page):
    for place in range(len(BAD), len(BAD) + 2):
        found = page.run(
            f"(() => {{ const chart = document.querySelectorAll('figure.chart svg')[{place}];"
            " const [all, name] = [chart, chart.querySelector('text.marker')]"
            ".map((one) => one.getBoundingClientRect());"
            " return name.left >= all.left && name.right <= all.right; })()"
        )
        assert found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_the_paper(page: Page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.ask("Emulation.setEmulatedMedia", features=features)
    colours = page.run(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    )
    paper, ink = (_brightness(one) for one in colours)
    assert (paper > ink) == (scheme == "light")
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7, "contrast as in WCAG AAA"


def _brightness(colour: str) -> float:
    """Return the relative luminance of a colour like `rgb(18, 23, 29)`."""
    parts = [int(one) / 255 for one in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_paper_it_is_dark_on_light_and_legends_keep_their_colours(page: Page):
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.ask("Emulation.setEmulatedMedia", media="print", features=features)
    paper, ink = (
        _brightness(page.run(f"getComputedStyle(document.body).{name}"))
        for name in ("backgroundColor", "color")
    )
    assert paper > ink
    mark = "getComputedStyle(document.querySelector('.legend li'), '::before')"
    assert page.run(f"{mark}.printColorAdjust") == "exact"
