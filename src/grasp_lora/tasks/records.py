"""The records that all tasks use: an example, its prompt, and a task."""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled example."""

    id: str
    """Id, unique within its file; the same id in two languages means the same question."""
    group: str
    """Group id; examples of one group (questions on one context) stay in the same split."""
    language: str
    """Language code, such as "en", or with a region or script, such as "zh-TW"."""
    fields: Mapping[str, str]
    """Name -> input text; for questions "context" and "question"."""
    references: tuple[str, ...]
    """Accepted answers, at least one; training uses the first."""


@dataclass(frozen=True, slots=True)
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
    """Return the first line of a text that is not blank, trimmed; "" if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def one_line(text: str) -> str:
    """Return a text with its lines trimmed and joined by spaces, if it has line breaks."""
    lines = text.splitlines()
    if lines == [text]:
        return text
    return " ".join(line.strip() for line in lines if line.strip())


@dataclass(frozen=True)
class Task:
    """A task: fields, prompts, metrics and limits."""

    name: str
    fields: tuple[str, ...]
    """Input names, first the one that may be shortened; empty if the template names them."""
    answer: str
    """Name of the column with the accepted answers."""
    prompts: Mapping[str, str]
    """Language -> template with each field once in braces; other languages use "en"."""
    metrics: tuple[str, ...]
    """Metrics reported by default, keys of `grasp_lora.metrics.METRICS`."""
    max_new_tokens: int
    """Most tokens of a generated answer."""
    max_length: int = 512
    """Default for the most tokens of prompt and answer together."""
    new_tokens_by_language: Mapping[str, int] = field(default_factory=dict)
    """Language -> its own limit instead of `max_new_tokens`."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field or answer column -> other names of that column in published files."""
    clean: Callable[[str], str] = first_line
    """Turns a generated text into the prediction that is scored."""
    one_line: bool = True
    """Whether answers have one line.

    Generation then stops at the first line break after a word, and the lines of accepted answers
    are joined.
    """

    def new_tokens(self, language: str) -> int:
        """Return the most tokens of a generated answer in a language."""
        found = in_language(self.new_tokens_by_language, language)
        return self.max_new_tokens if found is None else found


def main_language(language: str) -> str:
    """Return the language of a code without region and script, such as "zh" for "zh-TW"."""
    return language.replace("_", "-").split("-")[0].lower()


def in_language(table: Mapping[str, T], language: str) -> T | None:
    """Return a table's entry for a language code, else for its main language, else None."""
    return table.get(language, table.get(main_language(language)))


def normalize_text(text: str) -> str:
    """Return a text as ids and groups are made of it: in NFKC, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("\ufeff", " ").split())


def text_key(text: str) -> str:
    """Return a hash of 16 hex digits, equal for texts that `normalize_text` makes equal."""
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()[:16]
