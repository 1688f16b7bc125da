"""The index of all pages for language models, `llms.txt`: sections and names are the site's.

`make pages` writes it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
OUTSIDE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that lie outside docs/."""


class _Site(yaml.SafeLoader):
    """Reads mkdocs.yml without making the Python objects that it names."""


_Site.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def site() -> dict[str, Any]:
    """Return the settings of the site."""
    return yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Site)


def pages(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """Return (name, path from the root of the repository) of every page of a navigation."""
    for entry in nav:
        for name, inner in entry.items():
            if isinstance(inner, list):
                yield from pages(inner)
            else:
                yield name, OUTSIDE.get(inner, f"docs/{inner}")


def index() -> str:
    """Return the whole file."""
    settings = site()
    lines = [f"# {settings['site_name']}", "", f"> {settings['site_description']}."]
    for entry in settings["nav"]:
        for section, inner in entry.items():
            listed = inner if isinstance(inner, list) else [{section: inner}]
            found = [f"- [{name}]({path}): {about(path)}" for name, path in pages(listed)]
            lines += ["", f"## {section}", "", *found]
    return "\n".join(lines) + "\n"


def about(path: str) -> str:
    """Return the first sentence of a page, without links and emphasis."""
    blocks = (ROOT / path).read_text("utf-8").split("\n\n")
    text = " ".join(next(one for one in blocks if not one.startswith("#")).split())
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|\*\*", lambda found: found[1] or "", text)
    sentence = re.match(r"(?:`[^`]*`|[^`])*?[.:](?= |$)", text)
    said = (sentence[0] if sentence else text).rstrip(":.")
    return f"{said.removeprefix('This page is ')}."


if __name__ == "__main__":
    print(index(), end="")
