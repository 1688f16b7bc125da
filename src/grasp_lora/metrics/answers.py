"""Answer scores: exact match and token F1, by the rules of SQuAD v1.1 or of MLQA."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from grasp_lora.metrics.records import Family, Measured, Options, Row, mean_measured
from grasp_lora.metrics.segment import base_language

_ENGLISH_ARTICLES = r"\b(a|an|the)\b"

MLQA_ARTICLES: Mapping[str, str | None] = MappingProxyType(
    {
        "en": _ENGLISH_ARTICLES,
        "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
        "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
        "vi": r"\b(của|là|cái|chiếc|những)\b",
        # The published pattern: it removes every "ال", inside words too. Scores that are to be
        # compared with published ones need it as it is.
        "ar": r"\sال^|ال",
        "hi": None,
        "zh": None,
    }
)
"""The languages of MLQA and what counts as an article in each (mlqa_evaluation_v1)."""

# The correction of lm-evaluation-harness (pull request 3589): only at the start of a word, with
# whatever is behind it.
_FIXED_ARTICLES: Mapping[str, str | None] = MappingProxyType({**MLQA_ARTICLES, "ar": r"(?:^|\s)ال"})

_HAN = re.compile("[\u4e00-\u9fa5]")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _squad_form(text: str, language: str) -> str:
    """Lower case, no ASCII punctuation, no English articles; the same for every language."""
    del language  # XQuAD's authors score all languages by the English script
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(_ENGLISH_ARTICLES, " ", bare).split())


def _mlqa_form(text: str, language: str, articles: Mapping[str, str | None]) -> str:
    """Lower case, no Unicode punctuation, no articles of the language, Han characters apart.

    The order of the steps is that of mlqa_evaluation_v1.
    """
    bare = "".join(c for c in text.lower() if not _is_punctuation(c))
    pattern = articles[language]
    if pattern is not None:
        bare = re.sub(pattern, " ", bare)
    if language == "zh":
        bare = _HAN.sub(lambda match: f" {match[0]} ", bare)
    return " ".join(bare.split())


RULES: Mapping[str, Callable[[str, str], str]] = MappingProxyType(
    {
        "squad": _squad_form,
        "mlqa": partial(_mlqa_form, articles=MLQA_ARTICLES),
        "mlqa-fixed": partial(_mlqa_form, articles=_FIXED_ARTICLES),
    }
)
"""Name of a rule set -> fn(text, language): the form in which two answers are compared."""


def _fault(rules: str, language: str) -> str | None:
    """Why answers of a language cannot be compared by some rules, or None."""
    if rules not in RULES:
        return f"unknown rules {rules!r}; choose one of: {', '.join(RULES)}"
    if rules != "squad" and language not in MLQA_ARTICLES:
        return (
            f"the rules {rules!r} know no language {language!r}, only {', '.join(MLQA_ARTICLES)}; "
            "use the rules 'squad'"
        )
    return None


def normalize_answer(text: str, language: str = "en", rules: str = "squad") -> str:
    """Return the form of an answer that is compared, tokens parted by single spaces.

    Args:
        text: the answer.
        language: two-letter code; "squad" treats all languages alike.
        rules: "squad", the SQuAD v1.1 script, official for XQuAD too; "mlqa", the rules of
            mlqa_evaluation_v1 for each of its languages; or "mlqa-fixed", the same but that the
            Arabic article goes only at the start of a word (lm-evaluation-harness, pull request
            3589), where the published pattern tears "ال" out of the middle of words too.

    Raises:
        ValueError: for unknown rules, or a language the rules do not cover.
    """
    code = base_language(language)
    fault = _fault(rules, code)
    if fault is not None:
        raise ValueError(fault)
    return RULES[rules](text, code)


def exact_match(
    prediction: str, references: Sequence[str], language: str = "en", rules: str = "squad"
) -> float:
    """Return 1.0 if the prediction equals a reference after normalisation, else 0.0.

    Raises:
        ValueError: if there is no reference, or as `normalize_answer`.
    """
    _check_references(references)
    found = normalize_answer(prediction, language, rules)
    return float(any(found == normalize_answer(text, language, rules) for text in references))


def token_f1(
    prediction: str, references: Sequence[str], language: str = "en", rules: str = "squad"
) -> float:
    """Return the harmonic mean of token precision and recall, in [0, 1], best reference first.

    An answer without a token left after normalisation scores 0, as in the published scripts.

    Raises:
        ValueError: if there is no reference, or as `normalize_answer`.
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
    # A single text is a sequence of its letters, each of which would be taken as a reference.
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a list of at least one text, got {references!r}")


def _measure(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    rules, language = options.rules, options.language
    found = {}
    for name, score in _SCORES.items():
        per_row = [100 * score(row.prediction, row.references, language, rules) for row in rows]
        settings = {"rules": rules, "language": language, "what": "mean over rows, best reference"}
        found[name] = mean_measured(per_row, settings)
    return found


_SCORES = {"exact_match": exact_match, "token_f1": token_f1}

ANSWERS = Family(
    names=tuple(_SCORES),
    measure=_measure,
    missing=lambda options: _fault(options.rules, base_language(options.language)),
)
"""Exact match and token F1 in [0, 100]."""
