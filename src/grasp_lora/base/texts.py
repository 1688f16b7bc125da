"""The form in which texts are compared, and the languages written without spaces between words."""

import re
import unicodedata

UNSEGMENTED = frozenset({"bo", "dz", "ja", "km", "lo", "my", "th", "yue", "zh"})
"""Codes of languages written without spaces between words."""

NORMAL_FORM = (
    "NFC; Arabic presentation forms as letters; no tatweel, direction marks, zero-width spaces, "
    "soft hyphens, variation selectors or outer blanks"
)
"""The rule of `normal_form` in words, for the record of a score."""

# The joiners U+200C and U+200D stay: in Persian and in Indic scripts they make another word.
_INVISIBLE = (
    "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufe00-\ufe0f\ufeff"
    "\U000e0100-\U000e01ef"
)
_DROPPED = re.compile(f"[\u0640{_INVISIBLE}]")
_PRESENTATION_FORM = re.compile("[\ufb50-\ufdff\ufe70-\ufefc]")
_VOWEL_MARK = re.compile("[\u064b-\u0652\u0670]")


def normal_form(text: str) -> str:
    """Return the form of a text in which it is compared with others; apply it to both sides.

    Texts that look the same and mean the same become equal: the text is in Unicode NFC; Arabic
    presentation forms (U+FB50-FDFF, U+FE70-FEFC) are the letters that they show; the tatweel and
    the signs that show nothing (direction marks, zero-width space, word joiner, byte order mark,
    soft hyphen, variation selectors) are dropped, and so are white space characters at both ends.
    Everything else stays: the joiners, vowel marks, letter case, full-width letters and digits.
    Applied twice it changes nothing more.
    """
    if text.isascii():
        return text.strip()
    letters = _PRESENTATION_FORM.sub(_letters, text)
    return unicodedata.normalize("NFC", _DROPPED.sub("", letters)).strip()


def contains(text: str, part: str) -> bool:
    """Return whether a text contains another, both in normal form."""
    return normal_form(part) in normal_form(text)


def without_vowel_marks(text: str) -> str:
    """Return a text without the Arabic vowel marks (U+064B-0652, U+0670), which writers may omit.

    Arabic presentation forms must have become letters before, see `normal_form`.
    """
    return _VOWEL_MARK.sub("", text)


def _letters(form: re.Match[str]) -> str:
    # A vowel mark by itself has a blank before it, which is not in the word.
    return unicodedata.normalize("NFKC", form[0]).strip()
