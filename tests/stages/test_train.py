"""Test the number of epochs that cross-validation chooses."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from grasp_lora.base.files import write_json
from grasp_lora.stages.train import _cross_validated


def chosen(folder: Path, curves: list[list[float]]):
    """Return the choice by two folds of one example each, and what was said."""
    inputs, said = {}, []
    for number, curve in enumerate(curves):
        write_json(folder / str(number) / "stage.json", {"rows": [[loss] for loss in curve]})
        inputs[f"fold {number}"] = folder / str(number)
    examples = [SimpleNamespace(id=str(number)) for number in range(len(curves))]
    context = SimpleNamespace(
        examples=lambda role, split: examples if split == "dev" else [],
        reporter=SimpleNamespace(say=said.append),
    )
    work = SimpleNamespace(
        inputs=inputs, context=context, stage=SimpleNamespace(options={"role": "target"})
    )
    return _cross_validated(work, [[one] for one in examples]), said


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_epochs_whose_loss_is_not_finite_are_not_chosen_and_are_named(tmp_path, bad):
    curves = [[9.0, bad, 3.0, 1.0, 2.0], [9.0, 0.0, 3.0, 2.0, 2.0]]
    (epochs, judged), said = chosen(tmp_path, curves)
    assert (epochs, judged) == (3, 1.5)
    assert said == ["cross-validation: the loss is not finite after epochs [1]"]


def test_where_no_epoch_has_a_finite_loss_there_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="no finite loss after any of 2 epochs"):
        chosen(tmp_path, [[1.0, math.nan, math.nan], [1.0, 1.0, 1.0]])
