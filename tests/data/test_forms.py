import csv
import json
import random
import re
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from grasp_lora.data.forms import given_records, open_records, read_records

ROWS = [
    {"id": "1", "article": "Der Fluss\nist lang.", "summary": 'Ein "Fluss"'},
    {"id": "2", "article": "النهر طويل، جدًا", "summary": "نهر"},
    {"id": "3", "article": "河,很长\u2028。", "summary": ""},
]


def values(path: Path) -> list[dict]:
    return [dict(record.values) for record in read_records(path)]


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files = {
        "jsonl": written(tmp_path / "a.jsonl", lines(ROWS)),
        "json": written(tmp_path / "a.json", json.dumps(ROWS, indent=1)),
        "csv": table(tmp_path / "a.csv", ROWS),
        "tsv": table(tmp_path / "a.tsv", ROWS, delimiter="\t"),
        "parquet": tmp_path / "a.parquet",
    }
    for form, path in files.items():
        assert open_records(path)[0] == form
        assert values(path) == ROWS, form
    assert [dict(record.values) for record in given_records(ROWS)] == ROWS


@pytest.mark.parametrize("name", ["a.ndjson", "a.txt", "a", "a.JSON", "a.jsonl"])
def test_json_is_told_by_its_content_and_not_by_the_name(tmp_path: Path, name: str) -> None:
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}
    contents = {
        "jsonl": [lines(ROWS), lines(ROWS[:1]), json.dumps(ROWS[0], indent=2)],
        "json": [json.dumps(ROWS), json.dumps({"version": 1, "data": ROWS}), "\n [] "],
        "squad": [json.dumps(squad), json.dumps({"version": 1, **squad}, indent=4)],
    }
    for form, texts in contents.items():
        for text in texts:
            assert open_records(written(tmp_path / name, text))[0] == form


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_a_json_of_columns_gives_the_rows_that_pandas_wrote(tmp_path: Path) -> None:
    table = pd.DataFrame(ROWS)
    texts = [
        json.dumps(columns_of(ROWS)),
        json.dumps({"data": ROWS}),
        table.to_json(),
        table.to_json(orient="records"),
        table.to_json(orient="records", lines=True),
    ]
    for text in texts:
        path = written(tmp_path / "a.json", text)
        assert values(path) == ROWS, text
    records = list(read_records(written(path, json.dumps(columns_of(ROWS)))))
    assert [record.where for record in records] == [f"{path}[{n}]" for n in range(3)]


def test_a_column_may_hold_mappings(tmp_path: Path) -> None:
    rows = [{"id": "1", "answers": {"text": ["a"]}}, {"id": "2", "answers": {"text": []}}]
    assert values(written(tmp_path / "a.json", json.dumps(columns_of(rows)))) == rows


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"id": ["1", "2"], "text": ["a"]}, r"columns of different lengths \(id: 2, text: 1\)"),
        ({"q1": {"text": "a"}, "q2": {"text": "b"}}, r"object of objects \('q1', 'q2'\), which"),
        ({str(n): {"text": "a"} for n in range(12)}, r"'7' and 4 more\), which is no list of rows"),
        ({"train": {"text": ["a"]}}, "one object of objects .'train'."),
    ],
)
def test_an_object_that_is_no_list_of_rows_is_refused(
    tmp_path: Path, document: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        values(written(tmp_path / "a.json", json.dumps(document)))


SPLITS = {"train": ROWS[:1], "validation": ROWS[1:2], "test": ROWS[2:]}


@pytest.mark.parametrize(
    ("split", "name"), [("train", "train"), ("dev", "validation"), ("test", "test")]
)
def test_a_json_of_splits_gives_the_split_that_is_named(
    tmp_path: Path, split: str, name: str
) -> None:
    path = written(tmp_path / "a.json", json.dumps(SPLITS))
    opened = open_records(path, split)
    assert (opened.form, opened.split) == ("json", name)
    (record,) = opened.records
    assert (record.where, record.values) == (f"{path}: {name}[0]", SPLITS[name][0])


@pytest.mark.parametrize(
    ("split", "lack"),
    [(None, "no part is named to read"), ("micro_dev", "none of them is named 'micro_dev'")],
)
def test_which_split_to_read_is_never_guessed(tmp_path: Path, split: str | None, lack: str) -> None:
    path = written(tmp_path / "a.json", json.dumps(SPLITS))
    message = rf"a\.json holds the splits 'train', 'validation', 'test', and {lack}; .*train: FILE"
    with pytest.raises(ValueError, match=message):
        open_records(path, split)


def test_the_only_list_of_an_object_is_its_rows_whatever_its_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", json.dumps({"examples": ROWS}))
    for split in (None, "test"):
        opened = open_records(path, split)
        assert opened.split == "examples"
        assert [record.values for record in opened.records] == ROWS


def test_squad_questions_carry_their_context_and_place(tmp_path: Path) -> None:
    questions = [{"id": "1", "question": "p"}, {"id": "2", "question": "q"}]
    paragraphs = [{"context": "a", "qas": []}, {"context": "b", "qas": questions}]
    path = written(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    first, second = read_records(path)
    assert first.values == {"id": "1", "question": "p", "context": "b"}
    assert second.where == f"{path}: data[0].paragraphs[1].qas[1]"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\n \t\n"])
def test_lines_may_end_in_any_way_and_begin_with_a_byte_order_mark(
    tmp_path: Path, end: str
) -> None:
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(ROWS, end).encode())
    assert values(path) == ROWS
    mixed = lines(ROWS[:1], "\r") + lines(ROWS[1:2], "\r\n") + lines(ROWS[2:], "\n")
    assert [record.where for record in read_records(written(path, mixed))] == [
        f"{path}:1", f"{path}:2", f"{path}:3"
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_keep_line_breaks_inside_quotes_and_count_lines_as_an_editor_does(
    tmp_path: Path, end: str
) -> None:
    text = end.join(["\ufeffid, text", '1,"two', 'lines"', "", "2,one", "3,"])
    path = written(tmp_path / "a.csv", text)
    records = list(read_records(path))
    assert [record.values for record in records] == [
        {"id": "1", "text": f"two{end}lines"}, {"id": "2", "text": "one"}, {"id": "3", "text": ""}
    ]  # fmt: skip
    assert [record.where for record in records] == [f"{path}:{n}" for n in (2, 5, 6)]


def test_random_texts_survive_csv_and_tsv(tmp_path: Path) -> None:
    draw = random.Random(0)
    letters = "ab,\t;\"'\n\r\\ éजि水\u200fن"
    rows = [
        {"id": str(i), "text": "".join(draw.choices(letters, k=draw.randint(1, 12)))}
        for i in range(300)
    ]
    assert values(table(tmp_path / "a.csv", rows)) == rows
    assert values(table(tmp_path / "a.tsv", rows, delimiter="\t")) == rows


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffid,text,,,\n1,a,,,\n2,b,, ,\n",
        "id,text\n1,a,,\n2,b\n",
        "id,text,,\n1,a\n2,b,\n",
        "id,,text,\n1,,a,\n2,,b,\n",
        ",id,text\n0,1,a\n1,2,b\n",
    ],
)
def test_columns_without_a_name_and_a_value_are_not_read(tmp_path: Path, text: str) -> None:
    expected = [{"id": "1", "text": "a"}, {"id": "2", "text": "b"}]
    assert values(written(tmp_path / "a.csv", text)) == expected
    assert values(written(tmp_path / "a.tsv", text.replace(",", "\t"))) == expected


@pytest.mark.parametrize("text", ["id,text,,\n1,a,,\n2,b,,see\n", "id,,,text\n1,,,a\n2,,see,b\n"])
def test_a_value_in_a_column_without_a_name_is_refused_at_its_place(
    tmp_path: Path, text: str
) -> None:
    column = 4 if text.startswith("id,text") else 3
    message = rf"a\.csv:3: 'see' is in column {column}, which has no name in the header; name the"
    with pytest.raises(ValueError, match=message):
        values(written(tmp_path / "a.csv", text))


def test_a_field_beyond_the_limit_of_csv_is_read_and_the_limit_put_back(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [{"id": "1", "text": "x" * (limit + 1)}]
    assert values(table(tmp_path / "a.csv", rows)) == rows
    assert csv.field_size_limit() == limit
    with pytest.raises(ValueError, match="broken quotes"):
        values(written(tmp_path / "b.csv", 'a,b\n1,"x' + "x" * limit))
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,text\n1,a\n2,"b" c\n3,d\n', r"a\.csv:3: broken quotes"),
        ('id,text\n1,"a\n2,b\n', r"a\.csv:2: broken quotes"),
        ("id,text\n1,a,b\n", r"a\.csv:2: 3 values for 2 columns"),
        ("id,text\n\n1\n", r"a\.csv:3: 1 values for 2 columns"),
        ("id,text,text\n1,a,b\n", "names 'text' twice"),
        ("id,text,\n1,\n2\n", r"a\.csv:3: 1 values for 3 columns"),
        ("id;text\n1;a\n", r"the header is one column, 'id;text'; \.csv needs commas"),
        ("id\ttext\n1\ta\n", "the header is one column"),
    ],
)
def test_a_broken_table_is_refused_at_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values(written(tmp_path / "a.csv", text))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "begins with the byte order mark of UTF-16"),
        ("utf-32", "begins with the byte order mark of UTF-32"),
        ("utf-16-le", "holds the byte 0x00 at offset 1"),
        ("cp1256", "byte 0x{byte:02x} at offset {offset} .line 2."),
        ("latin-1", "byte 0x{byte:02x} at offset {offset} .line 2."),
    ],
)
def test_another_encoding_is_named_by_its_first_foreign_byte(
    tmp_path: Path, suffix: str, encoding: str, message: str
) -> None:
    text = '{"id":\n"' + ("نهر" if encoding == "cp1256" else "café") + '"}'
    data = text.encode(encoding)
    offset = next(i for i, byte in enumerate(data) if byte > 127 or encoding.startswith("utf"))
    with pytest.raises(ValueError, match=message.format(byte=data[offset], offset=offset)) as info:
        values(written(tmp_path / f"a{suffix}", data))
    assert "save it as UTF-8" in str(info.value)
    assert "\n" not in str(info.value)


def test_the_offset_of_a_foreign_byte_counts_the_byte_order_mark(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"byte 0xe9 at offset 5 \(line 1\)"):
        values(written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"\xe9'))


@pytest.mark.parametrize("text", ["", " \n", "\ufeff", "\ufeff\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ValueError, match="is empty; it needs at least one row"):
        values(written(tmp_path / name, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(ROWS[:1]) + "\n{broken", r"a\.json:3: not JSON .*one JSON object a line"),
        (lines(ROWS[:1]) + "[1]", r"a\.json:2: a JSON object is needed, got list"),
        ('{"data": [\n{"paragraphs": [],}]}', r"a\.json:2: not JSON"),
        ('[{"id": "1"},\n]', r"a\.json:2: not JSON .*one list of objects"),
        ("[1]", r"a\.json\[0\]: a JSON object is needed, got int"),
        ('{"data": 3}', "'data' must be a list"),
        ('{"data": [{"paragraphs": []}, 3]}', r"data\[1\]: 'paragraphs' must be a list"),
        ('{"data": [{"paragraphs": [{}]}]}', r"data\[0\].paragraphs\[0\]: 'qas'"),
        ('{"data": [{"paragraphs": [{"qas": ["x"]}]}]}', r"qas\[0\]: a JSON object is needed"),
        ("id,text\n1,a", r"begins with 'id,text.*which is not JSON.*\.tsv"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_broken_json_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values(written(tmp_path / "a.json", text))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        values(written(tmp_path / "a.parquet", lines(ROWS)))


def test_parquet_without_pyarrow_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        values(written(tmp_path / "a.parquet", b""))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist; give the path"):
        read_records(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": [], "test": []}, "got one mapping of train, test; give one of them"),
        (["a"], r"rows\[0\]: a mapping of columns to values is needed, got str"),
    ],
)
def test_rows_that_are_no_mappings_are_refused(rows: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(given_records(rows))  # type: ignore[arg-type]


def qa_table(rows: int = 300) -> pa.Table:
    return pa.table(
        {
            "id": [f"q{n}" for n in range(rows)],
            "context": [f"House {n} has {n + 2} rooms. " * 5 for n in range(rows)],
            "question": [f"How many rooms has house {n}?" for n in range(rows)],
            "answers": [[f"{n + 2} rooms"] for n in range(rows)],
        }
    )


def test_a_damaged_parquet_file_is_told_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    parquet.write_table(qa_table(), whole, row_group_size=50, write_page_checksum=True)
    content = whole.read_bytes()
    draw = random.Random(3)
    told: list[str] = []
    for number in range(120):
        data = bytearray(content)
        kind = number % 4
        if kind == 0:
            data = data[: draw.randrange(len(data))]
        elif kind == 1:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 2:
            place = len(data) - draw.randrange(8, 2000)
            data[place : place + 8] = draw.randbytes(8)
        else:
            place = draw.randrange(len(data))
            data[place : place + draw.randrange(1, 300)] = b""
        path = tmp_path / "damaged.parquet"
        path.write_bytes(data)
        try:
            list(read_records(path))
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 80
    said = f"{tmp_path / 'damaged.parquet'} is not a Parquet file, or is damaged ("
    assert [text for text in told if not text.startswith(said) or "\n" in text] == []


def test_columns_of_one_name_in_a_parquet_file_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["id", "id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: two columns are named 'id'"):
        list(read_records(tmp_path / "a.parquet"))


DEEP = '{"id": "1", "context": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "x.jsonl: lists and objects are nested too deeply"),
        ('{"id": "1"}\n' + DEEP, "x.jsonl:2: lists and objects are nested too deeply"),
        ('[{"id": 1, "id": 2}]', "x.jsonl: the key 'id' is given twice in one object; keep one"),
        ('{"a": 1}\n{"id": 1, "id": 2}', "x.jsonl:2: the key 'id' is given twice"),
        ('{"id": ' + "1" * 5000 + "}", "x.jsonl: a number has thousands of digits; write it as"),
        ('{"a": 1}\n{"id": ' + "1" * 5000 + "}", "x.jsonl:2: a number has thousands of digits"),
    ],
)
def test_json_that_python_cannot_read_rightly_is_told_with_its_place(tmp_path, text, said) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        list(read_records(tmp_path / "x.jsonl"))
