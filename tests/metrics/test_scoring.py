import dataclasses
import json
import math
from unicodedata import normalize

import numpy as np
import pytest

import grasp_lora.metrics.scoring as scoring
from grasp_lora.metrics.records import Family, Options, Row, mean_measured
from grasp_lora.metrics.scoring import compare, missing, score
from grasp_lora.metrics.table import FAMILIES, METRICS

FAST = Options(resamples=200)
NAMES = ("exact_match", "token_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum",
         "bertscore_f1", "loss", "perplexity")  # fmt: skip


def rows(*answers: str, groups: tuple[str, ...] = ()) -> list[Row]:
    """Return rows "r0", "r1", ... whose reference is "yes"."""
    padded = groups or ("",) * len(answers)
    return [
        Row(f"r{i}", text, ("yes",), group)
        for i, (text, group) in enumerate(zip(answers, padded, strict=True))
    ]


def test_every_metric_is_listed_once() -> None:
    assert tuple(METRICS) == NAMES
    assert sum(len(family.names) for family in FAMILIES) == len(NAMES)
    assert [name for name in NAMES if not METRICS[name].higher_is_better] == ["loss", "perplexity"]


def test_a_score_holds_value_interval_count_settings_and_rows() -> None:
    found = score(rows("yes", "no", "yes", "yes"), ["exact_match"], FAST)["exact_match"]
    assert found.value == 75.0
    assert found.per_row == (100.0, 0.0, 100.0, 100.0)
    assert found.n == 4
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low < 75 < found.high <= 100
    assert found.settings["rules"] == "squad"


def test_scores_come_in_the_order_of_the_names_and_only_those_named() -> None:
    wanted = ["chrf", "token_f1", "bleu"]
    assert list(score(rows("yes", "no"), wanted, FAST)) == wanted
    assert score(rows("yes"), [], FAST) == {}


FORMS = [
    Row("một", normalize("NFD", "thành phố Huế ở đâu"), ("thành phố Huế ở đâu",), "g"),
    Row("hai", "\u200fﺍﻟﻘﺎﻫﺮﺓ مدينة في مصـر", ("القاهرة مدينة في مصر",), "g"),
    Row("ba", normalize("NFD", "부산 항구 는 여기"), ("부산 항구 는 여기\n",), "h"),
]


@pytest.mark.parametrize("rouge", ["unicode", "xlsum"])
def test_texts_in_another_form_have_all_the_scores_of_their_references(rouge: str) -> None:
    names = [name for name in NAMES if name not in ("bertscore_f1", "loss", "perplexity")]
    options = dataclasses.replace(FAST, rouge=rouge, language="vi")
    swapped = [Row(row.id, row.references[0], (row.prediction,), row.group) for row in FORMS]
    for answers in (FORMS, swapped):
        for name, found in score(answers, names, options).items():
            assert found.per_row == pytest.approx([100] * 3), name


def test_a_text_in_another_form_scores_as_its_normal_form() -> None:
    one = [Row("1", normalize("NFD", "năm ấy"), ("năm 1975 ấy",), "g")]
    other = [Row("1", "năm ấy", ("năm 1975 ấy",), "g")]
    names = ["token_f1", "bleu", "chrf", "rougeL"]
    found, wanted = (score(answers, names, FAST) for answers in (one, other))
    assert {name: s.value for name, s in found.items()} == {
        name: s.value for name, s in wanted.items()
    }
    assert found["token_f1"].value == pytest.approx(80)  # 2 common, 2 found, 3 wanted: 4/5


def test_systems_are_paired_by_ids_and_references_in_normal_form() -> None:
    theirs = [
        Row(normalize("NFD", row.id), "no", (f"\ufeff{row.references[0]} ",), normalize("NFD", "g"))
        for row in reversed(FORMS)
    ]
    found = compare(FORMS, theirs, ["exact_match"], FAST)["exact_match"]
    assert (found.a, found.b, found.n) == (100, 0, 3)
    twice = [*FORMS, Row(normalize("NFD", "một"), "x", ("x",))]
    with pytest.raises(ValueError, match="two rows have the id"):
        score(twice, ["chrf"], FAST)


def test_written_results_are_json() -> None:
    answers = [dataclasses.replace(row, loss=1.0, tokens=2) for row in rows("yes", "no")]
    names = ["exact_match", "token_f1", "bleu", "chrf", "loss", "perplexity"]
    for found in score(answers, names, FAST).values():
        written = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert written == found.to_json()
        assert list(written) == ["value", "low", "high", "n", "settings"]


def test_rows_of_one_group_leave_no_interval() -> None:
    found = score(rows("yes", "no", groups=("c", "c")), ["exact_match", "bleu"], FAST)
    assert {(one.low, one.high) for one in found.values()} == {(None, None)}


def test_rows_are_resampled_by_group() -> None:
    # Two groups of different rows: a resample has one group twice or both groups, so it scores 0,
    # 50 or 100. With single rows, eight rows would almost never be all right or all wrong.
    answers = ("yes",) * 4 + ("no",) * 4
    grouped = score(rows(*answers, groups=("a",) * 4 + ("b",) * 4), ["exact_match"], FAST)
    single = score(rows(*answers), ["exact_match"], FAST)
    assert (grouped["exact_match"].low, grouped["exact_match"].high) == (0.0, 100.0)
    assert single["exact_match"].low not in (None, 0.0)


def test_seed_confidence_and_resamples_reach_the_interval() -> None:
    answers = rows(*["yes", "no", "oh yes"] * 10)

    def ends(**changes: float) -> tuple[float | None, float | None]:
        found = score(answers, ["token_f1"], dataclasses.replace(FAST, **changes))["token_f1"]
        return found.low, found.high

    narrow, wide = ends(confidence=0.5), ends(confidence=0.99)
    assert ends() == ends()
    assert ends(seed=1) != ends()
    assert ends(resamples=0) == (None, None)
    assert None not in (*narrow, *wide)
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]  # type: ignore[operator]


def test_a_family_is_measured_once_whatever_is_asked_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def measure(rows, options):
        calls.append(len(rows))
        return {name: mean_measured([1.0] * len(rows), {}) for name in ("one", "two", "three")}

    family = Family(("one", "two", "three"), measure, lambda options: None)
    monkeypatch.setattr(scoring, "FAMILIES", (family,))
    monkeypatch.setattr(scoring, "METRICS", dict.fromkeys(family.names, family))
    assert list(score(rows("yes", "no"), ["three", "one", "three"], FAST)) == ["three", "one"]
    assert calls == [2]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no rows to score"),
        (rows("yes", "no") + rows("yes"), "two rows have the id 'r0'"),
        ([Row("q", "yes", ())], r"row 'q' has the references \(\)"),
        ([Row("q", "yes", "yes")], "row 'q' has the references 'yes'"),  # type: ignore[arg-type]
    ],
    ids=["none", "equal ids", "no reference", "a bare text"],
)
def test_rows_that_cannot_be_scored_are_refused_by_name(bad: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(bad, ["exact_match"], FAST)
    for pair in ((bad, rows("yes", "no")), (rows("yes", "no"), bad)):
        with pytest.raises(ValueError, match=message):
            compare(*pair, ["exact_match"], FAST)


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(ValueError, match="unknown metric 'rouge'; did you mean rouge"):
        score(rows("yes"), ["bleu", "rouge"], FAST)
    with pytest.raises(ValueError, match="unknown metric 'accuracy'; known: exact_match, token_f1"):
        missing(["accuracy"], FAST)


def test_a_metric_that_cannot_be_measured_is_refused_not_dropped() -> None:
    mlqa = dataclasses.replace(FAST, rules="mlqa", language="sw")
    assert list(missing(["bleu", "exact_match"], mlqa)) == ["exact_match"]
    with pytest.raises(ValueError, match="exact_match cannot be computed: .*'sw'.*'squad'"):
        score(rows("yes"), ["bleu", "exact_match"], mlqa)
    with pytest.raises(ValueError, match="row 'r0' has no loss"):
        score(rows("yes"), ["loss"], FAST)


def test_a_loss_that_is_no_number_is_refused_by_the_name_of_its_row() -> None:
    bad = [*rows("yes"), Row("q3", "", ("yes",), loss=math.nan, tokens=1)]
    with pytest.raises(ValueError, match="row 'q3' has the loss nan"):
        score([dataclasses.replace(bad[0], loss=1.0, tokens=1), bad[1]], ["loss"], FAST)


def test_a_comparison_pairs_rows_by_id_whatever_their_order() -> None:
    ours = rows(*["yes"] * 8, "no", "no")
    theirs = rows(*["no"] * 8, "yes", "no")
    exactly = Options(resamples=2**10)
    found = compare(ours, theirs[::-1], ["exact_match", "chrf"], exactly)
    assert list(found) == ["exact_match", "chrf"]
    exact = found["exact_match"]
    assert (exact.a, exact.b, exact.difference, exact.n) == (80.0, 10.0, 70.0, 10)
    assert exact.low is not None
    assert exact.high is not None
    assert 0 < exact.low < 70 < exact.high <= 100
    # Of nine rows that differ, one has the other sign. Swaps with at least this difference have
    # none or one row against the rest: 2 * (1 + 9) of 2^9.
    assert exact.p_value == pytest.approx(20 / 512)
    assert found == compare(ours, theirs, ["exact_match", "chrf"], exactly)


def test_equal_systems_differ_by_nothing() -> None:
    ours = rows("yes", "no", "oh yes", "")
    for found in compare(ours, ours, ["exact_match", "token_f1", "bleu", "chrf"], FAST).values():
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_the_groups_of_the_first_system_are_the_ones_resampled() -> None:
    ours, theirs = rows("yes", "yes"), rows("no", "no")
    assert compare(ours, theirs, ["exact_match"], FAST)["exact_match"].low == 100.0
    grouped = rows("yes", "yes", groups=("c", "c"))
    assert compare(grouped, theirs, ["exact_match"], FAST)["exact_match"].low is None


def test_systems_on_other_rows_are_refused_by_the_first_one_that_differs() -> None:
    ours = rows("yes", "no", "no")
    with pytest.raises(ValueError, match=r"row 'r1' is only in system A \(2 rows"):
        compare(ours, ours[:1], ["bleu"], FAST)
    with pytest.raises(ValueError, match="row 'r2' is only in system B"):
        compare(ours[:2], ours, ["bleu"], FAST)
    other = [ours[0], dataclasses.replace(ours[1], references=("yes", "no")), ours[2]]
    with pytest.raises(ValueError, match="row 'r1' has different references"):
        compare(ours, other, ["bleu"], FAST)


def test_a_row_without_a_group_is_a_group_of_its_own() -> None:
    assert Row("q", "", ("a",)).group == "q"
    assert Row("q", "", ("a",), "c").group == "c"


def test_the_mean_of_sums_is_the_mean_of_rows() -> None:
    found = mean_measured([1.0, 2.0, 6.0], {})
    assert found.statistics.dtype == np.float64
    assert found.value(found.statistics.sum(axis=0)) == 3.0


def test_long_references_are_cut_in_messages():
    with pytest.raises(ValueError, match=r"row 'q' has the references 'y+… \(500 characters\);"):
        score([Row("q", "yes", "y" * 500)], ["token_f1"], Options())  # type: ignore[arg-type]
