"""The sections of a configuration that say which examples a run reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    model_validator,
)

from grasp_lora.base.words import shown
from grasp_lora.config.languages import language_code
from grasp_lora.config.sections import LocalPath, Section

PARTS = ("train", "dev", "micro_dev", "test")
"""The parts of a role's examples, in the order in which they are drawn, read and shown."""

if TYPE_CHECKING:  # code that reads a configuration treats these keys as plain text
    PartName: TypeAlias = str
else:
    PartName = Literal[PARTS]

_V = TypeVar("_V")


def in_order(parts: Mapping[str, _V]) -> dict[str, _V]:
    """Return parts in the order of `PARTS`, whatever order they were written in."""
    return {part: parts[part] for part in PARTS if part in parts}


def _by_name(named: Mapping[str, _V]) -> dict[str, _V]:
    return dict(sorted(named.items()))


InOrder = AfterValidator(in_order)
ByName = AfterValidator(_by_name)
"""The order in which keys are written has no meaning, so no result may depend on it."""

_LONGEST_NAME = 60
"""Characters of the name of a test set."""

PRESET_TASKS = {"xlsum": "summarization", "mlqa": "qa", "xquad": "qa"}


class HubData(Section):
    hub: str = Field(min_length=1, description="data set id, owner/name")
    config: str | None = Field(default=None, description="configuration of the data set")
    revision: str | None = Field(default=None, description="branch, tag or commit")
    splits: Annotated[dict[PartName, str], Field(min_length=1), InOrder] = Field(
        description="part -> published split it is drawn from, such as {train: train, test: test}"
    )


FILES_KINDS = {
    "<builtin>": "builtin",
    "<preset>": "xlsum, mlqa or xquad",
    "<one>": "the path of one file",
    "<hub>": "{hub: owner/name, splits: {test: NAME}}",
    "<parts>": "a file for each part",
}
"""Tag of each kind of `files` in pydantic's messages -> the kind in words."""


def _files_kind(value: Any) -> str:
    if isinstance(value, HubData) or (isinstance(value, Mapping) and "hub" in value):
        return "<hub>"
    if isinstance(value, Mapping):
        return "<parts>"
    if isinstance(value, str) and value in PRESET_TASKS:
        return "<preset>"
    return "<builtin>" if value == "builtin" else "<one>"


Files: TypeAlias = Annotated[
    Annotated[Literal["builtin"], Tag("<builtin>")]
    | Annotated[Literal["xlsum", "mlqa", "xquad"], Tag("<preset>")]
    | Annotated[LocalPath, Tag("<one>")]
    | Annotated[HubData, Tag("<hub>")]
    | Annotated[dict[PartName, LocalPath], InOrder, Tag("<parts>")],
    Discriminator(_files_kind),
]


class ExampleSource(Section):
    """What every set of examples has: a language, a prompt, and the names of its columns."""

    language: Annotated[str, AfterValidator(language_code)] = Field(
        description="language code such as en or ar: picks prompt and metric rules"
    )
    prompt: str | None = Field(
        default=None, description="prompt template in place of the task's own"
    )
    columns: Annotated[dict[str, str], ByName] = Field(
        default={},
        description="our name -> column of the files: id, group, the task's inputs and answers",
    )


class LanguageData(ExampleSource):
    files: Files = Field(
        default="builtin",
        description="builtin; a published set (xlsum, mlqa, xquad); {hub: owner/name, splits: "
        "{...}}; one labelled file, divided as `rows` says; or a file for each part",
    )
    rows: Annotated[dict[PartName, NonNegativeInt], InOrder] = Field(
        default={},
        description="examples in each part; whole contexts stay in one part. Without train, dev "
        "and micro_dev, one file (less rows.test) is divided among them automatically",
    )

    @property
    def sizes_chosen_here(self) -> bool:
        """Whether one set would be divided into train, dev and micro_dev of sizes chosen here."""
        return not any(part != "test" for part in self.rows)

    @property
    def divided_automatically(self) -> bool:
        """Whether one file is divided into train, dev and micro_dev of sizes chosen here."""
        return isinstance(self.files, Path) and self.sizes_chosen_here

    @model_validator(mode="after")
    def _rows_and_columns_fit_files(self) -> "LanguageData":
        if self.columns and isinstance(self.files, str):
            raise ValueError(
                f"columns has no effect on files: {self.files}; its columns are known, so remove it"
            )
        if self.rows and isinstance(self.files, Mapping):
            raise ValueError(
                "rows divides one file, but files gives a file for each part; remove rows"
            )
        if isinstance(self.files, HubData):
            unknown = [part for part in self.rows if part not in self.files.splits]
            if unknown:
                raise ValueError(
                    f"rows gives {', '.join(unknown)}, but files.splits names no published split "
                    "to draw it from; add it there"
                )
        return self

    def paths(self) -> dict[str, Path]:
        """Return the paths of the files by their key below `files`; a single file has key ""."""
        if isinstance(self.files, Mapping):
            return dict(self.files)
        return {"": self.files} if isinstance(self.files, Path) else {}


class OneSet(ExampleSource):
    """One set of examples, which is not divided."""

    part: ClassVar[str]
    """The key below `files.splits` that names its published split."""

    files: Annotated[
        Annotated[LocalPath, Tag("<one>")]
        | Annotated[Literal["xlsum", "mlqa", "xquad"], Tag("<preset>")]
        | Annotated[HubData, Tag("<hub>")],
        Discriminator(_files_kind),
    ] = Field(description="one file, a published set, or {hub: owner/name, splits: {...}}")
    rows: PositiveInt | None = Field(
        default=None,
        description="number of examples, drawn with the seed of the splits; default: all",
    )

    @model_validator(mode="after")
    def _is_one_split(self) -> "OneSet":
        if isinstance(self.files, HubData) and set(self.files.splits) != {self.part}:
            raise ValueError(
                f"files.splits names {', '.join(self.files.splits)}, but this is one "
                f"published split; write splits: {{{self.part}: NAME}}"
            )
        return self

    def paths(self) -> dict[str, Path]:
        """Return the path of the file under the key "", or nothing if `files` names no file."""
        return {"": self.files} if isinstance(self.files, Path) else {}


class TestSet(OneSet):
    __test__ = False  # pytest takes classes called Test... for tests
    part = "test"


class ExtraData(OneSet):
    part = "train"

    language: Annotated[str, AfterValidator(language_code)] = Field(
        default="", description="language code; default: the target's"
    )
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="rows that an epoch reads for every labelled row"
    )


class DataSettings(Section):
    task: str = Field(
        default="qa",
        description="qa, summarization or text-to-text: renders prompts, chooses scores",
    )
    max_length: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="tokens of prompt and answer, longer contexts are cut; default: the task's own",
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        default=None,
        description="seed of the splits; default: the run's seed. Set it to compare several seeds "
        "on the same examples",
    )
    chat: bool = Field(default=False, description="put prompts into the tokenizer's chat template")
    max_faulty: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="fraction of a file's rows that may be faulty: left out, or with an answer "
        "that is not in its context",
    )
    allow_leakage: bool = Field(
        default=False, description="go on if two splits share examples; the leak is recorded"
    )
    near_duplicates: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8, description="Jaccard similarity from which two texts are near-duplicates"
    )
    source: LanguageData | None = Field(default=None, description="examples of the source language")
    target: LanguageData = Field(description="examples of the target language")
    extra: ExtraData | None = Field(
        default=None,
        description="rows of the target language that are no labels, such as translated or "
        "generated ones; `weight` of them (default 1) are trained on for every labelled row: "
        "{files, weight, language, prompt, columns, rows}",
    )
    tests: Annotated[dict[str, TestSet], ByName] = Field(
        default={},
        description="more test sets by name, such as another domain: {NAME: {language, "
        "files, prompt, columns, rows}}",
    )

    @model_validator(mode="after")
    def _extra_is_asked_like_target(self) -> "DataSettings":
        if self.extra is not None:
            given = {
                "language": self.extra.language or self.target.language,
                "prompt": self.target.prompt if self.extra.prompt is None else self.extra.prompt,
            }
            # The setter goes past the freeze: nobody sees the object before construction ends.
            object.__setattr__(self, "extra", self.extra.model_copy(update=given))
        return self

    @model_validator(mode="after")
    def _names_of_tests(self) -> "DataSettings":
        bad = [name for name in self.tests if not _may_name_a_test(name)]
        if bad:
            raise ValueError(
                f"a test set cannot be called {shown(bad[0])}: the scores use test, mean and worst "
                f"for other things, and a name has 1 to {_LONGEST_NAME} printable characters, no "
                "slash or backslash, and does not begin with a dot; choose another name"
            )
        return self


def _may_name_a_test(name: str) -> bool:
    """Return whether a name can be that of a file and the title of a table."""
    plain = re.sub("[\u200c\u200d]", "", name)  # joiners, which Persian and Indic words need
    return (
        name not in ("test", "mean", "worst")
        and 1 <= len(name) <= _LONGEST_NAME
        and plain.isprintable()
        and not name.startswith(".")
        and not any(mark in name for mark in "/\\")
    )
