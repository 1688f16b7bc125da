"""The tokens around the two sides of an encoder-decoder: a prompt, and the answer to it.

The encoder reads the prompt with the tokens that the tokenizer puts around a text. The decoder
begins with the tokens that the tokenizer and the model put ahead of an answer. In models of many
languages (mBART, NLLB, M2M100) one of them names the language. They write an answer in the language
of its prompt here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grasp_lora.base.words import shortened, shown
from grasp_lora.tasks.records import main_language

_WORD = "a"
"""A text that every tokenizer has tokens for."""

_LANGUAGE_TOKEN = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
"""A language as NLLB ("spa_Latn") and mBART ("es_XX") name it."""

# Code of a language -> the first part of its FLORES-200 code (ISO 639-3, of a macrolanguage the
# member that FLORES has), which is how NLLB names it.
_FLORES = {
    "af": "afr", "am": "amh", "ar": "arb", "az": "azj", "be": "bel", "bg": "bul", "bn": "ben",
    "bo": "bod", "ca": "cat", "cs": "ces", "cy": "cym", "da": "dan", "de": "deu", "dz": "dzo",
    "el": "ell", "en": "eng", "es": "spa", "et": "est", "eu": "eus", "fa": "pes", "fi": "fin",
    "fr": "fra", "ga": "gle", "gl": "glg", "gu": "guj", "ha": "hau", "he": "heb", "hi": "hin",
    "hr": "hrv", "hu": "hun", "hy": "hye", "id": "ind", "ig": "ibo", "is": "isl", "it": "ita",
    "ja": "jpn", "ka": "kat", "kk": "kaz", "km": "khm", "kn": "kan", "ko": "kor", "lo": "lao",
    "lt": "lit", "lv": "lvs", "mk": "mkd", "ml": "mal", "mn": "khk", "mr": "mar", "ms": "zsm",
    "my": "mya", "ne": "npi", "nl": "nld", "no": "nob", "pa": "pan", "pl": "pol", "pt": "por",
    "ro": "ron", "ru": "rus", "rw": "kin", "si": "sin", "sk": "slk", "sl": "slv", "so": "som",
    "sq": "als", "sr": "srp", "sv": "swe", "sw": "swh", "ta": "tam", "te": "tel", "th": "tha",
    "tr": "tur", "uk": "ukr", "ur": "urd", "uz": "uzn", "vi": "vie", "xh": "xho", "yo": "yor",
    "zh": "zho", "zu": "zul",
}  # fmt: skip

_TRADITIONAL = {"tw", "hk", "mo"}
"""Regions where Chinese is written in the script that FLORES calls Hant."""


@dataclass(frozen=True)
class Sides:
    """The token ids around a prompt, and those ahead of its answer.

    A causal language model has one side, so all are empty.
    """

    before: tuple[int, ...] = ()
    """Ahead of the prompt."""
    after: tuple[int, ...] = ()
    """Behind the prompt."""
    start: tuple[int, ...] = ()
    """What the decoder begins with; nothing is generated or learned there."""


ONE_SIDE = Sides()
"""Those of a causal language model."""


def two_sides(tokenizer: Any, decoder_start: int, language: str) -> Sides:
    """Return the tokens around the sides of an encoder-decoder for a language.

    A tokenizer that puts tokens ahead of a target (NLLB, mBART-50: the language; BART: the start of
    a text) lets the decoder begin with `decoder_start` and them. One that puts the language behind
    it (mBART) lets the decoder begin with the language: the model's shift moves it there.

    Args:
        tokenizer: a Hugging Face tokenizer; it is set to the language where it knows any.
        decoder_start: id that the model's decoder begins with by default.
        language: language of the prompt and of the answer.

    Raises:
        ValueError: the tokenizer knows languages, and not this one.
    """
    if hasattr(tokenizer, "src_lang"):
        tokenizer.src_lang = tokenizer.tgt_lang = language_of(tokenizer, language)
    bare = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    before, after = _around(tokenizer(_WORD)["input_ids"], bare)
    ahead, behind = _around(tokenizer(text_target=_WORD)["input_ids"], bare)
    if not ahead and len(behind) > 1:
        return Sides(before, after, behind[-1:])
    return Sides(before, after, (decoder_start, *ahead))


def language_of(tokenizer: Any, language: str) -> str:
    """Return a language as a tokenizer of many languages names it, such as "spa_Latn" for "es".

    A script or a region in the code ("zh-Hant", "zh-TW") decides where the tokenizer knows several
    of a language; else it is the first of them.

    Raises:
        ValueError: the tokenizer does not know the language.
    """
    known = _known(tokenizer)
    main, *rest = re.split("[-_]", language.lower())
    names = {main, _FLORES.get(main_language(language))}
    fits = [name for name in known if name.split("_")[0] in names]
    if not fits:
        raise ValueError(
            f"the model's tokenizer knows no language {shown(language)}; it knows "
            f"{shortened(', '.join(known))}. Give the code of one of these as data.*.language, or "
            "another model"
        )
    wanted = {*rest, *(["hant"] if _TRADITIONAL & {*rest} else [])}
    exact = [name for name in fits if wanted & set(name.lower().split("_")[1:])]
    return (exact or fits)[0]


def _known(tokenizer: Any) -> list[str]:
    """Return the languages of a tokenizer, as it names them."""
    named = getattr(tokenizer, "lang_code_to_id", None)
    if named:
        return list(named)
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    return [token for token, _ in added if _LANGUAGE_TOKEN.fullmatch(token)]


def _around(whole: Sequence[int], bare: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens ahead of and behind those of the bare text."""
    size = len(bare)
    place = next(at for at in range(len(whole)) if list(whole[at : at + size]) == list(bare))
    return tuple(whole[:place]), tuple(whole[place + size :])
