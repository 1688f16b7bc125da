"""The rows of a run: which examples every role trains on, tunes on and is tested on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp_lora.config import LanguageData, RunConfig
from grasp_lora.tasks.base import Example
from grasp_lora.tasks.builtin import DEFAULT_SIZES, builtin_splits
from grasp_lora.tasks.qa import load_examples
from grasp_lora.tasks.splits import (
    check_disjoint,
    label_budget,
    manifest,
    split_auto,
    split_by_group,
)

Parts = dict[str, tuple[Example, ...]]


@dataclass(frozen=True)
class RunData:
    """Examples per role ("source", "target") and split, and how they came about.

    Attributes:
        parts: role -> split -> examples.
        dropped: "role/split" -> rows left out because their context was shared out already.
        sources: "role" -> where the rows came from.
    """

    parts: dict[str, Parts]
    dropped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """Return the ids of every split with a hash, JSON-able."""
        return {
            role: manifest(parts) | {"from": self.sources.get(role, "")}
            for role, parts in self.parts.items()
        } | {"dropped": self.dropped}


def load_run_data(config: RunConfig, say: Callable[[str], None]) -> RunData:
    """Read, split and check the rows of a run.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty or malformed, there are too few rows, or a question or context
            is in two splits.
    """
    source, target = config.data.source, config.data.target
    parts: dict[str, Parts] = {"source": {}, "target": {}}
    dropped: dict[str, int] = {}
    names: dict[str, str] = {}
    for role, section in (("source", source), ("target", target)):
        if section is None:
            continue
        names[role] = _name(section)
        parts[role], lost = _read(section, role, config, say)
        dropped |= {f"{role}/{split}": n for split, n in lost.items() if n}
    check_disjoint({f"{r}/{split}": rows for r in parts for split, rows in parts[r].items()})
    for role in parts:
        empty = [s for s in ("train", "micro_dev") if role == "target" and not parts[role].get(s)]
        if empty:
            raise ValueError(
                f"the target data has no rows in {' and '.join(empty)}; the search trains on"
                " train and probes micro_dev: give data.target.rows or data.target.files for both"
            )
    budget = label_budget(parts["target"])
    used = ", ".join(f"{n} {split}" for split, n in budget.items() if split != "test")
    say(f"target labels used: {used}; tested on {budget.get('test', 0)}")
    for where, count in dropped.items():
        say(f"{where}: {count} rows left out (their context would be in two splits)")
    return RunData(parts, dropped, names)


def _name(section: LanguageData) -> str:
    paths = section.paths()
    return ", ".join(f"{k}={p.name}" if k else p.name for k, p in paths.items()) or "builtin"


def _read(
    section: LanguageData, role: str, config: RunConfig, say: Callable[[str], None]
) -> tuple[Parts, dict[str, int]]:
    paths = section.paths()
    if not paths:
        return _builtin(section, role, config), {}
    read = {key: _file(path, section.language, say) for key, path in paths.items()}
    if "" not in read:
        return read, {}
    if section.labels == "auto":
        return _auto(read[""], section.rows.get("test", 0), config.seed)
    split = split_by_group(read[""], section.rows, config.seed)
    return dict(split.parts), dict(split.dropped)


def _auto(rows: tuple[Example, ...], test: int, seed: int) -> tuple[Parts, dict[str, int]]:
    held = split_by_group(rows, {"test": test}, seed)
    taken = {e.group for e in held.parts["test"]}
    labelled = split_auto([e for e in rows if e.group not in taken], seed)
    return dict(labelled.parts) | dict(held.parts), dict(labelled.dropped) | dict(held.dropped)


def _file(path: Path, language: str, say: Callable[[str], None]) -> tuple[Example, ...]:
    examples, report = load_examples(path, language)
    if report.answers_outside:
        say(
            f"{path.name}: {report.answers_outside} of {report.rows} rows have an answer that is"
            " not in their context"
        )
    return tuple(examples)


def _builtin(section: LanguageData, role: str, config: RunConfig) -> Parts:
    source, target = config.data.source, config.data.target
    given = {"source": source.rows if source else {}, "target": target.rows}
    both = builtin_splits(
        source.language if source and source.files == "builtin" else section.language,
        target.language if target.files == "builtin" else section.language,
        {side: sizes or DEFAULT_SIZES[side] for side, sizes in given.items()},
        config.seed,
    )
    return dict(both[0] if role == "source" else both[1])
