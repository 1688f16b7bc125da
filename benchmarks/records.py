"""Recorded results as tables: a Parquet file a pair, a row a run, every number as it was measured.

    python -m benchmarks.records show docs/results/records/en-ar.parquet --method grasp-restart
    python -m benchmarks.records add docs/results/records/rounds/en-ar.parquet grasp-s42.jsonl ...

A record is what JSON can hold. Its nested keys become columns, joined by dots: `scores.test.loss`
is a number, `rows.test.values.loss` a list with the loss of every test row. Four columns stand
before them: `collection` says what a run was made for, `job` names it, `method` and `seed` are the
two parts of that name. `keys` lists the columns that a record has, in its order, so that a value
that is missing is told from one that is null.

A column that no single type can hold is JSON text. `show` prints the main columns; `add` puts the
records of files into a table, each file as the job that the file is named after.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import common
from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.base.owner import held

Record = dict[str, Any]
Records = Mapping[str, Sequence[Record]]
"""The records of each job: one of a run, one a round of a search."""

FOLDER = common.ROOT / "docs" / "results" / "records"
RUNS = "runs"
"""The collection of the main comparison."""

_FIRST = ("collection", "job", "method", "seed", "keys")
_FORMS_KEY = "forms"
_SMALL = {  # a table is written seldom and cloned often
    "compression": "zstd",
    "compression_level": 22,
    "use_dictionary": False,
    "write_statistics": False,
    "store_schema": False,
}
_SCORES = "scores.test."
_SHOWN = ("ratio", "zeros", "best.step", "best.loss", "verdict", "round", "mask_ratio", "seconds")


class _Form(NamedTuple):
    """How the values of a column are stored: to what Arrow holds, and back."""

    store: Callable[[Any], Any]
    restore: Callable[[Any], Any]


_FORMS = {
    "plain": _Form(lambda value: value, lambda value: value),
    "points": _Form(
        lambda points: [{"step": step, "loss": loss} for step, loss in points],
        lambda points: [[one["step"], one["loss"]] for one in points],
    ),
    "json": _Form(lambda value: json.dumps(value, ensure_ascii=False), json.loads),
}


def read(table: Path, collection: str = RUNS) -> dict[str, list[Record]]:
    """Return the records of each job of a collection; none where there is no such table."""
    return _content(table).get(collection, {}) if table.exists() else {}


def read_runs(table: Path, collection: str = RUNS) -> dict[str, Record]:
    """Return the record of each job of a collection that has one record a job."""
    return {job: record for job, (record,) in read(table, collection).items()}


def write(table: Path, records: Records, collection: str = RUNS) -> None:
    """Replace a collection of a table by these records; the others stay."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with _alone(table.parent):
        content = _content(table) if table.exists() else {}
        _replace(table, content | {collection: {job: list(ones) for job, ones in records.items()}})


def append(table: Path, records: Records, collection: str = RUNS, skip_known: bool = False) -> int:
    """Add jobs to a collection of a table; return how many are new.

    The file holds the old or the new table at any time.

    Args:
        table: the file; it is made if there is none.
        records: of each job.
        collection: that they belong to.
        skip_known: leave out a job that the collection has already.

    Raises:
        ValueError: the collection has one of the jobs, and none is to be left out; nothing is
            written.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    with _alone(table.parent):
        content = _content(table) if table.exists() else {}
        known = content.setdefault(collection, {})
        twice = sorted(known.keys() & records.keys())
        if twice and not skip_known:
            raise ValueError(f"{table}: {collection} has {', '.join(twice)} already")
        new = {job: list(ones) for job, ones in records.items() if job not in known}
        if new:
            _replace(table, content | {collection: known | new})
    return len(new)


def jobs(table: Path, collection: str = RUNS) -> set[str]:
    """Return the jobs that a collection has; none where there is no table."""
    if not table.exists():
        return set()
    names = pq.read_table(table, columns=["collection", "job"]).to_pylist()
    return {one["job"] for one in names if one["collection"] == collection}


def tables_with(folder: Path, collection: str) -> list[Path]:
    """Return the tables of a folder that hold a collection, by the names of their pairs.

    Raises:
        ValueError: none does.
    """
    held = {table: collections(table) for table in sorted(folder.glob("*.parquet"))}
    found = [table for table, names in held.items() if collection in names]
    if not found:
        known = ", ".join(sorted(set().union(*held.values()))) or "none"
        raise ValueError(f"no table of {folder} holds '{collection}'; there are: {known}")
    return found


def beside(table: Path, kind: str) -> Path:
    """Return the place of another table of the same pair, such as its "rounds" or "probes"."""
    return table.parent / kind / table.name


def collections(table: Path) -> set[str]:
    """Return the collections of a table."""
    return set(pq.read_table(table, columns=["collection"]).column("collection").to_pylist())


def _content(table: Path) -> dict[str, dict[str, list[Record]]]:
    """Return collection -> job -> records."""
    stored = pq.read_table(table)
    forms = json.loads(pq.read_metadata(table).metadata[_FORMS_KEY.encode()])
    columns = {name: stored.column(name).to_pylist() for name in stored.column_names}
    for name, form in forms.items():
        back = _FORMS[form].restore
        columns[name] = [None if value is None else back(value) for value in columns[name]]
    content: dict[str, dict[str, list[Record]]] = {}
    for i, keys in enumerate(columns["keys"]):
        record = _nested({key: columns[key][i] for key in keys})
        jobs = content.setdefault(columns["collection"][i], {})
        jobs.setdefault(columns["job"][i], []).append(record)
    return content


def _replace(table: Path, content: Mapping[str, Records]) -> None:
    """Write the table whole: to a file beside it first, which then takes its name."""
    rows = [
        _row(collection, job, record)
        for collection, jobs in sorted(content.items())
        for job, records in sorted(jobs.items())
        for record in records
    ]
    names = dict.fromkeys([*_FIRST, *(name for row in rows for name in row)])
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    forms = {name: form for name, (_, form) in columns.items() if form != "plain"}
    made = pa.table({name: array for name, (array, _) in columns.items()})
    handle, temporary = tempfile.mkstemp(dir=table.parent, prefix=f".{table.name}.")
    os.close(handle)
    try:
        with pq.ParquetWriter(temporary, made.schema, **_SMALL) as writer:
            writer.write_table(made)
            writer.add_key_value_metadata({_FORMS_KEY: json.dumps(forms)})
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, table)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _row(collection: str, job: str, record: Record) -> Record:
    """Return a record's columns: the first ones, then its own, which go before the first ones."""
    method, _, seed = job.rpartition("-s")
    known = method and seed.isdigit()
    own = _flat(record)
    if own.get("job", job) != job or own.keys() & {"collection", "keys"}:
        raise ValueError(f"{job}: its record has a job, a collection or keys of its own")
    if any("." in key for key in record):
        raise ValueError(f"{job}: a key of its record has a dot")
    names = {"job": job, "method": method if known else job, "seed": int(seed) if known else None}
    return {"collection": collection} | names | {"keys": list(own)} | own


def _flat(record: Mapping[str, Any], before: str = "") -> Record:
    """Return the values of nested keys, joined by dots; what has a dot in its keys stays whole."""
    found: Record = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value and not any("." in inner for inner in value):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = value
    return found


def _nested(values: Mapping[str, Any]) -> Record:
    """Return the record that `_flat` was given."""
    record: Record = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = record
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return record


def _column(values: Sequence[Any]) -> tuple[pa.Array, str]:
    """Return a column in the first form that gives every value back, of the same type."""
    for name, form in _FORMS.items():
        try:
            array = pa.array([None if value is None else form.store(value) for value in values])
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, OverflowError):
            continue
        if name == "plain" and "struct" in str(array.type):
            continue  # keys that only some of the values have would come back as null
        back = [None if one is None else form.restore(one) for one in array.to_pylist()]
        if repr(back) == repr(list(values)):
            return array, name
    raise ValueError(f"no column can hold {values!r:.200}")


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Hold a lock of the folder for the body, so that no other process writes a table there."""
    return held(folder / ".records.lock", folder, print, wait=True)


def shown(
    table: Path, collections: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """Return a table's main columns as lines of Markdown; an empty choice chooses all rows.

    The columns are those of `_SHOWN` and the scores on the test rows, where a row has any.
    """
    rows = [
        _row(collection, job, record)
        for collection, jobs in _content(table).items()
        for job, records in jobs.items()
        for record in records
    ]
    kept = [
        row
        for row in rows
        if not collections or row["collection"] in collections
        if not methods or row["method"] in methods
        if not seeds or row["seed"] in seeds
    ]
    scores = dict.fromkeys(name for row in kept for name in row if name.startswith(_SCORES))
    some = [name for name in (*_SHOWN, *scores) if any(row.get(name) is not None for row in kept)]
    names = ["collection", "job", *some]
    heads = [name.removeprefix(_SCORES) for name in names]
    lines = [[_cell(row.get(name)) for name in names] for row in kept]
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(names), *lines)]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="what", required=True)
    showing = commands.add_parser("show", help="print the main columns of a table")
    showing.add_argument("table", type=Path)
    showing.add_argument("--collection", nargs="+", default=[])
    showing.add_argument("--method", nargs="+", default=[])
    showing.add_argument("--seed", type=int, nargs="+", default=[])
    adding = commands.add_parser("add", help="put the records of files into a table")
    adding.add_argument("table", type=Path)
    adding.add_argument("files", nargs="+", type=Path, help="JSON, or JSONL with a record a line")
    adding.add_argument("--collection", default=RUNS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Show a table or add to it."""
    options = parsed(argv)
    if options.what == "show":
        print("\n".join(shown(options.table, options.collection, options.method, options.seed)))
        return
    files: Sequence[Path] = options.files
    records = {
        file.stem: read_jsonl(file) if file.suffix == ".jsonl" else [read_json(file)]
        for file in files
    }
    append(options.table, records, options.collection)
    print(f"{options.table}: {len(records)} jobs added")


if __name__ == "__main__":
    main()
