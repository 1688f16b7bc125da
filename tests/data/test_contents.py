import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from grasp_lora.data.forms import open_records

ROWS = [{"id": str(n), "article": "Fluß, نهر\nzwei", "summary": 'Ein "x"'} for n in range(50)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = "id,summary\n1,red\n2,\n".encode("utf-8-sig")


def values(path: Path) -> list[dict]:
    return [dict(record.values) for record in open_records(path).records]


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_gives_the_rows_of_the_file_in_it(tmp_path: Path, suffix: str) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    contents = {
        "jsonl": LINES,
        "json": json.dumps(ROWS).encode(),
        "csv": TABLE,
        "parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    for form, data in contents.items():
        path = tmp_path / f"a.{form}{suffix}"
        path.write_bytes(PACK[suffix](data))
        opened = open_records(path)
        assert opened.form == form
        expected = ROWS if form != "csv" else [{"id": "1", "summary": "red"},
                                               {"id": "2", "summary": ""}]  # fmt: skip
        assert [dict(record.values) for record in opened.records] == expected
        assert values(path.rename(tmp_path / f"B.{form.upper()}{suffix.upper()}")) == expected


def test_several_packed_parts_after_each_other_are_one_file(tmp_path: Path) -> None:
    half = len(ROWS) // 2
    parts = ["".join(json.dumps(row) + "\n" for row in part).encode()
             for part in (ROWS[:half], ROWS[half:])]  # fmt: skip
    for suffix, pack in PACK.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(map(pack, parts)))
        assert values(path) == ROWS, suffix


def test_the_content_says_whether_a_file_is_packed(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.csv.gz", tmp_path / "b.jsonl"
    plain.write_bytes(TABLE)
    packed.write_bytes(gzip.compress(LINES))
    assert values(plain)[0] == {"id": "1", "summary": "red"}
    assert values(packed) == ROWS


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](LINES)[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+ is a damaged \w+ file \(.+\); fetch or"):
        values(path)
