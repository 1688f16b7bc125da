"""Test which state a training keeps where dev losses are not finite."""

import math
import re

import pytest
import torch

from grasp_lora.config.run_config import load_config
from grasp_lora.core.pruning.masks import NotANumber
from grasp_lora.stages.train import fresh_adapter
from grasp_lora.training import best
from grasp_lora.training.trainer import Diverged
from grasp_lora.workbench import fit as fit_module
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.fit import FitOptions, fit
from helpers import tiny_backbone_folder
from jobs import job, write_job


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    tiny_backbone_folder(folder / "base")
    return open_context(load_config(write_job(folder / "run.yaml", job(folder))), quiet=True)


def fitted(context, monkeypatch, tmp_path, losses):
    """Return the result of two epochs with these dev losses, and what was said."""
    evaluations, said = iter(losses), []
    monkeypatch.setattr(
        best, "example_losses", lambda model, batches, count: [next(evaluations)] * count
    )
    monkeypatch.setattr(context.reporter, "say", said.append)
    options = FitOptions(context.config.training("finetune"), "training")
    fresh = fresh_adapter(context.backbone.model, context.config)
    with context.live(fresh, "merged") as live:
        return fit(context, live, options, tmp_path / "checkpoints"), said


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_dev_loss_that_is_not_finite_is_never_kept_and_is_named(
    context, monkeypatch, tmp_path, bad, place
):
    losses = [2.0, 1.0]
    losses.insert(place, bad)
    result, said = fitted(context, monkeypatch, tmp_path, losses)
    assert result.best.loss == 1.0
    step = result.evaluations[place].step
    assert f"training: the dev loss is not finite at steps [{step}]; none is kept" in said
    assert result.facts()["groups"] == [row.group for row in context.encoded("target", "dev")]


def test_where_no_dev_loss_is_finite_there_is_one_error(context, monkeypatch, tmp_path):
    with pytest.raises(Diverged, match="no dev loss is finite, at none of the steps"):
        fitted(context, monkeypatch, tmp_path, [math.nan, math.inf, math.nan])


def test_what_diverged_is_told_without_its_place(context, monkeypatch, tmp_path):
    with pytest.raises(Diverged) as caught:
        fitted(context, monkeypatch, tmp_path, [math.nan, math.inf, math.nan])
    error = caught.value
    assert error.why.startswith("no dev loss is finite, at none of the steps [0, ")
    assert str(error) == f"training: {error.why}"
    assert error.steps == int(error.why.partition("]")[0].rpartition(" ")[2])


def test_an_adapter_that_is_too_large_is_told_and_not_the_learning_rate(
    context, monkeypatch, tmp_path
):
    options = FitOptions(context.config.training("finetune"), "training")
    fresh = fresh_adapter(context.backbone.model, context.config)
    with context.live(fresh, "merged") as live:
        for parameter in live.params.values():
            parameter.data.fill_(1e30)
        with pytest.raises(Diverged) as caught:
            fit(context, live, options, tmp_path / "checkpoints")
    said = str(caught.value)
    assert re.match(
        r"training, step \d: .* what it starts from, with values up to 1e\+30, is", said
    )
    assert "check the adapters" in said
    assert "learning rate" not in said


def test_a_score_that_is_no_number_is_told_with_its_stage_and_step(context, monkeypatch, tmp_path):
    def reprune(_optimizer):
        raise NotANumber("importance scores must be numbers, got NaN")

    options = FitOptions(context.config.training("finetune"), "training", reprune=reprune)
    fresh = fresh_adapter(context.backbone.model, context.config)
    said = r"^training, step \d+: importance scores must be numbers, got NaN: "
    with context.live(fresh, "merged") as live, pytest.raises(Diverged, match=said):
        fit(context, live, options, tmp_path / "checkpoints")


@pytest.mark.parametrize(("dtype", "packs"), [("float32", False), ("bfloat16", True)])
def test_examples_are_packed_where_the_model_computes_them_apart(
    context, tmp_path, monkeypatch, dtype, packs
):
    """The losses and the adapter are those of padded batches but for rounding."""
    config = context.config.model_copy(
        update={"model": context.config.model.model_copy(update={"dtype": dtype})}
    )
    opened = open_context(config, quiet=True)
    shapes = []

    def trained(name):
        model = opened.backbone.model
        fresh = fresh_adapter(model, opened.config)
        with opened.live(fresh, "merged") as live:
            hook = model.register_forward_pre_hook(
                lambda _m, _a, given: shapes.append(tuple(given["input_ids"].shape)),
                with_kwargs=True,
            )
            options = FitOptions(opened.config.training("finetune"), "training")
            result = fit(opened, live, options, tmp_path / name)
            hook.remove()
            factors = torch.cat([p.detach().flatten() for p in live.params.values()])
        return [entry["loss"] for entry in result.log], factors

    losses, factors = trained("as it is")
    assert any(rows == 1 and length > opened.longest for rows, length in shapes) == packs
    monkeypatch.setattr(fit_module, "can_pack", lambda _model: False)
    padded, others = trained("padded")
    assert losses == pytest.approx(padded, rel=0.02 if packs else 0)
    assert (factors - others).norm() <= (0.05 if packs else 0) * others.norm()
