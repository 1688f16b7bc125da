"""Score answers by exact match and token F1, with the rules of SQuAD v1.1, of MLQA or our own."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from grasp_lora.base.texts import UNSEGMENTED, normal_form, without_vowel_marks
from grasp_lora.base.words import shown
from grasp_lora.metrics.records import Family, Measured, Options, Row, mean_measured
from grasp_lora.metrics.segment import base_language, tokens

_ENGLISH_ARTICLES = r"\b(a|an|the)\b"

MLQA_ARTICLES: Mapping[str, str | None] = MappingProxyType(
    {
        "en": _ENGLISH_ARTICLES,
        "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
        "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
        "vi": r"\b(của|là|cái|chiếc|những)\b",
        # The published pattern removes every "ال", even inside words. Scores that are compared with
        # published scores need it unchanged.
        "ar": r"\sال^|ال",
        "hi": None,
        "zh": None,
    }
)
"""Language of MLQA -> pattern of its articles, or None (mlqa_evaluation_v1)."""

# The correction of lm-evaluation-harness (pull request 3589) removes the article only at the start
# of a word, whatever follows it.
_FIXED_ARTICLES: Mapping[str, str | None] = MappingProxyType({**MLQA_ARTICLES, "ar": r"(?:^|\s)ال"})

_HAN = re.compile("[\u4e00-\u9fa5]")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _squad_form(text: str, language: str) -> str:
    """Return lower case without ASCII punctuation and English articles, for every language."""
    del language  # the authors of XQuAD score all languages with the English script
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(_ENGLISH_ARTICLES, " ", bare).split())


def _mlqa_form(text: str, language: str, articles: Mapping[str, str | None]) -> str:
    """Return lower case without Unicode punctuation and articles of the language.

    In Chinese, Han characters become separate tokens. The steps have the order of
    mlqa_evaluation_v1.
    """
    bare = "".join(c for c in text.lower() if not _is_punctuation(c))
    pattern = articles[language]
    if pattern is not None:
        bare = re.sub(pattern, " ", bare)
    if language == "zh":
        bare = _HAN.sub(lambda match: f" {match[0]} ", bare)
    return " ".join(bare.split())


def _unicode_form(text: str, language: str) -> str:
    """Return the words of any script; a text without words, such as "€", keeps its signs."""
    bare = without_vowel_marks(text)
    words = tokens(bare, language) or unicodedata.normalize("NFKC", bare).casefold().split()
    return " ".join(words)


RULES: Mapping[str, Callable[[str, str], str]] = MappingProxyType(
    {
        "squad": _squad_form,
        "mlqa": partial(_mlqa_form, articles=MLQA_ARTICLES),
        "mlqa-fixed": partial(_mlqa_form, articles=_FIXED_ARTICLES),
        "unicode": _unicode_form,
    }
)
"""Name of a rule set -> function(text in normal form, language) -> normalised text."""

OF_MLQA = ("mlqa", "mlqa-fixed")
"""Rule sets that differ by language and cover only those of MLQA."""


def answer_rules(language: str, rules: str | None = None) -> str:
    """Return the rules by which answers in a language are compared.

    Args:
        language: code such as "zh" or "zh-TW".
        rules: the rules asked for, which are returned; None asks for those of the language.

    Returns:
        By language: "unicode" for languages written without spaces between words, where a whole
        clause would be one word to "squad", and "squad" for all others.
    """
    if rules is not None:
        return rules
    return "unicode" if base_language(language) in UNSEGMENTED else "squad"


def _fault(rules: str, language: str) -> str | None:
    """Return why answers of a language cannot be compared by some rules, or None if they can."""
    if rules not in RULES:
        return f"unknown rules {shown(rules)}; choose one of: {', '.join(RULES)}"
    if rules in OF_MLQA and language not in MLQA_ARTICLES:
        return (
            f"the rules {shown(rules)} do not cover the language {shown(language)}, only "
            f"{', '.join(MLQA_ARTICLES)}; use the rules 'squad' or 'unicode'"
        )
    return None


def normalize_answer(text: str, language: str = "en", rules: str | None = None) -> str:
    """Return the normalised answer: its tokens, separated by single spaces.

    The rules are applied to the text's normal form.

    Args:
        text: the answer.
        language: two-letter code; "squad" treats all languages alike.
        rules: None: those of the language, see `answer_rules`. "squad": the SQuAD v1.1 script,
            which is also the official script of XQuAD. "mlqa": the rules of mlqa_evaluation_v1 for
            each of its languages. "mlqa-fixed": as "mlqa", but the Arabic article is removed only
            at the start of a word (lm-evaluation-harness, pull request 3589); the published pattern
            also removes "ال" in the middle of words. "unicode": the words of `segment.tokens`,
            where each character of a script without spaces is a word, without Arabic vowel marks;
            articles stay.

    Raises:
        ValueError: the rules are unknown, or do not cover the language.
    """
    code, chosen = base_language(language), answer_rules(language, rules)
    fault = _fault(chosen, code)
    if fault is not None:
        raise ValueError(fault)
    return RULES[chosen](normal_form(text), code)


def exact_match(
    prediction: str, references: Sequence[str], language: str = "en", rules: str | None = None
) -> float:
    """Return 1.0 if the prediction equals a reference after normalisation, else 0.0.

    Raises:
        ValueError: there is no reference, or as `normalize_answer`.
    """
    _check_references(references)
    found = normalize_answer(prediction, language, rules)
    return float(any(found == normalize_answer(text, language, rules) for text in references))


def token_f1(
    prediction: str, references: Sequence[str], language: str = "en", rules: str | None = None
) -> float:
    """Return the token F1 in [0, 1], the harmonic mean of precision and recall, best reference.

    An answer without tokens after normalisation scores 0, as in the published scripts.

    Raises:
        ValueError: there is no reference, or as `normalize_answer`.
    """
    _check_references(references)
    found = Counter(normalize_answer(prediction, language, rules).split())
    return max(
        _overlap(found, Counter(normalize_answer(text, language, rules).split()))
        for text in references
    )


def _overlap(found: Counter[str], wanted: Counter[str]) -> float:
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def _check_references(references: Sequence[str]) -> None:
    # A single text is a sequence of letters, and each letter would count as a reference.
    if isinstance(references, str) or not references:
        raise ValueError(
            f"references must be a list of at least one text, got {shown(references)}; give a list"
        )


def _measure(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    rules, language = answer_rules(options.language, options.rules), options.language
    found = {}
    for name, score in _SCORES.items():
        per_row = [100 * score(row.prediction, row.references, language, rules) for row in rows]
        settings = {"rules": rules, "language": language, "what": "mean over rows, best reference"}
        found[name] = mean_measured(per_row, settings)
    return found


def _missing(options: Options) -> str | None:
    rules = answer_rules(options.language, options.rules)
    return _fault(rules, base_language(options.language))


_SCORES = {"exact_match": exact_match, "token_f1": token_f1}

ANSWERS = Family(
    names=tuple(_SCORES),
    measure=_measure,
    missing=_missing,
)
"""Exact match and token F1 in [0, 100]."""
