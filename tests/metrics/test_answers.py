from unicodedata import normalize

import pytest

from grasp_lora.metrics import MLQA_ARTICLES, exact_match, normalize_answer, token_f1
from grasp_lora.metrics.answers import ANSWERS, RULES, answer_rules
from grasp_lora.metrics.records import Options, Row

# (text, normalised text, reason), by the rules of the published SQuAD v1.1 script
SQUAD_FORMS = [
    ("The Cat.", "cat", "article, case and full stop go"),
    ("an  apple\ta day", "apple day", "articles anywhere, white space as one space"),
    ("theatre", "theatre", "an article inside a word stays"),
    ("a.b-c", "abc", "punctuation goes without a space"),
    ("A.", "", "an article alone leaves nothing"),
    ("«uno»", "«uno»", "only ASCII punctuation goes"),
    ("la casa", "la casa", "only English articles go"),
    ("", "", "nothing stays nothing"),
]

# (language, text, normalised text), by the rules of mlqa_evaluation_v1
MLQA_FORMS = [
    ("en", "The «Cat»", "cat"),
    ("es", "¿Los gatos de la casa?", "gatos de casa"),
    ("es", "elefante", "elefante"),
    ("de", "Des Kaisers „neue“ Kleider", "kaisers neue kleider"),
    ("vi", "Những ngôi nhà của tôi", "ngôi nhà tôi"),
    # The published pattern removes every "ال", at the start of words and inside them.
    ("ar", "البيت الكبير", "بيت كبير"),
    ("ar", "الرمال", "رم"),
    ("ar", "قال", "ق"),
    ("ar", "باريس،", "باريس"),
    ("hi", "दिल्ली।", "दिल्ली"),
    ("hi", "the दिल्ली", "the दिल्ली"),
    ("zh", "《红楼梦》abc 12", "红 楼 梦 abc 12"),
    ("zh", "北京, China", "北 京 china"),
]


@pytest.mark.parametrize(("text", "form", "why"), SQUAD_FORMS)
@pytest.mark.parametrize("language", ["en", "es", "zh"])
def test_squad_rules_follow_the_english_script_in_every_language(
    text: str, form: str, why: str, language: str
) -> None:
    assert normalize_answer(text, language, "squad") == form, why


# (text, normalised text, reason), by "mlqa-fixed": the Arabic article only at the start of a word
FIXED_FORMS = [
    ("البيت الكبير", "بيت كبير", "at the start and behind a space"),
    ("الرمال", "رمال", "the end of the word stays"),
    ("قال", "قال", "a word that ends in it stays"),
    ("ال", "", "alone it leaves nothing"),
    ("والبيت", "والبيت", "behind a conjunction it stays"),
    ("«البيت»", "بيت", "punctuation goes first, so that the quoted word begins with it"),
    ("رأس_المال", "رأسالمال", "punctuation goes first, so that the second word does not begin"),
    ("بِالبيت", "بِالبيت", "behind a vowel mark it is inside the word"),
]


@pytest.mark.parametrize(("language", "text", "form"), MLQA_FORMS)
def test_mlqa_rules_follow_the_published_script(language: str, text: str, form: str) -> None:
    assert normalize_answer(text, language, "mlqa") == form
    if language != "ar":
        assert normalize_answer(text, language, "mlqa-fixed") == form


@pytest.mark.parametrize(("text", "form", "why"), FIXED_FORMS)
def test_fixed_rules_strip_the_arabic_article_only_where_a_word_begins(
    text: str, form: str, why: str
) -> None:
    assert normalize_answer(text, "ar", "mlqa-fixed") == form, why


# (language, text, normalised text, reason), by "unicode"
UNICODE_FORMS = [
    ("zh", "「海淀区」。", "海 淀 区", "characters apart, no punctuation"),
    ("zh", "１９９０年", "1990 年", "full-width digits are digits"),
    ("ja", "渋谷区です", "渋 谷 区 で す", "kana by character too"),
    ("th", "กรุงเทพ ", "ก รุ ง เ ท พ", "a mark stays with its letter"),
    ("bo", "ལྷ་ས།", "ལྷ ས", "Tibetan by syllable"),
    ("en", "The Cat.", "the cat", "articles stay"),
    ("de", "Straße 3,5", "strasse 3 5", "folded case; a comma parts numbers"),
    ("ar", "القَاهِرَةُ، مصر؟", "القاهرة مصر", "Arabic vowel marks and punctuation go"),
    ("hi", "दिल्ली।", "दिल्ली", "Hindi vowel signs stay"),
    ("tr", "IŞIK", "ışık", "the lower case of the language"),
    ("zh", "€。", "€。", "a text without words keeps its signs"),
    ("zh", "", "", "nothing stays nothing"),
]


@pytest.mark.parametrize(("language", "text", "form", "why"), UNICODE_FORMS)
def test_unicode_rules_take_words_of_any_script(
    language: str, text: str, form: str, why: str
) -> None:
    assert normalize_answer(text, language, "unicode") == form, why


@pytest.mark.parametrize(
    ("languages", "rules"),
    [
        (["zh", "zh-TW", "zh_Hans", "yue", "ja", "th", "lo", "km", "my", "bo", "dz"], "unicode"),
        (["en", "ar", "es", "hi", "ko", "sw", "vi", "tr", "und"], "squad"),
    ],
)
def test_the_rules_are_those_of_the_language_unless_others_are_asked_for(
    languages: list[str], rules: str
) -> None:
    for language in languages:
        assert answer_rules(language) == rules
        assert answer_rules(language, "mlqa") == "mlqa"
        measured = ANSWERS.measure([Row("1", "a", ("a",))], Options(language=language))
        assert {one.settings["rules"] for one in measured.values()} == {rules}


def test_every_mlqa_language_has_a_hand_made_case() -> None:
    assert {language for language, _, _ in MLQA_FORMS} == set(MLQA_ARTICLES)


ALL = tuple(RULES)
PUBLISHED = ("squad", "mlqa", "mlqa-fixed")

# (language, rules, prediction, references, exact match, F1)
GOLD = [
    # English: an article goes under all published rules; else 2 common, 3 found, 2 wanted: 4/5
    ("en", PUBLISHED, "the cat sat", ["Cat sat."], 1, 1),
    ("en", ("unicode",), "the cat sat", ["Cat sat."], 0, 0.8),
    # 2 tokens of 3 found, 2 of 2 wanted: p = 2/3, r = 1, F1 = 4/5
    ("en", ALL, "big cat sat", ["cat sat"], 0, 0.8),
    # the best of two references: 1 of 1 and 1 of 2 gives 2/3
    ("en", ALL, "Paris", ["Rome", "Paris France"], 0, 2 / 3),
    # the exact match may be a later reference
    ("en", ALL, "Paris", ["Paris France", "paris"], 1, 1),
    # a word counts as often as both have it: common 1, 3 found, 1 wanted: 2/4
    ("en", ALL, "no no no", ["no"], 0, 0.5),
    # common 2, 3 found, 2 wanted: 4/5
    ("en", ALL, "no no yes", ["no no"], 0, 0.8),
    ("en", ALL, "dog", ["cat"], 0, 0),
    ("en", ALL, "", ["cat"], 0, 0),
    # only MLQA takes quotation marks that are not ASCII: else no token is shared
    ("en", ("squad",), "“cat”", ["cat"], 0, 0),
    ("en", ("mlqa", "mlqa-fixed"), "“cat”", ["cat"], 1, 1),
    # Spanish: "la" is an article only to MLQA; else 1 common, 2 found, 1 wanted: 2/3
    ("es", ("squad",), "la casa", ["casa"], 0, 2 / 3),
    ("es", ("mlqa", "mlqa-fixed"), "¡La casa!", ["una casa"], 1, 1),
    ("es", ("unicode",), "¡La casa!", ["casa"], 0, 2 / 3),
    # the reverse: an English article, which only "squad" removes
    ("es", ("squad",), "a Madrid", ["Madrid"], 1, 1),
    ("es", ("mlqa", "mlqa-fixed"), "a Madrid", ["Madrid"], 0, 2 / 3),
    # German: articles of all cases; else 1 common, 2 found, 2 wanted: 2/4
    ("de", ("squad",), "ein Haus", ["das Haus"], 0, 0.5),
    ("de", ("mlqa", "mlqa-fixed"), "ein Haus", ["dem Haus"], 1, 1),
    ("de", ("unicode",), "„Straße“", ["STRASSE"], 1, 1),
    # Vietnamese: "cái" goes; else 1 common, 2 found, 1 wanted: 2/3
    ("vi", ("squad",), "cái nhà", ["nhà"], 0, 2 / 3),
    ("vi", ("mlqa", "mlqa-fixed"), "cái nhà", ["nhà"], 1, 1),
    ("vi", ("unicode",), "cái nhà", ["nhà"], 0, 2 / 3),
    # "mẹ của tôi" leaves "mẹ tôi": 1 common with "tôi", 2 found, 1 wanted: 2/3
    ("vi", ("mlqa", "mlqa-fixed"), "mẹ của tôi", ["tôi"], 0, 2 / 3),
    # Arabic: the article belongs to the word under "squad"
    ("ar", ("squad",), "القاهرة", ["قاهرة"], 0, 0),
    ("ar", ("mlqa", "mlqa-fixed"), "القاهرة", ["قاهرة"], 1, 1),
    # "mlqa" removes the end of "sands": "رم" stays, as for "الرم"
    ("ar", ("mlqa",), "الرمال", ["الرم"], 1, 1),
    ("ar", ("mlqa-fixed",), "الرمال", ["الرم"], 0, 0),
    ("ar", ("mlqa-fixed",), "الرمال", ["رمال"], 1, 1),
    # "mlqa" makes "شم" of "شمال": 1 common, 2 found, 2 wanted: 2/4
    ("ar", ("mlqa",), "شمال شرقي", ["شم غربي"], 0, 0.5),
    ("ar", ("mlqa-fixed",), "شمال شرقي", ["شم غربي"], 0, 0),
    # the Arabic comma is no ASCII: under "squad" 1 common of 2 and 2
    ("ar", ("squad",), "عمان، الأردن", ["عمان الأردن"], 0, 0.5),
    ("ar", ("mlqa", "mlqa-fixed"), "عمان، الأردن؟", ["عمان الأردن"], 1, 1),
    ("ar", ("unicode",), "عَمّان، الأردن؟", ["عمان الأردن"], 1, 1),
    # teh marbuta is not heh, and the article belongs to the word
    ("ar", ("squad", "unicode"), "القاهره", ["القاهرة"], 0, 0),
    ("ar", ("squad", "unicode"), "قاهرة", ["القاهرة"], 0, 0),
    # vowel marks stay under the published rules
    ("ar", PUBLISHED, "القَاهِرَة", ["القاهرة"], 0, 0),
    ("ar", ("unicode",), "القَاهِرَة", ["القاهرة"], 1, 1),
    # Hindi has no articles; the danda is punctuation to MLQA only
    ("hi", ALL, "नई दिल्ली", ["दिल्ली"], 0, 2 / 3),
    ("hi", ("squad",), "दिल्ली।", ["दिल्ली"], 0, 0),
    ("hi", ("mlqa", "mlqa-fixed", "unicode"), "दिल्ली।", ["दिल्ली"], 1, 1),
    # Chinese: one token under "squad"; characters apart under MLQA: 2 common, 3 and 2: 4/5
    ("zh", ("squad",), "北京市", ["北京"], 0, 0),
    ("zh", ("mlqa", "mlqa-fixed", "unicode"), "北京市", ["北京"], 0, 0.8),
    # Latin words and numbers stay whole: 1998, 年 and iphone are common, 4 found, 4 wanted: 6/8
    ("zh", ("mlqa", "mlqa-fixed", "unicode"), "1998年的iPhone", ["1998年iphone手"], 0, 6 / 8),
    # punctuation of either width is removed before characters are separated
    ("zh", ("mlqa", "mlqa-fixed", "unicode"), "《三国演义》。", ["三国演义"], 1, 1),
    ("zh", ("squad",), "《三国演义》。", ["三国演义"], 0, 0),
    # without the mark the two words become one: common 0
    ("zh", ("mlqa", "mlqa-fixed"), "a、b", ["a b"], 0, 0),
    ("zh", ("unicode",), "a、b", ["a b"], 1, 1),
    # 3 common, 6 found, 3 wanted: 6/9
    ("zh", ("mlqa", "mlqa-fixed", "unicode"), "北京市海淀区", ["海淀区"], 0, 2 / 3),
    # full-width digits are other tokens to the published rules: 1 common, 2 found, 2 wanted: 2/4
    ("zh", ("mlqa", "mlqa-fixed"), "１９９０年", ["1990年"], 0, 0.5),
    ("zh", ("unicode",), "１９９０年", ["1990年"], 1, 1),
    # traditional letters are not simplified ones
    ("zh", ALL, "臺灣", ["台湾"], 0, 0),
    # signs without a word are compared as they are
    ("zh", ("unicode",), "€", ["$"], 0, 0),
    # Japanese: 3 common, 6 and 3; 3 common, 5 and 3
    ("ja", ("squad",), "東京都渋谷区", ["渋谷区"], 0, 0),
    ("ja", ("unicode",), "東京都渋谷区", ["渋谷区"], 0, 6 / 9),
    ("ja", ("unicode",), "渋谷区です", ["渋谷区"], 0, 6 / 8),
    # Thai letters with their marks: 6 common, 12 found, 6 wanted
    ("th", ("squad",), "กรุงเทพมหานคร", ["กรุงเทพ"], 0, 0),
    ("th", ("unicode",), "กรุงเทพมหานคร", ["กรุงเทพ"], 0, 12 / 18),
    ("th", ("squad", "unicode"), "กรุงเทพ ", ["กรุงเทพ"], 1, 1),
]

# (language, prediction, reference): the same text in another form
SAME = [
    ("vi", normalize("NFD", "thành phố Huế"), "thành phố Huế"),
    ("ko", normalize("NFD", "부산"), "부산"),
    ("hi", normalize("NFD", "क़िला"), normalize("NFC", "क़िला")),
    ("ar", "ﺍﻟﻘﺎﻫﺮﺓ", "القاهرة"),
    ("ar", "القـــاهرة", "القاهرة"),
    ("ar", "\u200fالقاهرة", "القاهرة"),
    ("en", "\ufeff18\u200b00", " 1800\n"),
]


@pytest.mark.parametrize(("language", "one", "other"), SAME)
def test_a_text_in_another_form_is_the_same_answer_under_all_rules(
    language: str, one: str, other: str
) -> None:
    for rules in ALL:
        if rules in ("mlqa", "mlqa-fixed") and language not in MLQA_ARTICLES:
            continue
        for score in (exact_match, token_f1):
            assert score(one, [other], language, rules) == 1, rules
            assert score(other, [one], language, rules) == 1, rules


@pytest.mark.parametrize(("language", "rules", "prediction", "references", "match", "f1"), GOLD)
def test_scores_equal_values_worked_out_by_hand(
    language: str,
    rules: tuple[str, ...],
    prediction: str,
    references: list[str],
    match: float,
    f1: float,
) -> None:
    for name in rules:
        assert exact_match(prediction, references, language, name) == match, name
        assert token_f1(prediction, references, language, name) == pytest.approx(f1), name


def test_every_language_and_rule_has_a_case_worked_out_by_hand() -> None:
    covered = {(row[0], name) for row in GOLD for name in row[1]}
    assert covered >= {(language, name) for language in MLQA_ARTICLES for name in RULES}
    assert {language for language, name in covered if name == "unicode"} >= {"ja", "th"}


def test_answers_without_tokens_match_exactly_but_share_no_token() -> None:
    assert exact_match("the", ["a."]) == 1.0
    assert token_f1("the", ["a."]) == 0.0


@pytest.mark.parametrize("score", [exact_match, token_f1])
def test_scores_refuse_missing_references_and_a_bare_text(score) -> None:
    with pytest.raises(ValueError, match="at least one"):
        score("x", [])
    with pytest.raises(ValueError, match="list"):
        score("x", "xyz")


def test_unknown_rules_and_languages_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown rules 'bleu'.*squad, mlqa, mlqa-fixed, unicode"):
        normalize_answer("x", "en", "bleu")
    for rules in ("mlqa", "mlqa-fixed"):
        with pytest.raises(ValueError, match=f"{rules!r}.*'fr'.*use the rules 'squad'"):
            normalize_answer("x", "fr", rules)


def test_the_family_gives_means_in_hundredths_with_the_score_of_each_row() -> None:
    rows = [Row("1", "la casa", ("casa",)), Row("2", "un gato", ("perro", "gato negro"))]
    found = ANSWERS.measure(rows, Options(language="es", rules="mlqa"))
    assert list(found) == list(ANSWERS.names) == ["exact_match", "token_f1"]
    # "gato" against "gato negro": 1 common, 1 found, 2 wanted: 2/3
    assert found["exact_match"].per_row.tolist() == [100, 0]
    assert found["token_f1"].per_row == pytest.approx([100, 200 / 3])
    for measured, mean in zip(found.values(), (50, 250 / 3), strict=True):
        assert measured.value(measured.statistics.sum(axis=0)) == pytest.approx(mean)
        assert (measured.settings["rules"], measured.settings["language"]) == ("mlqa", "es")


def test_the_family_names_rules_that_do_not_cover_a_language_and_the_remedy() -> None:
    assert ANSWERS.missing(Options(language="sw", rules="squad")) is None
    assert ANSWERS.missing(Options(language="ar", rules="mlqa-fixed")) is None
    reason = ANSWERS.missing(Options(language="sw", rules="mlqa"))
    assert reason is not None
    assert "do not cover the language 'sw'" in reason
    assert reason.endswith("use the rules 'squad' or 'unicode'")
    assert "unknown rules 'xquad'" in str(ANSWERS.missing(Options(rules="xquad")))
