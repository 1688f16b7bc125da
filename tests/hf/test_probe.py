"""A batch of 8 equals 8 batches of 1, for every architecture, with position ids from the mask."""

import pytest
import torch

from grasp_lora.hf.backbones import ModelSpec, load_backbone
from grasp_lora.hf.probe import Rows, row_losses
from grasp_lora.tasks.encoding import Collator, Encoded
from helpers import tiny_backbone_folder, tiny_model


def rows(count: int = 8) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        length = 5 + 2 * i
        ids = tuple(torch.randint(1, 256, (length,), generator=generator).tolist())
        out.append(Encoded(str(i), str(i), ids, length - 2 - i % 3, 0))
    return out


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_batch_of_8_equals_8_batches_of_1(arch):
    model = tiny_model(arch).eval()
    encoded = rows()
    collate = Collator(pad_id=0)
    together = row_losses(model, Rows(encoded, collate, 8).batches(range(8)), 8)
    alone = row_losses(model, Rows(encoded, collate, 1).batches(range(8)), 8)
    assert together == pytest.approx(alone, abs=1e-5)


def test_gpt2_without_position_ids_would_be_wrong():
    model = tiny_model("gpt2").eval()
    encoded = rows()
    plain = Collator(pad_id=0, with_position_ids=False)
    together = row_losses(model, Rows(encoded, plain, 8).batches(range(8)), 8)
    alone = row_losses(model, Rows(encoded, plain, 1).batches(range(8)), 8)
    assert max(abs(a - b) for a, b in zip(together, alone, strict=True)) > 1e-3


def test_rows_come_in_their_own_order_with_like_lengths_together():
    batches = Rows(rows(), Collator(pad_id=0), 3).batches([7, 0, 3, 5])
    positions = [p for chunk, _ in batches for p in chunk]
    assert positions == [0, 3, 2, 1]
    assert [len(chunk) for chunk, _ in batches] == [2, 2], "less padding than the longest three"
    assert [b["input_ids"].shape[1] for _, b in batches] == [19, 11]


def test_the_output_layer_of_a_frozen_backbone_is_not_multiplied_by_bmm(tmp_path):
    folder = tiny_backbone_folder(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(folder), dtype="float32", device="cpu"))
    batches = Rows(rows(), Collator(pad_id=0), 8).batches(range(8))
    with torch.profiler.profile(record_shapes=True) as profile:
        row_losses(backbone.model, batches, 8)
    vocabulary = backbone.model.config.vocab_size
    products = [
        event
        for event in profile.events()
        if event.name == "aten::bmm"
        and any(vocabulary in shape for shape in event.input_shapes if shape)
    ]
    assert not products
