"""Printed lists, against what Python, numpy and pandas print."""

import csv
import io
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from grasp_lora.data.printed import NotPrinted, Shortened, printed_value

LETTERS = "ab'\"\\ \n\t,[](){}.:éनि水\u200f\ud83d"


def forms(texts: list[str]) -> dict[str, str]:
    objects = np.array([*texts, None], dtype=object)[:-1]
    rows = [{"text": text, "answer_start": 3} for text in texts]
    starts = np.arange(len(texts), dtype="int32")
    return {
        "list": str(texts),
        "tuple": str(tuple(texts)),
        "numpy text": str(objects),
        "numpy repr": repr(objects),
        "numpy strings": repr(np.array(texts or objects)),
        "list of numpy strings": str(list(np.array(texts))) if texts else "[]",
        "mapping of arrays": str({"text": objects, "answer_start": starts}),
        "list of mappings": str(rows),
        "array of mappings": str(np.array([*rows, None], dtype=object)[:-1]),
    }


def texts_in(value: Any) -> list[str]:
    entries = value["text"] if isinstance(value, dict) else value
    return [entry["text"] if isinstance(entry, dict) else entry for entry in entries]


def test_whatever_is_printed_is_read_back_exactly() -> None:
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(1, 6)
        texts = ["".join(draw.choices(LETTERS, k=draw.randint(0, 40))) for _ in range(count)]
        for name, form in forms(texts).items():
            # numpy keeps no zero characters, and none are drawn.
            assert texts_in(printed_value(form)) == texts, name


def test_empty_lists_are_read_as_such() -> None:
    for name, form in forms([]).items():
        if name != "tuple":
            assert texts_in(printed_value(form)) == [], name


def test_a_table_written_by_pandas_is_read_back() -> None:
    answers = np.array(["the guild's", 'a "mill"', "x" * 90], dtype=object)
    table = pd.DataFrame({"answers": [answers, list(answers), {"text": answers}]})
    cells = [row["answers"] for row in csv.DictReader(io.StringIO(table.to_csv(index=False)))]
    assert [texts_in(printed_value(cell)) for cell in cells] == [list(answers)] * 3


def test_missing_values_and_numbers_are_kept_apart_from_texts() -> None:
    assert printed_value(str(np.array(["a", None, float("nan"), 3], dtype=object))) == [
        "a", None, None, 3
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "['a''b']",
        "['a' 'b', 'c']",
        "['a', 'b' 'c']",
        "['a',]",
        "['a', 'b'",
        "['a'] the guild",
        "['a']]",
        "['a\nb']",
        r"['\q']",
        "['a' b]",
        "[red, is red]",
        "{'a', 'b'}",
        "{'a': 'b', 'a': 'c'}",
        "{1: 'b'}",
        "('a')",
        "('a' 'b')",
        "array('a')",
        "array(['a'], 3)",
        "[list(['a'])]",
        "'a'",
        "7",
        "",
        "[" * 100_000,
    ],
)
def test_anything_else_is_no_printed_list(text: str) -> None:
    with pytest.raises(NotPrinted):
        printed_value(text)


@pytest.mark.parametrize("form", [str, repr])
def test_an_array_that_numpy_shortened_is_told_as_such(form: Any) -> None:
    with pytest.raises(Shortened):
        printed_value(form(np.array([str(n) for n in range(1200)], dtype=object)))
    assert printed_value("['...']") == ["..."]
