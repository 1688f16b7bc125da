import json
from pathlib import Path
from unicodedata import normalize

import pytest
from rich.console import Console

from grasp_lora.metrics.records import Options
from grasp_lora.metrics.table import METRICS
from grasp_lora.report.score_words import comparison_lines, result_notes, score_table
from grasp_lora.scoring import files as scoring_files
from grasp_lora.scoring.files import (
    UNKNOWN,
    compare_files,
    read_rows,
    score_file,
)

ROW = {"id": "1", "prediction": "a dog", "references": ["the dog"]}
NO_WEIGHTS = "the encoder is not here; download it"
QA = Options(resamples=200)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def answers(path: Path, *pairs: tuple[str, str], **more: list) -> Path:
    """Return rows of (prediction, reference) with ids 0, 1, ...; `more` adds whole columns."""
    rows = [
        {"id": i, "prediction": said, "references": [true]}
        | {key: column[i] for key, column in more.items()}
        for i, (said, true) in enumerate(pairs)
    ]
    return write(path, *rows)


@pytest.fixture
def without_bertscore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without the encoder."""
    whole = scoring_files.missing

    def missing(names, options):
        others = [name for name in names if name != "bertscore_f1"]
        asked = {"bertscore_f1": NO_WEIGHTS} if "bertscore_f1" in names else {}
        return whole(others, options) | asked

    monkeypatch.setattr(scoring_files, "missing", missing)


def test_rows_are_read_with_all_they_may_have(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"id": 7, "prediction": "", "reference": "كتاب", "context_id": 3, "loss": 2, "tokens": 4},
        {
            "id": "b",
            "prediction": " 书\u2028记\n",
            "references": ["x", "y"],
            "group": "g",
            "model": {},
        },
    )
    one, two = read_rows(path)
    assert (one.id, one.prediction, one.references, one.group) == ("7", "", ("كتاب",), "3")
    assert (one.loss, one.tokens) == (2.0, 4)
    assert (two.prediction, two.references, two.group) == ("书\u2028记", ("x", "y"), "g")
    assert (two.loss, two.tokens) == (None, None)


def test_one_reference_may_be_a_text_under_either_name(tmp_path):
    rows = [ROW | {"references": "the dog"}, {"id": "2", "prediction": "", "reference": "the dog"}]
    read = read_rows(write(tmp_path / "a.jsonl", *rows))
    assert [row.references for row in read] == [("the dog",), ("the dog",)]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_line_ends_and_blank_lines_do_no_harm(tmp_path, start, end):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(ROW | {"id": str(i)}).encode() for i in range(2)]
    path.write_bytes(start + end.join([lines[0], b"  ", lines[1], b""]))
    assert [row.id for row in read_rows(path)] == ["0", "1"]


def test_ids_may_repeat_between_sets_but_not_within_one(tmp_path):
    dev, test = ROW | {"set": "dev"}, ROW | {"set": "test"}
    assert [row.id for row in read_rows(write(tmp_path / "a", dev, test))] == ["dev/1", "test/1"]
    assert [row.group for row in read_rows(tmp_path / "a")] == ["dev/1", "test/1"]
    assert [row.id for row in read_rows(write(tmp_path / "b", test))] == ["1"]
    with pytest.raises(ValueError, match=r"c:3: the id '1' was used at .*c:2; give each row"):
        read_rows(write(tmp_path / "c", dev, test, test))
    with pytest.raises(ValueError, match=r"d:2: the id '1' was used at .*d:1"):
        read_rows(write(tmp_path / "d", ROW, ROW | {"id": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": None}, 'prediction is null; it must be a text; write "" for'),
        ({"prediction": 5}, "prediction is 5; it must be a text"),
        ({"prediction": ["a"]}, r'prediction is \["a"\]; it must be a text'),
        ({"prediction": "\ud800"}, r"half of a surrogate pair"),
        ({"references": []}, r"references is \[\]; it must be a list of at least one text"),
        ({"references": ""}, 'reference is ""; it must be a non-empty text'),
        ({"references": 7}, "references is 7; it must be a list of at least one text"),
        ({"references": None}, "references is null; it must be a list"),
        ({"references": ["dog", None]}, "reference is null; it must be a non-empty text"),
        ({"references": [["dog"]]}, r'reference is \["dog"\]; it must be a non-empty text'),
        ({"references": ["  "]}, 'reference is "  "; it must be a non-empty text'),
        ({"reference": "dog"}, "both references and reference are among"),
        ({"id": None}, "id is null; it must be a non-empty text or an integer"),
        ({"id": ""}, 'id is ""; it must be'),
        ({"id": True}, "id is true; it must be"),
        ({"id": 1.5}, "id is 1.5; it must be"),
        ({"group": ["x"]}, r'group is \["x"\]; it must be a non-empty text'),
        ({"loss": "low"}, 'loss is "low"; it must be a finite number of at least 0'),
        ({"loss": float("nan")}, "loss is NaN; it must be a finite number"),
        ({"loss": -0.1}, "loss is -0.1; it must be"),
        ({"loss": True}, "loss is true; it must be"),
        ({"tokens": 0}, "tokens is 0; it must be an integer of at least 1"),
        ({"tokens": 2.5}, "tokens is 2.5; it must be"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_the_rule(tmp_path, change, message):
    rows = [ROW | {"id": "first", "group": "g"}, ROW | {"group": "g"} | change]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        read_rows(path)


@pytest.mark.parametrize("key", ["id", "prediction", "references"])
def test_a_missing_key_is_named_with_those_found(tmp_path, key):
    row = {name: value for name, value in ROW.items() if name != key} | {"answer": "x"}
    with pytest.raises(ValueError, match=rf"a:2: no '?{key}'? among .*answer.*(needed|give)"):
        read_rows(write(tmp_path / "a", ROW | {"id": "0"}, row))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no row; write at least one"),
        (b"\n \n", "has no row"),
        (b'{"id": 1', r":1: not JSON .*write one JSON object per line"),
        (b'[\n{"id": 1}\n]', r":1: not JSON"),
        (b"[1, 2]", r":1: \[1, 2\] is no JSON object"),
        (b"dog\n", r":1: not JSON .*\"dog\""),
        (b'{"id": "caf\xe9"}', r":1: not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
        ('{"id": "1"}'.encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8; save it as UTF-8"),
        ('{"id": "1"}'.encode("utf-16-le"), "is UTF-16"),
        ('{"id": "1"}'.encode("utf-16-be"), "is UTF-16"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_absent_files_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prediction file at .*a.jsonl; give the path"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is a folder; give a file"):
        read_rows(tmp_path)


def test_groups_in_some_rows_only_are_refused(tmp_path):
    grouped = ROW | {"id": "0", "group": "g"}
    with pytest.raises(ValueError, match=r'a:2: no "group", but other rows have one'):
        read_rows(write(tmp_path / "a", grouped, ROW))
    with pytest.raises(ValueError, match=r'b:1: no "group"'):
        read_rows(write(tmp_path / "b", ROW, grouped))


@pytest.mark.parametrize(
    ("language", "pairs", "expected"),
    [
        # Case, an article and punctuation do not count; the third answer has an extra word.
        ("en", [("The Dog!", "dog"), ("cat", "cat"), ("a red cat", "cat"), ("", "bird")], 50.0),
        ("ar", [("القاهرة", "القاهرة"), ("القاهرة.", "القاهرة"), ("دمشق", "بغداد")], 200 / 3),
        ("zh", [("北京", "北京"), ("北京市", "北京"), ("上海", "上海"), ("北京", "上海")], 50.0),
    ],
)
def test_exact_match_of_a_small_file_is_the_one_counted_by_hand(
    tmp_path, language, pairs, expected
):
    path, out = answers(tmp_path / "a.jsonl", *pairs), tmp_path / "new" / "scores.json"
    result = score_file(path, Options(language=language), ["exact_match"], out)
    entry = result["exact_match"]
    assert entry["value"] == pytest.approx(expected)
    assert entry["n"] == len(pairs)
    assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 100
    written = json.loads(out.read_text("utf-8"))
    assert written == result
    assert list(written["exact_match"]) == ["value", "low", "high", "n", "settings"]


def test_settings_say_what_was_resampled(tmp_path):
    pairs = [("a", "a"), ("b", "c"), ("d", "d"), ("e", "e")]
    by_row = score_file(answers(tmp_path / "a", *pairs), QA, ["exact_match"])["exact_match"]
    path = answers(tmp_path / "b", *pairs, context_id=[1, 1, 2, 2])
    by_group = score_file(path, QA, ["exact_match"])["exact_match"]
    assert (by_row["settings"]["resampled_by"], by_row["settings"]["groups"]) == ("row", 4)
    assert (by_group["settings"]["resampled_by"], by_group["settings"]["groups"]) == ("group", 2)
    assert by_group["settings"]["resamples"] == 200
    assert (by_group["low"], by_group["value"], by_group["high"]) == (50, 75, 100)
    assert any('the same "group"' in note for note in result_notes({"exact_match": by_row}))
    assert any("only 2 groups" in note for note in result_notes({"exact_match": by_group}))


def test_sets_scored_together_are_said_to_be(tmp_path):
    path = answers(tmp_path / "a", ("a", "a"), ("b", "b"), set=["dev", "test"])
    result = score_file(path, QA, ["exact_match"])
    assert result["exact_match"]["settings"]["sets"] == ["dev", "test"]
    assert "the sets dev, test were scored together as one" in result_notes(result)


@pytest.mark.usefixtures("without_bertscore")
def test_by_default_everything_is_scored_and_bertscore_is_null_where_it_cannot_be(tmp_path):
    path, out = answers(tmp_path / "a", ("القط الأسود", "القط"), ("كلب", "كلب")), tmp_path / "s"
    result = score_file(path, Options(language="ar", resamples=50), out=out)
    assert list(result) == [name for name in METRICS if name not in ("loss", "perplexity")]
    assert result["bertscore_f1"] == {
        "value": None, "low": None, "high": None, "n": 2, "settings": {"missing": NO_WEIGHTS}
    }  # fmt: skip
    assert json.loads(out.read_text("utf-8")) == result
    assert f"bertscore_f1 not computed: {NO_WEIGHTS}" in result_notes(result)
    others = [entry["value"] for name, entry in result.items() if name != "bertscore_f1"]
    assert all(0 <= value <= 100 for value in others)
    assert result["rouge1"]["value"] > 0


@pytest.mark.usefixtures("without_bertscore")
@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["bertscore_f1"], QA),
        (["chrf", "bertscore_f1"], QA),
        (None, Options(bertscore_model="some/encoder")),
        (None, Options(bertscore_layer=3)),
        (None, Options(bertscore_rescale=True)),
    ],
)
def test_bertscore_that_was_asked_for_is_an_error_before_any_work(
    tmp_path, monkeypatch, names, options
):
    monkeypatch.setattr(scoring_files, "score", None)  # to call it would be a TypeError
    with pytest.raises(ValueError, match=f"bertscore_f1 cannot be computed: {NO_WEIGHTS}"):
        score_file(answers(tmp_path / "a", ("a", "a")), options, names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_bertscore")
def test_loss_and_perplexity_come_where_every_row_has_them(tmp_path):
    pairs = [("a", "a"), ("b", "b")]
    whole = answers(tmp_path / "a", *pairs, loss=[1.0, 3.0], tokens=[3, 1])
    result = score_file(whole, QA)
    assert result["loss"]["value"] == pytest.approx(2.0)
    assert result["perplexity"]["value"] == pytest.approx(4.4816890703)  # e^((3*1 + 1*3) / 4)
    for name, columns in {
        "b": {"loss": [1.0, None], "tokens": [3, 1]},
        "c": {"loss": [1.0, 3.0]},
        "d": {"loss": [1.0, 3.0], "tokens": [3, None]},
    }.items():
        partial = answers(tmp_path / name, *pairs, **columns)
        found = score_file(partial, QA)
        if name == "c":
            assert "loss" not in found, "no row has all it takes"
        else:
            assert found["loss"]["value"] is None
            assert "1 rows lack a loss or its tokens" in found["loss"]["settings"]["missing"]
        with pytest.raises(ValueError, match="loss cannot be computed: . rows? lacks? a loss"):
            score_file(partial, QA, ["chrf", "loss"])


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["chr"], QA, "unknown metric 'chr'.*chrf"),
        ([], QA, "no metric to compute; choose from: exact_match"),
        (["exact_match"], Options(resamples=1), "resamples must be 0"),
        (["exact_match"], Options(confidence=95), "confidence must lie between 0 and 1"),
        (None, Options(rules="mlqa", language="fi"), "'fi'"),
    ],
)
def test_options_that_cannot_be_are_refused_before_scoring(
    tmp_path, monkeypatch, names, options, message
):
    monkeypatch.setattr(scoring_files, "score", None)
    with pytest.raises(ValueError, match=message):
        score_file(answers(tmp_path / "a", ("a", "a")), options, names)


def test_equal_seeds_give_equal_files(tmp_path):
    pairs = [(str(i), str(i % 7)) for i in range(30)]
    path = answers(tmp_path / "a", *pairs)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        score_file(path, Options(seed=seed, resamples=99), ["token_f1"], tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_a_result_is_replaced_only_if_asked(tmp_path):
    path, out = answers(tmp_path / "a", ("a", "a")), tmp_path / "out.json"
    out.write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="out.json exists; .*--overwrite"):
        score_file(path, QA, ["exact_match"], out)
    assert out.read_text("utf-8") == "mine"
    score_file(path, QA, ["exact_match"], out, overwrite=True)
    assert json.loads(out.read_text("utf-8"))["exact_match"]["value"] == 100


def test_places_that_cannot_be_written_are_refused(tmp_path):
    path = answers(tmp_path / "a", ("a", "a"))
    with pytest.raises(ValueError, match="is a folder; name a JSON file"):
        score_file(path, QA, ["exact_match"], tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="would be replaced, but .* is read from there"):
        score_file(path, QA, ["exact_match"], tmp_path / "x" / ".." / "a", overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"/a/out\.json"):
        score_file(path, QA, ["exact_match"], path / "out.json")
    other = answers(tmp_path / "b", ("a", "a"))
    with pytest.raises(ValueError, match="would be replaced, but .* is read from there"):
        compare_files(path, other, QA, ["exact_match"], other, overwrite=True)


def test_one_row_is_scored_without_an_interval(tmp_path):
    result = score_file(answers(tmp_path / "a", ("a b", "a")), QA, ["exact_match", "chrf"])
    assert (result["exact_match"]["value"], result["exact_match"]["low"]) == (0, None)
    assert "none" in shown(score_table(result))


def shown(table) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.usefixtures("without_bertscore")
def test_the_table_shows_scores_ends_and_what_was_left_out(tmp_path):
    pairs = [("a", "a"), ("b", "c"), ("d", "d"), ("e", "e")]
    path = answers(tmp_path / "b", *pairs, group=[1, 1, 2, 2])
    lines = shown(score_table(score_file(path, QA))).splitlines()
    assert "95 % interval" in lines[1]
    line = next(line for line in lines if "exact_match" in line)
    assert "75.0" in line
    assert "[50.0, 100.0]" in line
    assert "not computed" in next(line for line in lines if "bertscore_f1" in line)


def test_two_systems_are_compared_on_rows_matched_by_id(tmp_path):
    # A is right in rows 0, 1 and 2, B in row 0. Rows 1 and 2 can be swapped in 4 ways, and one
    # way has a difference as large: p = 2 * 1 / 4.
    truth = ["a", "b", "c", "d"]
    a = answers(tmp_path / "a", *zip(["a", "b", "c", "x"], truth, strict=True))
    b = answers(tmp_path / "b", *zip(["a", "y", "z", "x"], truth, strict=True))
    b.write_text("\n".join(reversed(b.read_text("utf-8").split("\n"))), "utf-8")
    out = tmp_path / "out.json"
    result = compare_files(a, b, Options(), ["exact_match"], out)
    entry = result["exact_match"]
    assert (entry["a"], entry["b"], entry["difference"], entry["n"]) == (75, 25, 50, 4)
    assert entry["p_value"] == 0.5
    assert entry["low"] == 0
    assert entry["high"] == 100
    assert entry["settings"]["resampled_by"] == "row"
    assert json.loads(out.read_text("utf-8")) == result
    assert comparison_lines(result) == [
        "exact_match: A 75.0, B 25.0, difference 50.0 [0.0, 100.0], p 0.50: "
        "no significant difference on these 4 rows"
    ]


def test_the_better_system_is_named_by_the_direction_of_the_metric(tmp_path):
    pairs = [("a", "a")] * 12
    a = answers(tmp_path / "a", *pairs, loss=[1.0] * 12, tokens=[2] * 12)
    b = answers(tmp_path / "b", *[("b", "a")] * 12, loss=[1.5] * 12, tokens=[2] * 12)
    lines = comparison_lines(compare_files(a, b, Options(), ["exact_match", "loss"]))
    assert lines[0] == (
        "exact_match: A 100.0, B 0.0, difference 100.0 [100.0, 100.0], p 0.002: "
        "A is better on these 12 rows"
    )
    assert lines[1] == (
        "loss: A 1.000, B 1.500, difference -0.500 [-0.500, -0.500], p 0.002: "
        "A is better on these 12 rows"
    )
    assert "about 5 in 100" in lines[2]
    back = comparison_lines(compare_files(b, a, Options(), ["exact_match", "loss"]))
    assert "B is better" in back[0]
    assert "B is better" in back[1]


def test_a_system_compared_with_itself_is_not_told_apart(tmp_path):
    path = answers(tmp_path / "a", ("a b", "a"), ("c", "c"))
    entry = compare_files(path, path, QA, ["token_f1"])["token_f1"]
    assert (entry["difference"], entry["low"], entry["high"], entry["p_value"]) == (0, 0, 0, 1)
    one = answers(tmp_path / "one", ("a b", "a"))
    [line] = comparison_lines(compare_files(one, one, QA, ["token_f1"]))
    assert line.endswith("difference 0.0, p 1.00: no significant difference on this 1 row")
    [line] = comparison_lines(compare_files(path, path, Options(resamples=0), ["token_f1"]))
    assert line.endswith("difference 0.0: not tested")


@pytest.mark.usefixtures("without_bertscore")
def test_a_comparison_too_is_null_where_a_metric_cannot_be_computed(tmp_path):
    path = answers(tmp_path / "a", ("a b", "a"), ("c", "c"))
    result = compare_files(path, path, QA)
    assert result["bertscore_f1"]["p_value"] is None
    assert result["bertscore_f1"]["settings"] == {"missing": NO_WEIGHTS}
    assert not any("bertscore" in line for line in comparison_lines(result))
    assert result_notes(result)[0] == f"bertscore_f1 not computed: {NO_WEIGHTS}"


def test_groups_may_stand_in_one_of_the_files_only(tmp_path):
    pairs = [("a", "a"), ("b", "c"), ("d", "d"), ("e", "e")]
    bare = answers(tmp_path / "a", *pairs)
    grouped = answers(tmp_path / "b", *pairs, group=[1, 1, 2, 2])
    for files in ((bare, grouped), (grouped, bare), (grouped, grouped)):
        settings = compare_files(*files, QA, ["exact_match"])["exact_match"]["settings"]
        assert (settings["resampled_by"], settings["groups"]) == ("group", 2)
    other = answers(tmp_path / "c", *pairs, group=[1, 1, 2, 1])
    with pytest.raises(ValueError, match=r"id '3' is of group '2' in .*b, but of '1' in .*c"):
        compare_files(grouped, other, QA, ["exact_match"])


def test_rows_of_one_system_only_are_named(tmp_path):
    pairs = [(str(i), "x") for i in range(6)]
    long, short = answers(tmp_path / "long", *pairs), answers(tmp_path / "short", *pairs[:1])
    for files in ((long, short), (short, long)):
        with pytest.raises(
            ValueError,
            match=r"short has no row for the id '1', '2', '3' and 2 more of .*long; compare",
        ):
            compare_files(*files, QA, ["exact_match"])


def test_other_references_are_refused(tmp_path):
    a, b = answers(tmp_path / "a", ("a", "x")), answers(tmp_path / "b", ("a", "y"))
    with pytest.raises(ValueError, match=r"id '0' has the references \[\"x\"\] in .*\[\"y\"\] in"):
        compare_files(a, b, QA, ["exact_match"])


def entry(difference: float, p: float | None, confidence: float = 0.95) -> dict:
    """Return a comparison with B at 20 on 100 rows."""
    numbers = {"a": 20 + difference, "b": 20.0, "difference": difference, "p_value": p}
    ends = {"low": difference - 1, "high": difference + 1, "n": 100}
    return numbers | ends | {"settings": {"confidence": confidence}}


@pytest.mark.parametrize(
    ("name", "compared", "expected"),
    [
        (
            "chrf",
            entry(1.4, 0.18),
            "chrf: A 21.4, B 20.0, difference 1.4 [0.4, 2.4], p 0.18: "
            "no significant difference on these 100 rows",
        ),
        (
            "chrf",
            entry(-0.04, 0.9),
            "difference 0.0 [-1.0, 1.0], p 0.90: no significant difference",
        ),
        ("bleu", entry(-2, 0.05), "p 0.050: B is better"),
        ("bleu", entry(-2, 0.0501), "p 0.050: no significant difference"),
        ("bleu", entry(2, 0.1, confidence=0.9), "p 0.10: A is better"),
        ("bleu", entry(2, 0.0002), "p 0.0002: A is better"),
        ("perplexity", entry(-2, 0.01), "A 18, B 20, difference -2 [-3, -1], p 0.010: A is better"),
        ("perplexity", entry(1e200, 0.01), "A 1e+200, B 20, difference 1e+200"),
        ("rouge1", entry(2, None), "[1.0, 3.0]: not tested"),
    ],
)
def test_lines_say_in_words_what_the_numbers_show(name, compared, expected):
    [line] = comparison_lines({name: compared})
    assert expected in line


def test_without_a_language_the_script_tells(tmp_path):
    def scored(*references):
        rows = [
            {"id": str(n), "prediction": text, "references": [text]}
            for n, text in enumerate(references)
        ]
        path = write(tmp_path / "a.jsonl", *rows)
        return score_file(path, Options(language=UNKNOWN, resamples=0), ["bleu"])["bleu"]

    for references, language, tokenizer in (
        (["بيت كبير"], "und", "13a"),
        (["他在北京大学读书"], "zh", "zh"),
        (["東京", "東京に住む"], "ja", "char"),
        (["บ้านหลังใหญ่"], "th", "char"),
        (["ལྷ་ས་ནི་བོད་ཀྱི་རྒྱལ་ས་ཡིན།"], "bo", "char"),
    ):
        settings = scored(*references)["settings"]
        assert settings["scored_as"] == language
        assert settings["tokenizer"] in (tokenizer, "ja-mecab")
    with pytest.raises(
        ValueError, match="the scripts of th, zh.* score each language in its own file"
    ):
        scored("房子", "บ้าน")
    path = write(tmp_path / "b.jsonl", {"id": "1", "prediction": "a", "references": ["a"]})
    with pytest.raises(ValueError, match="--rules depends on the language"):
        score_file(path, Options(language=UNKNOWN, rules="mlqa"), ["exact_match"])


CASES = Path(__file__).parents[2].parent / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the project")
CHINESE = [("北京市海淀区", "海淀区"), ("「海淀区」。", "海淀区"), ("１９９０年", "1990年")]


@pytest.mark.parametrize(
    ("options", "rules", "exact", "f1"),
    [
        # 3 common, 6 found, 3 wanted: 6/9
        (Options(language="zh-CN", resamples=0), "unicode", [0, 100, 100], [200 / 3, 100, 100]),
        (Options(language=UNKNOWN, resamples=0), "unicode", [0, 100, 100], [200 / 3, 100, 100]),
        (Options(language="zh", rules="squad", resamples=0), "squad", [0, 0, 0], [0, 0, 0]),
        (Options(language=UNKNOWN, rules="squad", resamples=0), "squad", [0, 0, 0], [0, 0, 0]),
        # full-width digits are other tokens, and 1 of 2 is common
        (
            Options(language="zh", rules="mlqa", resamples=0),
            "mlqa",
            [0, 100, 0],
            [200 / 3, 100, 50],
        ),
    ],
)
def test_answers_without_spaces_are_scored_by_character(tmp_path, options, rules, exact, f1):
    for n, pair in enumerate(CHINESE):
        found = score_file(answers(tmp_path / "a", pair), options, ["exact_match", "token_f1"])
        assert found["exact_match"]["value"] == exact[n]
        assert found["token_f1"]["value"] == pytest.approx(f1[n])
        assert {entry["settings"]["rules"] for entry in found.values()} == {rules}
        assert found["token_f1"]["settings"]["texts"].startswith("NFC")


def test_files_in_another_form_hold_the_same_rows(tmp_path):
    rows = [
        {"id": "câu 1", "prediction": "Huế", "references": ["thành phố Huế"], "group": "bài"},
        {"id": "câu 2", "prediction": "القاهرة", "references": ["القاهرة"], "group": "bài"},
    ]
    others = [
        {"id": normalize("NFD", "câu 2"), "prediction": "\u200fﺍﻟﻘﺎﻫﺮﺓ",
         "references": ["القـاهرة "], "context_id": normalize("NFD", "bài")},
        {"id": "câu 1\ufeff", "prediction": "x",
         "references": [normalize("NFD", "thành phố Huế")], "context_id": "bài"},
    ]  # fmt: skip
    one, other = write(tmp_path / "a", *rows), write(tmp_path / "b", *others)
    found = compare_files(one, other, QA, ["exact_match", "token_f1"])
    # "Huế" has 1 of 3 words of its reference: 2/4
    assert (found["token_f1"]["a"], found["token_f1"]["b"]) == (75, 50)
    assert (found["exact_match"]["a"], found["exact_match"]["b"]) == (50, 50)
    with pytest.raises(ValueError, match="was used at .*a:1"):
        read_rows(write(tmp_path / "a", rows[0], rows[0] | {"id": normalize("NFD", "câu 1")}))
    for key in ("id", "group", "reference"):
        row = {"id": 1, "prediction": "a", "reference": "a"} | {key: "\u200f \ufeff"}
        with pytest.raises(ValueError, match="must be a non-empty text"):
            read_rows(write(tmp_path / "a", row))


@needs_cases
@pytest.mark.parametrize(
    ("name", "language", "rules", "exact"),
    [
        ("vi-decomposed", "vi", None, [100, 100]),
        # the last two have another last letter, and no article
        ("ar-forms", "ar", None, [100, 100, 0, 100, 0, 0]),
        ("ar-forms", "ar", "unicode", [100, 100, 100, 100, 0, 0]),
        ("ar-forms", "ar", "mlqa-fixed", [100, 100, 0, 100, 0, 100]),
        ("zh", "zh", None, [0, 100, 100, 100, 0]),
        ("ja", "ja", None, [0, 0]),
        ("th", "th", None, [0, 100]),
    ],
)
def test_cases_of_many_scripts_score_as_their_writers_mean(tmp_path, name, language, rules, exact):
    read = read_rows(CASES / f"score-{name}.jsonl")
    options = Options(language=language, rules=rules, resamples=0)
    found = [
        score_file(
            write(tmp_path / "a", {"id": row.id, "prediction": row.prediction,
                                   "references": list(row.references)}),
            options, ["exact_match"],
        )["exact_match"]["value"]
        for row in read
    ]  # fmt: skip
    assert found == exact


def test_long_ids_and_texts_are_cut_in_messages(tmp_path):
    with pytest.raises(ValueError, match=r":2: the id 'i+… \(500 characters\) was used at"):
        read_rows(write(tmp_path / "a", *[ROW | {"id": "i" * 500}] * 2))
    with pytest.raises(ValueError, match=r"prediction is \[\"p+… \(\d+ characters\); it must"):
        read_rows(write(tmp_path / "b", ROW | {"prediction": ["p" * 500]}))
