"""Split texts of any script into words and sentences, by Unicode rules without a dictionary."""

import unicodedata

import regex

from grasp_lora.base.texts import normal_form

# Scripts without spaces between words, where each character is one word.
_CHARACTER = (
    r"[[\p{L}\p{Nl}]&&"
    r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Lao}\p{scx=Khmer}\p{scx=Myanmar}]]"
)
# Signs that belong to the character before them: marks, the vowel am of Thai and Lao (a letter by
# category), and consonants that the Khmer coeng or the Burmese virama stacks below it. `\X` is not
# used, because it splits the Burmese vowel aa from its consonant and changes between Unicode
# versions.
_ATTACHED = rf"(?:[\p{{M}}\u0e33\u0eb3]|(?<=[\u17d2\u1039]){_CHARACTER})"
_LETTER = rf"[[\p{{L}}\p{{N}}]--{_CHARACTER}]"
# Joiners select letter shapes inside a Persian or Bengali word; at its end they are noise.
_WORD = rf"{_LETTER}(?:[\u200c\u200d]*(?:{_LETTER}|\p{{M}}))*"
_BY_SCRIPT = {
    "ja": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "zh": regex.compile(r"\p{Han}"),
    "th": regex.compile(r"\p{Thai}"),
    "lo": regex.compile(r"\p{Lao}"),
    "km": regex.compile(r"\p{Khmer}"),
    "my": regex.compile(r"\p{Myanmar}"),
    "bo": regex.compile(r"\p{Tibetan}"),
}
_TOKEN = regex.compile(f"(?V1)(?:{_CHARACTER}{_ATTACHED}*|{_WORD})")

_DOTTED_I = str.maketrans({"İ": "i", "I": "ı"})
_CASES = {"tr": _DOTTED_I, "az": _DOTTED_I}

TOKEN_RULE = (
    "NFKC, case folded; Han, kana, Thai, Lao, Khmer, Burmese by character with its marks, "
    "else runs of letters, marks and digits"
)
"""The rule of `tokens` in words, for the record of a score."""

_CLOSING = r"[\p{Pe}\p{Pf}\"'”’]*"
# These marks end a sentence everywhere.
_ALWAYS = r"[。！？｡؟۔।॥።፧។៕။]+"
# These end it only before white space, so 3.5 stays whole. The point of an initial never does.
_BEFORE_SPACE = r"(?:[!?…]|(?<!(?<![\p{L}\p{M}\p{N}])\p{L})\.)[.!?…]*"
_END = regex.compile(rf"(?V1)(?:{_ALWAYS}{_CLOSING}|{_BEFORE_SPACE}{_CLOSING}(?=\s|$))|\n+")


def unspaced_language(text: str) -> str | None:
    """Return the language of a text in a script without spaces between words.

    Only the script decides: a text with kana is Japanese, a text with Han but no kana is Chinese.

    Returns:
        "ja", "zh", "th", "lo", "km", "my" or "bo"; None if no letter is of such a script.
    """
    return next((code for code, found in _BY_SCRIPT.items() if found.search(text)), None)


def base_language(language: str) -> str:
    """Return the first part of a language code in lower case: "zh" for "zh-Hans" or "zh_CN"."""
    return language.lower().replace("_", "-").partition("-")[0]


def tokens(text: str, language: str = "en") -> list[str]:
    """Return the words of a text, case folded, without punctuation and symbols.

    The text is first brought to its normal form and to NFKC, so that half-width kana and full-width
    Latin letters equal the common forms. NFKC splits the vowel am of Thai and Lao, which is
    then joined again. Each character of Han, kana, Thai, Lao, Khmer and Burmese is one word,
    together with its marks. In all other scripts, and for digits of any script, a run of letters,
    marks and digits is one word. For ASCII text the words equal the tokens of rouge-score without
    its stemmer.

    Args:
        text: any text; empty text has no words.
        language: code such as "tr"; it decides the lower case of the letters I and İ.
    """
    text = unicodedata.normalize("NFKC", normal_form(text))
    text = text.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3")
    return _TOKEN.findall(text.translate(_CASES.get(base_language(language), {})).casefold())


def sentences(text: str) -> list[str]:
    """Return the sentences of a text in order, without white space at their ends.

    A sentence ends at a line break. It ends after 。！？ and the matching marks of Arabic, Urdu,
    Devanagari, Ethiopic, Khmer and Burmese. It ends after . ! ? … before white space, except after
    the point of a single letter (J. Verne). Closing quotes and brackets belong to the sentence.
    Thai and Lao have no end marks, so only line breaks split them. Abbreviations of several letters
    (Dr.) are not recognised.
    """
    starts = [0, *(end.end() for end in _END.finditer(text))]
    parts = [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [part for part in parts if part]
