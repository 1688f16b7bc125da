import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from grasp_lora.metrics.overlap import OVERLAP, bleu_tokenizer, bleu_value, chrf_value
from grasp_lora.metrics.records import Measured, Options, Row
from grasp_lora.tasks.encoding import UNSEGMENTED

# language, tokenizer -> (prediction, reference) pairs
TEXTS = {
    ("ar", "13a"): [
        ("أعلنت المدينة افتتاح الجسر الجديد يوم الأحد.", "أعلنت المدينة عن افتتاح الجسر، الأحد."),
        ("يشرب الأولاد الحليب الدافئ كل صباح.", "يشرب الأولاد الحليب كل صباح قبل المدرسة."),
    ],
    ("zh", "zh"): [
        ("这家书店每天早上九点开门。", "那家书店每天上午九点开门。"),
        ("他买了3本书和一支笔,花了20元。", "他买了3本书和两支笔,一共花了20元。"),
    ],
    ("de", "13a"): [
        ("Die Brücke wurde am Sonntag nach drei Jahren offen.", "Am Sonntag wurde sie eröffnet."),
        ("Der Zug fährt um 8.30 Uhr, nicht um 9 Uhr.", "Der Zug fährt um 8.30 Uhr, nicht später."),
    ],
    ("th", "char"): [
        ("แมวนอนบนเก้าอี้สีแดง", "แมวสีดำนอนบนเก้าอี้"),
        ("วันนี้อากาศร้อนมาก", "วันนี้อากาศร้อนเล็กน้อย"),
    ],
}


def rows_of(pairs: list[tuple[str, tuple[str, ...]]]) -> list[Row]:
    return [Row(str(i), text, references) for i, (text, references) in enumerate(pairs)]


def measured(name: str, rows: list[Row], language: str = "en") -> Measured:
    family = next(family for family in OVERLAP if name in family.names)
    return family.measure(rows, Options(language=language))[name]


def value(found: Measured) -> float:
    return float(found.value(found.statistics.sum(axis=0)))


def streams(rows: list[Row]) -> list[list[Any]]:
    widest = max(len(row.references) for row in rows)
    return [[(*row.references, *[None] * widest)[i] for row in rows] for i in range(widest)]


def random_rows(seed: int, count: int, longest: int = 9) -> list[Row]:
    """Return answers of few words, so that matches, ties and absent orders are common."""
    draw = random.Random(seed)

    def text(shortest: int) -> str:
        words = draw.choices(
            ["aa", "b", "abc", "cab", "東京", "."], k=draw.randint(shortest, longest)
        )
        return " ".join(words)

    return rows_of(
        [(text(0), tuple(text(1) for _ in range(draw.randint(1, 3)))) for _ in range(count)]
    )


@pytest.mark.parametrize(("language", "tokenizer"), TEXTS)
def test_scores_and_signatures_equal_those_of_the_sacrebleu_command(
    language: str, tokenizer: str, tmp_path: Path
) -> None:
    pairs = TEXTS[language, tokenizer]
    for name, column in (("hyp", 0), ("ref", 1)):
        lines = "\n".join(pair[column] for pair in pairs) + "\n"
        (tmp_path / name).write_text(lines, encoding="utf-8")
    rows = rows_of([(text, (reference,)) for text, reference in pairs])
    for metric in ("bleu", "chrf"):
        command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", metric, "-w", "9"]
        command += ["--format", "text", *(["-tok", tokenizer] if metric == "bleu" else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        title, printed = done.stdout.split(" = ")[:2]
        found = measured(metric, rows, language)
        assert title.split("|", 1)[1] == found.settings["signature"]
        assert value(found) == pytest.approx(float(printed.split()[0]), abs=1e-8)
        assert 1 < value(found) < 99, "texts that are equal or unlike would prove nothing"


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", range(8))
def test_sums_over_rows_score_as_sacrebleu_scores_the_corpus(seed: int, count: int) -> None:
    rows = random_rows(seed, count)
    texts = [row.prediction for row in rows]
    bleu, chrf = BLEU(), CHRF()
    wanted_bleu = bleu.corpus_score(texts, streams(rows)).score
    wanted_chrf = chrf.corpus_score(texts, streams(rows)).score
    found_bleu, found_chrf = measured("bleu", rows), measured("chrf", rows)
    assert value(found_bleu) == pytest.approx(wanted_bleu, rel=1e-12, abs=1e-12)
    assert value(found_chrf) == wanted_chrf
    assert found_bleu.settings["signature"] == str(bleu.get_signature())
    assert found_chrf.settings["signature"] == str(chrf.get_signature())


def test_row_scores_equal_sentence_scores_of_sacrebleu() -> None:
    rows = random_rows(0, 60)
    for name, metric in (("bleu", BLEU(effective_order=True)), ("chrf", CHRF())):
        wanted = [metric.sentence_score(row.prediction, row.references).score for row in rows]
        assert measured(name, rows).per_row == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(30))
def test_bleu_of_any_counts_equals_sacrebleus(seed: int) -> None:
    draw = np.random.default_rng(seed)
    total = np.sort(draw.integers(0, 12, size=(50, 4)))[:, ::-1]
    matched = (total * draw.random((50, 4)) * draw.integers(0, 2, size=(50, 4))).astype(int)
    lengths = np.stack([total[:, 0], draw.integers(0, 15, size=50)], axis=1)
    found = bleu_value(np.concatenate([lengths, matched, total], axis=1).astype(float))
    wanted = [
        BLEU.compute_bleu(m.tolist(), t.tolist(), int(ours), int(theirs), "exp").score
        for m, t, (ours, theirs) in zip(matched, total, lengths, strict=True)
    ]
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_bleu_of_one_short_sentence_equals_the_value_worked_out_by_hand() -> None:
    # "a b c d e" against "a b c x": n-grams matched 3 of 5, 2 of 4, 1 of 3, 0 of 2; the order
    # without a match counts as half a match; longer than the reference, so no penalty.
    rows = rows_of([("a b c d e", ("a b c x",))])
    assert value(measured("bleu", rows)) == pytest.approx(
        100 * (3 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25
    )
    # "a b c x" against "a b c x y z": all n-grams match, 4 words for 6: exp(1 - 6/4).
    rows = rows_of([("a b c x", ("a b c x y z",))])
    assert value(measured("bleu", rows)) == pytest.approx(100 * np.exp(-0.5))


def test_chrf_of_one_short_word_equals_the_value_worked_out_by_hand() -> None:
    # "ab" against "abc": letters 2 of 2 and of 3, pairs 1 of 1 and of 2; "ab" has no triple.
    # Precision 1, recall (2/3 + 1/2) / 2 = 7/12; F2 = 5 * 7/12 / (4 + 7/12) = 35/55.
    assert value(measured("chrf", rows_of([("a b", ("abc",))]))) == pytest.approx(100 * 35 / 55)


def test_one_wrong_word_costs_a_chinese_sentence_only_part_of_its_score() -> None:
    # 12 characters, the last one wrong: it is in one n-gram of each order, of 12, 11, 10 and 9.
    rows = rows_of([("今天下午我们去海边散步吗", ("今天下午我们去海边散步吧",))])
    found = measured("bleu", rows, "zh")
    assert value(found) == pytest.approx(100 * (11 / 12 * 10 / 11 * 9 / 10 * 8 / 9) ** 0.25)
    assert found.settings["tokenizer"] == "zh"
    assert value(measured("bleu", rows, "en")) == 0.0, "the wrong tokenizer would show"


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_empty_predictions_score_0(name: str, text: str) -> None:
    full = ("the cat sat on the mat", ("the cat sat on the mat",))
    empty = (text, ("the dog ran", "a dog"))
    alone, mixed = measured(name, rows_of([empty, empty])), measured(name, rows_of([empty, full]))
    assert value(alone) == 0.0
    assert alone.per_row.tolist() == [0.0, 0.0]
    assert mixed.per_row == pytest.approx([0.0, 100.0])
    assert 0 < value(mixed) < 100, "a missing answer costs the others, too"


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_empty_references_neither_crash_nor_score(name: str) -> None:
    found = measured(name, rows_of([("a cat", ("",)), ("", ("",))]))
    assert value(found) == 0.0
    assert found.per_row.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ar", "بدأت المدرسة أمس في المدينة"),
        ("zh", "学校昨天开学了"),
        ("hi", "कल स्कूल फिर से खुल गया"),
        ("th", "โรงเรียนเปิดเมื่อวานนี้"),
    ],
)
def test_identical_texts_of_any_script_score_100(name: str, language: str, text: str) -> None:
    assert value(measured(name, rows_of([(text, ("x", text))]), language)) == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "score"), [("bleu", bleu_value), ("chrf", chrf_value)], ids=["bleu", "chrf"]
)
def test_values_of_many_resamples_equal_those_of_each(
    name: str, score: Callable[[np.ndarray], np.ndarray]
) -> None:
    statistics = measured(name, random_rows(1, 20)).statistics
    drawn = np.random.default_rng(0).integers(0, 20, size=(3, 5, 20))
    sums = statistics[drawn].sum(axis=-2)
    together = score(sums)
    assert together.shape == (3, 5)
    for i, j in np.ndindex(3, 5):
        assert together[i, j] == score(sums[i, j])


SENTENCES = {
    "bo": "ལྷ་ས་ནི་བོད་ཀྱི་རྒྱལ་ས་ཡིན།",
    "dz": "ཐིམ་ཕུ་འདི་འབྲུག་གི་རྒྱལ་ས་ཨིན།",
    "ja": "東京は日本の首都です",
    "km": "ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា",
    "lo": "ວຽງຈັນແມ່ນນະຄອນຫຼວງຂອງປະເທດລາວ",
    "my": "နေပြည်တော်သည်မြန်မာနိုင်ငံ၏မြို့တော်ဖြစ်သည်",
    "th": "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
    "yue": "北京係中國嘅首都",
    "zh": "北京是中国的首都",
}


@pytest.mark.parametrize("language", sorted(UNSEGMENTED))
def test_a_sentence_without_spaces_that_is_its_reference_scores_in_full(language: str) -> None:
    text = SENTENCES[language]
    found = measured("bleu", rows_of([(text, (text,))]), language)
    assert value(found) == pytest.approx(100)
    assert found.per_row == pytest.approx(100)
    # One wrong character leaves most of the score, because the sentence is not one word.
    assert 30 < value(measured("bleu", rows_of([(text[:-1], (text,))]), language)) < 100


def test_languages_without_spaces_between_words_get_a_tokenizer_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("grasp_lora.metrics.overlap.find_spec", lambda name: None)
    absent = {code: bleu_tokenizer(code) for code in ("zh", "zh-CN", "zh_TW", "ja", "ko", "th")}
    assert absent == {
        "zh": "zh", "zh-CN": "zh", "zh_TW": "zh", "ja": "char", "ko": "char", "th": "char"
    }  # fmt: skip
    assert {bleu_tokenizer(code) for code in ("km", "lo", "my")} == {"char"}
    assert {bleu_tokenizer(code) for code in ("ar", "en", "hi", "sw", "vi")} == {"13a"}
    monkeypatch.setattr("grasp_lora.metrics.overlap.find_spec", lambda name: name)
    assert (bleu_tokenizer("ja"), bleu_tokenizer("ko")) == ("ja-mecab", "ko-mecab")


def test_settings_name_what_the_score_depends_on() -> None:
    settings = measured("bleu", random_rows(0, 3), "zh").settings
    assert settings["tokenizer"] == "zh"
    assert settings["language"] == "zh"
    assert settings["version"] == sacrebleu.__version__
    assert settings["signature"].startswith("nrefs:")


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [family.missing(Options()) for family in OVERLAP] == [None, None]
    monkeypatch.setattr("grasp_lora.metrics.overlap.find_spec", lambda name: None)
    for family in OVERLAP:
        assert "pip install 'grasp-lora[metrics]'" in str(family.missing(Options()))
