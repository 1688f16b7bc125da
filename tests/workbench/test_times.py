"""Which clock a run gets."""

from pathlib import Path

import pytest
import torch

from grasp_lora.base.clock import Clock
from grasp_lora.config.run_config import RunConfig
from grasp_lora.workbench import times
from jobs import job

CONFIG = RunConfig.model_validate(job(Path("any")))


@pytest.mark.parametrize(
    ("device", "profile", "waits"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_only_a_profile_on_a_gpu_waits_for_the_device(monkeypatch, device, profile, waits):
    monkeypatch.setattr(times, "choose_device", lambda _wanted: torch.device(device))
    clock = times.open_clock(CONFIG, profile)
    found = clock.synchronize is torch.accelerator.synchronize
    assert found == waits
    assert found or clock.synchronize is Clock().synchronize
