"""Read records from JSON lines, JSON, SQuAD JSON, CSV, TSV and Parquet files, packed or not."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from grasp_lora.base.words import shortened, shown
from grasp_lora.data.contents import PACKED_SUFFIXES, bytes_of, data_suffix, text_of

DELIMITED: Mapping[str, str] = MappingProxyType({".csv": ",", ".tsv": "\t"})
"""File name suffix -> separator of values."""
SUFFIXES = (
    f".jsonl, .ndjson, .json, .csv, .tsv, .parquet, also packed: {', '.join(PACKED_SUFFIXES)}"
)
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"dev": ("dev", "validation", "valid", "val")}
)
"""Split -> the names that it has in files, if there are others than its own."""
_SHOWN = 8
"""Number of names that a message lists."""
_BATCH = 4096
"""Rows of a Parquet file that are read at once."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file, unchanged."""

    where: str
    """Its place, for messages: the file with a line number or an index."""
    values: Mapping[str, Any]
    """Column name -> value."""


class Opened(NamedTuple):
    """An open file."""

    form: str
    """One of "csv", "tsv", "parquet", "squad", "json" and "jsonl"."""
    records: Iterator[Record]
    """The rows in their order. A ValueError is raised at a row that is not valid."""
    split: str = ""
    """Name of the split that is read, if the file holds splits."""


def read_records(path: str | Path) -> Iterator[Record]:
    """Return the rows of a file in their order; see `open_records`."""
    return open_records(path).records


def open_records(path: str | Path, split: str | None = None) -> Opened:
    """Open a file of rows.

    CSV, TSV and Parquet files are recognised by their suffix. Other files must be JSON. Their
    content decides between SQuAD (`data` -> `paragraphs` -> `qas`, one record per question), a list
    of objects (possibly below a key `data`), an object of splits (name -> list of objects), an
    object of columns (name -> list of values, or pandas' name -> row number -> value), and one
    object per line. Each may be compressed with gzip, bzip2, xz or zstd.

    Args:
        path: a file in UTF-8, with or without a byte order mark; CSV and TSV with a header row.
        split: the split to read where a file holds several; see `SPLIT_NAMES`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, not UTF-8 or in an unknown format, or it holds
            splits and not the one to read.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {found}; give the path of a data file ({SUFFIXES})")
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return Opened("parquet", _parquet_records(path))
    text = text_of(path)
    if suffix in DELIMITED:
        return Opened(suffix[1:], _delimited_records(path, text, DELIMITED[suffix]))
    if text.lstrip()[0] not in "{[":
        raise ValueError(
            f"{path} begins with {text.strip()[:20]!r}, which is not JSON; give a file of JSON "
            f"objects, or let the name end in its format ({SUFFIXES})"
        )
    return _json_records(path, text, split)


def given_records(rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Yield records from mappings, such as the rows of a `datasets.Dataset`.

    Raises:
        ValueError: `rows` is a single mapping (of splits or columns), or a row is not a mapping.
    """
    if isinstance(rows, Mapping):
        keys = ", ".join(map(str, list(rows)[:8]))
        raise ValueError(
            f"rows must be a list of mappings, got one mapping of {keys}; give one of them"
        )
    for index, row in enumerate(rows):
        yield _record(f"rows[{index}]", row, "a mapping of columns to values")


def _record(where: str, row: Any, needed: str = "a JSON object") -> Record:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {needed} is needed, got {type(row).__name__}")
    return Record(where, cast(Mapping[str, Any], row))


def _json_records(path: Path, text: str, split: str | None) -> Opened:
    try:
        document = _loaded(text, str(path))
    except json.JSONDecodeError as error:
        if not _has_json_line(text):
            raise ValueError(
                f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); "
                "write one JSON object a line, or one list of objects"
            ) from None
        return Opened("jsonl", _line_records(path, text))
    if isinstance(document, list):
        return Opened("json", _list_records(str(path), cast(list[Any], document)))
    if "data" not in document:
        return _object_records(path, document, split)
    articles = _list_at(document, "data", str(path))
    if any(isinstance(entry, Mapping) and "paragraphs" in entry for entry in articles):
        return Opened("squad", _squad_records(path, articles))
    return Opened("json", _list_records(f"{path}: data", articles))


class _KeyTwice(Exception):
    """An object of a JSON text has a key twice; Python would silently keep the last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(name for name in names if names.count(name) > 1))
    return found


def _loaded(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        JSONDecodeError: the text is not JSON.
        ValueError: it is, but cannot be read: a key stands twice in one object, the values are
            nested too deeply, or a number has too many digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except _KeyTwice as error:
        raise ValueError(
            f"{where}: the key {shown(error.args[0])} is given twice in one object; keep one"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{where}: lists and objects are nested too deeply to be read; write plain rows"
        ) from None
    except ValueError:  # of Python's limit on the digits of a number
        raise ValueError(f"{where}: a number has thousands of digits; write it as a text") from None


def _object_records(path: Path, document: Mapping[str, Any], split: str | None) -> Opened:
    """Return the rows of one JSON object: of splits, of columns, or itself a row."""
    values = list(document.values())
    if values and all(isinstance(value, list) for value in values):
        if all(isinstance(row, Mapping) for rows in values for row in rows):
            name = _split_of(path, list(document), split)
            return Opened("json", _list_records(f"{path}: {name}", document[name]), name)
        return Opened("json", _column_records(path, document))
    if values and all(isinstance(value, Mapping) for value in values):
        numbers = [tuple(value) for value in values]
        if not all(found == numbers[0] for found in numbers) or not "".join(numbers[0]).isdigit():
            raise ValueError(
                f"{path} is one object of objects ({_first(document)}), which is no list of rows; "
                "write one JSON object a line, or one list of objects"
            )
        columns = {name: list(value.values()) for name, value in document.items()}
        return Opened("json", _column_records(path, columns))
    return Opened("jsonl", iter([_record(f"{path}:1", document)]))


def _split_of(path: Path, names: list[str], split: str | None) -> str:
    """Return the name, among a file's splits, of the one to read."""
    wanted = SPLIT_NAMES.get(split, (split,)) if split is not None else ()
    found = names if len(names) == 1 else [name for name in wanted if name in names]
    if found:
        return found[0]
    lack = "no part is named to read" if split is None else f"none of them is named {split!r}"
    raise ValueError(
        f"{path} holds the splits {_first(names)}, and {lack}; name the file for each part, such "
        "as files: {train: FILE, test: FILE}, where a part reads the split of its name, or save "
        "the rows of one split as a file of their own"
    )


def _column_records(path: Path, columns: Mapping[str, list[Any]]) -> Iterator[Record]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in list(lengths.items())[:_SHOWN])
        raise ValueError(
            f"{path} is a JSON of columns of different lengths ({told}); give each row a value in "
            "each column"
        )
    rows = zip(*columns.values(), strict=True)
    return (
        Record(f"{path}[{index}]", dict(zip(columns, row, strict=True)))
        for index, row in enumerate(rows)
    )


def _first(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _has_json_line(text: str) -> bool:
    """Return whether the first line that is not blank is a complete JSON object."""
    first = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    try:
        return isinstance(_loaded(first, ""), dict)
    except json.JSONDecodeError:
        return False


def _list_records(where: str, rows: list[Any]) -> Iterator[Record]:
    for index, row in enumerate(rows):
        yield _record(f"{where}[{index}]", row)


def _line_records(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = _loaded(line, where)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg}); write one JSON object a line"
            ) from None
        yield _record(where, values)


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text, one at a time, as a list of them would hold the text again."""
    start = 0
    # JSON texts may contain U+2028 and similar characters, at which splitlines() would split.
    for end in re.finditer(r"\r\n|\n|\r", text):
        yield text[start : end.start()]
        start = end.end()
    yield text[start:]


def _squad_records(path: Path, articles: list[Any]) -> Iterator[Record]:
    for a, article in enumerate(articles):
        at = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_list_at(article, "paragraphs", at)):
            place = f"{at}.paragraphs[{p}]"
            for q, question in enumerate(_list_at(paragraph, "qas", place)):
                record = _record(f"{place}.qas[{q}]", question)
                context = {"context": paragraph["context"]} if "context" in paragraph else {}
                yield Record(record.where, {**record.values, **context})


def _list_at(parent: Any, key: str, where: str) -> list[Any]:
    value = parent.get(key) if isinstance(parent, Mapping) else None
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key!r} must be a list, as in SQuAD")
    return cast(list[Any], value)


def _delimited_records(path: Path, text: str, delimiter: str) -> Iterator[Record]:
    """Yield the rows of a table.

    Spreadsheets leave columns behind that have no name and no value: these are not read. Nor is
    the first column if it has no name, in which pandas writes the row numbers.
    """
    lines = _numbered_cells(path, text, delimiter)
    header = [name.strip() for name in lines[0][1]]
    if len(header) == 1 and any(other in header[0] for other in ",;|\t"):
        raise ValueError(
            f"{path}: the header is one column, {shown(header[0])}; .csv needs commas and .tsv tabs"
        )
    named = [name for name in header if name]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: the header names {shown(twice)} twice; column names are unique")
    for number, cells in lines[1:]:
        where = f"{path}:{number}"
        _check_cells(where, header, cells, delimiter)
        pairs = zip(header, cells, strict=False)
        yield Record(where, {name: cell for name, cell in pairs if name})


def _check_cells(where: str, header: list[str], cells: list[str], delimiter: str) -> None:
    least = max((at + 1 for at, name in enumerate(header) if name), default=0)
    beyond = any(cell.strip() for cell in cells[len(header) :])
    if len(cells) < least or beyond:
        raise ValueError(
            f"{where}: {len(cells)} values for {len(header)} columns; put texts that "
            f"hold {delimiter!r}, a quote or a line break in double quotes"
        )
    for at, (name, cell) in enumerate(zip(header, cells, strict=False)):
        if at and not name and cell.strip():
            raise ValueError(
                f"{where}: {shown(cell)} is in column {at + 1}, which has no name in the header; "
                "name the column, or remove it"
            )


def _numbered_cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return (number of its first line, cells) of each row that is not blank."""
    # Without strict, a stray quote would silently swallow all rows up to the next quote.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    # The limit on the length of a field applies to the whole process, so restore it.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{start}: broken quotes ({error}); put the whole text in double quotes and "
            "double those inside it"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet_records(path: Path) -> Iterator[Record]:
    packed = path.suffix.lower() in PACKED_SUFFIXES
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet needs pyarrow; run `pip install pyarrow`") from None
    with _readable_parquet(path):
        # Checksums show pages that are damaged and still can be read.
        source = io.BytesIO(bytes_of(path)) if packed else path
        file = parquet.ParquetFile(source, page_checksum_verification=True)
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=_BATCH)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two columns are named {shown(twice)}; column names are unique")
    return _parquet_rows(path, batches)


@contextmanager
def _readable_parquet(path: Path) -> Iterator[None]:
    """Say of whatever pyarrow raises on a damaged file what the file is.

    It has no common class of errors: a damaged file gives any of `OSError`, `ValueError`,
    `TypeError`, `KeyError`, `OverflowError`, `MemoryError` and more.
    """
    try:
        yield
    except Exception as error:
        why = shortened(str(error).split("\n")[0]) or type(error).__name__
        raise ValueError(
            f"{path} is not a Parquet file, or is damaged ({why}); fetch or write it again"
        ) from None


def _parquet_rows(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
    index = 0
    while True:
        with _readable_parquet(path):
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for row in rows:
            yield Record(f"{path}[{index}]", row)
            index += 1
