"""The records every task speaks: an example, its prompt, and a row of the task table."""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One labelled row."""

    id: str
    """Unique within its file; the same id in two languages means the same question."""
    group: str
    """Rows of one group (for questions: one context) never go to different splits."""
    language: str
    """Two-letter code, such as "en"."""
    fields: Mapping[str, str]
    """The inputs by name; for questions "context" and "question"."""
    references: tuple[str, ...]
    """Accepted answers, at least one; the first is the one trained on."""


@dataclass(frozen=True)
class Prompt:
    """The text before the answer, in three parts; only the body may be shortened."""

    prefix: str
    body: str
    suffix: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.prefix + self.body + self.suffix


def first_line(text: str) -> str:
    """Return the first line of generated text that holds more than white space, trimmed."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


@dataclass(frozen=True)
class Task:
    """One row of the task table."""

    name: str
    render: Callable[[Example, str | None], Prompt]
    """(example, template) -> prompt; a template of None means the built-in one of the language."""
    metrics: Mapping[str, Callable[..., float]]
    """Name -> fn(prediction, references, language, rules=...) in [0, 1]."""
    max_new_tokens: int
    """Longest answer that is generated, in tokens."""
    clean: Callable[[str], str] = first_line
    """Generated text -> the prediction that is scored."""


def normalize_text(text: str) -> str:
    """Return the form in which two texts are compared: NFKC, white space runs as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("\ufeff", " ").split())


def text_key(text: str) -> str:
    """Return 16 hex digits that are equal for texts equal after `normalize_text`."""
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()[:16]
