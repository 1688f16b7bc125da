"""Texts in the tables of a terminal."""

from rich.text import Text

from grasp_lora.base.words import printable


def cell(text: str) -> Text:
    """Return a text so that a rich table shows it as it is: no markup, nothing a terminal obeys."""
    return Text(printable(text).replace("\n", "\\n"))
