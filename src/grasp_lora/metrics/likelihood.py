"""Compute loss and perplexity of the references from the losses per row."""

import math
from collections.abc import Sequence

import numpy as np

from grasp_lora.base.words import shown
from grasp_lora.metrics.records import Family, Measured, Options, Row, mean_measured

# exp of a larger exponent overflows a float; a diverged model still gets a finite perplexity.
_LARGEST_EXPONENT = 700.0


def _measure(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    losses = np.array([_checked_loss(row) for row in rows])
    tokens = np.array([_checked_tokens(row) for row in rows], dtype=np.float64)
    loss = mean_measured(
        losses, {"tokenizer": options.tokenizer, "per": "answer token, mean over rows"}
    )
    perplexity = Measured(
        _exp(losses),
        np.stack([losses * tokens, tokens], axis=-1),
        lambda sums: _exp(sums[..., 0] / sums[..., 1]),
        {
            "tokenizer": options.tokenizer,
            "per": "answer token, over all tokens of all rows",
            "comparable": "only between systems of the same tokenizer",
        },
    )
    return {"loss": loss, "perplexity": perplexity}


def _checked_loss(row: Row) -> float:
    if row.loss is None:
        raise ValueError(
            f"row {shown(row.id)} has no loss, but loss and perplexity are computed from it; "
            "evaluate with the model's losses, or leave out these two metrics"
        )
    if not math.isfinite(row.loss) or row.loss < 0:
        raise ValueError(
            f"row {shown(row.id)} has the loss {row.loss}, but it must be a finite number of at "
            "least 0; look for NaN or infinity in the model's weights, or compute in float32"
        )
    return row.loss


def _checked_tokens(row: Row) -> int:
    if row.tokens is None or row.tokens < 1:
        raise ValueError(
            f"row {shown(row.id)} has a loss over {row.tokens} tokens, but it must be at least 1; "
            "give the number of answer tokens that the loss is a mean over"
        )
    return row.tokens


def _exp(mean: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(mean, _LARGEST_EXPONENT))


def _missing(options: Options) -> None:
    del options


LIKELIHOOD = Family(("loss", "perplexity"), _measure, _missing, higher_is_better=False)
"""Loss in nats per answer token, and perplexity (at most e^700); lower is better."""
