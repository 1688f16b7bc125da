"""Define the records that all metrics share: a row to score, the options, a measured metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grasp_lora.base.texts import normal_form


@dataclass(frozen=True)
class Row:
    """The prediction for one example, with its references; one row of a predictions file."""

    id: str
    """Id of the example, unique within a scored set; two systems are paired by it."""
    prediction: str
    references: tuple[str, ...]
    """Accepted texts, at least one."""
    group: str = ""
    """Rows of one group are resampled together; an empty group becomes the id."""
    loss: float | None = None
    """Mean negative log-likelihood of the first reference, nats per answer token."""
    tokens: int | None = None
    """Number of answer tokens that the loss is a mean over."""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    def normal(self) -> "Row":
        """Return the row with id, group and all texts in normal form, as rows are compared."""
        return replace(
            self,
            id=normal_form(self.id),
            prediction=normal_form(self.prediction),
            references=tuple(map(normal_form, self.references)),
            group=normal_form(self.group),
        )


@dataclass(frozen=True)
class Options:
    """The settings that the scores depend on besides the rows."""

    task: str = "qa"
    """Name of the task that the rows come from."""
    language: str = "en"
    """Two-letter code of the answers' language, such as "zh"."""
    rules: str | None = None
    """Answer rules, a key of `answers.RULES`; None takes those of the language."""
    rouge: str = "unicode"
    """How ROUGE cuts a text into words: "unicode" or "xlsum"."""
    tokenizer: str | None = None
    """Name of the tokenizer behind `Row.loss`; losses are comparable only with equal tokenizers."""
    bertscore_model: str | None = None
    """Folder or name of the encoder; None takes bert-score's recommendation for the language."""
    bertscore_layer: int | None = None
    """Layer whose hidden states are compared; None takes the recommended layer."""
    bertscore_rescale: bool = False
    """Whether to rescale by bert-score's baseline, which only some languages have."""
    bertscore_max_length: int = 512
    """Maximum length of a text in encoder tokens; longer texts are truncated."""
    device: str = "cpu"
    """Device that the encoder runs on."""
    batch_size: int = 32
    """Texts per encoder batch; changes speed and memory, not scores."""
    resamples: int = 1000
    """Number of bootstrap resamples for an interval; 0 gives no intervals."""
    confidence: float = 0.95
    """Fraction of resamples inside an interval, in (0, 1)."""
    seed: int = 0
    """Seed of the resampling."""


@dataclass(frozen=True)
class Measured:
    """One metric over n rows, with the statistics to score any resample of the rows."""

    per_row: np.ndarray
    """Score of each row, shape [n], in the unit of the value."""
    statistics: np.ndarray
    """Statistics that the score is computed from, float64 [n, k]; additive over rows."""
    value: Callable[[np.ndarray], np.ndarray]
    """Function: sums of the statistics over rows, shape [..., k] -> scores, shape [...]."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that reproduce the score, as JSON values."""


@dataclass(frozen=True)
class Family:
    """Metrics that are measured together."""

    names: tuple[str, ...]
    measure: Callable[[Sequence[Row], Options], dict[str, Measured]]
    """Function: (rows, at least one; options) -> name -> measured metric, for all names."""
    missing: Callable[[Options], str | None]
    """Function: options -> why the family cannot be computed and what to do, or None if it can."""
    higher_is_better: bool = True


def mean_measured(per_row: Sequence[float] | np.ndarray, settings: dict[str, Any]) -> Measured:
    """Return the metric that is the mean of the scores per row."""
    scores = np.asarray(per_row, dtype=np.float64)
    return Measured(scores, np.stack([scores, np.ones_like(scores)], axis=-1), _mean, settings)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def check_resampling(resamples: int, confidence: float) -> None:
    """Check the options of intervals.

    Raises:
        ValueError: the number of resamples or the confidence is out of its range.
    """
    if resamples < 0 or resamples == 1:
        raise ValueError(f"resamples must be 0 (no intervals) or at least 2, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must lie between 0 and 1, like 0.95, got {confidence}; write 95 % as 0.95"
        )
