"""Warnings about a run, computed from the results of its stages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lora.base.files import read_json, write_json
from grasp_lora.core.controller.rounds import ControllerConfig, RatioChoice, RoundRecord
from grasp_lora.core.evidence import findings
from grasp_lora.core.evidence.findings import Finding
from grasp_lora.stages.folder import STAGE_FILE


def search_findings(
    config: ControllerConfig,
    choice: RatioChoice,
    records: Sequence[RoundRecord],
    flipped: Sequence[int],
    entries: int,
    micro_dev: int,
    groups: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the warnings about a search, JSON-able.

    Args:
        config: settings of the controller.
        choice: the ratio that the search chose, and its verdict.
        records: the rounds of the search.
        flipped: for each round, the entries that became pruned or were restored.
        entries: the entries of the adapter.
        micro_dev: the number of micro-dev examples; they come first in the pool.
        groups: group of each example that probes are drawn from.
    """
    found = [
        findings.never_fired(choice.verdict),
        findings.at_bound(choice.ratio, choice.verdict, config),
        findings.thrashing(records, flipped, entries),
        findings.coarse_reward(records),
    ]
    if 0 < micro_dev < len(groups):
        found.append(findings.unrepresentative(records, choice.ratio, range(micro_dev), groups))
    return _jsonable(found)


def add_run_findings(
    out: Path,
    final: Path,
    alone: dict[str, Path],
    systems: Sequence[Mapping[str, Any]] = (),
    sections: Mapping[str, str] | None = None,
) -> None:
    """Add to `ratio.json` the warnings that need the final run and the baselines.

    Args:
        out: the run's folder; its `ratio.json` and `baselines/` are read.
        final: folder of the final adapter.
        alone: name -> folder of a single adapter that was chosen on the same dev examples.
        systems: the evaluated systems, as `scores.json` lists them.
        sections: name in `alone` -> settings of its training, if not `train.finetune`.
    """
    ratio, stage = read_json(out / "ratio.json"), read_json(final / STAGE_FILE)
    rows, groups = _best_rows(final), _groups(final)
    found: list[Finding | None] = []
    if stage["best"] is not None:
        kept, steps = stage["best"]["step"], stage["steps"]
        search = _stage(out / "search")
        if search.get("best"):  # the final run continued from the best step of the search
            kept, steps = kept + search["best"]["step"], steps + search["steps"]
        found.append(findings.overfitting(kept, steps))
    unpruned = out / "baselines" / "merged-finetuned"
    folders = {"final run": final, "unpruned merge": unpruned}
    curves = {name: _curve(folder) for name, folder in (folders | alone).items()}
    known_groups = {name: _groups(folder) for name, folder in (folders | alone).items()}
    grouped = {name: one for name, one in known_groups.items() if one is not None}
    found.append(findings.undertrained(curves, grouped, sections))
    whole = _best_rows(unpruned)
    # A post-hoc merge is not trained: its baseline is another merge, not this one unpruned.
    if rows and len(whole) == len(rows) and stage["ratio"] > 0 and stage["steps"] > 0:
        found.append(findings.over_pruned(rows, whole, groups))
    others = {name: _best_rows(folder) for name, folder in alone.items()}
    others = {name: losses for name, losses in others.items() if len(losses) == len(rows)}
    if rows and others:
        found.append(findings.not_worth_merging(rows, others, groups))
    found.append(findings.empty_answers({one["name"]: _empty(one["sets"]) for one in systems}))
    known = ratio.get("findings", [])
    names = {one["name"] for one in _jsonable(found)}
    kept = [one for one in known if one["name"] not in names]
    write_json(out / "ratio.json", ratio | {"findings": kept + _jsonable(found)})


def _empty(sets: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    # Scores written by an earlier version have no count of empty answers.
    counted = [one for one in sets.values() if "empty" in one]
    return sum(one["empty"] for one in counted), sum(one["n"] for one in counted)


def _best_rows(folder: Path) -> list[float]:
    return _known(_stage(folder).get("best_rows", []))


def _curve(folder: Path) -> list[list[float]]:
    """Return the dev losses in nats, evaluation by evaluation."""
    return [_known(losses) for losses in _stage(folder).get("rows", [])]


def _known(losses: Sequence[float | None]) -> list[float]:
    """Return losses read from JSON, where null stands for one that is not finite."""
    return [math.nan if loss is None else loss for loss in losses]


def _groups(folder: Path) -> list[str] | None:
    """Return the group of each dev example; None where an earlier version wrote none."""
    return _stage(folder).get("groups") or None


def _stage(folder: Path) -> dict[str, Any]:
    file = folder / STAGE_FILE
    return read_json(file) if file.exists() else {}


def _jsonable(found: Iterable[Finding | None]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found if one is not None]
