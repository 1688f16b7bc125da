"""What adapters cost: counted bytes, and that zeros cost as much as other numbers."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_lora.models.backbones import ModelSpec, load_backbone
from grasp_lora.sharing.cost import costs
from grasp_lora.sharing.export import Request, write_export
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return the costs of an adapter, of the same half pruned, and of the same trimmed."""
    place = tmp_path_factory.mktemp("cost")
    base = tiny_backbone_folder(place / "base")
    whole = tiny_adapter_folder(place / "whole", tiny_model(), r=4)
    pruned = tiny_adapter_folder(place / "pruned", tiny_model(), r=4)
    file = pruned / "adapter_model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[::2] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    trimmed = write_export(
        Request(whole, "peft", place / "trimmed", dtype="float32", rank=2), lambda _line: None
    )
    backbone = load_backbone(ModelSpec(str(base), "float32", device="cpu"))
    return costs([whole, pruned, trimmed], backbone), tensors


def test_pruned_is_as_large_as_unpruned_and_trimmed_is_half(rows):
    (bare, whole, pruned, trimmed), tensors = rows
    assert (bare.name, bare.disk, bare.memory) == ("no adapter", 0, 0)
    assert [one.rank for one in (whole, pruned, trimmed)] == [4, 4, 2]
    assert whole.memory == pruned.memory == sum(t.nbytes for t in tensors.values())
    assert 2 * trimmed.memory == whole.memory
    assert whole.disk == pruned.disk > trimmed.disk
    assert (whole.zeros, pruned.zeros) == (0, pytest.approx(0.5))


def test_times_and_speed_are_measured(rows):
    for one in rows[0]:
        assert one.speed > 0
        assert (one.load > 0) == (one.name != "no adapter")
        assert torch.isfinite(torch.tensor([one.load, one.switch, one.speed])).all()


def test_zeros_that_fill_up_a_rank_are_not_counted(tmp_path):
    base = tiny_backbone_folder(tmp_path / "base")
    mixed = tiny_adapter_folder(tmp_path / "mixed", tiny_model(), r=4, rank_pattern={"q_proj": 1})
    one = write_export(
        Request(mixed, "peft", tmp_path / "one", dtype="float32"), lambda _line: None
    )
    backbone = load_backbone(ModelSpec(str(base), "float32", device="cpu"))
    (_, row) = costs([one], backbone)
    assert (row.rank, row.zeros) == (4, 0)


def test_energy_is_that_of_a_thousand_tokens(tmp_path, monkeypatch):
    """A device that uses 2 J for each reading of 256 tokens."""
    base = tiny_backbone_folder(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(base), "float32", device="cpu"))
    used = [0.0]
    monkeypatch.setattr("grasp_lora.sharing.cost._LONG", 0.05)
    backbone.model.register_forward_hook(lambda *_given: used.__setitem__(0, used[0] + 2.0))
    (row,) = costs([], backbone, lambda: used[0])
    assert row.energy == pytest.approx(1000 * 2 / 256)
    assert costs([], backbone)[0].energy is None
