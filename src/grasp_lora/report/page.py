"""Write a report as one HTML page that needs no network and runs only its own script.

All texts are escaped by the template engine, after `legible` has shown what turns the direction of
a text or steers a terminal. The page's policy allows no request, and no script or style but its
own, which it names by their hashes.
"""

import base64
import functools
import hashlib
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from grasp_lora.base.words import legible
from grasp_lora.report.charts import HEIGHT, WIDTH, Chart, axis, drawing
from grasp_lora.report.document import Code, Document, Dots, Lines, Part, Picture, Table

_TEMPLATES = "templates"
_DOTS_WIDTH = 240


def to_page(document: Document) -> str:
    """Return a report as an HTML page; the same report gives the same bytes."""
    style, script = (_file(name) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src '{_hashed(style)}'; script-src '{_hashed(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # The two files are our own; escaping would change them.
    made = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return _environment().get_template("report.html").render(document=document, **made)


@functools.cache
def _environment() -> Environment:
    found = Environment(
        autoescape=True,
        finalize=_finalize,
        loader=PackageLoader("grasp_lora.report", _TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.globals |= {"width": WIDTH, "height": HEIGHT, "dots_width": _DOTS_WIDTH}
    found.globals |= {"drawing": drawing, "placed": _placed}
    found.tests["shown"] = _is_shown
    found.filters["kind"] = _kind
    return found


def _finalize(value: object) -> object:
    """Return a value as it may stand in the page before it is escaped."""
    return value if isinstance(value, Markup) else legible(str(value))


def _is_shown(part: Part) -> bool:
    """Return whether a page has a part: pictures in files are for Markdown."""
    empty = (isinstance(part, Table | Dots) and not part.rows) or (
        isinstance(part, Lines) and not part.texts
    )
    return not isinstance(part, Picture) and not empty


def _kind(part: Part) -> str:
    kinds = {Lines: "lines", Table: "table", Dots: "dots", Chart: "chart", Code: "code"}
    return kinds[type(part)]


def _placed(dots: Dots) -> list[tuple[float, float, float]]:
    """Return where each value of a dot plot is, and both ends of its interval, in its SVG."""
    ends = [one for _, *values in dots.rows for one in values if one is not None]
    across = axis(ends, 6, _DOTS_WIDTH - 6)
    return [
        (
            across.at(value),
            across.at(value if low is None else low),
            across.at(value if high is None else high),
        )
        for _, value, low, high in dots.rows
    ]


@functools.cache
def _file(name: str) -> str:
    place = resources.files("grasp_lora.report") / _TEMPLATES / name
    return place.read_text(encoding="utf-8")


def _hashed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
