"""What is made from the pages and beside them: index, commands, citation, changes, the site."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cli_page
import docs_index
import grasp_lora

ROOT = Path(__file__).parents[1]
CHANGES = "CHANGELOG.md"


def test_the_page_of_the_commands_is_current():
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert page == cli_page.page(), "make pages writes it again"
    assert "## `grasp-lora data describe`" in page


def test_the_index_is_current_and_lists_every_page():
    text = (ROOT / "llms.txt").read_text("utf-8")
    assert text == docs_index.index(), "make pages writes it again"
    pages = {path for _, path in docs_index.pages(docs_index.site()["nav"])}
    there = {one.relative_to(ROOT).as_posix() for one in (ROOT / "docs").rglob("*.md")}
    assert pages == there | {"README.md", CHANGES}
    assert all(f"]({path}): " in text for path in pages)


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == grasp_lora.__version__
    assert {"message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert paper["url"].endswith("2601.06702")
    assert [one["family-names"] for one in paper["authors"]] == ["Hassan", "Chen"]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'license = "{cited["license"]}"' in project
    assert f'version = "{cited["version"]}"' in project


def test_the_changes_begin_with_this_version():
    versions = [
        line.removeprefix("## ")
        for line in (ROOT / CHANGES).read_text("utf-8").splitlines()
        if line.startswith("## ")
    ]
    assert versions[0] == grasp_lora.__version__


def test_readme_is_short_and_begins_with_the_two_commands_that_set_up():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    assert "$ make demo" in text
    assert "`make test`" in text


PAGE = """# A page

[README](../README.md#top) [a script](../examples/run.py) [a folder](records) [here](#a-page)

```python
x = "[not a link](nowhere.md)"
```
"""


@pytest.fixture
def built(tmp_path):
    """Return a function that builds a small site with our settings: page text -> (built, log)."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (pip install '.[docs]')")
    (tmp_path / "docs" / "records").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "run.py").write_text("pass\n")
    (tmp_path / "README.md").write_text("# Top\n\n[a page](docs/page.md#a-page)\n")
    (tmp_path / CHANGES).write_text("# Changes\n")
    shutil.copy(ROOT / "mkdocs_hooks.py", tmp_path)
    nav = "nav: [index.md, page.md, changelog.md]\nsite_dir: site\n"
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\n{nav}")

    def build(text: str) -> tuple[Path, str]:
        (tmp_path / "docs" / "page.md").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return tmp_path / "site", done.stderr if done.returncode else ""

    return build


def test_links_of_the_repository_work_on_the_site(built):
    site, log = built(PAGE)
    assert log == ""
    page = (site / "page" / "index.html").read_text("utf-8")
    assert 'href="..#top"' in page or 'href="../#top"' in page
    assert 'href="../examples/run.py"' in page
    assert (site / "examples" / "run.py").read_text() == "pass\n"
    assert "<span>a folder</span>" in page
    assert "[not a link]" in page
    assert 'href="page/#a-page"' in (site / "index.html").read_text("utf-8")


BROKEN = ("nowhere.md", "#nowhere", "../README.md#nowhere", "../none.py", "images/none.png")


def test_a_broken_link_fails_the_site(built):
    _, log = built(PAGE + "".join(f"\n[x]({link})\n" for link in BROKEN))
    found = [line for line in log.splitlines() if "WARNING -  Doc file 'page.md'" in line]
    assert len(found) == len(BROKEN)
