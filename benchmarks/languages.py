"""Sweeps of many languages: what each run shipped and gained, kept as small files, and tables.

    grasp-lora sweep configs/languages/sweep.yaml --out runs/languages --jobs 2 --threads 1
    python -m benchmarks.languages keep runs/languages --collection languages
    python -m benchmarks.languages tables
    python -m benchmarks.languages scores

`keep` copies what `tables` needs of each finished run (`recipe: auto`) of a sweep's folder into
docs/results/records/languages.parquet; what is kept is not kept again. It reads the examples
again, to count the tokens a word, so it is started where the sweep was.
"""

import argparse
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import recipes, recorded, records
from benchmarks.recipes import SHIPPED
from grasp_lora.base.files import check_run, jsonable, read_config, read_json, read_jsonl
from grasp_lora.config.run_config import RunConfig
from grasp_lora.metrics.scoring import Options, compare_means
from grasp_lora.models.backbones import load_tokenizer
from grasp_lora.plans.cell import RUN_FOLDER
from grasp_lora.report.run import TITLES
from grasp_lora.workbench.context import model_spec, part_encoding, part_rows
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import load_run_data

TABLE = records.FOLDER / "languages.parquet"
LANGUAGES, LIMITS = "languages", "limits"
COLLECTIONS = (LANGUAGES, LIMITS)
_TEST = "test"
_NONE = "\N{EN DASH}"
_COLUMNS = {
    "zero-shot": "bare model",
    "few-shot": "prompt",
    "source adapter": "source",
    "target adapter": "target",
    "average of the adapters": "average",
}
"""The name of a system that needs no training, up to its first comma -> its column's title."""


def keep(folder: Path, table: Path, collection: str) -> int:
    """Add the finished runs of a sweep's folder that are not in a table; return how many."""
    known, new = records.jobs(table, collection), 0
    for out in sorted(folder.glob(f"*/{RUN_FOLDER}")):
        job = out.parent.name
        if job not in known and check_run(out):
            record = {job: [jsonable(record_of(out, job))]}
            new += records.append(table, record, collection, skip_known=True)
    return new


def record_of(out: Path, job: str) -> dict[str, Any]:
    """Return what is kept of a run's folder.

    Args:
        out: the folder of a run of `recipe: auto`.
        job: the name of its cell: language, configuration and seed.
    """
    config = RunConfig.model_validate(read_config(out))
    told = recipes.of_choice(out)
    scored = recipes.systems_of(out, told["recipe"])
    rows = {name: recipes.losses_of(place) for name, place in scored.items()}
    labels = read_json(out / "data.json")["target"]["splits"]
    value, unit = fertility(config)
    return {
        "cell": job,
        "language": config.data.target.language,
        "script": script(texts_of(scored[SHIPPED])),
        "task": config.data.task,
        "model": config.model.name,
        "labels": sum(len(labels.get(name, ())) for name in ("train", "dev", "micro_dev")),
        "systems": [
            {
                "name": name,
                "scores": recipes.values_of(place),
                "losses": rows[name]["values"]["loss"],
            }
            for name, place in scored.items()
        ],
        "groups": rows[SHIPPED]["groups"],
        "fertility": value,
        "unit": unit,
    } | told


def texts_of(place: Path) -> Iterable[str]:
    """Yield the answers that an evaluation compared with."""
    return (text for row in read_jsonl(place / "predictions.jsonl") for text in row["references"])


def script(texts: Iterable[str]) -> str:
    """Return the script that most letters are of, as Unicode names it (CJK, Latin, Thai, ...).

    Raises:
        ValueError: there is no letter.
    """
    letters = Counter(
        unicodedata.name(letter, "?").partition(" ")[0]
        for text in texts
        for letter in text
        if letter.isalpha()
    )
    if not letters:
        raise ValueError("the texts have no letter that a script could be told by")
    (name, _), *_ = letters.most_common(1)
    return name if name == "CJK" else name.capitalize()


def fertility(config: RunConfig) -> tuple[float, str]:
    """Return the tokens per unit of the target's test contexts, and the unit: word or character."""
    say = Reporter(quiet=True).say
    data = load_run_data(config, say)
    tokenizer, *_, start = load_tokenizer(model_spec(config), say)
    encoding = part_encoding(config, tokenizer, "target", _TEST, None, start)
    for _ in part_rows(config, data, encoding, "target", _TEST):
        pass
    value, unit, _ = encoding.fertility()
    return value or 0.0, unit


def gain(record: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Return how much lower the test loss of what is shipped is, with its 95 % interval.

    It is held against the system that needs no training and has the lowest loss on the held
    examples. None where a run measured no such system on the test examples. Whole contexts are
    drawn.
    """
    losses = {one["name"]: one["losses"] for one in record["systems"]}
    name = (record["recipe"]["simple"] or {}).get("name")
    if name not in losses:
        return None
    options = Options(task=record["task"], language=record["language"])
    return compare_means(losses[name], losses[SHIPPED], record["groups"], options)


def tables(table: Path) -> list[str]:
    """Return lines in Markdown: two tables for each collection that has runs.

    The first has losses on the test rows, in nats, and the gain of what is shipped over the best
    system that needs no training. The second says what is shipped and what was expected of it.
    """
    lines: list[str] = []
    for collection in COLLECTIONS:
        found = list(records.read_runs(table, collection).values())
        if found:
            losses = ["run", "script", "tokens", "labels", *_COLUMNS.values(), SHIPPED, "gain"]
            told = ["run", SHIPPED, "gain expected", "score, before", "after", "minutes"]
            lines += [f"### {collection.capitalize()}", ""]
            lines += _markdown(losses, [_losses(one) for one in found], 2)
            lines += _markdown(told, [_told(one) for one in found], 2)
    return lines


def scores(table: Path) -> list[str]:
    """Return lines in Markdown: the score of every system on the test rows, and a line on all runs.

    That line has the mean gain, in nats; how many gains are above 0 beyond their interval; how many
    the intervals that were printed beforehand hold; and how wide these are on average.
    """
    lines: list[str] = []
    for collection in COLLECTIONS:
        found = list(records.read_runs(table, collection).values())
        if found:
            titles = ["run", "score", *_COLUMNS.values(), SHIPPED]
            lines += [f"### {collection.capitalize()}", ""]
            lines += [*_markdown(titles, [_scores(one) for one in found], 2), _all(found), ""]
    return lines


def _scores(record: Mapping[str, Any]) -> list[str]:
    metric = recorded.SCORE[record["task"]]
    systems = record["systems"]
    values = {one["name"].partition(",")[0]: one["scores"][metric] for one in systems}
    columns = (*_COLUMNS, SHIPPED)
    shown = (f"{values[name]:.1f}" if name in values else _NONE for name in columns)
    return [_name(record), TITLES.get(metric, metric), *shown]


def _all(found: Sequence[Mapping[str, Any]]) -> str:
    told = [(one["recipe"]["gain"], gain(one)) for one in found]
    gains = [gained for _, gained in told if gained is not None]
    mean = f"{fmean(one['difference'] or 0.0 for one in gains):+.3f}" if gains else _NONE
    above = sum((one["low"] or 0.0) > 0 for one in gains)
    known = [(a["interval"], b["difference"]) for a, b in told if a is not None and b is not None]
    held = sum(low <= value <= high for (low, high), value in known)
    width = f"{fmean(high - low for (low, high), _ in known):.2f}" if known else _NONE
    return (
        f"Mean gain {mean}; above 0 beyond its interval in {above} of {len(gains)}; held by the "
        f"expected interval in {held} of {len(known)}, which is {width} wide on average."
    )


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Return a table; the first `words` columns are words, the others numbers."""
    aligned = f"|{'---|' * words}{'---:|' * (len(titles) - words)}"
    head, *body = (f"| {' | '.join(row)} |" for row in (titles, *rows))
    return [head, aligned, *body, ""]


def _name(record: Mapping[str, Any]) -> str:
    return f"`{record['cell'].rpartition('-s')[0].removesuffix('-auto')}`"


def _losses(record: Mapping[str, Any]) -> list[str]:
    # Runs differ in how many solved examples their prompt has; all are in one column.
    means = {one["name"].partition(",")[0]: fmean(one["losses"]) for one in record["systems"]}
    columns = (*_COLUMNS, SHIPPED)
    shown = (f"{means[name]:.3f}" if name in means else _NONE for name in columns)
    tokens = f"{record['fertility']:.1f} a {record['unit']}"
    about = (_name(record), record["script"], tokens, str(record["labels"]))
    return [*about, *shown, _interval(gain(record), "difference")]


def _told(record: Mapping[str, Any]) -> list[str]:
    metric = recorded.SCORE[record["task"]]
    scores = {one["name"]: one["scores"][metric] for one in record["systems"]}
    simple = (record["recipe"]["simple"] or {}).get("name")
    before, after = (
        f"{scores[name]:.1f}" if name in scores else _NONE for name in (simple, SHIPPED)
    )
    return [
        _name(record),
        f"{record['recipe']['ships']}; before: {simple or 'nothing'}",
        _interval(record["recipe"]["gain"], "gain"),
        f"{TITLES.get(metric, metric)} {before}",
        after,
        f"{record['seconds'] / 60:.0f}",
    ]


def _interval(found: Mapping[str, Any] | None, name: str) -> str:
    if found is None:
        return _NONE
    low, high = found["interval"] if "interval" in found else (found["low"], found["high"])
    shown = f"{found[name]:+.3f}"
    return shown if low is None else f"{shown} [{low:+.3f}, {high:+.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="what", required=True)
    keeping = commands.add_parser("keep", help="copy the finished runs of a sweep")
    keeping.add_argument("folder", type=Path, help="that `grasp-lora sweep` wrote")
    keeping.add_argument("--collection", choices=COLLECTIONS, default=LANGUAGES)
    showing = commands.add_parser("tables", help="print what is kept")
    scoring = commands.add_parser(
        "scores", help="print every system's score, and all runs in a line"
    )
    for one in (keeping, showing, scoring):
        one.add_argument("--records", type=Path, default=TABLE, help="the table")
    options = parser.parse_args(argv)
    if options.what == "keep":
        print(f"{keep(options.folder, options.records, options.collection)} runs kept")
    else:
        shown = tables if options.what == "tables" else scores
        print("\n".join(shown(options.records)))


if __name__ == "__main__":
    main()
