import pytest

from grasp_lora.metrics import MLQA_ARTICLES, exact_match, normalize_answer, token_f1
from grasp_lora.metrics.answers import ANSWERS, RULES
from grasp_lora.metrics.records import Options, Row

# (text, what is left of it, why), by the rules of the published SQuAD v1.1 script
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

# (language, text, what is left of it), by the rules of mlqa_evaluation_v1
MLQA_FORMS = [
    ("en", "The «Cat»", "cat"),
    ("es", "¿Los gatos de la casa?", "gatos de casa"),
    ("es", "elefante", "elefante"),
    ("de", "Des Kaisers „neue“ Kleider", "kaisers neue kleider"),
    ("vi", "Những ngôi nhà của tôi", "ngôi nhà tôi"),
    # The published pattern takes every "ال" out, at the start and inside of words.
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


# (text, what is left of it, why), by "mlqa-fixed": the Arabic article only where a word begins
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


def test_every_mlqa_language_has_a_hand_made_row() -> None:
    assert {language for language, _, _ in MLQA_FORMS} == set(MLQA_ARTICLES)


ALL = tuple(RULES)

# (language, rules, prediction, references, exact match, F1)
GOLD = [
    # English: an article goes under all rules
    ("en", ALL, "the cat sat", ["Cat sat."], 1, 1),
    # 2 tokens of 3 found, 2 of 2 wanted: p = 2/3, r = 1, F1 = 4/5
    ("en", ALL, "big cat sat", ["cat sat"], 0, 0.8),
    # the best of two references: 1 of 1 and 1 of 2 gives 2/3
    ("en", ALL, "Paris", ["Rome", "Paris France"], 0, 2 / 3),
    # the reference matched exactly may stand behind
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
    # the same in another way: the English article, which only "squad" takes
    ("es", ("squad",), "a Madrid", ["Madrid"], 1, 1),
    ("es", ("mlqa", "mlqa-fixed"), "a Madrid", ["Madrid"], 0, 2 / 3),
    # German: articles of all cases; else 1 common, 2 found, 2 wanted: 2/4
    ("de", ("squad",), "ein Haus", ["das Haus"], 0, 0.5),
    ("de", ("mlqa", "mlqa-fixed"), "ein Haus", ["dem Haus"], 1, 1),
    # Vietnamese: "cái" goes; else 1 common, 2 found, 1 wanted: 2/3
    ("vi", ("squad",), "cái nhà", ["nhà"], 0, 2 / 3),
    ("vi", ("mlqa", "mlqa-fixed"), "cái nhà", ["nhà"], 1, 1),
    # "mẹ của tôi" leaves "mẹ tôi": 1 common with "tôi", 2 found, 1 wanted: 2/3
    ("vi", ("mlqa", "mlqa-fixed"), "mẹ của tôi", ["tôi"], 0, 2 / 3),
    # Arabic: the article belongs to the word under "squad"
    ("ar", ("squad",), "القاهرة", ["قاهرة"], 0, 0),
    ("ar", ("mlqa", "mlqa-fixed"), "القاهرة", ["قاهرة"], 1, 1),
    # "sands" loses its end under "mlqa": "رم" is left, as it is of "الرم"
    ("ar", ("mlqa",), "الرمال", ["الرم"], 1, 1),
    ("ar", ("mlqa-fixed",), "الرمال", ["الرم"], 0, 0),
    ("ar", ("mlqa-fixed",), "الرمال", ["رمال"], 1, 1),
    # "mlqa" makes "شم" of "شمال": 1 common, 2 found, 2 wanted: 2/4
    ("ar", ("mlqa",), "شمال شرقي", ["شم غربي"], 0, 0.5),
    ("ar", ("mlqa-fixed",), "شمال شرقي", ["شم غربي"], 0, 0),
    # the Arabic comma is no ASCII: under "squad" 1 common of 2 and 2
    ("ar", ("squad",), "عمان، الأردن", ["عمان الأردن"], 0, 0.5),
    ("ar", ("mlqa", "mlqa-fixed"), "عمان، الأردن؟", ["عمان الأردن"], 1, 1),
    # Hindi has no articles; the danda is punctuation to MLQA only
    ("hi", ALL, "नई दिल्ली", ["दिल्ली"], 0, 2 / 3),
    ("hi", ("squad",), "दिल्ली।", ["दिल्ली"], 0, 0),
    ("hi", ("mlqa", "mlqa-fixed"), "दिल्ली।", ["दिल्ली"], 1, 1),
    # Chinese: one token under "squad"; characters apart under MLQA: 2 common, 3 and 2: 4/5
    ("zh", ("squad",), "北京市", ["北京"], 0, 0),
    ("zh", ("mlqa", "mlqa-fixed"), "北京市", ["北京"], 0, 0.8),
    # Latin words and numbers stay whole: 1998, 年 and iphone are common, 4 found, 4 wanted: 6/8
    ("zh", ("mlqa", "mlqa-fixed"), "1998年的iPhone", ["1998年iphone手"], 0, 6 / 8),
    # punctuation of either width goes before characters are parted
    ("zh", ("mlqa", "mlqa-fixed"), "《三国演义》。", ["三国演义"], 1, 1),
    ("zh", ("squad",), "《三国演义》。", ["三国演义"], 0, 0),
    # without the mark the two words become one: common 0
    ("zh", ("mlqa", "mlqa-fixed"), "a、b", ["a b"], 0, 0),
]


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


def test_every_language_and_rule_has_a_row_worked_out_by_hand() -> None:
    covered = {(row[0], name) for row in GOLD for name in row[1]}
    assert covered == {(language, name) for language in MLQA_ARTICLES for name in RULES}


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
    with pytest.raises(ValueError, match="unknown rules 'bleu'.*squad, mlqa, mlqa-fixed"):
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


def test_the_family_says_which_rules_do_not_cover_a_language_and_what_to_do() -> None:
    assert ANSWERS.missing(Options(language="sw", rules="squad")) is None
    assert ANSWERS.missing(Options(language="ar", rules="mlqa-fixed")) is None
    reason = ANSWERS.missing(Options(language="sw", rules="mlqa"))
    assert reason is not None
    assert "do not cover the language 'sw'" in reason
    assert reason.endswith("use the rules 'squad'")
    assert "unknown rules 'xquad'" in str(ANSWERS.missing(Options(rules="xquad")))
