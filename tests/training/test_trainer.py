"""Steps are counted like in the Trainer and accelerate."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from grasp_lora.training.trainer import steps_per_epoch


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
