import random
from collections import Counter
from functools import cache
from importlib.util import find_spec

import pytest
from rouge_score.rouge_scorer import RougeScorer

from grasp_lora.metrics import rouge
from grasp_lora.metrics.records import Options, Row
from grasp_lora.metrics.rouge import MODES, ROUGE
from grasp_lora.metrics.segment import tokens

NAMES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def scores(prediction, *references, language="en", mode="unicode"):
    options = Options(language=language, rouge=mode)
    measured = ROUGE.measure([Row("1", prediction, references)], options)
    return [float(measured[name].per_row[0]) for name in NAMES]


# language -> reference, prediction with one word changed, words of both, shared bigrams.
# With n words each and n - 1 bigrams, one changed word leaves n - 1 words in order: ROUGE-1 and
# ROUGE-L are (n - 1) / n, ROUGE-2 is shared / (n - 1).
GOLD = {
    # the last word of 4: bigrams 1-2 and 2-3 stay
    "ar": ("ذهب الولد إلى المدرسة.", "ذهب الولد إلى السوق،", 4, 2),
    # 我 今|明 天 去 北 京: the 2nd of 6; of 5 bigrams 天去, 去北, 北京 stay
    "zh": ("我今天去北京。", "我明天去北京！", 6, 3),
    # 猫|犬 が コ ー ヒ ー を 飲 む: the first of 9; of 8 bigrams 7 stay
    "ja": ("猫がコーヒーを飲む。", "犬がｺｰﾋｰを飲む", 9, 7),
    # ฉั น กิ|ดิ น น้ำ: the 3rd of 5; of 4 bigrams the first and the last stay
    "th": ("ฉันกินน้ำ", "ฉันดินน้ำ", 5, 2),
    # ខ្ញុំ ញ៉ាំ បា យ|ត: the last of 4
    "km": ("ខ្ញុំញ៉ាំបាយ។", "ខ្ញុំញ៉ាំបាត", 4, 2),
    # ຂ້ ອ ຍ ກິ|ບິ ນ ເ ຂົ້ າ: the 4th of 8; of 7 bigrams 2 go
    "lo": ("ຂ້ອຍກິນເຂົ້າ", "ຂ້ອຍບິນເຂົ້າ", 8, 5),
    # ငါ ရေ သော က်|တ်: the last of 4
    "my": ("ငါ ရေ သောက်။", "ငါရေသောတ်", 4, 2),
    # the 3rd of 4: of 3 bigrams the first stays
    "hi": ("राम घर जाता है।", "राम घर आता है", 4, 1),
    "am": ("አበበ፡ወደ፡ቤት፡ሄደ።", "አበበ ወደ ገበያ ሄደ", 4, 1),
    "ru": ("Мама мыла белую раму.", "мама мыла чёрную раму", 4, 1),
    # ışık izmir de çok güzel|kötü: the last of 5
    "tr": ("Işık İzmir'de çok güzel", "IŞIK izmir'de ÇOK kötü", 5, 3),
    # the cat|dog didn t sleep: the 2nd of 5; of 4 bigrams 2 stay
    "en": ("The cat didn't sleep.", "the dog didn't sleep", 5, 2),
    # die strasse ist|war sehr lang: the 3rd of 5
    "de": ("Die STRASSE ist sehr lang", "Die Straße war sehr lang", 5, 2),
    # the last of 4, the prediction in decomposed form
    "vi": ("Tôi uống cà phê", "To\u0302i uo\u0302\u0301ng ca\u0300 tra\u0300", 4, 2),
    # the 2nd of 3: no bigram stays
    "ko": ("나는 학교에 간다", "나는 집에 간다", 3, 0),
}


@pytest.mark.parametrize("language", GOLD)
def test_one_changed_word_costs_what_it_should_in_every_script(language):
    reference, prediction, words, shared = GOLD[language]
    kept = 100 * (words - 1) / words
    wanted = [kept, 100 * shared / (words - 1), kept, kept]
    assert scores(prediction, reference, language=language) == pytest.approx(wanted)


@pytest.mark.parametrize("language", GOLD)
def test_identical_texts_score_100_and_empty_or_other_texts_0(language):
    text = GOLD[language][0]
    other = "xyzzy plugh" if language != "en" else "甲乙丙"
    assert scores(text, text, language=language) == [100] * 4
    for prediction in ("", " \n", "…。؟!", other):
        assert scores(prediction, text, language=language) == [0] * 4
        assert scores(text, prediction, language=language) == [0] * 4
    assert scores("", "", language=language) == [0] * 4


def f1(hits, found, wanted):
    return 200 * hits / (found + wanted) if hits else 0.0


def ngram_f1(found, wanted, n):
    a, b = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in (found, wanted))
    return f1(sum((a & b).values()), sum(a.values()), sum(b.values()))


def lcs_f1(found, wanted):
    @cache
    def longest(i, j):
        if i == 0 or j == 0:
            return 0
        if found[i - 1] == wanted[j - 1]:
            return longest(i - 1, j - 1) + 1
        return max(longest(i - 1, j), longest(i, j - 1))

    return f1(longest(len(found), len(wanted)), len(found), len(wanted))


def test_random_chinese_texts_score_as_an_independent_count_of_their_characters():
    draw = random.Random(7)
    for _ in range(40):
        found, wanted = ("".join(draw.choices("天地人你我他", k=draw.randint(1, 25))) for _ in "ab")
        # Texts of one sentence: ROUGE-Lsum is ROUGE-L.
        lcs = lcs_f1(found, wanted)
        wanted_scores = [ngram_f1(found, wanted, 1), ngram_f1(found, wanted, 2), lcs, lcs]
        assert scores(found, wanted, language="zh") == pytest.approx(wanted_scores)


def test_plain_english_scores_as_rouge_score_does_without_its_stemmer():
    texts = [
        "The quick brown fox jumps over the lazy dog",
        "the quick brown dog jumped over 2 lazy foxes!",
        "A fox isn't a dog; dogs (3 of 4) are lazy.",
        "over the lazy dog the quick brown fox jumps",
    ]
    plain = RougeScorer(NAMES)
    for prediction in texts:
        for reference in texts:
            theirs = plain.score(reference, prediction)
            assert scores(prediction, reference) == [100 * theirs[n].fmeasure for n in NAMES]


def test_swapped_sentences_cost_rouge_l_but_not_rouge_lsum():
    # 4 words, 2 of them in a common order; sentence by sentence all 4 are found.
    assert scores("甲乙。丙丁。", "丙丁。甲乙。", language="zh")[2:] == [50, 100]
    assert scores("One two. Three four.", "three four. one two.")[2:] == [50, 100]


def test_a_text_with_lines_is_not_cut_into_sentences_again():
    # Left as one line, "one two. three four." shares two words in order with each swapped line.
    swapped = "three four. one two.\nfive"
    assert scores(swapped, "one two. three four.\nfive")[3] == pytest.approx(60)
    assert scores(swapped.replace("\n", " "), "one two. three four. five")[3] == 100


def test_the_best_reference_is_chosen_for_each_metric():
    # "d c b a" has all words in no order, "a b x y" half of them and 1 of 3 bigrams.
    found = scores("a b c d", "d c b a", "a b x y")
    assert found == pytest.approx([100, 100 / 3, 50, 50])


def test_the_value_is_the_mean_over_rows():
    rows = [Row("1", "a b", ("a b",)), Row("2", "a", ("b",)), Row("3", "a b", ("a c",))]
    measured = ROUGE.measure(rows, Options())["rouge1"]
    assert measured.per_row.tolist() == [100, 0, 50]
    assert measured.value(measured.statistics.sum(axis=0)) == 50


def test_the_settings_say_how_words_were_cut():
    row = Row("1", "你好", ("你好",))
    plain = ROUGE.measure([row], Options(language="zh"))["rougeL"].settings
    assert plain["mode"] == "unicode"
    assert plain["package"].startswith("rouge-score ")
    assert plain["stemmer"] is plain["segmenter"] is None
    xlsum = ROUGE.measure([row], Options(language="zh", rouge="xlsum"))["rougeL"].settings
    assert xlsum["segmenter"].startswith("jieba ")
    arabic = MODES["xlsum"]("ar").settings
    assert arabic["stemmer"].endswith(" arabic")
    assert "stop words" in arabic["unlike_xlsum"]


# (language, text, words as split and stemmed by the published scorer, reason)
XLSUM = [
    (
        "en",
        "Covid19 costs 2,000€, don't!",
        ["covid", "19", "cost", "2", "000", "€", "don", "t"],
        "",
    ),
    ("ar", "المكتبات في 2024", ["مكتب", "في", "2024"], "only words over 3 letters are stemmed"),
    ("ru", "красивая мама", ["красив", "мам"], "Russian"),
    ("zh", "我爱北京，天安门。", ["我", "爱", "北京", " ", "天安门"], "the gap of a comma counts"),
    ("zh-Hant", "北京ABC", ["北京", "abc"], "the first part of the code decides"),
    ("vi", "漢字ab", ["漢", "字", "ab"], "ideographs apart where there is no segmenter"),
    ("am", "ሰላም።ለዓለም", ["ሰላም", "ለዓለም"], "no stemmer"),
    ("fa", "می\u200cخواهم", ["میخواهم"], "joiners are controls and go"),
    ("ar", "", [], ""),
    ("zh", "。", [], ""),
]


@pytest.mark.parametrize(("language", "text", "wanted", "why"), XLSUM)
def test_xlsum_words_are_those_of_the_published_scorer(language, text, wanted, why):
    assert MODES["xlsum"](language).tokenize(text) == wanted, why


@pytest.mark.skipif(find_spec("pythainlp") is None, reason="the package pythainlp is not installed")
def test_xlsum_cuts_thai_into_dictionary_words():
    # cat eats fish, cat sees fish; the space counts as a word
    assert MODES["xlsum"]("th").tokenize("แมวกิน ปลา") == ["แมว", "กิน", " ", "ปลา"]
    found = scores("แมวกินปลา", "แมวเห็นปลา", language="th", mode="xlsum")
    assert found[:2] == pytest.approx([200 / 3, 0])


def test_a_stem_does_not_depend_on_the_words_before_it():
    words = "قالوا ذهبتم درسوا المكتبات كتابهم سيكتبون".split()
    cut = MODES["xlsum"]("ar").tokenize

    def stems(listed):
        rouge._stem.cache_clear()
        return dict(zip(listed, cut(" ".join(listed)), strict=True))

    first = stems(words)
    draw = random.Random(0)
    for _ in range(20):
        assert stems(draw.sample(words, len(words))) == first


def test_the_chinese_segmenter_loads_in_silence(capfd):
    rouge._segmenter.cache_clear()
    assert MODES["xlsum"]("zh").tokenize("我爱北京")[-1] == "北京"
    assert capfd.readouterr() == ("", "")


def test_the_reason_for_a_missing_score_has_a_remedy(monkeypatch):
    def missing(mode, language):
        return ROUGE.missing(Options(rouge=mode, language=language))

    for language in ("ar", "zh", "ja", "my"):
        assert missing("unicode", language) is None
    assert missing("xlsum", "ar") is None
    assert "choose one of: unicode, xlsum" in missing("words", "en")
    assert "no segmenter for Japanese" in missing("xlsum", "ja")
    assert "no stemmer for Hindi" in missing("xlsum", "hi-IN")
    assert "use the mode 'unicode'" in missing("xlsum", "bn")
    real = find_spec
    for absent, mode, language in [
        ("pythainlp", "xlsum", "th"),
        ("jieba", "xlsum", "zh-CN"),
        ("nltk", "xlsum", "en"),
        ("rouge_score", "unicode", "en"),
    ]:
        monkeypatch.setattr(
            rouge, "find_spec", lambda name, absent=absent: None if name == absent else real(name)
        )
        reason = missing(mode, language)
        assert absent.replace("_", "-") in reason
        assert "pip install" in reason


def test_unicode_words_are_cut_for_the_language_of_the_options():
    assert MODES["unicode"]("tr").tokenize("IŞIK") == tokens("IŞIK", "tr") == ["ışık"]
