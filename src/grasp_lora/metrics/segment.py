"""Words and sentences of a text in any script, by rules of Unicode and no dictionary."""

import unicodedata

import regex

# Scripts written without spaces between words; each character is a word of its own there.
_CHARACTER = (
    r"[[\p{L}\p{Nl}]&&"
    r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Lao}\p{scx=Khmer}\p{scx=Myanmar}]]"
)
# Signs that belong to the character before them: marks, the vowel am of Thai and Lao (a letter by
# category), and what the Khmer coeng or the Burmese virama stacks below it. `\X` is not used: it
# parts the Burmese vowel aa from its consonant, and it changes with the version of Unicode.
_ATTACHED = rf"(?:[\p{{M}}\u0e33\u0eb3]|(?<=[\u17d2\u1039]){_CHARACTER})"
_LETTER = rf"[[\p{{L}}\p{{N}}]--{_CHARACTER}]"
# The joiners choose letter shapes inside a Persian or Bengali word; at its end they are noise.
_WORD = rf"{_LETTER}(?:[\u200c\u200d]*(?:{_LETTER}|\p{{M}}))*"
_BY_SCRIPT = {
    "ja": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "zh": regex.compile(r"\p{Han}"),
    "th": regex.compile(r"\p{Thai}"),
    "lo": regex.compile(r"\p{Lao}"),
    "km": regex.compile(r"\p{Khmer}"),
    "my": regex.compile(r"\p{Myanmar}"),
}
_TOKEN = regex.compile(f"(?V1)(?:{_CHARACTER}{_ATTACHED}*|{_WORD})")

# Soft hyphens and variation selectors change the look of a word, not the word.
_INVISIBLE = regex.compile("[\u00ad\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_DOTTED_I = str.maketrans({"İ": "i", "I": "ı"})
_CASES = {"tr": _DOTTED_I, "az": _DOTTED_I}

TOKEN_RULE = (
    "NFKC, case folded; Han, kana, Thai, Lao, Khmer, Burmese by character with its marks, "
    "else runs of letters, marks and digits"
)
"""What `tokens` does, in words for a report."""

_CLOSING = r"[\p{Pe}\p{Pf}\"'”’]*"
# These end a sentence wherever they stand.
_ALWAYS = r"[。！？｡؟۔।॥።፧។៕။]+"
# These do before white space only, so 3.5 stays whole; the point of an initial (J. Verne) never.
_BEFORE_SPACE = r"(?:[!?…]|(?<!(?<![\p{L}\p{M}\p{N}])\p{L})\.)[.!?…]*"
_END = regex.compile(rf"(?V1)(?:{_ALWAYS}{_CLOSING}|{_BEFORE_SPACE}{_CLOSING}(?=\s|$))|\n+")


def unspaced_language(text: str) -> str | None:
    """Return the language a text without spaces between words is in, by its script alone.

    Kana make it Japanese, Han without kana Chinese.

    Returns:
        "ja", "zh", "th", "lo", "km" or "my"; None if no letter is of such a script.
    """
    return next((code for code, found in _BY_SCRIPT.items() if found.search(text)), None)


def base_language(language: str) -> str:
    """Return the first part of a language code in lower case: "zh" for "zh-Hans" or "zh_CN"."""
    return language.lower().replace("_", "-").partition("-")[0]


def tokens(text: str, language: str = "en") -> list[str]:
    """Return the words of a text, case folded, without punctuation and symbols.

    The text is brought to NFKC first, so half-width kana, full-width Latin letters and Arabic
    presentation forms equal the common ones; the vowel am of Thai and Lao, which NFKC takes
    apart, is put together again. Characters of Han, kana, Thai, Lao, Khmer and Burmese are words
    of their own, with the marks they carry; in all other scripts, and for digits of any script,
    a run of letters, marks and digits is a word. For ASCII text these are the tokens of
    rouge-score without its stemmer.

    Args:
        text: any text; empty text has no words.
        language: code such as "tr", which decides how the letters I and İ become small.
    """
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    text = text.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3")
    return _TOKEN.findall(text.translate(_CASES.get(base_language(language), {})).casefold())


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, trimmed, in order.

    A sentence ends at a line break; behind 。！？ and their kin in Arabic, Urdu, Devanagari,
    Ethiopic, Khmer and Burmese script; and behind . ! ? … before white space, but for the point
    of a single letter. Closing quotes and brackets stay with the sentence. Thai and Lao mark no
    ends: only line breaks part them. Abbreviations of several letters (Dr.) are not known.
    """
    starts = [0, *(end.end() for end in _END.finditer(text))]
    parts = [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [part for part in parts if part]
