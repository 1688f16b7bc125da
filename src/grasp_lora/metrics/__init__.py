"""Score predictions against references, with intervals and paired comparisons of two systems."""

from grasp_lora.metrics.answers import MLQA_ARTICLES, exact_match, normalize_answer, token_f1
from grasp_lora.metrics.records import Options, Row
from grasp_lora.metrics.scoring import (
    Comparison,
    Score,
    compare,
    compare_means,
    missing,
    score,
)
from grasp_lora.metrics.table import METRICS

__all__ = [
    "METRICS",
    "MLQA_ARTICLES",
    "Comparison",
    "Options",
    "Row",
    "Score",
    "compare",
    "compare_means",
    "exact_match",
    "missing",
    "normalize_answer",
    "score",
    "token_f1",
]
