"""The report of a finished run: one gathering of its facts, written as Markdown and as a page.

This module reads records only. No number of the run depends on it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lora.base.files import PROMPT_FILE, read_json, write_text
from grasp_lora.report.card import model_loader
from grasp_lora.report.choice import ratio_line, ship_parts, tried_lines
from grasp_lora.report.data_words import prompt_line, trained_on_line
from grasp_lora.report.document import (
    Cell,
    Code,
    Document,
    Dots,
    Lines,
    Part,
    Section,
    Table,
    cells,
)
from grasp_lora.report.evidence_parts import (
    answers_section,
    curves_section,
    ratio_section,
    tried_section,
    zeros_section,
)
from grasp_lora.report.markdown import to_markdown
from grasp_lora.report.page import to_page
from grasp_lora.report.run import (
    HEADLINES,
    NATIVE,
    TITLES,
    difference_lines,
    finding_lines,
    format_value,
    outcome_line,
    score_cell,
    set_title,
    sets_of,
    unpruned_of,
    verdict_words,
    zeros_cell,
    zeros_titles,
)
from grasp_lora.report.time_words import share_cells, stage_times, time_notes

_SCORES_NOTE = (
    "In brackets: 95 % bootstrap interval over contexts. Scores are 0 to 100. The loss is in nats "
    "per answer token, a mean over examples. The settings of each score are in scores.json."
)
_RETRAINED_NOTE = (
    "Every fine-tuned system was retrained on all {rows} labelled target examples, for the number "
    "of epochs that the dev examples had chosen in a first run on the train examples alone. Dev "
    "losses are those of the first run."
)


def write_report(run: Path) -> Path:
    """Write `report.md` and `report.html` into a finished run folder; return the first.

    The same records give the same bytes.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    document = run_document(run)
    write_text(run / "report.html", to_page(document))
    write_text(run / "report.md", to_markdown(document))
    return run / "report.md"


def run_document(run: Path) -> Document:
    """Return what there is to say about a finished run, most important first.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    ratio, scores = read_json(run / "ratio.json"), read_json(run / "scores.json")
    choice, data, made, config = (
        read_json(run / f"{name}.json") if (run / f"{name}.json").exists() else {}
        for name in ("recipe", "data", "provenance", "config")
    )
    decision = ship_parts(choice, "final") if choice else [outcome_line(ratio)]
    sections = (
        Section("", tuple(_why(choice, scores))),
        Section("Systems", tuple(_systems(scores))),
        ratio_section(run, ratio, ratio_line(ratio) if choice else ""),
        *([tried_section(choice, _told(choice, ratio))] if choice else []),
        curves_section(run),
        zeros_section(run),
        answers_section(run, scores["task"]),
        Section("Data and warnings", tuple(_data(data, [*finding_lines(ratio), *_mixed(scores)]))),
        Section("Cost, settings, provenance", tuple(_made(made, ratio, config, scores))),
        Section("Load what is shipped", tuple(_loading(run / "final", made))),
    )
    title = "The adapter to ship, and scores" if choice else "Prune ratio and scores"
    return Document(title, tuple(decision), sections)


def _told(choice: Mapping[str, Any], ratio: Mapping[str, Any]) -> list[str]:
    """Return what there is to say about a choice and no other section says."""
    elsewhere = (choice["why"], ratio_line(ratio))
    return [one for one in tried_lines(choice, ratio) if one not in elsewhere]


def _why(choice: Mapping[str, Any], scores: Mapping[str, Any]) -> Iterator[Part]:
    if choice:
        yield Lines((choice["why"],))
    if "labelled_rows" in scores:
        yield Lines((_RETRAINED_NOTE.format(rows=scores["labelled_rows"]),))


def _systems(scores: Mapping[str, Any]) -> Iterator[Part]:
    """Yield dots, scores and differences of every test set; Markdown has the first set's only."""
    if not scores["systems"]:
        return
    yield Lines((_SCORES_NOTE,))
    # The result comes first, so that a table that is cut still has it.
    rows = sorted(scores["systems"], key=lambda row: row["slug"] != "final")
    for number, (name, first) in enumerate(sets_of(scores).items()):
        title, known, whole = set_title(scores, name, first), first["scores"], number > 0
        yield Lines((f"{title}:",), whole=whole)
        shown = [m for m in HEADLINES.get(scores["task"], ()) if m in known]
        for metric in [*shown[:1], *(m for m in shown[1:] if m == "loss")]:
            yield _dots(rows, name, metric)
        yield _score_table(scores, rows, name, whole)
        verdict, lines = verdict_words(scores, name), difference_lines(scores, name)
        if verdict:
            against = lines.get(unpruned_of(scores), "")
            yield Lines((f"{verdict} Result {against}",), whole=whole)
        if lines:
            about = ("Differences of the result to each system, on the same examples:",)
            yield Lines(about, whole=True)
            yield Lines(tuple(lines.values()), listed=True, whole=True)
    if len(sets_of(scores)) > 1:
        yield _over_sets(scores, rows)


def _dots(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> Dots:
    found = [(row, row["sets"][name]["scores"][metric]) for row in rows]
    known = [(row, score) for row, score in found if score["value"] is not None]
    lower = ", lower is better" if metric in NATIVE else ""
    return Dots(
        f"{TITLES.get(metric, metric)}{lower}",
        tuple((row["name"], one["value"], one["low"], one["high"]) for row, one in known),
        tuple(n for n, (row, _) in enumerate(known) if row["slug"] == "final"),
    )


def _score_table(
    scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str, whole: bool
) -> Table:
    """Return all scores of a test set, each with its interval, and where each system is."""
    shown, zeros = list(sets_of(scores)[name]["scores"]), zeros_titles(scores)
    placed = any(row.get("path") for row in rows)
    titles = ["system", *(TITLES.get(m, m) for m in shown), *zeros, *(["path"] if placed else [])]
    body: list[tuple[Cell, ...]] = []
    for row in rows:
        values = row["sets"][name]["scores"]
        line = [Cell(row["name"])]
        line += [Cell(score_cell(values[m], m), values[m]["value"]) for m in shown]
        line += [Cell(zeros_cell(row), row.get("zeros")) for _ in zeros]
        line += [Cell(row.get("path", ""))] if placed else []
        body.append(tuple(line))
    marked = tuple(n for n, row in enumerate(rows) if row["slug"] == "final")
    return Table(tuple(titles), tuple(body), whole=whole, marked=marked)


def _over_sets(scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the mean over the test sets and the worst of them, for every system."""
    shown = [m for m in HEADLINES.get(scores["task"], ()) if m in rows[0]["mean"]]
    titles = ["mean and worst set", *(TITLES.get(m, m) for m in shown)]
    body: list[tuple[Cell, ...]] = []
    for row in rows:
        line = [Cell(row["name"])]
        for m in shown:
            mean, worst = row["mean"][m], row["worst"][m]
            text = f"{format_value(mean, m)}, {format_value(worst['value'], m)} ({worst['set']})"
            line.append(Cell(text, mean))
        body.append(tuple(line))
    return Table(tuple(titles), tuple(body))


def _mixed(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for every metric that was scored with different settings across systems."""
    for name, first in sets_of(scores).items():
        for m in first["scores"]:
            kinds = {str(row["sets"][name]["scores"][m]["settings"]) for row in scores["systems"]}
            if len(kinds) > 1:
                yield (
                    f"The column {TITLES.get(m, m)} of {name} holds scores of different settings "
                    "(tokenizer, model or rescaling), so do not compare them."
                )


def _data(data: Mapping[str, Any], warnings: Sequence[str]) -> Iterator[Part]:
    rows: list[tuple[Cell, ...]] = []
    for role, one in data.items():
        if isinstance(one, dict) and "splits" in one:
            counts = ", ".join(f"{split} {len(ids)}" for split, ids in one["splits"].items())
            came = one["from"]
            came = ", ".join(came.values()) if isinstance(came, dict) else came
            rows.append(cells((role, counts, came, one["sha256"][:16])))
    if rows:
        yield Table(("examples of", "rows", "from", "hash of ids"), tuple(rows), texts=True)
    # Runs of earlier versions have no prompts there.
    asked: Mapping[str, Any] = data.get("prompts", {}).get("target", {})
    told = [prompt_line(asked)] if asked else []
    dropped: Mapping[str, int] = data.get("dropped", {})
    told += [
        f"{where}: {count} left out, as another split has them" for where, count in dropped.items()
    ]
    known: Mapping[str, Mapping[str, Any]] = data.get("trained_on", {})
    told += [trained_on_line(role, facts) for role, facts in known.items()]
    leaks: Sequence[Mapping[str, Any]] = data.get("leaks", [])
    if leaks:
        told.append(f"{len(leaks)} pairs of examples are in two splits, and the settings allow it:")
    for leak in leaks:
        first, second = (" ".join(leak[side]) for side in ("first", "second"))
        told.append(f"{leak['kind']}: {first} and {second}, similarity {leak['similarity']:.2f}")
    yield Lines((*told, *warnings), listed=True)


def _made(
    made: Mapping[str, Any],
    ratio: Mapping[str, Any],
    config: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> Iterator[Part]:
    """Yield where the time went, the settings, and with what the run was made."""
    if "time" in made:
        titles, shares = share_cells(made["time"])
        yield Table(tuple(titles), (cells(shares),))
        yield Lines((time_notes(made["time"], made["device"]),))
        seconds = stage_times(made["time"])
        stages = tuple((Cell(name), Cell(text, float(text))) for name, text in seconds.items())
        yield Table(("stage", "seconds"), stages, folded="Seconds of each stage", whole=True)
    told: list[str] = []
    if "preset" in ratio:
        changed = ", ".join(ratio["changed_from_preset"])
        told.append(f"preset {ratio['preset']}" + (f": {changed}" if changed else ""))
    if "backbone" in made:
        told.append(
            f"{made['backbone']}, {made['dtype']} on {made['device']}, {made['threads']} threads, "
            f"seed {made['seed']}, settings {made['config_hash']}, "
            f"weights {made['base_fingerprint'][:16]}, finished {made['finished']}"
        )
        versions = ", ".join(f"{name} {one}" for name, one in made["packages"].items())
        told.append(f"{versions}, Python {made['python']}, {made['platform']}")
    yield Lines(tuple(told), listed=True)
    if config:
        rows = tuple(cells(one) for one in flat(config["config"]))
        yield Table(("setting", "value"), rows, True, folded="All settings", whole=True)
    kept = tuple(cells(one) for one in _score_settings(scores))
    if kept:
        folded = "Settings of the scores"
        yield Table(("score", "settings"), kept, True, folded=folded, whole=True)


def _score_settings(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, first in sets_of(scores).items():
        for metric, score in first["scores"].items():
            settings = ", ".join(f"{k}: {v}" for k, v in score["settings"].items())
            yield f"{name}, {TITLES.get(metric, metric)}", settings


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings below others as (dotted name, value as JSON)."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", json.dumps(value, ensure_ascii=False)


def _loading(final: Path, made: Mapping[str, Any]) -> Iterator[Part]:
    if (final / PROMPT_FILE).exists():
        yield Lines(("No adapter: final/prompt.json has what is put before a question.",))
    if "backbone" not in made or not (final / "adapter_config.json").exists():
        return
    base, loader = repr(made["backbone"]), model_loader(read_json(final / "adapter_config.json"))
    yield Code(
        "from peft import PeftModel\n"
        f"from transformers import {loader}, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base})\n"
        f"model = {loader}.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(model, "final")  # in the folder of this report'
    )
