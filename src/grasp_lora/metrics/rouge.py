"""Compute ROUGE in every script: rouge-score counts words split by Unicode rules or as in XL-Sum.

rouge-score's own tokenizer keeps only ASCII letters and digits, so it gives two identical Arabic or
Chinese texts the score 0.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import regex

from grasp_lora.base.words import shown
from grasp_lora.metrics.records import Family, Measured, Options, Row, mean_measured
from grasp_lora.metrics.segment import TOKEN_RULE, base_language, sentences, tokens

_NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class Words:
    """A tokenizer for RougeScorer: splits texts into the words that ROUGE counts."""

    tokenize: Callable[[str], list[str]]
    """Function: text -> words."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the tokenizer, for the record of the score."""


def _unicode_words(language: str) -> Words:
    settings = {"words": TOKEN_RULE, "segmenter": None, "stemmer": None}
    return Words(partial(tokens, language=language), settings | {"regex": version("regex")})


# XL-Sum's fork of rouge-score (csebuetnlp/xl-sum, multilingual_rouge_scoring) first drops control
# characters and punctuation. All ASCII symbols count as punctuation.
_CONTROLS = regex.compile(r"(?V1)[[\p{C}\ufffd]--[\t\n\r]]")
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
# The units that its "aggressive" pyonmttok keeps together; each CJK ideograph is one unit.
_IDEOGRAPHS = (
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_PIECES = regex.compile(
    rf"(?V1){_IDEOGRAPHS}|[\p{{L}}--{_IDEOGRAPHS}][[\p{{L}}\p{{M}}]--{_IDEOGRAPHS}]*"
    r"|\p{N}[\p{N}\p{M}]*|\S"
)
_SHORTEST_STEMMED = 4

_NLTK_STEMMERS = {
    "ar": "arabic",
    "da": "danish",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hu": "hungarian",
    "it": "italian",
    "nl": "dutch",
    "nb": "norwegian",
    "nn": "norwegian",
    "no": "norwegian",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
}
_SEGMENTERS = {"zh": "jieba", "th": "pythainlp"}
# Languages whose segmenter or stemmer in the published scorer is not available here.
_UNSUPPORTED = {
    "bn": "stemmer for Bengali",
    "hi": "stemmer for Hindi",
    "ja": "segmenter for Japanese",
    "my": "segmenter for Burmese",
    "tr": "stemmer for Turkish",
}


def _xlsum_words(language: str) -> Words:
    language = base_language(language)
    settings = {
        "words": "lower case, without punctuation; runs of letters, runs of digits, ideographs",
        "segmenter": _SEGMENTERS.get(language),
        "stemmer": None,
    }
    if language in _SEGMENTERS:
        # White space between words counts as a word, as in the published scorer.
        settings["words"] = "lower case, without punctuation, cut by the segmenter"
        settings["segmenter"] += " " + version(_SEGMENTERS[language])
    if language in _NLTK_STEMMERS:
        settings["stemmer"] = f"nltk {version('nltk')} {_NLTK_STEMMERS[language]}"
        # The published scorer does not stem stop words; it downloads their lists with NLTK.
        settings["unlike_xlsum"] = "stop words are stemmed too, each word by itself"
    return Words(partial(_xlsum_tokens, language=language), settings)


def _xlsum_tokens(text: str, language: str) -> list[str]:
    text = " ".join(_PUNCTUATION.sub(" ", _CONTROLS.sub("", text.lower())).split())
    if text and language in _SEGMENTERS:
        return [word for word in _segmenter(language)(text) if word]
    return [
        _stem(word, language) if len(word) >= _SHORTEST_STEMMED else word
        for word in _PIECES.findall(text)
    ]


@lru_cache(maxsize=2**16)
def _stem(word: str, language: str) -> str:
    if language in _NLTK_STEMMERS:
        from nltk.stem.snowball import SnowballStemmer

        # A new stemmer for each word, because the Arabic stemmer keeps state: a stem would depend
        # on earlier words, and equal texts would not score 100.
        return str(SnowballStemmer(_NLTK_STEMMERS[language]).stem(word))
    return word


@lru_cache(maxsize=1)
def _segmenter(language: str) -> Callable[[str], list[str]]:
    if language == "zh":
        with warnings.catch_warnings():
            # Its source has invalid escapes and may need pkg_resources; a user cannot fix these.
            warnings.simplefilter("ignore")
            import jieba

        # The dictionary is read as in `initialize`, but without its messages and without its cache
        # file, which all users of the machine share.
        own = jieba.Tokenizer()
        own.FREQ, own.total = own.gen_pfdict(own.get_dict_file())
        own.initialized = True
        return own.lcut
    from pythainlp.tokenize import word_tokenize  # pyright: ignore[reportMissingImports]

    return partial(word_tokenize, engine="newmm")


MODES: MappingProxyType[str, Callable[[str], Words]] = MappingProxyType(
    {"unicode": _unicode_words, "xlsum": _xlsum_words}
)
"""Name of a mode -> function(language) -> tokenizer."""


def _measure(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    from rouge_score.rouge_scorer import RougeScorer

    words = MODES[options.rouge](options.language)
    whole = RougeScorer([name for name in _NAMES if name != "rougeLsum"], tokenizer=words)
    by_sentence = RougeScorer(["rougeLsum"], tokenizer=words)
    found = []
    for row in rows:
        references = list(row.references)
        best = whole.score_multi(references, row.prediction)
        lines = [_lines(text) for text in references]
        best |= by_sentence.score_multi(lines, _lines(row.prediction))
        found.append(best)
    settings = {
        "what": "mean F1 over rows, best reference",
        "package": f"rouge-score {version('rouge-score')}",
        "mode": options.rouge,
        "language": options.language,
        "sentences": "line breaks, else ends of sentences by their marks",
        **words.settings,
    }
    return {
        name: mean_measured([100 * scores[name].fmeasure for scores in found], dict(settings))
        for name in _NAMES
    }


def _lines(text: str) -> str:
    """Return the text with one sentence per line; a text with line breaks is not changed."""
    return text if "\n" in text.strip() else "\n".join(sentences(text))


def _missing(options: Options) -> str | None:
    if options.rouge not in MODES:
        return f"rouge is {shown(options.rouge)}; choose one of: {', '.join(MODES)}"
    language, packages = base_language(options.language), ["rouge_score"]
    if options.rouge == "xlsum":
        if language in _UNSUPPORTED:
            return f"the mode 'xlsum' has no {_UNSUPPORTED[language]} here; use the mode 'unicode'"
        packages.append(_SEGMENTERS.get(language, "nltk"))
    for package in packages:
        if find_spec(package) is None:
            name = package.replace("_", "-")
            return (
                f"the package {name} is not installed, but the mode {shown(options.rouge)} needs "
                f"it for {shown(language)}; pip install {name}"
            )
    return None


ROUGE = Family(_NAMES, _measure, _missing)
"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (by sentences): F1 in [0, 100]."""
