"""Values, paths and texts of the user as messages show them: on one line, escaped, not too long."""

import os
import re
import unicodedata
from collections.abc import Sized
from datetime import date
from pathlib import Path

MOST = 80
"""Characters of a value that a message shows, at most."""
_LONGEST_NAME = 255
"""Bytes of a file name on the usual file systems; a longer text was hardly meant as a path."""
# Controls, formats (which turn the direction of text), halves of surrogate pairs, line separators.
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def shown(value: object) -> str:
    """Return a value as messages show it: as Python writes it, in at most `MOST` characters.

    A text is quoted. Characters that a terminal obeys or cannot show are escaped. A longer value is
    cut and followed by its length.
    """
    length = ""
    if isinstance(value, Sized) and not isinstance(value, str):
        length = "1 entry" if len(value) == 1 else f"{len(value)} entries"
    elif isinstance(value, str):
        length = f"{len(value)} characters"
    try:
        text = str(value) if isinstance(value, date) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply to be shown"
    return shortened(text, length)


def shown_path(path: Path | str) -> str:
    """Return a path as messages show it: in quotes and escaped, whole unless it cannot be one."""
    text = str(path)
    return shown(text) if len(text) > _LONGEST_NAME else repr(text)


def without_home(path: Path | str) -> str:
    """Return a path with `~` in place of the user's home folder, for files that are passed on.

    Names that are no absolute path, such as those of a hub, are returned as they are.
    """
    try:
        below = Path(path).relative_to(Path.home())
    except (ValueError, RuntimeError):  # elsewhere, or there is no home folder
        return str(path)
    return str(Path("~", below))


def shortened(text: str, length: str = "") -> str:
    """Return a text on one line in at most `MOST` characters, escaped as in `printable`.

    Args:
        text: the text.
        length: the length that follows a text that was cut, such as "300 entries"; "" counts its
            characters.
    """
    line = printable(text).replace("\n", "\\n")
    if len(line) <= MOST:
        return line
    end = f"… ({length or f'{len(text)} characters'})"
    return line[: MOST - len(end)] + end


def printable(text: str) -> str:
    """Return a text with the characters escaped that a terminal obeys; line breaks stay."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _OBEYED and c != "\n" else c for c in text
    )


# Joiners change the look of letters in Persian and in Indian scripts, direction marks that of
# punctuation in Arabic and Hebrew; neither turns the text around it.
_READ = {"\u200c", "\u200d", "\u200e", "\u200f", "\u061c"}


def legible(text: str) -> str:
    """Return a text as a page shows it: as `printable`, but with joiners and direction marks."""
    return "".join(c if c in _READ else printable(c) for c in text)


_OF_MARKDOWN = re.compile(r"[\\`*\[|~$]|(?<!\w)_|_(?!\w)")


def in_markdown(text: str) -> str:
    """Return a text so that Markdown and HTML show it as it is, on one line.

    For everything that comes from data or from outside, such as ids, names and errors: it makes no
    link, picture, table cell or element. The text must not stand between backticks.
    """
    line = printable(text).replace("\n", "\\n")
    line = _OF_MARKDOWN.sub(lambda mark: "\\" + mark[0], line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str) -> list[str]:
    """Return a text as the lines of a block of code in Markdown, which it cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, legible(text), fence]


def in_picture(text: str) -> str:
    """Return a text so that matplotlib draws it as it is, and takes none of it for a formula."""
    return printable(text).replace("\n", "\\n").replace("$", r"\$")


def check_path(path: Path | str) -> None:
    """Check that a text can be a path: no longer than a path, in UTF-8, without control characters.

    Raises:
        ValueError: it holds a control character, such as a line break, bytes that are not UTF-8
            (Python has these as halves of surrogate pairs), or is too long. A name in UTF-8 that
            the locale's encoding does not know can be a path.
    """
    if any(len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME for name in Path(path).parts):
        raise ValueError(
            f"{shown_path(path)} is no path: a name in it has over {_LONGEST_NAME} bytes; give the "
            "path of a file or folder"
        )
    if any(unicodedata.category(c) == "Cs" for c in str(path)) and not _is_utf8(path):
        raise ValueError(
            f"{shown_path(path)} is not UTF-8; rename the file or folder, as no record could hold "
            "its name"
        )
    if any(unicodedata.category(c) == "Cc" for c in str(path)):
        raise ValueError(
            f"{shown_path(path)} holds a control character (in double quotes YAML reads \\n and \\t"
            " as such): write the path in single quotes, or with / in place of \\"
        )


def _is_utf8(path: Path | str) -> bool:
    """Return whether the bytes of a path are UTF-8, whatever the encoding of the locale."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeError:
        return False
    return True


def from_percent(value: object) -> float | None:
    """Return the fraction that a percentage means: "20%" and 20 give 0.2; None for other values.

    A number counts as a percentage above 1 and up to 100, since a fraction is never that large.
    """
    written = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if written is not None:
        return float(written[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value / 100 if 1 < value <= 100 else None
