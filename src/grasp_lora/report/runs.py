"""Finished runs side by side: what each ships, its scores, its cost, and the settings that differ.

This module reads the records of the runs only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.base.files import check_run, read_config, read_json
from grasp_lora.base.words import shown_path, without_home
from grasp_lora.report.choice import ship_parts
from grasp_lora.report.document import Cell, Document, Dots, Lines, Part, Section, Table, cells
from grasp_lora.report.run import (
    HEADLINES,
    NATIVE,
    NO_VALUE,
    TITLES,
    outcome_line,
    score_cell,
)
from grasp_lora.report.run_report import flat

_NOT_COMPARED = ("output",)
"""Settings that say where a run is, not what it does."""
_NO_TEST = "Intervals of single runs are no test of their difference."


@dataclass(frozen=True)
class Run:
    """The records of a finished run.

    Attributes:
        name: its folder, as short as tells it from the others.
        folder: the folder.
        ratio: content of `ratio.json`.
        scores: content of `scores.json`.
        choice: content of `recipe.json`; empty for the published recipe.
        data: content of `data.json`.
        made: content of `provenance.json`.
        settings: dotted name -> value as JSON.
    """

    name: str
    folder: Path
    ratio: Mapping[str, Any]
    scores: Mapping[str, Any]
    choice: Mapping[str, Any]
    data: Mapping[str, Any]
    made: Mapping[str, Any]
    settings: Mapping[str, str]

    @property
    def decision(self) -> str:
        """The outcome in one sentence."""
        parts = ship_parts(self.choice, "final") if self.choice else [outcome_line(self.ratio)]
        return " | ".join(parts)

    def final(self, test: str) -> Mapping[str, Any] | None:
        """Return what the result scored on a test set; None where it was not scored."""
        rows = [row for row in self.scores["systems"] if row["slug"] == "final"]
        return rows[0]["sets"].get(test) if rows else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the records of finished runs.

    Raises:
        ValueError: a folder holds no finished run, or is given twice.
    """
    for folder in folders:
        if not folder.is_dir() or not check_run(folder):
            raise ValueError(
                f"{shown_path(folder)} holds no finished run; give folders that grasp-lora run has "
                "finished, or finish it with the same command"
            )
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{shown_path(place)} is given twice; give each run once")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, or their whole paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    alike = len(set(names)) < len(names)
    return [without_home(folder.resolve()) for folder in folders] if alike else names


def _read(folder: Path, name: str) -> Run:
    ratio, scores, data, made = (
        read_json(folder / f"{one}.json") for one in ("ratio", "scores", "data", "provenance")
    )
    recipe = folder / "recipe.json"
    choice = read_json(recipe) if recipe.exists() else {}
    settings = dict(flat(read_config(folder)))
    return Run(name, folder, ratio, scores, choice, data, made, settings)


def runs_document(folders: Sequence[Path]) -> Document:
    """Return what there is to say about finished runs side by side.

    Raises:
        ValueError: as `read_runs`.
    """
    runs = read_runs(folders)
    tests = list(dict.fromkeys(test for run in runs for test in _tests(run)))
    decisions = tuple(cells((run.name, run.decision)) for run in runs)
    sections = (
        Section(
            "Decisions", (Table(("run", "decision"), decisions, texts=True), Lines((_NO_TEST,)))
        ),
        *(Section(f"Scores of what is shipped, {t}", tuple(_scores(runs, t))) for t in tests),
        Section("Ratio and cost", (_cost(runs),)),
        Section("Settings that differ", tuple(_settings(runs))),
    )
    return Document("Runs side by side", tuple(_lowest(runs, tests)), sections)


def _tests(run: Run) -> list[str]:
    """Return the test sets on which the result was scored."""
    rows = [row for row in run.scores["systems"] if row["slug"] == "final"]
    return list(rows[0]["sets"]) if rows else []


def _lowest(runs: Sequence[Run], tests: Sequence[str]) -> Iterator[str]:
    """Yield how many runs there are, and which ships the lowest loss on the first test set."""
    yield f"{len(runs)} runs"
    losses = {
        run.name: found["scores"]["loss"]
        for test in tests[:1]
        for run in runs
        if (found := run.final(test)) is not None and "loss" in found["scores"]
    }
    known = {name: one for name, one in losses.items() if one["value"] is not None}
    if known and not _differ(runs, tests[0]):
        best = min(known, key=lambda name: known[name]["value"])
        yield f"lowest loss on {tests[0]}: {best}, {score_cell(known[best], 'loss')}"


def _differ(runs: Iterable[Run], test: str) -> bool:
    """Return whether a test set has other rows in some of these runs, by their ids."""
    role = "target" if test == "test" else "tests"
    found = {str(run.data.get(role, {}).get("splits", {}).get(test)) for run in runs}
    return len(found) > 1


def _scores(runs: Sequence[Run], test: str) -> Iterator[Part]:
    scored = [(run, found) for run in runs if (found := run.final(test)) is not None]
    if _differ((run for run, _ in scored), test):
        yield Lines(("The runs were tested on different examples: do not compare these scores.",))
    metrics = list(dict.fromkeys(m for _, found in scored for m in found["scores"]))
    task = scored[0][0].scores["task"]
    shown = [m for m in HEADLINES.get(task, ()) if m in metrics]
    for metric in [*shown[:1], *(m for m in shown[1:] if m == "loss")]:
        found = [(run.name, one["scores"].get(metric, {})) for run, one in scored]
        known = [(name, score) for name, score in found if score.get("value") is not None]
        rows = tuple((name, one["value"], one["low"], one["high"]) for name, one in known)
        lower = ", lower is better" if metric in NATIVE else ""
        yield Dots(f"{TITLES.get(metric, metric)}{lower}", rows)
    yield _score_table(scored, shown, whole=False)
    if metrics != shown:
        yield _score_table(scored, metrics, whole=True)


def _score_table(
    scored: Sequence[tuple[Run, Mapping[str, Any]]], metrics: Sequence[str], whole: bool
) -> Table:
    titles = ("run", "examples", *(TITLES.get(m, m) for m in metrics))
    rows: list[tuple[Cell, ...]] = []
    for run, found in scored:
        line = [Cell(run.name), Cell(str(found["n"]), found["n"])]
        for metric in metrics:
            score = found["scores"].get(metric)
            text = NO_VALUE if score is None else score_cell(score, metric)
            line.append(Cell(text, None if score is None else score["value"]))
        rows.append(tuple(line))
    folded = "All scores" if whole else ""
    return Table(titles, tuple(rows), folded=folded, whole=whole)


def _cost(runs: Sequence[Run]) -> Table:
    titles = ("run", "ratio", "verdict", "plain runs", "seconds", "peak memory (GB)", "device")
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        price = run.choice.get("price", {}).get("plain_runs")
        seconds = run.made["time"]["wall_seconds"]
        peak = run.made.get("peak_gpu_memory_bytes") or run.made.get("peak_memory_bytes")
        rows.append(
            (
                Cell(run.name),
                Cell(f"{run.ratio['ratio']:.3f}", run.ratio["ratio"]),
                Cell(run.ratio["verdict"]),
                Cell(NO_VALUE if price is None else f"{price:.2f}", price),
                Cell(f"{seconds:.0f}", seconds),
                Cell(NO_VALUE if peak is None else f"{peak / 1e9:.2f}", peak),
                Cell(f"{run.made['device']}, {run.made['dtype'].removeprefix('torch.')}"),
            )
        )
    return Table(titles, tuple(rows))


def _settings(runs: Sequence[Run]) -> Iterator[Part]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        values = [run.settings.get(name, NO_VALUE) for run in runs]
        if len(set(values)) > 1 and name not in _NOT_COMPARED:
            rows.append(cells((name, *values)))
    if rows:
        yield Table(("setting", *(run.name for run in runs)), tuple(rows), texts=True)
    else:
        yield Lines(("None but the place of the results.",))
