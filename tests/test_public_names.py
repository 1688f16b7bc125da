"""The public names: each has a docstring, types and its part of the page."""

from pathlib import Path

import api_page
import grasp_lora

ROOT = Path(__file__).parents[1]


def test_the_page_shows_every_public_name_as_it_is():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert page == api_page.page(), "make pages writes it again"
    for name in grasp_lora.__all__:
        assert name.startswith("__") or f"## `{name}`" in page


def test_every_public_name_has_a_docstring():
    for name in grasp_lora.__all__:
        assert name == "__version__" or len(getattr(grasp_lora, name).__doc__) > 40


def test_the_package_says_that_it_is_typed():
    assert (Path(grasp_lora.__file__).parent / "py.typed").is_file()
