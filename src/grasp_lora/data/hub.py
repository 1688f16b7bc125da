"""Rows of the Hugging Face hub: the data sets known by name, and any other by its id.

Only data files are read, never a data set's own code: `datasets` refuses it from version 4 on.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
"""Rows read of a published split; only XL-Sum's largest (English, Hindi, ...) have more."""
ALL = -1
"""The size of a part that takes all rows of its published split that no other part takes."""

_NO_SCRIPTS = "scripts are no longer supported"
Load = Callable[..., Any]
Read = Callable[[Any], tuple[list[Example], LoadReport]]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Published:
    """What was read of one published split."""

    rows: int
    """Rows it has."""
    fingerprint: str
    """The one `datasets` gives it."""
    commit: str | None
    """Commit of the data set, None where the rows are not from the hub."""
    report: LoadReport


@dataclass(frozen=True)
class HubExamples:
    """Rows by published split, and how they came about."""

    examples: Mapping[str, tuple[Example, ...]]
    drawn_from: Mapping[str, str]
    """Part -> published split its rows are drawn from."""
    used: Source
    published: Mapping[str, Published]
    tried: tuple[tuple[Source, str], ...] = ()
    """Places that failed before, and why."""

    def record(self) -> dict[str, Any]:
        """Return where the rows came from, as plain JSON values."""
        splits = {
            name: {
                "rows": split.rows,
                "read": split.report.rows,
                "left_out": dict(split.report.left_out),
                "answers_outside": split.report.answers_outside,
                "joined": split.report.joined,
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
        """Return these with `keep` applied to the rows of every published split."""
        kept = {name: tuple(keep(rows)) for name, rows in self.examples.items()}
        return replace(self, examples=kept)


def load_preset(
    name: str,
    language: str,
    protocol: str = "official",
    *,
    role: str = "target",
    max_faulty: float = 0.1,
    cache_dir: str | Path | None = None,
    load: Load = load_published,
) -> HubExamples:
    """Load what a role needs of a data set known by name, from the first place that gives it.

    Of a published split with more than 50,000 rows as many are read, the same each time. Without
    a connection, or with `HF_HUB_OFFLINE=1`, only what `datasets` has in its cache is found.

    Args:
        name: one of `PUBLISHED_SETS`.
        language: one of the preset's codes.
        protocol: "official" takes test rows of the published test split, where there is one;
            "paper" draws from the splits the published script draws from.
        role: "source" or "target".
        max_faulty: largest share of faulty rows, in [0, 1].
        cache_dir: where `datasets` keeps its copy; None is its own place.
        load: stands in for `fetch.load_published`.

    Raises:
        ValueError: for an unknown name, language, protocol or role, or if no place gives the
            rows; it says which were tried and why each failed.
    """
    preset = _row(PUBLISHED_SETS, name, "preset")
    called = _row(preset.languages, language, f"language of {name}")
    drawn_from = _row(_row(preset.drawn_from, protocol, "protocol"), role, "role")
    task = task_named(preset.task)

    def read(dataset: Any) -> tuple[list[Example], LoadReport]:
        return load_examples(_at_most(dataset, MAX_ROWS), task, language, max_faulty=max_faulty)

    places, what = preset.sources(called), f"{name} {language}"
    return _first_of(places, drawn_from, read, what, cache_dir, load)


def load_hub(
    repo: str,
    config: str | None,
    revision: str | None,
    splits: Mapping[str, str],
    task: Task,
    language: str,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    max_faulty: float = 0.1,
    cache_dir: str | Path | None = None,
    load: Load = load_published,
) -> HubExamples:
    """Load published splits of any data set of the hub.

    Args:
        repo: id of the data set, owner/name.
        config: its configuration, None for its only one.
        revision: branch, tag or commit; None is the main branch. On the hub's own Parquet copy,
            "refs/convert/parquet", the folder called as the config is read.
        splits: part -> published split its rows are drawn from; a slice such as "train[:500]"
            is one too.
        task: what a row holds.
        language: code of the rows' language.
        columns: our name -> column, see `load_examples`.
        template: the prompt's template, for a task without fields of its own.
        max_faulty: largest share of faulty rows, in [0, 1].
        cache_dir: where `datasets` keeps its copy; None is its own place.
        load: stands in for `fetch.load_published`.

    Raises:
        ValueError: if the rows cannot be had or are not those of the task; it says why.
    """

    def read(dataset: Any) -> tuple[list[Example], LoadReport]:
        return load_examples(
            dataset, task, language, columns=columns, template=template, max_faulty=max_faulty
        )

    return _first_of((Source(repo, config, revision),), splits, read, repo, cache_dir, load)


def split_published(found: HubExamples, sizes: Mapping[str, int], seed: int) -> Split:
    """Draw parts of given sizes, each from its published split; no group is in two of them.

    Args:
        found: the rows.
        sizes: part -> rows; -1 takes all that no other part of the same published split takes.
        seed: which groups go where.

    Raises:
        ValueError: if a part has no published split, two parts want all of one, a size is
            below -1, or there are too few rows.
    """
    shared: dict[str, dict[str, int]] = {}
    for part, size in sizes.items():
        shared.setdefault(_row(found.drawn_from, part, "part"), {})[part] = size
    parts: dict[str, tuple[Example, ...]] = {}
    dropped: dict[str, int] = {}
    for published, wanted in shared.items():
        greedy = [part for part, size in wanted.items() if size == ALL]
        if len(greedy) > 1:
            raise ValueError(
                f"{' and '.join(greedy)} are each to be all of the published split {published!r}; "
                "give rows for each, or slices that do not overlap, such as "
                f"'{published}[:50]' and '{published}[50:100]'"
            )
        counted = {part: size for part, size in wanted.items() if size != ALL}
        split = split_by_group(found.examples[published], counted, seed)
        parts, dropped = parts | split.parts, dropped | split.dropped
        for part in greedy:
            parts[part] = _rest(found.examples[published], split, part, published)
            dropped[part] = 0
    return Split({part: parts[part] for part in sizes}, {part: dropped[part] for part in sizes})


def _rest(rows: Sequence[Example], split: Split, part: str, published: str) -> tuple[Example, ...]:
    taken = {example.group for examples in split.parts.values() for example in examples}
    rest = tuple(example for example in rows if example.group not in taken)
    if not rest:
        raise ValueError(
            f"no row of the published split {published!r} is left for {part}; ask for fewer rows "
            "in the other parts"
        )
    return rest


def _row(table: Mapping[str, Row], key: str, what: str) -> Row:
    if key not in table:
        raise ValueError(f"unknown {what}: {key!r}; choose one of: {', '.join(table)}")
    return table[key]


def _first_of(
    places: Sequence[Source],
    drawn_from: Mapping[str, str],
    read: Read,
    what: str,
    cache_dir: str | Path | None,
    load: Load,
) -> HubExamples:
    """Return the rows of the first place that gives them all."""
    tried: list[tuple[Source, str]] = []
    for source in places:
        rows: dict[str, tuple[Example, ...]] = {}
        published: dict[str, Published] = {}
        try:
            for split in dict.fromkeys(drawn_from.values()):
                dataset = load(
                    source.repo,
                    source.config,
                    split=source.splits.get(split, split),
                    revision=source.revision,
                    cache_dir=cache_dir,
                )
                examples, report = read(dataset)
                rows[split] = tuple(examples)
                published[split] = Published(
                    len(dataset), dataset._fingerprint, commit_of(dataset), report
                )
        except source_errors() as error:
            tried.append((source, _reason(error)))
            continue
        rows = _distinct(rows)
        return HubExamples(rows, dict(drawn_from), source, published, tuple(tried))
    raise ValueError(_nowhere(what, tried, drawn_from))


def _distinct(rows: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """Return the rows with the split in every id, if two splits number their rows alike."""
    ids = [example.id for examples in rows.values() for example in examples]
    if len(set(ids)) == len(ids):
        return rows
    return {
        split: tuple(replace(example, id=f"{split}/{example.id}") for example in examples)
        for split, examples in rows.items()
    }


def _at_most(dataset: Any, most: int) -> Any:
    if len(dataset) <= most:
        return dataset
    return dataset.select(sorted(random.Random(0).sample(range(len(dataset)), most)))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def _nowhere(what: str, tried: Sequence[tuple[Source, str]], parts: Iterable[str]) -> str:
    listed = "; ".join(f"{source} ({reason})" for source, reason in tried)
    files = ", ".join(f"{part}: FILE" for part in parts)
    script = any(_NO_SCRIPTS in reason for _, reason in tried)
    exported = any(source.revision == EXPORT for source, _ in tried)
    hint = f"set revision: {EXPORT} to read the hub's own Parquet copy, " if script else ""
    return (
        f"no rows of {what} could be had, tried {listed}; {'' if exported else hint}check the "
        "connection (without one, only what was loaded before is found), or give local files: "
        f"files: {{{files}}} below data.source or data.target"
    )
