"""YAML as it is read, and the words in it that YAML does not read as text."""

import datetime
import json
import time

import pytest
import yaml

from grasp_lora.config.yaml_text import Words, read_yaml, yaml_fault


def fault_of(text: str) -> str:
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml(text)
    return yaml_fault(caught.value)


@pytest.mark.parametrize(
    "text",
    ["a: no\non: {x: [1.10, 'no', ~]}", "", "x", "- 1\n- a", "b: &b {x: no}\nc: {<<: *b, y: 1}"],
)
def test_values_are_those_of_yaml(text):
    assert read_yaml(text)[0] == yaml.safe_load(text)


def test_words_that_are_no_text_are_kept_as_written():
    values, words = read_yaml("a: No\non: {x: [1.10, off, 'no', yes please, 2023-01-01, ~]}\n7: b")
    assert values["a"] is False
    assert values[True]["x"][3:5] == ["yes please", datetime.date(2023, 1, 1)]
    assert words.values == {
        ("a",): "No",
        ("True", "x", "0"): "1.10",
        ("True", "x", "1"): "off",
        ("True", "x", "4"): "2023-01-01",
    }
    assert words.keys == {("True",): "on", ("7",): "7"}


def test_words_of_an_option_stand_below_its_setting():
    words = Words()
    words.add_option(("a", "b"), read_yaml("{c: no, 1: x}")[1])
    words.add_option(("d",), read_yaml("off")[1])
    assert words.values == {("a", "b", "c"): "no", ("d",): "off"}
    assert words.keys == {("a", "b", "1"): "1"}
    assert words.options == {("a", "b"), ("d",)}


def test_text_that_repeats_itself_by_aliases_is_read_once():
    nine = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 4)]
    _, words = read_yaml("\n".join(["a0: &a0 [no]", *nine]))
    assert words.values == {("a0", "0"): "no"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a: "C:\\data"', "line 1, column 8: found unknown escape character 'd'; in double quotes"),
        ('a: 1\nb: "C:\\Users"', "line 2, column 9: expected escape sequence of 8 hexadecimal"),
        ("a: [1\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\na: 2", "line 2: 'a' is given twice; remove one of them"),
        ("[1]: 2", "line 1: a key must be one word, not a list or a block"),
        (
            "a: 1\nb: 2023-13-45",
            "line 2: '2023-13-45' cannot be read: month must be in 1..12; put it in quotes if",
        ),
        ("a: " + "9" * 5000, "a number has thousands of digits"),
        ("a: &x 1\nb: &x 2", "line 2, column 4: duplicate anchor 'x'; name it otherwise"),
        ("a: &x [*x]", "line 1: the text stands for more than 10000 values, as aliases"),
        ("a: &x {b: *x}", "line 1: the text stands for more than 10000 values, as aliases"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels deep; write settings plainly"),
        ("a: " + "[" * 20000 + "]" * 20000, "nested more than 50 levels deep"),
        ("a: " + "{b: " * 9000 + "1" + "}" * 9000, "nested more than 50 levels deep"),
        ("a: " + "x" * 1_000_001, "1000004 characters are no configuration; 1000000 at most"),
        (
            "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 99))]),
            "nested more than 50 levels deep",
        ),
        (
            "a: !!bool abc",
            "line 1: 'abc' cannot be read: it does not fit its tag; take the tag out",
        ),
        ("a: !!timestamp abc", "it does not fit its tag"),
        ("a: !foo {r: 1}", "line 1, column 4: the tag '!foo' is not allowed; take it out"),
        (
            "a: !!python/object/apply:os.system ['true']",
            "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed; take it out",
        ),
        ('a: "\\ud83d"', "line 1: a text holds half of a character"),
    ],
)
def test_what_is_no_yaml_is_said_in_one_line(text, said):
    fault = fault_of(text)
    assert said in fault
    assert "\n" not in fault


def test_a_path_in_double_quotes_is_told_to_take_others():
    assert "in single quotes, or with / in place of \\" in fault_of('a: "C:\\data"')


ALIASES = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
MERGES = [f"k{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12)]


@pytest.mark.parametrize(
    "lines", [["a0: &a0 [x]", *ALIASES], ["k0: &m0 {x: 1}", *MERGES, "<<: *m11"]]
)
def test_a_text_that_stands_for_values_without_end_is_refused_at_once(lines):
    began = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match="stands for more than 10000 values, as aliases"):
        read_yaml("\n".join(lines))
    assert time.perf_counter() - began < 2


def test_two_escapes_of_json_are_one_character():
    text = "a\U0001f600\U0001d518b\u4e2d"
    assert read_yaml(json.dumps({"output": text}))[0] == {"output": text}
