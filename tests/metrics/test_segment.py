import unicodedata

import pytest
from rouge_score.tokenize import tokenize

from grasp_lora.metrics.segment import base_language, sentences, tokens

# (language, text, words, reason)
WORDS = [
    (
        "zh",
        "我爱AI，2024年！",
        ["我", "爱", "ai", "2024", "年"],
        "Han apart, Latin and digits whole",
    ),
    ("zh", "〇々㐀𠮷", ["〇", "々", "㐀", "𠮷"], "rare ideographs, zero and the iteration mark"),
    ("zh", "ＡＢＣ１２３", ["abc123"], "full width is the same letters"),
    ("ja", "ｺｰﾋｰ", ["コ", "ー", "ヒ", "ー"], "half width is the same kana, long signs apart"),
    ("ja", "ｶﾞ", ["ガ"], "a half-width voicing mark joins its kana"),
    ("ja", "東京へ行く。", ["東", "京", "へ", "行", "く"], "Han and hiragana by character"),
    ("ja", "葛\U000e0100", ["葛"], "a variation selector is not a difference"),
    ("th", "น้ำดี ๒๕๖๗", ["น้ำ", "ดี", "๒๕๖๗"], "tone mark and vowel am stay, digits are one word"),
    ("lo", "ນ້ຳ", ["ນ້ຳ"], "the Lao am stays too"),
    ("km", "ខ្មែរ។", ["ខ្មែ", "រ"], "what the coeng stacks stays with its character"),
    ("my", "မင်္ဂလာ မာ", ["မ", "င်္ဂ", "လာ", "မာ"], "virama stacks, and the vowel aa stays"),
    ("ar", "كَتَبَ، الكتابُ؟", ["كَتَبَ", "الكتابُ"], "vowel signs stay in the word"),
    (
        "fa",
        "می\u200cخواهم\u200c.",
        ["می\u200cخواهم"],
        "a joiner inside a word stays, at its end goes",
    ),
    ("hi", "क्षत्रिय हिन्दी।", ["क्षत्रिय", "हिन्दी"], "vowel signs and conjuncts stay"),
    ("bn", "ক্\u200cষ বাংলা", ["ক্\u200cষ", "বাংলা"], "a conjunct with a joiner is one word"),
    ("am", "ሰላም፡ለዓለም።", ["ሰላም", "ለዓለም"], "the word separator parts"),
    ("ko", "한국어 문장", ["한국어", "문장"], "Korean has spaces"),
    ("de", "Straße STRASSE", ["strasse", "strasse"], "case folding, not only lower case"),
    ("el", "ΛΌΓΟΣ λόγος", ["λόγοσ", "λόγοσ"], "the final sigma too"),
    ("tr", "IŞIK İyi", ["ışık", "iyi"], "Turkish dotless and dotted i"),
    ("en", "IN İyi", ["in", "i̇yi"], "elsewhere I becomes i"),
    ("en", "soft\u00adhyphen", ["softhyphen"], "a soft hyphen is invisible"),
    ("en", "❤️ ok", ["ok"], "a symbol's variation selector is no word"),
    ("en", " \n\t。!", [], "nothing but punctuation"),
    ("en", "", [], "nothing"),
]


@pytest.mark.parametrize(("language", "text", "wanted", "why"), WORDS)
def test_words_are_cut_by_script(language, text, wanted, why):
    assert tokens(text, language) == wanted, why


def test_words_do_not_depend_on_the_unicode_form():
    for text in ("Tiếng Việt", "น้ำทำ", "한국어", "ガギ", "café", "ক্ষয়"):
        decomposed = unicodedata.normalize("NFD", text)
        assert tokens(decomposed) == tokens(text)
        assert tokens(unicodedata.normalize("NFKD", text)) == tokens(text)


def test_ascii_words_are_those_of_rouge_score():
    text = "Don't pay $3,000.50 to A_B-c@d.e; it's 50% (or 1/2) [x]{y}~ OK\tYES\n'end'"
    assert tokens(text) == tokenize(text, None)
    every_character = "".join(map(chr, range(128))) + "z"
    assert tokens(every_character) == tokenize(every_character, None)


# (text, sentences)
SENTENCES = [
    ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
    ("It costs 3.5 euros. Really?! Yes", ["It costs 3.5 euros.", "Really?!", "Yes"]),
    ("J. Verne and U.S. ships at 5 p.m. sail.", ["J. Verne and U.S. ships at 5 p.m. sail."]),
    ('He said "no." Then (he left.) So', ['He said "no."', "Then (he left.)", "So"]),
    ("今天好。他说：“好！”走了？对", ["今天好。", "他说：“好！”", "走了？", "对"]),
    ("هل ذهبت؟نعم. لا", ["هل ذهبت؟", "نعم.", "لا"]),
    ("یہ ہے۔وہ ہے", ["یہ ہے۔", "وہ ہے"]),
    ("यह है। वह है॥ ठीक", ["यह है।", "वह है॥", "ठीक"]),
    ("ሰላም።እንዴት፧ደህና", ["ሰላም።", "እንዴት፧", "ደህና"]),
    ("ខ្មែរ។ល្អ៕", ["ខ្មែរ។", "ល្អ៕"]),
    ("ထမင်းစား။သွား", ["ထမင်းစား။", "သွား"]),
    ("ฉันกินข้าว เขานอน\nเธอไป", ["ฉันกินข้าว เขานอน", "เธอไป"]),
    ("one line\n\n two. three ", ["one line", "two.", "three"]),
    (" \n ", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "wanted"), SENTENCES)
def test_sentences_end_at_the_marks_of_their_script(text, wanted):
    assert sentences(text) == wanted


def test_a_language_code_is_cut_to_its_first_part():
    assert [base_language(code) for code in ("zh", "zh-Hans", "pt_BR", "EN")] == [
        "zh",
        "zh",
        "pt",
        "en",
    ]
