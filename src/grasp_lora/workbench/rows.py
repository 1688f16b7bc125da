"""The examples of a run: those that each role trains on, chooses by and is tested on."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grasp_lora.base.files import STAGE_FILE, read_json
from grasp_lora.base.words import shown
from grasp_lora.config.data_sections import (
    PARTS,
    ExampleSource,
    ExtraData,
    HubData,
    LanguageData,
    OneSet,
    TestSet,
    in_order,
)
from grasp_lora.config.run_config import RunConfig
from grasp_lora.data.builtin import DEFAULT_SIZES, builtin_splits
from grasp_lora.data.files import load_examples
from grasp_lora.data.forms import SPLIT_NAMES
from grasp_lora.data.hub import (
    ALL,
    PUBLISHED_SETS,
    HubExamples,
    Source,
    load_hub,
    load_preset,
    split_published,
)
from grasp_lora.data.leaks import (
    Leak,
    drop_parallel,
    find_leaks,
    groups_like,
    parallel_notice,
    refuse_leaks,
)
from grasp_lora.data.repeats import drop_repeated_texts
from grasp_lora.data.splits import label_budget, manifest, split_auto, split_by_group
from grasp_lora.report.data_words import trained_on_line
from grasp_lora.tasks.base import Example, Task, task_named

_KNOWN = "adapters.trained_on."
Parts = dict[str, tuple[Example, ...]]
Say = Callable[[str], None]
Rows = Iterable[Mapping[str, Any]]
"""Rows from Python, such as a `datasets.Dataset`."""
Given = Mapping[str, Mapping[str, Rows] | Rows]
"""Role ("source", "target", "extra", "tests") -> split -> rows.

Rows of "source" and "target" may also be one set, which is divided like a file. Their splits may
have the usual names (`data.forms.SPLIT_NAMES`).
"""


@dataclass(frozen=True)
class RunData:
    """The examples of each role ("source", "target", "extra", "tests") and split, and their origin.

    Attributes:
        parts: role -> split -> examples; role "tests" has one entry for every further test set, and
            role "extra" the split "train" alone.
        dropped: "role/split" -> number of examples left out because another split already has
            their context.
        sources: role, or "tests/<name>" -> where the examples came from.
        leaks: pairs of examples that two splits share; filled only with `data.allow_leakage`.
        trained_on: role of a given adapter -> the file of the rows it was trained on, how many they
            are, and how many target train rows are of their contexts.
    """

    parts: dict[str, Parts]
    dropped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    leaks: tuple[Leak, ...] = ()
    trained_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    _digests: dict[tuple[str, str], str] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def manifest(self) -> dict[str, Any]:
        """Return the ids of every split, and hashes of ids and of whole examples; JSON-able."""
        record: dict[str, Any] = {
            role: manifest(parts) | {"from": self.sources.get(role, "")}
            for role, parts in self.parts.items()
            if role != "tests"
        }
        if "tests" in self.parts:
            came = {name: self.sources.get(f"tests/{name}", "") for name in self.parts["tests"]}
            record["tests"] = manifest(self.parts["tests"]) | {"from": came}
        return (
            record
            | {"rows_sha256": self.digest()}
            | {"dropped": self.dropped, "leaks": [asdict(leak) for leak in self.leaks]}
            | {"trained_on": self.trained_on}
        )

    def digest(self) -> str:
        """Return a hash of all examples, 16 hex digits."""
        content = hashlib.sha256()
        for role, parts in self.parts.items():
            for split, rows in parts.items():
                _feed(content, role, split, rows)
        return content.hexdigest()[:16]

    def digest_of(self, role: str, split: str) -> str:
        """Return a hash of the examples of a set, 16 hex digits; a missing set counts as empty."""
        if (role, split) not in self._digests:
            content = hashlib.sha256()
            _feed(content, role, split, self.parts.get(role, {}).get(split, ()))
            self._digests[role, split] = content.hexdigest()[:16]
        return self._digests[role, split]

    def test_sets(self) -> dict[str, tuple[str, str]]:
        """Return name -> (role, split) of the test sets: the target's own first, if not empty."""
        found = {"test": ("target", "test")} if self.parts["target"].get("test") else {}
        return found | {name: ("tests", name) for name in self.parts.get("tests", {})}


def _feed(content: Any, role: str, split: str, rows: Iterable[Example]) -> None:
    content.update(f"{role}/{split}\0".encode())
    for e in rows:
        record = [e.id, e.group, e.language, dict(e.fields), e.references]
        content.update(json.dumps(record, ensure_ascii=False).encode() + b"\0")


def load_run_data(
    config: RunConfig, say: Say, *, given: Given | None = None, training: bool = True
) -> RunData:
    """Read the examples of a run, divide them into splits, check them, and return them.

    Args:
        config: the run's settings.
        say: called with lines for the user.
        given: rows from Python; they replace the files of their role.
        training: False reads for an evaluation, which needs no train examples.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty or malformed, there are too few examples, or two splits, or one
            that judges and what a given adapter was trained on, share examples and
            `data.allow_leakage` is not set.
    """
    given = _with_our_splits(given or {})
    _check_given(config, given)
    reader = _Reader(config, task_named(config.data.task), say, given, training)
    reader.read_trained_on()
    target = reader.language("target", config.data.target)
    parts: dict[str, Parts] = {"target": target}
    if config.data.source is not None:
        used = [example for rows in target.values() for example in rows]
        parts = {"source": reader.language("source", config.data.source, used)} | parts
    if config.data.extra is not None:
        parts["extra"] = {"train": reader.extra(config.data.extra, target)}
    if config.data.tests:
        trained = [
            e for r in parts for split in parts[r] if split != "test" for e in parts[r][split]
        ]
        parts["tests"] = {
            name: reader.test_set(name, section, trained)
            for name, section in config.data.tests.items()
        }
    if training:
        _check_target(config, parts["target"])
    leaks = _check_leaks(config, parts, reader, say)
    budget = label_budget(parts["target"])
    spent = ", ".join(f"{n} {split}" for split, n in budget.items() if split != "test")
    tested = sum(map(len, [target.get("test", ()), *parts.get("tests", {}).values()]))
    say(f"target labels used: {spent or 'none'}; tested on {tested}")
    if "extra" in parts:
        say(f"extra rows, which are no labels: {len(parts['extra']['train'])}")
    for where, count in reader.dropped.items():
        say(f"{where}: {count} rows left out (their context would be in two splits)")
    data = RunData(parts, reader.dropped, reader.sources, leaks, reader.trained_on(target))
    for line in _lines_on_trained(config, data) if training else ():
        say(line)
    return data


def _lines_on_trained(config: RunConfig, data: RunData) -> Iterator[str]:
    """Yield what is known of the rows that given adapters were trained on."""
    for role, one in data.trained_on.items():
        yield trained_on_line(role, one)
    target = config.adapters.target
    if target is None or "target" in data.trained_on or _trained_here(target, data):
        return
    if any(data.parts["target"].get(split) for split in PARTS if split != "train"):
        yield (
            "adapters.target may have been trained on some of the dev, micro-dev and test rows: "
            "adapters.trained_on.target: FILE keeps them in train"
        )


def _trained_here(adapter: Path, data: RunData) -> bool:
    """Return whether an adapter is a result of this library, trained on these target train rows."""
    marker = adapter / STAGE_FILE
    key = read_json(marker).get("key", {}) if marker.is_file() else {}
    trained = key.get("examples", {}).get("target/train")
    return trained == data.digest_of("target", "train")


def _with_our_splits(given: Given) -> dict[str, Any]:
    """Return rows whose splits of source and target have our names, such as dev for validation.

    Raises:
        ValueError: two splits of a role have the same name then.
    """
    names = {theirs: ours for ours, known in SPLIT_NAMES.items() for theirs in known}
    found: dict[str, Any] = dict(given)
    for role in ("source", "target"):
        splits = found.get(role)
        if isinstance(splits, Mapping):
            found[role] = {names.get(name, name): rows for name, rows in splits.items()}
            if len(found[role]) < len(splits):
                raise ValueError(
                    f"of the splits given for {role}, {shown(sorted(splits))}, two are the same "
                    "one; leave one out"
                )
    return found


def _check_given(config: RunConfig, given: Given) -> None:
    """Check that the configuration has the roles and splits of the rows from Python.

    Raises:
        ValueError: it lacks one, or the rows of a role are no mapping.
    """
    parts = set(PARTS)
    known = {"target": parts, "tests": set(config.data.tests)}
    known |= {"source": parts} if config.data.source is not None else {}
    known |= {"extra": {"train"}} if config.data.extra is not None else {}
    for role, rows in given.items():
        if role not in known:
            raise ValueError(
                f"rows are given for {shown(role)}, which the configuration does not have; give "
                f"rows for {', '.join(known)}"
            )
        named = set(rows) if isinstance(rows, Mapping) else None
        if named is None and role in ("source", "target") and not isinstance(rows, str):
            continue
        if named is None or named - known[role]:
            wrong = (
                f"a {type(rows).__name__}"
                if named is None
                else f"{shown(min(named - known[role]))}"
            )
            raise ValueError(
                f"the rows given for {role} must be a mapping from splits "
                f"({', '.join(sorted(known[role])) or 'none are configured'}) to rows, got {wrong}"
            )


def _check_target(config: RunConfig, target: Parts) -> None:
    searches = config.recipe == "grasp"
    needed = ("train", "micro_dev") if searches else ("train",)
    empty = [split for split in needed if not target.get(split)]
    if empty:
        why = "the search trains on train and probes micro_dev" if searches else "it is trained on"
        raise ValueError(
            f"the target data has no examples in {' and '.join(empty)}; {why}: give"
            f" data.target.rows or data.target.files for {'both' if searches else 'it'}"
        )


def _check_leaks(
    config: RunConfig,
    parts: dict[str, Parts],
    reader: "_Reader",
    say: Say,
) -> tuple[Leak, ...]:
    named = {f"{role}/{split}": rows for role in parts for split, rows in parts[role].items()}
    named |= {f"{_KNOWN}{role}": rows for role, rows in reader.known.items()}
    near = config.data.near_duplicates
    leaks = find_leaks(named, threshold=near, say=say, apart=reader.apart)
    counted = tuple(leak for leak in leaks if not _may_share(leak.first[0], leak.second[0]))
    if counted and not config.data.allow_leakage:
        refuse_leaks(counted)
    if counted:
        say(
            f"leakage, allowed: {len(counted)} pairs of examples are in two splits, "
            f"first: {counted[0]}"
        )
    return counted


def _may_share(*splits: str) -> bool:
    """Return whether two splits may share examples.

    Two test sets may, as nothing is trained on either. Extra rows may share them with what judges
    no target adapter: the target train rows and the source rows, of which they may be translations.
    So may the rows that given adapters were trained on, with extra rows as well.
    """
    if any(split.startswith(_KNOWN) for split in splits):
        return not any(_judges(split) for split in splits)
    if "extra/train" in splits:
        return all(
            split in ("extra/train", "target/train") or split.startswith("source/")
            for split in splits
        )
    return all(split.startswith("tests/") or split.endswith("/test") for split in splits)


def _judges(split: str) -> bool:
    role, _, part = split.partition("/")
    return role == "tests" or (role == "target" and part != "train")


def without_held(
    rows: Sequence[Example], held: Sequence[Example], threshold: float
) -> tuple[Example, ...]:
    """Return the rows whose group shares no id, group or text with examples that judge them.

    Args:
        rows: rows to be trained on.
        held: examples that judge the training.
        threshold: Jaccard similarity from which texts count as the same; see `find_leaks`.
    """
    kept, _ = drop_parallel(rows, held)
    parts, _ = drop_repeated_texts({"dev": held, "train": kept}, threshold=threshold)
    return parts["train"]


@dataclass
class _Reader:
    """Reads the data sections of one configuration, and collects facts for the manifest."""

    config: RunConfig
    task: Task
    say: Say
    given: Mapping[str, Any]
    training: bool = True
    dropped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    known: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    """Role of a given adapter -> the rows that it was trained on."""
    apart: list[tuple[str, ...]] = field(default_factory=list)
    """The splits of each role, as "role/split", from which repeated texts were left out."""

    @property
    def seed(self) -> int:
        """The seed that divides examples into splits."""
        given = self.config.data.split_seed
        return self.config.seed if given is None else given

    def read_trained_on(self) -> None:
        """Read the rows that given adapters were trained on.

        Numbers as ids tell rows of a file apart, not rows of two files of one language: such rows
        are known by their texts.
        """
        data = self.config.data
        for role, path in self.config.adapters.trained_on.files().items():
            section = data.source if role == "source" and data.source else data.target
            rows = self._load(path, section, f"adapters.trained_on.{role}", "train")
            if section.language == data.target.language:
                rows = tuple(
                    replace(e, id=f"{_KNOWN}{role} {e.id}") if e.id.isdecimal() else e for e in rows
                )
            self.known[role] = rows

    def trained_on(self, target: Parts) -> dict[str, dict[str, Any]]:
        """Return role -> facts about the rows that a given adapter was trained on."""
        found: dict[str, dict[str, Any]] = {}
        for role, path in self.config.adapters.trained_on.files().items():
            train = target.get("train", ())
            groups = self._groups_like(train, self.known[role])
            count = sum(e.group in groups for e in train)
            found[role] = {"from": path.name, "rows": len(self.known[role]), "in_train": count}
        return found

    def _groups_like(self, rows: Sequence[Example], known: Sequence[Example]) -> frozenset[str]:
        near = self.config.data.near_duplicates
        return groups_like(rows, known, near, self.say) if known else frozenset()

    def _trained(self, rows: Sequence[Example]) -> frozenset[str]:
        """Return the groups of rows that a given adapter was trained on."""
        return self._groups_like(rows, [e for known in self.known.values() for e in known])

    def language(
        self, role: str, section: LanguageData, used: Iterable[Example] | None = None
    ) -> Parts:
        """Return split -> examples of a role.

        Args:
            role: "source" or "target".
            section: the settings of the role.
            used: examples of the other role. Their translations are left out of examples that are
                still to be divided into splits.
        """
        if role in self.given:
            self.sources[role] = "given in Python"
            given = self.given[role]
            if isinstance(given, Mapping):
                parts = in_order(given)
                return {part: self._load(source, section, part) for part, source in parts.items()}
            return self._divided(role, section, self._load(given, section, f"{role} rows"), used)
        paths = section.paths()
        if section.files == "builtin":
            self.sources[role] = "builtin"
            return _builtin(section, role, self.config, self.seed)
        if not paths and not isinstance(section.files, Mapping):
            return self._published(role, section, used)
        self.sources[role] = ", ".join(f"{k}={p.name}" if k else p.name for k, p in paths.items())
        read = {
            part: self._load(path, section, path.name, part or None) for part, path in paths.items()
        }
        return self._divided(role, section, read[""], used) if "" in read else read

    def _divided(
        self,
        role: str,
        section: LanguageData,
        rows: tuple[Example, ...],
        used: Iterable[Example] | None,
    ) -> Parts:
        """Return split -> examples of one set, which is divided as `rows` of the section say."""
        rows = self._without_parallel(role, rows, used)
        trained = self._trained(rows)
        if section.sizes_chosen_here:
            test = section.rows.get("test", 0)
            return self._without_repeats(
                role, *_split_automatically(rows, test, self.seed, self.training, trained)
            )
        split = split_by_group(rows, section.rows, self.seed, trained)
        return self._without_repeats(role, dict(split.parts), dict(split.dropped))

    def test_set(
        self, name: str, section: TestSet, trained: Sequence[Example]
    ) -> tuple[Example, ...]:
        """Return the examples of a further test set, without translations of `trained` examples."""
        rows = self._one_set(f"tests/{name}", section, self.given.get("tests", {}).get(name))
        others = [e for e in trained if e.language != section.language]
        kept, count = drop_parallel(rows, others)
        if count:
            self.say(f"tests/{name}: {parallel_notice(rows, others, count, 'training')}")
        if section.rows is None:
            return kept
        return split_by_group(kept, {name: section.rows}, self.seed).parts[name]

    def extra(self, section: ExtraData, target: Parts) -> tuple[Example, ...]:
        """Return the extra rows, without those that the target has beyond its train rows.

        Raises:
            ValueError: no row is left, or fewer than `data.extra.rows`.
        """
        rows = self._one_set("extra", section, self.given.get("extra", {}).get("train"))
        held = [e for split in target if split != "train" for e in target[split]]
        kept, count = drop_parallel(rows, held)
        if count:
            name = "target dev, micro-dev or test"
            self.say(f"extra: {parallel_notice(rows, held, count, name)}")
        if not kept:
            raise ValueError(
                f"data.extra: all {count} rows are left out, as they or others of their context "
                "share an id with a target row that is not trained on; give other rows, or other "
                "ids if they are no translations of them"
            )
        if section.rows is None:
            return kept
        return split_by_group(kept, {"extra": section.rows}, self.seed).parts["extra"]

    def _one_set(
        self, where: str, section: OneSet, given: Iterable[Mapping[str, Any]] | None
    ) -> tuple[Example, ...]:
        """Return the examples of a section that is not divided; `where` names it."""
        if given is not None:
            self.sources[where] = "given in Python"
            return self._load(given, section, where.removeprefix("tests/"))
        if isinstance(section.files, Path):
            self.sources[where] = section.files.name
            return self._load(section.files, section, section.files.name, section.part)
        found = self._found(section.files, section, "target")
        self.sources[where] = found.record()
        return found.examples[found.drawn_from[section.part]]

    def _published(self, role: str, section: LanguageData, used: Iterable[Example] | None) -> Parts:
        found = self._found(section.files, section, role)
        if isinstance(section.files, HubData):
            sizes = section.rows or dict.fromkeys(section.files.splits, ALL)
        else:
            sizes = section.rows or PUBLISHED_SETS[str(section.files)].sizes[role]
            self.say(f"{role}: {section.files} {section.language} from {found.used}")
        self.sources[role] = found.record()
        if used is not None:
            found = found.filtered(lambda rows: self._without_parallel(role, rows, used))
        trained = self._trained([e for rows in found.examples.values() for e in rows])
        split = split_published(found, sizes, self.seed, trained)
        return self._without_repeats(role, dict(split.parts), dict(split.dropped))

    def _found(self, files: Any, section: ExampleSource, role: str) -> HubExamples:
        """Return the published examples of `files`, a preset's name or a data set of the hub."""
        if isinstance(files, HubData):
            found = load_hub(
                Source(files.hub, files.config, files.revision),
                dict(files.splits),
                self.task,
                section.language,
                columns=section.columns,
                template=section.prompt,
                max_faulty=self.config.data.max_faulty,
            )
        else:
            found = load_preset(
                str(files),
                section.language,
                self.config.protocol,
                role=role,
                max_faulty=self.config.data.max_faulty,
            )
        for split, published in found.published.items():
            if published.report.line():
                self.say(f"{found.used} {split}: {published.report.line()}")
        return found

    def _load(
        self, source: Any, section: ExampleSource, name: str, split: str | None = None
    ) -> tuple[Example, ...]:
        """Return the examples of rows or of a file; `split` is read if the file holds several."""
        examples, report = load_examples(
            source,
            self.task,
            section.language,
            columns=section.columns,
            template=section.prompt,
            max_faulty=self.config.data.max_faulty,
            split=split,
        )
        if report.line():
            self.say(f"{name}: {report.line()}")
        return tuple(examples)

    def _without_parallel(
        self, role: str, rows: tuple[Example, ...], used: Iterable[Example] | None
    ) -> tuple[Example, ...]:
        """Return the examples that are no translations of `used` ones; report how many were."""
        if used is None:
            return rows
        used = list(used)
        kept, count = drop_parallel(rows, used)
        if count:
            self.say(f"{role}: {parallel_notice(rows, used, count, 'target')}")
        return tuple(kept)

    def _without_repeats(self, role: str, drawn: Parts, dropped: dict[str, int]) -> Parts:
        """Return the drawn splits without texts that another split has; record what is left out."""
        parts, lost = drop_repeated_texts(
            drawn, threshold=self.config.data.near_duplicates, say=self.say
        )
        for split, count in lost.items():
            if count:
                self.say(
                    f"{role}/{split}: {count} of {len(drawn[split])} rows left out, another split"
                    " has nearly the same text"
                )
        self.dropped |= {f"{role}/{split}": n for split, n in dropped.items() if n}
        self.apart.append(tuple(f"{role}/{split}" for split in parts))
        return parts


def _split_automatically(
    rows: tuple[Example, ...], test: int, seed: int, training: bool, trained: Collection[str]
) -> tuple[Parts, dict[str, int]]:
    """Return (split -> examples, split -> number left out), with splits chosen automatically.

    The test split is drawn first. The other examples are divided into train, dev and micro_dev. If
    they are too few for that and `training` is False, there is only the test split. Groups of
    `trained` are in train alone.
    """
    held = split_by_group(rows, {"test": test}, seed, trained)
    taken = {e.group for e in held.parts["test"]}
    others = [e for e in rows if e.group not in taken]
    try:
        labelled = split_auto(others, seed, trained)
    except ValueError:
        if training:
            raise
        return dict(held.parts), dict(held.dropped)
    return dict(labelled.parts) | dict(held.parts), dict(labelled.dropped) | dict(held.dropped)


def _builtin(section: LanguageData, role: str, config: RunConfig, seed: int) -> Parts:
    source, target = config.data.source, config.data.target
    given = {"source": source.rows if source else {}, "target": target.rows}
    both = builtin_splits(
        source.language if source and source.files == "builtin" else section.language,
        target.language if target.files == "builtin" else section.language,
        {side: sizes or DEFAULT_SIZES[side] for side, sizes in given.items()},
        seed,
    )
    return dict(both[0] if role == "source" else both[1])
