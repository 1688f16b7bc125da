"""Language codes and names as users write them -> the codes that prompts and metrics use."""

import re

from grasp_lora.base.words import shown

_CODE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]{2,8})*", re.IGNORECASE)

# Other spellings of the languages that have a prompt or a metric rule here: three-letter codes
# (ISO 639-3, with the most common member of a macrolanguage) and English names.
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
    """Return the code of a language, with two letters if there is such a code.

    "zho" and "Chinese" become "zh". A part after a hyphen or underscore ("pt_BR") is kept after a
    hyphen.

    Raises:
        ValueError: the text is neither a code nor one of the names known here.
    """
    first, *rest = re.split("[-_]", text.strip())
    known = _BY_NAME.get(first.lower())
    if known is None and not _CODE.fullmatch(text.strip()):
        raise ValueError(
            f"{shown(text)} is no language code; give two or three letters, such as ar, zh or sw"
        )
    return "-".join([known or first.lower(), *rest])
