"""How probable a model finds the references: loss and perplexity, from losses per row."""

import math
from collections.abc import Sequence

import numpy as np

from grasp_lora.metrics.records import Family, Measured, Options, Row, mean_measured

# exp of more is beyond the largest float; a model that broke down still gets a number.
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
            f"row {row.id!r} has no loss, which loss and perplexity are computed from; "
            "evaluate with the model's losses, or leave these two metrics out"
        )
    if not math.isfinite(row.loss) or row.loss < 0:
        raise ValueError(
            f"row {row.id!r} has the loss {row.loss}; it must be a finite number of at least 0; "
            "look for NaN or infinity in the model's weights, or compute in float32"
        )
    return row.loss


def _checked_tokens(row: Row) -> int:
    if row.tokens is None or row.tokens < 1:
        raise ValueError(
            f"row {row.id!r} has a loss over {row.tokens} tokens; it must be at least 1; "
            "give the number of answer tokens behind the loss"
        )
    return row.tokens


def _exp(mean: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(mean, _LARGEST_EXPONENT))


def _missing(options: Options) -> None:
    del options


LIKELIHOOD = Family(("loss", "perplexity"), _measure, _missing, higher_is_better=False)
"""Loss in nats and perplexity (at most e^700); lower is better."""
