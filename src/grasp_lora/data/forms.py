"""Read records from JSON lines, JSON, SQuAD v1.1 JSON, CSV, TSV and Parquet files, in UTF-8."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from grasp_lora.base.words import shown

BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec"
OTHER_MARKS: Mapping[bytes, str] = MappingProxyType(
    {
        # UTF-32 first, because its mark begins with that of UTF-16.
        b"\xff\xfe\x00\x00": "UTF-32",
        b"\x00\x00\xfe\xff": "UTF-32",
        b"\xff\xfe": "UTF-16",
        b"\xfe\xff": "UTF-16",
    }
)
DELIMITED: Mapping[str, str] = MappingProxyType({".csv": ",", ".tsv": "\t"})
"""File name suffix -> separator of values."""
SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"


@dataclass(frozen=True)
class Record:
    """One row of a file, unchanged."""

    where: str
    """Its place, for messages: the file with a line number or an index."""
    values: Mapping[str, Any]
    """Column name -> value."""


def read_records(path: str | Path) -> Iterator[Record]:
    """Return the rows of a file in their order; see `open_records`."""
    return open_records(path)[1]


def open_records(path: str | Path) -> tuple[str, Iterator[Record]]:
    """Return the format of a file and its rows in their order.

    CSV, TSV and Parquet files are recognised by their suffix. Other files must be JSON. Their
    content decides between SQuAD v1.1 (`data` -> `paragraphs` -> `qas`, one record per question), a
    list of objects (possibly below a key `data`), and one object per line.

    Args:
        path: a file in UTF-8, with or without a byte order mark; CSV and TSV with a header row.

    Returns:
        One of "csv", "tsv", "parquet", "squad", "json" and "jsonl", and an iterator of records. The
        iterator raises a ValueError at a row that is not valid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, not UTF-8 or in an unknown format.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {found}; give the path of a data file ({SUFFIXES})")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet", _parquet_records(path)
    text = _text_of(path)
    if suffix in DELIMITED:
        return suffix[1:], _delimited_records(path, text, DELIMITED[suffix])
    if text.lstrip()[0] not in "{[":
        raise ValueError(
            f"{path} begins with {text.strip()[:20]!r}, which is not JSON; give a file of JSON "
            f"objects, or let the name end in its format ({SUFFIXES})"
        )
    return _json_records(path, text)


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


def _text_of(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark."""
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
    advice = "save it as UTF-8, for instance with `iconv -f {} -t UTF-8 OLD > NEW`"
    for mark, name in OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(
                f"{path} is not UTF-8: it begins with the byte order mark of {name}; "
                + advice.format(name)
            )
    if (zero := data.find(0)) >= 0:
        raise ValueError(
            f"{path} is not a UTF-8 text: it holds the byte 0x00 at offset {zero}, as UTF-16 "
            "and compressed files do; " + advice.format("UTF-16LE") + " or unpack it"
        )
    start = len(BOM) if data.startswith(BOM) else 0
    try:
        text = data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = data.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} (line {line}); "
            + advice.format("WINDOWS-1252")
            + " (with the file's own encoding after -f)"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it needs at least one row")
    return text


def _json_records(path: Path, text: str) -> tuple[str, Iterator[Record]]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if not _has_json_line(text):
            raise ValueError(
                f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); "
                "write one JSON object a line, or one list of objects"
            ) from None
        return "jsonl", _line_records(path, text)
    if isinstance(document, list):
        return "json", _list_records(str(path), cast(list[Any], document))
    if "data" not in document:
        return "jsonl", iter([_record(f"{path}:1", document)])
    articles = _list_at(document, "data", str(path))
    if any(isinstance(entry, Mapping) and "paragraphs" in entry for entry in articles):
        return "squad", _squad_records(path, articles)
    return "json", _list_records(f"{path}: data", articles)


def _has_json_line(text: str) -> bool:
    """Return whether the first line that is not blank is a complete JSON object."""
    first = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _list_records(where: str, rows: list[Any]) -> Iterator[Record]:
    for index, row in enumerate(rows):
        yield _record(f"{where}[{index}]", row)


def _line_records(path: Path, text: str) -> Iterator[Record]:
    # JSON texts may contain U+2028 and similar characters, at which splitlines() would split.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg}); write one JSON object a line"
            ) from None
        yield _record(where, values)


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
        raise ValueError(f"{where}: {key!r} must be a list, as in SQuAD v1.1")
    return cast(list[Any], value)


def _delimited_records(path: Path, text: str, delimiter: str) -> Iterator[Record]:
    lines = _numbered_cells(path, text, delimiter)
    header = [name.strip() for name in lines[0][1]]
    if len(header) == 1 and any(other in header[0] for other in ",;|\t"):
        raise ValueError(
            f"{path}: the header is one column, {shown(header[0])}; .csv needs commas and .tsv tabs"
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(
            f"{path}: the header names {shown(twice[0])} twice; column names are unique"
        )
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}:{number}: {len(cells)} values for {len(header)} columns; put texts that "
                f"hold {delimiter!r}, a quote or a line break in double quotes"
            )
        yield Record(f"{path}:{number}", dict(zip(header, cells, strict=True)))


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
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet needs pyarrow; run `pip install pyarrow`") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); write it again") from None
    return _parquet_rows(path, file.iter_batches())


def _parquet_rows(path: Path, batches: Iterable[Any]) -> Iterator[Record]:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield Record(f"{path}[{index}]", row)
            index += 1
