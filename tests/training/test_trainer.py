"""Steps are counted like in the Trainer and accelerate."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.integrations import integration_utils

from grasp_lora.tasks.encoding import IGNORED
from grasp_lora.training.trainer import (
    PACKAGES,
    Diverged,
    answer_loss,
    steps_per_epoch,
    tracker_faults,
)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_epoch_has_as_many_steps_as_a_process_has_full_or_partial_accumulations(
    batch_size, accumulation, processes
):
    for rows in range(1, 40):
        sampler = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
        batches = list(BatchSamplerShard(sampler, processes, 0, even_batches=True))
        steps = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
        counted = steps_per_epoch(rows, batch_size, accumulation, processes)
        assert counted == len(steps), rows


@pytest.mark.parametrize(
    ("logits", "label", "said"),
    [
        (0.0, IGNORED, "there are no answer tokens to learn from: check for an example without"),
        (math.nan, 1, "the model's own logits are not finite"),
        (3e38, 1, "the logits, of up to 3e+38, are too large for it"),
    ],
)
def test_a_loss_that_is_not_finite_is_told_with_its_cause(logits, label, said):
    values = torch.zeros(1, 2, 4)
    values[0, 0] = torch.tensor([logits, -logits, 0.0, 0.0])
    outputs = SimpleNamespace(logits=values)
    with pytest.raises(Diverged, match=re.escape(said)):
        answer_loss(outputs, torch.tensor([[IGNORED, label]]))


@pytest.mark.parametrize(
    ("name", "asked"),
    [("wandb", "wandb"), ("comet_ml", "comet"), ("azure_ml", "azureml"), ("flyte", "flytekit")],
)
def test_a_tracker_that_is_not_installed_is_named(monkeypatch, name, asked):
    for there, faults in ((True, 0), (False, 1)):
        monkeypatch.setattr(integration_utils, f"is_{asked}_available", lambda there=there: there)
        found = tracker_faults([name])
        assert len(found) == faults
    assert found[0].startswith(f"report_to: the tracker {name} is not installed; install")


def test_every_tracker_that_transformers_knows_can_be_asked_for():
    """A tracker of its own name would be taken for one that is there."""
    unasked = [
        name
        for name in integration_utils.INTEGRATION_TO_CALLBACK
        if not hasattr(integration_utils, f"is_{PACKAGES.get(name, name)}_available")
    ]
    assert unasked == []


def test_a_tracker_that_nobody_knows_is_refused():
    (fault,) = tracker_faults(["wanndb"])
    assert fault.startswith("report_to: there is no tracker 'wanndb'; choose from azure_ml, ")
    assert tracker_faults(["none"]) == tracker_faults(["all"]) == tracker_faults([]) == []
