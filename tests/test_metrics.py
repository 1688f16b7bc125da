import pytest

from grasp_lora.metrics import MLQA_ARTICLES, exact_match, mean_scores, normalize_answer, token_f1

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


@pytest.mark.parametrize(("language", "text", "form"), MLQA_FORMS)
def test_mlqa_rules_follow_the_published_script(language: str, text: str, form: str) -> None:
    assert normalize_answer(text, language, "mlqa") == form


def test_every_mlqa_language_has_a_hand_made_row() -> None:
    assert {language for language, _, _ in MLQA_FORMS} == set(MLQA_ARTICLES)


# (prediction, references, language, rules, exact match, F1)
GOLD = [
    ("the cat sat", ["Cat sat."], "en", "squad", 1.0, 1.0),
    # 2 tokens of 3 found, 2 of 2 wanted: p = 2/3, r = 1, F1 = 4/5
    ("big cat sat", ["cat sat"], "en", "squad", 0.0, 0.8),
    # the best of two references: 1 of 1 and 1 of 2 gives 2/3
    ("Paris", ["Rome", "Paris France"], "en", "squad", 0.0, 2 / 3),
    # a word counts as often as both have it: common 1, 3 found, 1 wanted: 2/4
    ("no no no", ["no"], "en", "squad", 0.0, 0.5),
    # common 2, 3 found, 2 wanted: 4/5
    ("no no yes", ["no no"], "en", "squad", 0.0, 0.8),
    ("dog", ["cat"], "en", "squad", 0.0, 0.0),
    ("", ["cat"], "en", "squad", 0.0, 0.0),
    ("la casa", ["casa"], "es", "squad", 0.0, 2 / 3),
    ("la casa", ["casa"], "es", "mlqa", 1.0, 1.0),
    ("ein Haus", ["das Haus"], "de", "mlqa", 1.0, 1.0),
    ("ein Haus", ["das Haus"], "de", "squad", 0.0, 0.5),
    # without spaces the answer is one token under "squad"; under "mlqa" 2 of 3 and 2 of 2
    ("北京市", ["北京"], "zh", "squad", 0.0, 0.0),
    ("北京市", ["北京"], "zh", "mlqa", 0.0, 0.8),
    ("القاهرة", ["قاهرة"], "ar", "mlqa", 1.0, 1.0),
    ("القاهرة", ["قاهرة"], "ar", "squad", 0.0, 0.0),
    ("नई दिल्ली", ["दिल्ली"], "hi", "mlqa", 0.0, 2 / 3),
    ("cái nhà", ["nhà"], "vi", "mlqa", 1.0, 1.0),
]


@pytest.mark.parametrize(("prediction", "references", "language", "rules", "match", "f1"), GOLD)
def test_scores_equal_values_worked_out_by_hand(
    prediction: str, references: list[str], language: str, rules: str, match: float, f1: float
) -> None:
    assert exact_match(prediction, references, language, rules) == match
    assert token_f1(prediction, references, language, rules) == pytest.approx(f1)


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
    with pytest.raises(ValueError, match="unknown rules 'bleu'.*squad, mlqa"):
        normalize_answer("x", "en", "bleu")
    with pytest.raises(ValueError, match="'fr'.*use the rules 'squad'"):
        normalize_answer("x", "fr", "mlqa")


def test_mean_scores_averages_each_score_by_itself() -> None:
    rows = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}, {"b": 1.0, "a": 0.5}]
    assert mean_scores(rows) == {"a": 0.5, "b": 0.5}


def test_mean_scores_refuses_nothing_and_unlike_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        mean_scores([])
    with pytest.raises(ValueError, match="different scores"):
        mean_scores([{"a": 1.0}, {"b": 1.0}])
