import unicodedata

import pytest

from grasp_lora.base.texts import contains, normal_form, without_vowel_marks

CAIRO = "القاهرة"

# (text, normal form, reason)
FORMS = [
    ("e\u0301te\u0301", "\u00e9t\u00e9", "decomposed letters are composed"),
    (unicodedata.normalize("NFD", "부산"), "부산", "decomposed Hangul too"),
    ("\ufe8d\ufedf\ufed8\ufe8e\ufeeb\ufeae\ufe93", CAIRO, "presentation forms are letters"),
    ("\ufefb", "لا", "a ligature is its two letters"),
    ("\ufdf2", "الله", "and a word ligature its four"),
    ("ﺍ\u0653", "\u0622", "letters from forms are composed with their marks"),
    ("القـــاهرة", CAIRO, "the tatweel only makes a word longer"),
    ("\ufe71", "\u064b", "also below a vowel mark by itself"),
    ("ب\ufe76ت", "ب\u064eت", "a vowel mark by itself brings no blank into the word"),
    (f"\u200f{CAIRO}\u200e \u2067\u202b\u061c", CAIRO, "direction marks, and the blank behind"),
    ("\ufeff1\u200b8\u20600\u00ad0", "1800", "what shows nothing"),
    ("葛\U000e0100❤\ufe0f", "葛❤", "variation selectors"),
    (" 1800\n", "1800", "outer blanks"),
    ("\u3000a \u00a0b\u2028", "a \u00a0b", "outer blanks of all kinds, inner ones stay"),
    ("می\u200cخواهم", "می\u200cخواهم", "the non-joiner makes another Persian word"),
    ("क्\u200dष", "क्\u200dष", "the joiner shows another Hindi form"),
    ("كَتَبَ", "كَتَبَ", "vowel marks stay"),
    ("هـ", "ه", "a single letter that is drawn connected"),
    ("١٢３ＡＢｶﾞ", "١٢３ＡＢｶﾞ", "digits and widths stay"),
    ("臺灣", "臺灣", "traditional letters are not simplified ones"),
    ("", "", "nothing"),
]


@pytest.mark.parametrize(("text", "form", "why"), FORMS)
def test_texts_are_compared_in_one_form(text: str, form: str, why: str) -> None:
    assert normal_form(text) == form, why
    assert normal_form(form) == form, "once is enough"


def test_every_arabic_presentation_form_is_its_letters() -> None:
    for code in (*range(0xFB50, 0xFDD0), *range(0xFE70, 0xFEFD)):
        wanted = unicodedata.normalize("NFKC", chr(code)).replace("\u0640", "").strip()
        assert normal_form(chr(code)) == unicodedata.normalize("NFC", wanted), hex(code)


def test_other_texts_are_in_nfc_alone() -> None:
    folded = [*range(0xFB50, 0xFE00), *range(0xFE00, 0xFE10), *range(0xFE70, 0xFF00), 0x640]
    invisible = [0xAD, 0x61C, 0x200B, 0x200E, 0x200F, 0x2060, *range(0x202A, 0x202F)]
    invisible += [*range(0x2066, 0x206A), *range(0xE0100, 0xE01F0), *range(0xD800, 0xE000)]
    for code in set(range(0x110000)) - {*folded, *invisible}:
        text = f"a{chr(code)}b"
        assert normal_form(text) == unicodedata.normalize("NFC", text), hex(code)


def test_a_part_is_found_in_any_form() -> None:
    assert contains("ﺍﻟﻘﺎﻫﺮﺓ مدينة", " القاهرة\n")
    assert contains(CAIRO, "ﺍﻟﻘﺎﻫﺮﺓ")
    assert contains(unicodedata.normalize("NFD", "năm 1975"), "năm")
    assert not contains(CAIRO, "القاهره")


def test_vowel_marks_are_dropped_and_other_marks_stay() -> None:
    assert without_vowel_marks("القَاهِرَة") == CAIRO
    assert without_vowel_marks("هٰذا كتابٌ مُمَزَّقٌ") == "هذا كتاب ممزق"
    assert without_vowel_marks("أ\u0654 हिन्दी é\u0301") == "أ\u0654 हिन्दी é\u0301"
