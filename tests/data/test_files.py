import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from grasp_lora.data.files import LoadReport, load_examples
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.records import Example, text_key

QA, SUMMARIZATION, TEXT = (TASKS[name] for name in ("qa", "summarization", "text-to-text"))
ROW = {"id": "1", "context": "It is red.", "question": "Which colour?", "answers": ["red"]}
GOOD = [{**ROW, "id": f"good-{index}"} for index in range(20)]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def read(source: Any, language: str = "en", task: str = "qa", **settings: Any) -> list[Example]:
    return load_examples(source, TASKS[task], language, **settings)[0]


def report_of(source: Any, task: str = "qa", **settings: Any) -> LoadReport:
    return load_examples(source, TASKS[task], "en", **settings)[1]


def pair(article: Any = "A long text.", summary: Any = "Short.", **more: Any) -> dict[str, Any]:
    return {"article": article, "summary": summary, **more}


def test_rows_become_examples() -> None:
    second = {**ROW, "id": 2, "answers": ["red", "is red", "red"], "title": "left alone"}
    one, two = read([ROW, second])
    fields = {"context": "It is red.", "question": "Which colour?"}
    assert one == Example("1", text_key("It is red."), "en", fields, ("red",))
    assert (two.id, two.references, two.group) == ("2", ("red", "is red"), one.group)


ANSWERS = [
    "red",
    ["red"],
    ("red",),
    [{"text": "red", "answer_start": 6}],
    {"text": ["red"], "answer_start": [6]},
    {"text": "red"},
]


@pytest.mark.parametrize("answers", ANSWERS, ids=str)
def test_answers_are_taken_in_every_usual_shape(answers: object) -> None:
    assert read([{**ROW, "answers": answers}])[0].references == ("red",)


def test_one_dataset_in_every_form_gives_the_same_examples(tmp_path: Path) -> None:
    answers = {"text": ["red", "is red"], "answer_start": [6, 3]}
    rows = [{**ROW, "answers": answers}, {**ROW, "id": "2", "answers": answers}]
    expected = read([{**ROW, "id": n, "answers": ["red", "is red"]} for n in "12"])
    dataset = Dataset.from_list(rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    qas = [{k: v for k, v in row.items() if k != "context"} for row in rows]
    squad = {"data": [{"paragraphs": [{"context": "It is red.", "qas": qas}]}]}
    sources = {
        "rows": [rows, dataset, dataset.to_iterable_dataset(), iter(rows)],
        "jsonl": [write(tmp_path / "a.jsonl", *rows), str(tmp_path / "a.jsonl")],
        "json": [write(tmp_path / "b.json", rows)],
        "squad": [write(tmp_path / "c.json", squad)],
        "parquet": [tmp_path / "a.parquet"],
    }
    for form, given in sources.items():
        for source in given:
            examples, report = load_examples(source, QA, "en")
            assert examples == expected, form
            name = "rows" if form == "rows" else str(source)
            assert report == LoadReport(name, form, rows=2, contexts=1)


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("is red", ("is red",)),
        ('["red", "is red"]', ("red", "is red")),
        ("['red', 'is red']", ("red", "is red")),
        ('{"text": ["red"], "answer_start": [6]}', ("red",)),
        ('[{"text": "red", "answer_start": 6}]', ("red",)),
        ('{"text": "red"}', ("red",)),
        ("['red' 'is red']", ("red", "is red")),
        ("['red'\n 'is red']", ("red", "is red")),
        ("('red', 'is red')", ("red", "is red")),
        ("array(['red', 'is red'], dtype=object)", ("red", "is red")),
        (
            "{'text': array(['red', 'is red'], dtype=object), "
            "'answer_start': array([6, 3], dtype=int32)}",
            ("red", "is red"),
        ),
        ("['red' None]", ("red",)),
        ("[1]", ("[1]",)),
        ("[1800 1801]", ("[1800 1801]",)),
        ("[sic", ("[sic",)),
        ("[sic] the guild", ("[sic] the guild",)),
        ('["sic"] the guild', ('["sic"] the guild',)),
        ("[the guild]", ("[the guild]",)),
        ("('red')", ("('red')",)),
        ("{}", ("{}",)),
        ("{x} in braces", ("{x} in braces",)),
    ],
)
def test_a_table_may_spell_out_a_list_of_answers(
    tmp_path: Path, cell: str, answers: tuple[str, ...]
) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(ROW), [*list(ROW.values())[:3], cell]])
    assert read(tmp_path / "a.csv", max_faulty=1)[0].references == answers


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("['red''is red']", r"not exactly one: \"\['red''is red'\]\";"),
        ("['red' 'is red', 'x']", "not exactly one"),
        ("['red', 'is r", "not exactly one"),
        ("{'red', 'is red'}", "not exactly one"),
        ("[list(['red'])]", "not exactly one"),
        ("['red' 'is' ... 'it' 'is red']", r"shortened with '\.\.\.', so answers are lost"),
        (
            "['red' " + "'is red' " * 40 + "'x',]",
            r"not exactly one: \".{50,79}… \(\d+ characters\);",
        ),
    ],
)
def test_what_looks_like_a_printed_list_and_is_none_is_refused_at_its_row(
    tmp_path: Path, cell: str, why: str
) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(ROW), ["1", "It is red.", "Which?", cell]])
    message = rf"a\.csv:2: answers looks like a printed list, but is {why}.*JSON list of texts"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv", max_faulty=1)


def test_several_summaries_may_be_printed_but_a_list_may_be_a_completion(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("article,summary,prompt,completion\na,['x' 'y'],p,['x' 'y']\n", "utf-8")
    assert read(path, task="summarization")[0].references == ("x", "y")
    assert read(path, task="text-to-text")[0].references == ("['x' 'y']",)


def test_an_empty_printed_list_is_no_answer(tmp_path: Path) -> None:
    cells = ["[]", "array([], dtype=object)", "{'text': array([], dtype=object)}"]
    good = [[str(n), "It is red.", "Which?", "red"] for n in range(9)]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [[cell, "It is red.", "Which?", cell] for cell in cells]
        csv.writer(file).writerows([list(ROW), *rows, *good])
    report = report_of(tmp_path / "a.csv", max_faulty=0.25)
    assert (report.rows, report.left_out) == (9, {"no answer": 3})
    assert report.first == {"no answer": "'[]'"}


def test_brackets_in_json_are_the_answer_itself() -> None:
    rows = [{**ROW, "context": 'Write ["x"].', "answers": '["x"]'}]
    assert read(rows)[0].references == ('["x"]',)


def test_decomposed_text_is_composed_so_that_answers_are_found() -> None:
    row = {**ROW, "context": "Un cafe\u0301.", "answers": ["caf\u00e9"]}
    example, report = read([row])[0], report_of([row])
    assert example.fields["context"] == "Un caf\u00e9."
    assert report.answers_outside == 0
    swapped = {**ROW, "context": "Un caf\u00e9.", "answers": "cafe\u0301"}
    assert read([swapped])[0].references == ("caf\u00e9",)


def test_contexts_alike_but_for_white_space_and_width_are_one_group() -> None:
    rows = [ROW, {**ROW, "id": "2", "context": " It\u00a0is  red."}, {**ROW, "id": "3",
            "context": "It is blue red."}]  # fmt: skip
    one, two, three = read(rows)
    assert one.group == two.group != three.group
    assert two.fields["context"] == " It\u00a0is  red."


def test_made_ids_depend_on_the_texts_alone() -> None:
    rows = [pair("a b", "c", url="1"), pair("a", "b c"), pair("a", "b", url="2")]
    ids = [e.id for e in read(rows, task="summarization")]
    assert len(set(ids)) == 3
    assert all(re.fullmatch("row-[0-9a-f]{16}", name) for name in ids)
    again = read([pair(" a\u00a0 b", "c", url="3")], language="sw", task="summarization")
    assert again[0].id == ids[0]
    assert [e.id for e in read(rows[::-1], task="summarization")] == ids[::-1]


def test_equal_rows_without_ids_are_read_once_and_counted() -> None:
    rows = [pair("a"), pair("b"), pair(" a "), pair("a", "Other."), pair("a")]
    examples, report = load_examples(rows, SUMMARIZATION, "en")
    assert [(e.fields["article"], e.references[0]) for e in examples] == [
        ("a", "Short."), ("b", "Short."), ("a", "Other.")
    ]  # fmt: skip
    assert (report.rows, report.contexts, report.duplicates) == (3, 2, 2)
    assert report.line() == ("2 rows dropped as the same as an earlier one, such as 'rows[2]'")


def test_equal_rows_with_ids_of_their_own_are_kept() -> None:
    assert report_of([pair(id="1"), pair(id="2")], "summarization").rows == 2


def test_an_id_used_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, "id": "2"}, {**ROW, "id": 1})
    message = r"a\.jsonl:3: the id '1' is used twice, first at .*a\.jsonl:1; give"
    with pytest.raises(ValueError, match=message):
        read(path)
    left_out = [{**ROW, "question": ""}, *GOOD, ROW]
    with pytest.raises(ValueError, match=r"rows\[21\]: the id '1' is used twice"):
        read(left_out)


@pytest.mark.parametrize("name", [None, True, "", " ", 1.5, ["1"]])
def test_what_is_no_id_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"rows\[1\]: id must be a text or a whole number"):
        read([ROW, {**ROW, "id": name}])
    with pytest.raises(ValueError, match=r"rows\[0\]: group must be"):
        read([{**ROW, "site": name}], columns={"group": "site"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": ""}, "empty question"),
        ({"question": None}, "empty question"),
        ({"question": float("nan")}, "empty question"),
        ({"context": " \n\u200b\ufeff"}, "empty context"),
        ({"question": "cut \ud83d"}, "broken question"),
        ({"answers": []}, "no answer"),
        ({"answers": {"text": [], "answer_start": []}}, "no answer"),
        ({"answers": None}, "empty answer"),
        ({"answers": " "}, "empty answer"),
        ({"answers": ["", " "]}, "empty answer"),
        ({"answers": ["red", "cut \ud83d"]}, "broken answer"),
        ({"answers": [{"text": None}]}, "empty answer"),
        ({"question": "", "answers": []}, "empty question"),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_and_counted(change: dict, reason: str) -> None:
    examples, report = load_examples([{**ROW, **change}, *GOOD], QA, "en")
    assert [e.id for e in examples] == [row["id"] for row in GOOD]
    assert (report.rows, dict(report.left_out), report.answers_outside) == (20, {reason: 1}, 0)
    assert report.line() == f"1 row left out ({reason}: 1, such as '1')"


def test_a_blank_among_good_answers_is_dropped_and_counted() -> None:
    blanks = ["", " \n", None, "\u200b", float("nan")]
    rows = [{**ROW, "id": str(n), "answers": [b, "red", b]} for n, b in enumerate(blanks)]
    examples, report = load_examples([*GOOD, *rows], QA, "en", max_faulty=0)
    assert {e.references for e in examples} == {("red",)}
    assert (report.rows, report.blank_answers, report.left_out) == (25, 5, {})
    assert report.line() == (
        "5 of 25 rows, such as '0', had a blank among their answers, which is dropped"
    )


def test_rows_alike_but_for_a_blank_answer_are_the_same_row() -> None:
    rows = [pair(summary=["a", ""]), pair(summary=["a"])]
    assert report_of(rows, "summarization").duplicates == 1


FLAGS = [
    ("is_impossible", True), ("is_impossible", "True"), ("is_impossible", 1),
    ("impossible", "yes"), ("unanswerable", "1"), ("is_unanswerable", "TRUE"),
    ("answerable", False), ("is_answerable", "false"), ("has_answer", 0), ("answerable", "0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FLAGS)
def test_a_row_that_says_it_has_no_answer_is_left_out_though_answers_stand_in_it(
    name: str, value: object
) -> None:
    other = not value if isinstance(value, bool) else None
    rows = [{**ROW, name: value}, *({**row, name: other} for row in GOOD)]
    examples, report = load_examples(rows, QA, "en", max_faulty=0)
    assert [e.id for e in examples] == [row["id"] for row in GOOD]
    assert report.line() == "1 row left out (marked as without an answer: 1, such as '1')"


def test_the_flags_of_squad_2_are_honoured_in_each_form_of_file(tmp_path: Path) -> None:
    void = {**ROW, "is_impossible": True, "answers": [], "plausible_answers": ["red"]}
    filled = {**void, "id": "2", "answers": ["red"]}
    good = [{**row, "is_impossible": False, "plausible_answers": []} for row in GOOD]
    rows = [void, filled, *good]
    qas = [{k: v for k, v in row.items() if k != "context"} for row in rows]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(void))
        writer.writeheader()
        writer.writerows(rows)
    squad = {"version": "v2.0", "data": [{"paragraphs": [{"context": "It is red.", "qas": qas}]}]}
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    sources = [
        write(tmp_path / "a.jsonl", *rows),
        write(tmp_path / "b.json", squad),
        tmp_path / "a.csv",
        tmp_path / "a.parquet",
        Dataset.from_list(rows),
    ]
    for source in sources:
        examples, report = load_examples(source, QA, "en", max_faulty=0)
        assert [e.id for e in examples] == [row["id"] for row in GOOD], source
        assert report.left_out == {"marked as without an answer": 2}


def test_plausible_answers_alone_mark_a_row_unless_a_flag_says_otherwise() -> None:
    rows = [{**row, "plausible_answers": []} for row in GOOD]
    plausible = {**ROW, "plausible_answers": [{"text": "red", "answer_start": 6}]}
    assert report_of([plausible, *rows]).left_out == {"marked as without an answer": 1}
    assert report_of([{**plausible, "is_impossible": False}, *rows]).left_out == {}


def test_a_flag_that_is_neither_true_nor_false_is_refused() -> None:
    message = (
        r"rows\[1\]: is_impossible must be true or false, got 'maybe' \(str\); .*rename the column"
    )
    with pytest.raises(ValueError, match=message):
        read([ROW, {**ROW, "id": "2", "is_impossible": "maybe"}])


def test_a_column_that_is_an_input_is_no_flag() -> None:
    rows = [{"answerable": "no", "prompt": "p", "completion": "c"}]
    assert read(rows, task="text-to-text", template="{answerable}\n{prompt}")[0].references == (
        "c",
    )


def test_a_file_of_rows_without_answers_alone_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"all 1 rows are left out \(marked as without an answer: 1"
    ):
        read([{**ROW, "is_impossible": True}])


ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@pytest.mark.parametrize("empty", ["", " ", None, "\u200b"])
def test_an_input_that_the_template_can_leave_out_may_be_empty(empty: str | None) -> None:
    rows = [
        {"instruction": "Count.", "input": empty, "output": "1 2 3"},
        {"instruction": "Count.", "input": "from 2", "output": "2 3"},
        {"instruction": "Count again.", "output": "1 2 3"},
    ]
    examples, report = load_examples(rows, TEXT, "en", template=ALPACA, max_faulty=0)
    assert [e.fields["input"] for e in examples] == ["", "from 2", ""]
    assert (report.empty_inputs, report.left_out) == ({"input": 2}, {})
    assert report.line() == (
        "2 of 3 rows, such as 'rows[0]', have no input; its lines are left out of their prompts"
    )


def test_rows_with_all_inputs_empty_or_in_one_line_are_left_out() -> None:
    rows = [{"instruction": "Count.", "input": "x", "output": str(n)} for n in range(9)]
    nothing = {"instruction": "", "input": " ", "output": "1"}
    assert report_of([*rows, nothing], "text-to-text", template=ALPACA).left_out == {
        "empty instruction": 1
    }
    settings = {"template": "{instruction} {input}"}
    assert report_of([*rows, {**rows[0], "input": ""}], "text-to-text", **settings).left_out == {
        "empty input": 1
    }


def test_answers_outside_the_context_are_kept_and_counted(tmp_path: Path) -> None:
    stray = {**ROW, "answers": ["red", "blue"]}
    examples, report = load_examples(write(tmp_path / "a.jsonl", stray, *GOOD), QA, "en")
    assert len(examples) == 21
    assert (report.answers_outside, report.left_out) == (1, {})
    assert report.line() == "1 of 21 rows have an answer that is not in their context"


def test_a_text_that_is_written_need_not_stand_in_its_input() -> None:
    assert report_of([pair()], "summarization", max_faulty=0).answers_outside == 0
    free = {"context": "Good morning.", "completion": "Bom dia."}
    settings = {"template": "{context}", "max_faulty": 0}
    assert report_of([free], "text-to-text", **settings).answers_outside == 0


def test_answers_of_several_lines_are_read_as_the_one_line_that_is_generated() -> None:
    lines = "First sentence .\n  Second,\u00a0 sentence .\n\nThird\u2028one .\n"
    kept = "Stays  as\u00a0it is. "
    examples, report = load_examples([pair(summary=lines), pair(summary=kept)], SUMMARIZATION, "en")
    (reference,) = examples[0].references
    assert reference == "First sentence . Second,\u00a0 sentence . Third one ."
    assert SUMMARIZATION.clean(reference) == reference
    assert examples[1].references == (kept.strip(),)
    assert report.joined == 1
    assert report.line().startswith("1 of 2 rows had answers of several lines, which are read as")


def test_an_answer_over_two_lines_of_its_context_is_no_answer_outside_it() -> None:
    row = {**ROW, "context": "It is\nred.", "answers": ["is\nred", "is red"]}
    examples, report = load_examples([row], QA, "en", max_faulty=1)
    assert examples[0].references == ("is red",)
    assert (report.joined, report.answers_outside) == (1, 1)
    assert report_of([{**row, "answers": ["is\nred"]}], max_faulty=0).answers_outside == 0


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("ﺍﻟﻘﺎﻫﺮﺓ مدينة كبيرة", "القاهرة"),
        ("القاهرة مدينة كبيرة", "ﺍﻟﻘﺎﻫﺮﺓ"),
        ("القـــاهرة مدينة كبيرة", "القاهرة"),
        ("في \u200fالقا\u200bهرة", "القاهرة\u200f"),
        (normalize("NFD", "부산 항구"), "부산"),
        ("opened in 1800.", " 1800\n"),
    ],
)
def test_an_answer_in_another_form_is_in_its_context(context: str, answer: str) -> None:
    row = {**ROW, "context": context, "answers": [answer]}
    (example,), report = load_examples([row], QA, "ar", max_faulty=0)
    assert report.answers_outside == 0
    # Both stay as written, but for NFC and the blanks around an answer.
    assert example.fields["context"] == normalize("NFC", context)
    assert example.references == (answer.strip(),)


def test_answers_lose_the_blanks_around_them() -> None:
    listed = [" 1800\n", "1800", {"text": "\u3000year 1800\u00a0"}]
    rows = [{**ROW, "context": "In the year 1800.", "answers": listed}]
    (example,), report = load_examples(rows, QA, "en")
    assert example.references == ("1800", "year 1800")
    assert (report.joined, report.line()) == (0, "")


def test_texts_keep_their_lines_where_generation_does() -> None:
    rows = [{"prompt": "Write a poem.", "completion": "\nOne\n  two\n"}]
    examples, report = load_examples(rows, TEXT, "en")
    assert examples[0].references == ("One\n  two",)
    assert (report.joined, report.line()) == (0, "")


def test_a_clean_file_has_nothing_to_say() -> None:
    assert report_of(GOOD).line() == ""


def test_the_share_of_faulty_rows_is_bounded_from_above_inclusively(tmp_path: Path) -> None:
    bad = [{**ROW, "id": "a", "question": ""}, {**ROW, "id": "b", "answers": "blue"}]
    path = write(tmp_path / "a.jsonl", *bad, *GOOD[:18])
    examples, report = load_examples(path, QA, "en", max_faulty=0.1)
    assert (len(examples), report.answers_outside, report.left_out) == (
        19, 1, {"empty question": 1}
    )  # fmt: skip
    path = write(tmp_path / "a.jsonl", *bad, *GOOD[:17])
    message = (
        r"a\.jsonl: 2 of 19 rows \(10\.5%\) are faulty \(empty question: 1, answer outside its "
        r"context: 1\), at most 10% may be; the first are .*a\.jsonl:1 \(empty question\); "
        r".*a\.jsonl:2 \(answer outside its context\); .*raise data\.max_faulty"
    )
    with pytest.raises(ValueError, match=message):
        read(path)
    assert len(read(path, max_faulty=0.2)) == 18


def test_no_share_is_refused_for_a_rounding_error() -> None:
    rows = [{**ROW, "id": str(n), "answers": "red" if n >= 29 else "blue"} for n in range(100)]
    # As a product, 0.29 * 100 is below 29.
    assert report_of(rows, max_faulty=0.29).answers_outside == 29
    with pytest.raises(ValueError, match="29 of 100"):
        read(rows, max_faulty=0.28)


def test_a_file_with_no_row_left_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 1 rows are left out \(no answer: 1\)"):
        read([{**ROW, "answers": []}], max_faulty=1)


@pytest.mark.parametrize("rows", [[], "[]", '{"data": []}', "id,context,question,answers\n"])
def test_no_rows_at_all_are_refused(tmp_path: Path, rows: object) -> None:
    source = rows
    if isinstance(rows, str):
        source = tmp_path / ("a.csv" if rows.startswith("id") else "a.json")
        source.write_text(rows, "utf-8")
    with pytest.raises(ValueError, match="holds no row; it needs at least one"):
        read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 5}, r"question must be a text, got 5 \(int\)"),
        ({"question": True}, r"question must be a text, got True \(bool\)"),
        ({"context": ["x"]}, r"context must be a text, got \['x'\] \(list\)"),
        ({"context": ["x" * 99]}, r"got \['x+… \(1 entry\) \(list\)"),
        ({"answers": 1998}, r"answers must be a text, got 1998 \(int\)"),
        ({"answers": ["red", 1998]}, r"answers must be a text, got 1998 \(int\)"),
        ({"answers": [["red"]]}, "answers must be a text"),
        ({"answers": [{"answer": "red"}]}, "answers has no 'text', only answer"),
        ({"answers": {}}, "answers has no 'text', only nothing"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_at_its_place(
    tmp_path: Path, change: Mapping[str, object], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", *GOOD, {**ROW, **change})
    with pytest.raises(ValueError, match=rf"a\.jsonl:21: .*{message}"):
        read(path, max_faulty=1)


CASES = Path(__file__).parents[2].parent / "shared" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the project")
@pytest.mark.parametrize(
    ("name", "language", "reference"),
    [
        ("answers-with-blanks", "en", "1800"),
        ("arabic-presentation-forms", "ar", "القاهرة"),
        ("korean-qa", "ko", "부산"),
    ],
)
def test_cases_in_other_forms_are_read_whole(name: str, language: str, reference: str) -> None:
    examples, report = load_examples(CASES / f"{name}.jsonl", QA, language, max_faulty=0)
    assert examples[0].references == (reference,)
    assert report.line() == ""


def test_a_long_id_is_cut_in_messages(tmp_path: Path) -> None:
    long = {**ROW, "id": "i" * 500}
    with pytest.raises(ValueError, match=r"the id 'i+… \(500 characters\) is used twice") as caught:
        read(write(tmp_path / "a.jsonl", long, long))
    assert "i" * 80 not in str(caught.value)


@pytest.mark.parametrize("name", ["id", "group"])
def test_half_a_character_in_an_id_is_refused_and_in_a_text_counted(tmp_path: Path, name) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**ROW, "group": "g"} | {name: "a\ud800"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .* '.*\\ud800' holds half of a character"):
        read(path, columns={"group": "group"})
    path.write_text("\n".join(map(json.dumps, [*GOOD, {**ROW, "context": "red \ud800"}])))
    _, report = load_examples(path, QA, "en")
    assert report.left_out == {"broken context": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}\n{}", "its rows have no columns; give each row its values by name"),
        ("[{}]", "its rows have no columns"),
        (json.dumps(ROW) + "\n{}", ":2: missing id, context, question, answers, which other rows"),
    ],
)
def test_rows_without_values_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "a.jsonl")


def test_a_value_nested_too_deeply_to_be_shown_is_told(tmp_path: Path) -> None:
    deep: Any = "red"
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(ValueError, match="answers must be a text, got a list nested too deeply"):
        read([{**ROW, "answers": deep}])
