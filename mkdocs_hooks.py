"""What the site needs beyond the files in docs/: README and CHANGELOG as pages, links out.

The same links work on a code host, where README lies beside docs/, and on the site, where it is
the first page. A file outside docs/ that a page links to is put on the site under its own path. A
link to a folder, which only a code host can show, keeps its words alone.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/ -> their names on the site."""
TARGET = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


class _Links(Treeprocessor, Extension):
    """Turns links between files of the repository into links between files of the site."""

    page = ""

    def extendMarkdown(self, md: Markdown) -> None:
        self.md = md
        md.treeprocessors.register(self, "links between files", 5)  # mkdocs reads links at 0

    def run(self, root: Element) -> None:
        for element in root.iter():
            for name in ("href", "src"):
                target = element.get(name, "")
                if target and not re.match(r"\w+:|#", target):
                    self._turn(element, name, target)

    def _turn(self, element: Element, name: str, target: str) -> None:
        file, sharp, anchor = target.partition("#")
        found = _in_repository(self.page, file)
        if (ROOT / found).is_dir():
            del element.attrib[name]
            element.tag = "span"
        else:
            here = dirname(_on_site(self.page)) or "."
            element.set(name, relpath(_on_site(found), here) + sharp + anchor)


LINKS = _Links()


def _in_repository(page: str, target: str) -> str:
    return normpath(f"{dirname(page)}/{target}" if dirname(page) else target)


def _on_site(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))


def on_config(config: Any) -> Any:
    """Read the links of every page by the rules above."""
    config.markdown_extensions.append(LINKS)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the linked files that lie outside docs/."""
    for path, name in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    pages = [*(ROOT / path for path in PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for target in TARGET.findall(page.read_text(encoding="utf-8")):
            found = _in_repository(page.relative_to(ROOT).as_posix(), target)
            name = _on_site(found)
            if (ROOT / found).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / found)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Note which page's links are read next."""
    names = {name: path for path, name in PAGES.items()}
    LINKS.page = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return markdown
