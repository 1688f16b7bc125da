"""The records every metric speaks: a row to score, the options, what a family measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One prediction with what it is scored against."""

    id: str
    """Unique within a scored set; what two systems are paired by."""
    prediction: str
    references: tuple[str, ...]
    """Accepted texts; at least one for every metric that reads the prediction."""
    group: str = ""
    """Rows of one group are resampled together; left empty it becomes the id."""
    loss: float | None = None
    """Mean negative log-likelihood of the first reference, nats per answer token."""
    tokens: int | None = None
    """Answer tokens behind the loss."""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)


@dataclass(frozen=True)
class Options:
    """What the scores depend on besides the rows."""

    task: str = "qa"
    """Name of the task the rows come from."""
    language: str = "en"
    """Two-letter code of the answers' language, such as "zh"."""
    rules: str = "squad"
    """Answer rules: "squad", "mlqa" or "mlqa-fixed"."""
    rouge: str = "unicode"
    """How ROUGE cuts a text into words: "unicode" or "xlsum"."""
    tokenizer: str | None = None
    """Name of the model tokenizer behind `Row.loss`; losses compare only where it is the same."""
    bertscore_model: str | None = None
    """Folder or name of the encoder; None takes the one bert-score recommends per language."""
    bertscore_layer: int | None = None
    """Layer whose states are compared; None takes the recommended one."""
    bertscore_rescale: bool = False
    """Whether to rescale by bert-score's baseline, which exists for some languages only."""
    bertscore_max_length: int = 512
    """Longest text in encoder tokens; what is beyond is cut off."""
    device: str = "cpu"
    """Where the encoder runs."""
    batch_size: int = 32
    """Texts the encoder reads at once; changes speed and memory, not scores."""
    resamples: int = 1000
    """Bootstrap resamples behind an interval; 0 leaves intervals out."""
    confidence: float = 0.95
    """Share of resamples inside an interval, in (0, 1)."""
    seed: int = 0
    """Seed of the resampling."""


@dataclass(frozen=True)
class Measured:
    """One metric over n rows, in a form that any resample of the rows can be scored from."""

    per_row: np.ndarray
    """Each row's own score, shape [n], in the unit of the value."""
    statistics: np.ndarray
    """What the score is computed from, float64 of shape [n, k]; it adds up over rows."""
    value: Callable[[np.ndarray], np.ndarray]
    """Sums over rows, shape [..., k] -> scores, shape [...]."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What a reader needs to compute the same number; holds only what JSON can."""


@dataclass(frozen=True)
class Family:
    """Metrics that are measured together; one row of the metric table."""

    names: tuple[str, ...]
    measure: Callable[[Sequence[Row], Options], dict[str, Measured]]
    """Measures every name of the family; the rows are not empty."""
    missing: Callable[[Options], str | None]
    """Why it cannot be computed here and what to do about it, or None."""
    higher_is_better: bool = True


def mean_measured(per_row: Sequence[float] | np.ndarray, settings: dict[str, Any]) -> Measured:
    """Return the metric that is the mean of its rows' scores."""
    scores = np.asarray(per_row, dtype=np.float64)
    return Measured(scores, np.stack([scores, np.ones_like(scores)], axis=-1), _mean, settings)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]
