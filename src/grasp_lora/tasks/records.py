"""The records every task speaks: an example, its prompt, and a row of the task table."""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One labelled row."""

    id: str
    """Unique within its file; the same id in two languages means the same question."""
    group: str
    """Rows of one group (for questions: one context) never go to different splits."""
    language: str
    """Two-letter code, such as "en", or one with a region or script, such as "zh-TW"."""
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


def one_line(text: str) -> str:
    """Return a text with its lines joined by spaces; one without line breaks stays as it is."""
    lines = text.splitlines()
    if lines == [text]:
        return text
    return " ".join(line.strip() for line in lines if line.strip())


@dataclass(frozen=True)
class Task:
    """One row of the task table."""

    name: str
    fields: tuple[str, ...]
    """Inputs of a row, the one that may be shortened first; empty: those the template names."""
    answer: str
    """Column of the accepted answers."""
    prompts: Mapping[str, str]
    """Language -> template with every field in braces exactly once; "en" stands in for others."""
    metrics: tuple[str, ...]
    """Names of the scores reported by default, keys of `grasp_lora.metrics.METRICS`."""
    max_new_tokens: int
    """Longest answer that is generated, in tokens."""
    max_length: int = 512
    """Tokens of prompt and answer together, unless a run says otherwise."""
    new_tokens_by_language: Mapping[str, int] = field(default_factory=dict)
    """Languages with another limit."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field, or the answer column -> column names that published files use instead."""
    clean: Callable[[str], str] = first_line
    """Generated text -> the prediction that is scored."""
    one_line: bool = True
    """Whether answers are of one line: generation may stop at the first line break behind a word,
    and accepted answers of several lines are read as one."""

    def new_tokens(self, language: str) -> int:
        """Return the longest answer generated in a language, in tokens."""
        found = in_language(self.new_tokens_by_language, language)
        return self.max_new_tokens if found is None else found


def main_language(language: str) -> str:
    """Return the part of a language code that names the language: "zh" of "zh-TW"."""
    return language.replace("_", "-").split("-")[0].lower()


def in_language(table: Mapping[str, T], language: str) -> T | None:
    """Return a table's row of a language: of its full code, else of the language it names."""
    return table.get(language, table.get(main_language(language)))


def normalize_text(text: str) -> str:
    """Return the form in which two texts are compared: NFKC, white space runs as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("\ufeff", " ").split())


def text_key(text: str) -> str:
    """Return 16 hex digits that are equal for texts equal after `normalize_text`."""
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()[:16]
