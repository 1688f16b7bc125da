"""What must not go out: absolute paths, which say where somebody works, and tokens."""

import re
from collections.abc import Iterator
from pathlib import PurePath

from safetensors import safe_open

from grasp_lora.base.words import shortened

# What stands before a path: nothing, a blank, a quote, a bracket or a mark; not a letter, as in
# "and/or", nor "<" or "/", as in "</p>" and "https://".
_BEFORE = r"""(?:^|(?<=[\s"'(=,:;\[>`|]))(?:file://)?"""
_NAME = r"""(?:[^\s/<>"'`|()&\\]|\\[_*~$])+"""
_PATH = re.compile(
    rf"{_BEFORE}/{_NAME}/(?:{_NAME}/)*(?:{_NAME})?|\b[A-Za-z]:[\\/]{{1,2}}Users[\\/][^\s<>\"'`|]+",
    re.MULTILINE,
)
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}"
    r"|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def found_in(text: str, *, paths: bool = True, token: str | None = None) -> Iterator[str]:
    """Yield what a text has that must not go out, in words; a token is not shown.

    Args:
        text: the text.
        paths: whether to look for absolute paths: the tokens of a vocabulary may look like one.
        token: the user's own token for the hub.
    """
    for match in _PATH.finditer(text) if paths else ():
        yield f"the path {shortened(match[0])}"
    if _TOKENS.search(text) or (token and token in text):
        yield "a token or key"


def without_paths(text: str) -> str:
    """Return a text in which only the last name of every absolute path is left."""
    return _PATH.sub(lambda match: "…/" + PurePath(match[0].replace("\\", "/")).name, text)


def notes_of_weights(file: PurePath | str) -> str:
    """Return the texts in a safetensors file, which stand in its head."""
    with safe_open(file, "pt") as tensors:
        found = tensors.metadata() or {}
        return "\n".join([*(f"{name}: {text}" for name, text in found.items()), *tensors.keys()])
