"""Language codes as users write them -> the codes that prompts, tokenizers and rules go by."""

import re

_CODE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]{2,8})*", re.IGNORECASE)

# Three letters (ISO 639-3, and its macrolanguages' members that are meant most often) or English
# names of the languages with a prompt or a rule of their own here.
_SAME = {
    "am": ("amh", "amharic"),
    "ar": ("ara", "arb", "arabic"),
    "bn": ("ben", "bengali"),
    "bo": ("bod", "tib", "tibetan"),
    "de": ("deu", "ger", "german"),
    "dz": ("dzo", "dzongkha"),
    "el": ("ell", "gre", "greek"),
    "en": ("eng", "english"),
    "es": ("spa", "spanish"),
    "fr": ("fra", "fre", "french"),
    "ha": ("hau", "hausa"),
    "hi": ("hin", "hindi"),
    "id": ("ind", "indonesian"),
    "ja": ("jpn", "japanese"),
    "km": ("khm", "khmer"),
    "ko": ("kor", "korean"),
    "lo": ("lao",),
    "my": ("mya", "bur", "burmese"),
    "ro": ("ron", "rum", "romanian"),
    "ru": ("rus", "russian"),
    "so": ("som", "somali"),
    "sw": ("swa", "swh", "swahili"),
    "th": ("tha", "thai"),
    "tr": ("tur", "turkish"),
    "ur": ("urd", "urdu"),
    "vi": ("vie", "vietnamese"),
    "yo": ("yor", "yoruba"),
    "yue": ("cantonese",),
    "zh": ("zho", "chi", "cmn", "chinese"),
}
_BY_NAME = {name: code for code, names in _SAME.items() for name in names}


def language_code(text: str) -> str:
    """Return a language's code, two letters where there are two: "zho" and "Chinese" are "zh".

    What follows a hyphen or underscore ("pt-BR") stays, behind a hyphen.

    Raises:
        ValueError: if it is neither a code nor one of the names known here.
    """
    first, *rest = re.split("[-_]", text.strip())
    known = _BY_NAME.get(first.lower())
    if known is None and not _CODE.fullmatch(text.strip()):
        raise ValueError(
            f"{text!r} is no language code; give two or three letters, such as ar, zh or sw"
        )
    return "-".join([known or first.lower(), *rest])
