"""What messages show of a user's values: one line, escaped, at most 80 characters."""

import datetime
from pathlib import Path

import pytest

from grasp_lora.base.words import (
    MOST,
    check_path,
    from_percent,
    printable,
    shortened,
    shown,
    shown_path,
    without_home,
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("plain", "'plain'"),
        ("it's", '"it\'s"'),
        ("مدينة 北京", "'مدينة 北京'"),
        ("a\nb\x1b[31m\u202e", r"'a\nb\x1b[31m\u202e'"),
        ("\ud800", r"'\ud800'"),
        (3, "3"),
        (None, "None"),
        ([1, "a"], "[1, 'a']"),
        (datetime.date(2023, 1, 2), "2023-01-02"),
    ],
)
def test_a_short_value_is_shown_as_it_is_written(value, said):
    assert shown(value) == said


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ("x" * 500, "… (500 characters)"),
        (["word"] * 300, "… (300 entries)"),
        ({str(n): n for n in range(90)}, "… (90 entries)"),
        (10**200, "… (201 characters)"),
        ("\x1b" * 50, "… (50 characters)"),
    ],
)
def test_a_long_value_is_cut_to_80_characters_with_its_length(value, end):
    text = shown(value)
    assert len(text) == MOST == 80
    assert text.endswith(end)
    assert repr(value).startswith(text.removesuffix(end))


def test_a_value_of_80_characters_is_shown_whole():
    assert shown("x" * 78) == repr("x" * 78)
    assert len(shown("x" * 79)) == 80


def test_a_path_is_escaped_and_stays_whole_where_it_may_exist():
    path = Path("/data") / ("f" * 100) / "rows.jsonl"
    assert shown_path(path) == f"'{path}'"
    assert shown_path("C:\new") == r"'C:\new'"
    assert shown_path("rows\u202elnosj.exe") == r"'rows\u202elnosj.exe'"
    assert len(shown_path("x" * 300)) == 80


def test_printable_leaves_text_and_line_breaks():
    assert printable("one\ntwo \u3000 é") == "one\ntwo \u3000 é"
    assert printable("\x1b]0;title\x07\u2066") == r"\x1b]0;title\x07\u2066"
    assert shortened("a\nb") == r"a\nb"
    assert shortened("y" * 81) == "y" * 63 + "… (81 characters)"


@pytest.mark.parametrize("path", ["C:\new", Path("a\tb"), "x\x1b[31m", "nul\0"])
def test_a_path_with_a_control_character_is_refused_and_shown_escaped(path):
    with pytest.raises(ValueError, match="single quotes") as caught:
        check_path(path)
    assert str(caught.value).startswith(repr(str(path)))


def test_a_text_that_is_too_long_for_a_path_is_refused():
    check_path("x" * 255)
    check_path(Path(*["folder"] * 60))
    with pytest.raises(
        ValueError, match=r"\(300 characters\) is no path: a name in it has over 255"
    ):
        check_path(Path("x" * 300))
    with pytest.raises(ValueError, match="is no path"):
        check_path("folder/" + "字" * 86)


def test_other_paths_are_left_alone():
    check_path(Path("C:\\data") / "مدينة \u202e.jsonl")
    # The bytes of the same name where the locale's encoding does not know them.
    check_path("مدينة".encode().decode("ascii", "surrogateescape"))
    for broken in ("\udcff", "caf\udce9", "\ud800"):
        with pytest.raises(ValueError, match="is not UTF-8; rename"):
            check_path(broken)


@pytest.mark.parametrize(
    ("value", "fraction"),
    [("20%", 0.2), (" 12.5 % ", 0.125), (20, 0.2), (100, 1.0), (1, None), (0.4, None)]
    + [("20", None), ("x%", None), (True, None), (101, None), (None, None), (float("nan"), None)],
)
def test_percentages_become_fractions(value, fraction):
    assert from_percent(value) == fraction


def test_the_home_folder_is_not_told(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("USERPROFILE", "/home/anna")
    assert without_home("/home/anna/models/llama") == "~/models/llama"
    assert without_home(Path("/home/anna")) == "~"
    for other in (
        "/data/models/llama",
        "/home/annabel/x",
        "models/llama",
        "owner/model",
        "smollm2",
    ):
        assert without_home(other) == other
