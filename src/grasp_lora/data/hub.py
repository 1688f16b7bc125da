"""Load examples from the Hugging Face hub, from a data set known by name or by its id.

Only data files are read, since `datasets` 4 and later do not run a data set's own code.
"""

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from grasp_lora.base.words import shown
from grasp_lora.data.fetch import EXPORT, commit_of, load_published, source_errors
from grasp_lora.data.files import LoadReport, load_examples
from grasp_lora.data.presets import PUBLISHED_SETS, Preset, Source
from grasp_lora.data.splits import Split, split_by_group
from grasp_lora.tasks.base import Example, Task, task_named

__all__ = [
    "PUBLISHED_SETS",
    "HubExamples",
    "Preset",
    "Published",
    "Source",
    "load_hub",
    "load_preset",
    "split_published",
]

MAX_ROWS = 50_000
"""Most rows read of a preset's split; only XL-Sum's largest (English, Hindi, ...) have more."""
ALL = -1
"""Size of a part that gets all examples of its published split that no other part gets."""

_NO_SCRIPTS = "scripts are no longer supported"
Load = Callable[..., Any]
Read = Callable[[Any], tuple[list[Example], LoadReport]]
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Published:
    """Statistics of one published split."""

    rows: int
    """Number of rows in the split."""
    fingerprint: str
    """Fingerprint of the data set in `datasets`."""
    commit: str | None
    """Commit of the data set, or None if the rows are not from the hub."""
    report: LoadReport
    """Statistics of reading its examples."""


@dataclass(frozen=True)
class HubExamples:
    """Examples by published split, and their origin."""

    examples: Mapping[str, tuple[Example, ...]]
    """Published split -> examples."""
    drawn_from: Mapping[str, str]
    """Part -> published split that its examples are drawn from."""
    used: Source
    """The place that provided the examples."""
    published: Mapping[str, Published]
    """Published split -> statistics."""
    tried: tuple[tuple[Source, str], ...] = ()
    """(place, reason) of each place that failed before."""

    def record(self) -> dict[str, Any]:
        """Return the origin of the examples as plain JSON values."""
        splits = {
            name: {
                "rows": split.rows,
                "read": split.report.rows,
                "left_out": dict(split.report.left_out),
                "answers_outside": split.report.answers_outside,
                "joined": split.report.joined,
                "blank_answers": split.report.blank_answers,
                "fingerprint": split.fingerprint,
                "commit": split.commit,
            }
            for name, split in self.published.items()
        }
        return {
            "data_set": self.used.repo,
            "config": self.used.config,
            "revision": self.used.revision,
            "splits": splits,
            "drawn_from": dict(self.drawn_from),
            "tried": [f"{source}: {reason}" for source, reason in self.tried],
        }

    def filtered(self, keep: Callable[[tuple[Example, ...]], Sequence[Example]]) -> "HubExamples":
        """Return a copy with `keep` applied to the examples of every published split."""
        kept = {name: tuple(keep(rows)) for name, rows in self.examples.items()}
        return replace(self, examples=kept)


def load_preset(
    name: str,
    language: str,
    protocol: str = "official",
    *,
    role: str = "target",
    max_faulty: float = 0.1,
    load: Load = load_published,
) -> HubExamples:
    """Load the published splits that a role needs of a data set known by name.

    The places of the data set are tried in order. If a published split has more than 50,000 rows,
    a fixed random sample of 50,000 is read. Without a connection, or with `HF_HUB_OFFLINE=1`, only
    data in the cache of `datasets` is found.

    Args:
        name: one of `PUBLISHED_SETS`.
        language: one of the preset's language codes.
        protocol: "official" takes test examples from the published test split, if there is one.
            "paper" draws from the same splits as the script published with the paper.
        role: "source" or "target".
        max_faulty: largest allowed fraction of faulty rows, in [0, 1].
        load: function with the signature of `fetch.load_published`.

    Raises:
        ValueError: the name, language, protocol or role is unknown, or no place provides the rows;
            the message lists the places and their errors.
    """
    preset = _entry(PUBLISHED_SETS, name, "preset")
    config_language = _entry(preset.languages, language, f"language of {name}")
    drawn_from = _entry(_entry(preset.drawn_from, protocol, "protocol"), role, "role")
    task = task_named(preset.task)

    def read(dataset: Any) -> tuple[list[Example], LoadReport]:
        return load_examples(_at_most(dataset, MAX_ROWS), task, language, max_faulty=max_faulty)

    places = preset.sources(config_language)
    return _load_first(places, drawn_from, read, f"{name} {language}", load)


def load_hub(
    source: Source,
    splits: Mapping[str, str],
    task: Task,
    language: str,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    max_faulty: float = 0.1,
    load: Load = load_published,
) -> HubExamples:
    """Load published splits of any data set of the hub.

    Args:
        source: the data set. With the revision "refs/convert/parquet", the hub's Parquet copy, the
            folder named like the config is read.
        splits: part -> published split that its examples are drawn from, or a slice of one such as
            "train[:500]".
        task: task of the examples.
        language: language code of the examples.
        columns: name -> column; see `load_examples`.
        template: prompt template, for a task without fields.
        max_faulty: largest allowed fraction of faulty rows, in [0, 1].
        load: function with the signature of `fetch.load_published`.

    Raises:
        ValueError: the rows cannot be loaded or do not fit the task; the message says why.
    """

    def read(dataset: Any) -> tuple[list[Example], LoadReport]:
        return load_examples(
            dataset, task, language, columns=columns, template=template, max_faulty=max_faulty
        )

    return _load_first((source,), splits, read, source.repo, load)


def split_published(
    found: HubExamples, sizes: Mapping[str, int], seed: int, trained: Collection[str] = ()
) -> Split:
    """Draw parts of given sizes from their published splits, so that no group is in two parts.

    Args:
        found: the examples.
        sizes: part -> number of examples. -1 means all examples that no other part of the same
            published split gets.
        seed: seed of the assignment of groups to parts.
        trained: groups that no part but train gets.

    Raises:
        ValueError: a part has no published split, two parts have the size -1 in the same one, a
            size is below -1, or there are too few examples.
    """
    shared: dict[str, dict[str, int]] = {}
    for part, size in sizes.items():
        shared.setdefault(_entry(found.drawn_from, part, "part"), {})[part] = size
    parts: dict[str, tuple[Example, ...]] = {}
    dropped: dict[str, int] = {}
    for published, wanted in shared.items():
        unlimited = [part for part, size in wanted.items() if size == ALL]
        if len(unlimited) > 1:
            raise ValueError(
                f"{' and '.join(unlimited)} are each to be all of the published split "
                f"{shown(published)}; "
                "give rows for each, or slices that do not overlap, such as "
                f"'{published}[:50]' and '{published}[50:100]'"
            )
        counted = {part: size for part, size in wanted.items() if size != ALL}
        split = split_by_group(found.examples[published], counted, seed, trained)
        parts, dropped = parts | split.parts, dropped | split.dropped
        for part in unlimited:
            kept_out = () if part == "train" else trained
            rows = [e for e in found.examples[published] if e.group not in kept_out]
            parts[part] = _rest(rows, split, part, published)
            dropped[part] = 0
    return Split({part: parts[part] for part in sizes}, {part: dropped[part] for part in sizes})


def _rest(rows: Sequence[Example], split: Split, part: str, published: str) -> tuple[Example, ...]:
    taken = {example.group for examples in split.parts.values() for example in examples}
    rest = tuple(example for example in rows if example.group not in taken)
    if not rest:
        raise ValueError(
            f"no row of the published split {shown(published)} is left for {part}; ask for fewer "
            "rows in the other parts"
        )
    return rest


def _entry(table: Mapping[str, Entry], key: str, what: str) -> Entry:
    if key not in table:
        raise ValueError(f"unknown {what}: {shown(key)}; choose one of: {', '.join(table)}")
    return table[key]


def _load_first(
    places: Sequence[Source],
    drawn_from: Mapping[str, str],
    read: Read,
    what: str,
    load: Load,
) -> HubExamples:
    """Return the examples of the first place that provides all splits."""
    tried: list[tuple[Source, str]] = []
    for source in places:
        examples: dict[str, tuple[Example, ...]] = {}
        published: dict[str, Published] = {}
        try:
            for split in dict.fromkeys(drawn_from.values()):
                dataset = load(
                    source.repo,
                    source.config,
                    split=source.splits.get(split, split),
                    revision=source.revision,
                )
                read_examples, report = read(dataset)
                examples[split] = tuple(read_examples)
                published[split] = Published(
                    len(dataset), dataset._fingerprint, commit_of(dataset), report
                )
        except source_errors() as error:
            tried.append((source, _reason(error)))
            continue
        examples = _with_distinct_ids(examples)
        return HubExamples(examples, dict(drawn_from), source, published, tuple(tried))
    raise ValueError(_none_found(what, tried, drawn_from))


def _with_distinct_ids(
    by_split: dict[str, tuple[Example, ...]],
) -> dict[str, tuple[Example, ...]]:
    """Return the examples with the split added to every id, if two splits share an id."""
    ids = [example.id for examples in by_split.values() for example in examples]
    if len(set(ids)) == len(ids):
        return by_split
    return {
        split: tuple(replace(example, id=f"{split}/{example.id}") for example in examples)
        for split, examples in by_split.items()
    }


def _at_most(dataset: Any, most: int) -> Any:
    if len(dataset) <= most:
        return dataset
    return dataset.select(sorted(random.Random(0).sample(range(len(dataset)), most)))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def _none_found(what: str, tried: Sequence[tuple[Source, str]], parts: Iterable[str]) -> str:
    listed = "; ".join(f"{source} ({reason})" for source, reason in tried)
    files = ", ".join(f"{part}: FILE" for part in parts)
    script = any(_NO_SCRIPTS in reason for _, reason in tried)
    exported = any(source.revision == EXPORT for source, _ in tried)
    hint = f"set revision: {EXPORT} to read the hub's own Parquet copy, " if script else ""
    return (
        f"no rows of {what} could be loaded, tried {listed}; {'' if exported else hint}check the "
        "connection (without one, only data loaded before is found), or give local files: "
        f"files: {{{files}}} below data.source or data.target"
    )
