"""The choice of columns, tested by loading examples."""

import json
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.data.files import LoadReport, load_examples
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.records import Example, text_key

ROW = {"id": "1", "context": "It is red.", "question": "Which colour?", "answers": ["red"]}


def read(source: Any, task: str = "qa", **settings: Any) -> list[Example]:
    return load_examples(source, TASKS[task], "en", **settings)[0]


def report_of(source: Any, task: str, **settings: Any) -> LoadReport:
    return load_examples(source, TASKS[task], "en", **settings)[1]


def test_columns_are_found_under_their_own_name_then_by_the_aliases_in_order() -> None:
    xlsum = {"id": "a", "url": "u", "title": "t", "summary": "s", "text": "x"}
    masakha = {"category": "c", "headline": "s", "text": "x", "url": "u"}
    for row in (xlsum, masakha, {"content": "y", "text": "x", "target": "z", "headline": "s"}):
        example = read([row], task="summarization")[0]
        assert (example.fields, example.references) == ({"article": "x"}, ("s",))
    both = {"text": "wrong", "article": "x", "summary": "s"}
    assert read([both], task="summarization")[0].fields == {"article": "x"}


def test_the_map_wins_over_names_and_aliases() -> None:
    row = {"id": "1", "key": 7, "text": "x", "body": "y", "summary": "s", "gold": "g", "site": 3}
    columns = {"id": "key", "article": "body", "summary": "gold", "group": "site"}
    example = read([row], task="summarization", columns=columns)[0]
    assert example == Example("7", "3", "en", {"article": "y"}, ("g",))


def test_a_group_column_counts_only_where_the_map_names_it() -> None:
    rows = [{"id": n, "article": n, "summary": "s", "group": "g"} for n in "ab"]
    assert [e.group for e in read(rows, task="summarization")] == [text_key("a"), text_key("b")]
    mapped = report_of(rows, "summarization", columns={"group": "group"})
    assert (mapped.rows, mapped.contexts) == (2, 1)


def test_a_template_names_the_inputs_of_a_task_without_fields() -> None:
    row = {"question": "q", "hint": "h", "prompt": "p", "out": "o"}
    template = "{hint} {not one} then {question}"
    example = read([row], task="text-to-text", template=template, columns={"completion": "out"})[0]
    assert list(example.fields.items()) == [("hint", "h"), ("question", "q")]
    assert example.group == text_key("h\nq"), "an instruction may be the same in all rows"
    plain = read([{**row, "completion": "c"}], task="text-to-text")[0]
    assert (plain.fields, plain.references) == ({"prompt": "p"}, ("c",))
    columns = {"hint": "prompt", "completion": "out"}
    mapped = read([row], task="text-to-text", template="{hint}", columns=columns)[0]
    assert mapped.fields == {"hint": "p"}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (ROW, {"columns": {"passage": "context"}},
         "columns does not know the name 'passage'.*map id, context, question, answers, group"),
        (ROW, {"columns": {"context": "passage"}},
         "rows: there is no column 'passage' for context; its columns are 'id', 'context'"),
        ({"text": "x", "gold": "y"}, {}, "no column for context or passage or paragraph, question"
         " or query, answers or answer; its columns are 'text', 'gold'; .* {context: gold}"),
        (ROW, {"columns": {"answers": "context"}}, "'context' is both context and answers"),
        (
            ROW,
            {"columns": {"question": "context"}},
            "'context' is both context and question; each needs its own; name another column",
        ),
        ({f"c{n}": "x" for n in range(30)}, {}, r"'c0', .*… \(30 columns\); name the right one"),
        ({}, {}, "rows: its rows have no columns; give each row its values by name"),
        (ROW, {"max_faulty": 1.5}, "share of rows in .0, 1., got 1.5"),
        (ROW, {"max_faulty": float("nan")}, "share of rows in .0, 1., got nan"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_named(row: dict, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read([row], **settings)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no input", "names no column"),
        ("{completion}", "names {completion}, which is the row's completion"),
        ("{prompt} {id}", "names {id}"),
        ("{other}", "no column for other; its columns are 'prompt', 'completion'"),
    ],
)
def test_a_template_that_names_no_input_is_refused(template: str, message: str) -> None:
    row = {"prompt": "p", "completion": "c"}
    with pytest.raises(ValueError, match=message):
        read([row], task="text-to-text", template=template)


def test_a_row_without_a_column_that_others_have_is_refused_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, (ROW, {"id": "2", "question": "x"}))), "utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: missing context, answers, which other rows"):
        read(path)
    some = [ROW, {k: v for k, v in ROW.items() if k != "id"}]
    for rows, index in ((some, 1), (some[::-1], 0)):
        with pytest.raises(ValueError, match=rf"rows\[{index}\]: missing id"):
            read(rows)
