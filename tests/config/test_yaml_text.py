"""YAML as it is read, and the words in it that YAML does not read as text."""

import datetime

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
    nine = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
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
        ("a: 2023-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: &x [*x]", "found unconstructable recursive node"),
    ],
)
def test_what_is_no_yaml_is_said_in_one_line(text, said):
    fault = fault_of(text)
    assert said in fault
    assert "\n" not in fault


def test_a_path_in_double_quotes_is_told_to_take_others():
    assert "in single quotes, or with / in place of \\" in fault_of('a: "C:\\data"')
