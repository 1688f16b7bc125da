"""A backbone in shards, one for each process, is loaded and planned, and answers as a whole one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo import together
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.models.backbones import ModelSpec, load_backbone, plan_memory
from grasp_lora.models.example_losses import SHARED_PREFIX, EncodedExamples, example_losses
from grasp_lora.models.shards import is_sharded, shards_wanted, take_over_fsdp
from grasp_lora.tasks.encoding import Collator, EncodedExample
from helpers import tiny_backbone_folder

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TEXT = tuple(range(30, 120))
ROWS = [EncodedExample(str(i), "g", (*TEXT, 5, 7 + i, 9 + 2 * i), 91, 0) for i in range(3)]
"""All begin alike: a batch of them takes two forward passes, and the other process does none."""


def loaded(folder: Path, asked: dict[str, str]) -> dict[str, Any]:
    """Return what a backbone that is loaded by a launch that asked for something is like."""
    os.environ.update(asked)
    take_over_fsdp()
    spec = ModelSpec(str(folder), dtype="float32", device="cpu")
    backbone = load_backbone(spec)
    batches = EncodedExamples(ROWS, Collator(pad_id=0), 3, 1, share_prefix=True).batches(range(3))
    assert [SHARED_PREFIX in batch for _, batch in batches] == [True]
    settings = GenerationSettings(
        max_new_tokens=6, batch_size=1, pad_id=backbone.pad_id, stop_ids=[], one_line=False
    )
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    return {
        "sharded": is_sharded(backbone.model),
        "fingerprint": backbone.fingerprint,
        "planned": plan_memory(spec).weights,
        "losses": example_losses(backbone.model, batches, len(ROWS)),
        "texts": generate_texts(backbone.model, backbone.tokenizer, prompts, settings),
    }


def test_a_backbone_in_shards_is_that_of_the_whole(tmp_path):
    folder = tiny_backbone_folder(tmp_path / "base")
    (alone,) = together(1, loaded, folder, FSDP2)
    assert alone["sharded"] is False, "one process has nobody to share with"
    for one in together(2, loaded, folder, FSDP2):
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        assert one["planned"] == pytest.approx(alone["planned"] / 2, abs=1)
        same = ("fingerprint", "texts")
        assert {name: one[name] for name in same} == {name: alone[name] for name in same}
        assert one["sharded"] is True


def quantized(folder: Path) -> None:
    os.environ.update(FSDP2)
    take_over_fsdp()
    load_backbone(ModelSpec(str(folder), device="cpu", quantization="4bit"))


def test_quantized_weights_are_not_cut(tmp_path):
    for one in together(2, quantized, tmp_path):
        assert isinstance(one, ValueError)
        assert "'4bit' packs weights into bytes, which FSDP cannot cut into shards" in str(one)


def test_a_launch_that_asked_for_nothing_gets_nothing():
    take_over_fsdp()
    assert not shards_wanted()
    assert torch.distributed.is_available()
