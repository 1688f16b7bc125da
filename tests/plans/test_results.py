"""Test the choice among results of methods."""

import pytest

from grasp_lora.plans.results import best_of


def result(micro_dev, dev):
    return {"losses": {"micro_dev": micro_dev, "dev": dev}, "price": {"runs": 1}}


def test_the_lowest_finite_loss_is_chosen_at_the_price_of_all():
    results = {
        "null": result([None], [0.1]),  # JSON has null for what is not finite
        "nan": result([0.0], [float("nan")]),
        "worse": result([1.0], [2.0]),
        "best": result([1.0], [1.5]),
    }
    found = best_of(results, ("micro_dev", "dev"))
    assert (found["chosen"], found["price"]) == ("best", {"runs": 4})


def test_where_no_loss_is_finite_there_is_one_error():
    with pytest.raises(ValueError, match="none of a, b has a finite loss on dev"):
        best_of({"a": result([1.0], [None]), "b": result([1.0], [None])}, ("dev",))
