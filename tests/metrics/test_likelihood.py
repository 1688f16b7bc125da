import math

import numpy as np
import pytest

from grasp_lora.metrics.likelihood import LIKELIHOOD
from grasp_lora.metrics.records import Measured, Options, Row

ROWS = [
    Row("1", "", ("a",), loss=1.0, tokens=1),
    Row("2", "", ("b",), loss=3.0, tokens=3),
    Row("3", "", ("c",), loss=0.5, tokens=8),
]


def value(found: Measured) -> float:
    return float(found.value(found.statistics.sum(axis=0)))


def test_loss_weighs_rows_alike_and_perplexity_weighs_tokens_alike() -> None:
    found = LIKELIHOOD.measure(ROWS, Options())
    assert value(found["loss"]) == pytest.approx(4.5 / 3)
    # 1 * 1 + 3 * 3 + 0.5 * 8 = 14 nats over 1 + 3 + 8 = 12 tokens
    assert value(found["perplexity"]) == pytest.approx(math.exp(14 / 12))
    assert found["loss"].per_row.tolist() == [1.0, 3.0, 0.5]
    assert found["perplexity"].per_row == pytest.approx([math.e, math.e**3, math.e**0.5])


def test_lower_is_better_and_needs_no_package() -> None:
    assert not LIKELIHOOD.higher_is_better
    assert LIKELIHOOD.missing(Options()) is None


def test_settings_name_the_tokenizer_and_what_a_loss_is_a_mean_of() -> None:
    found = LIKELIHOOD.measure(ROWS, Options(tokenizer="gemma"))
    assert found["loss"].settings == {
        "tokenizer": "gemma",
        "per": "answer token, mean over rows",
    }
    assert found["perplexity"].settings["tokenizer"] == "gemma"
    assert "same tokenizer" in found["perplexity"].settings["comparable"]


def test_resamples_are_scored_together_as_they_are_alone() -> None:
    drawn = np.random.default_rng(0).integers(0, 3, size=(4, 3))
    for found in LIKELIHOOD.measure(ROWS, Options()).values():
        sums = found.statistics[drawn].sum(axis=1)
        assert found.value(sums).tolist() == [float(found.value(one)) for one in sums]


def test_a_model_that_broke_down_gets_a_finite_perplexity() -> None:
    found = LIKELIHOOD.measure([Row("1", "", ("a",), loss=9000.0, tokens=2)], Options())
    assert value(found["loss"]) == 9000.0
    assert value(found["perplexity"]) == pytest.approx(math.exp(700))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -0.1])
def test_a_loss_that_no_model_has_is_refused_by_the_name_of_its_row(loss: float) -> None:
    bad = Row("q7", "", ("a",), loss=loss, tokens=2)
    with pytest.raises(ValueError, match=r"row 'q7' has the loss .*finite number"):
        LIKELIHOOD.measure([*ROWS, bad], Options())


def test_a_row_without_loss_or_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="row 'q8' has no loss"):
        LIKELIHOOD.measure([*ROWS, Row("q8", "", ("a",))], Options())
    for tokens in (None, 0):
        bad = Row("q9", "", ("a",), loss=1.0, tokens=tokens)
        with pytest.raises(ValueError, match=f"row 'q9' has a loss over {tokens} tokens"):
            LIKELIHOOD.measure([*ROWS, bad], Options())
