"""The smaller file of an adapter: what is read is what was written, or one clear error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_lora.adapters.packed import QUANTIZED_FILE, load_quantized, write_packed
from grasp_lora.core.packing import FORMATS, packed

SIZES = {"int8": (3, 40, 7), "int4": (1, 33, 5), "bf16": (2, 4, 9)}
"""Format -> rank, inputs and outputs; odd numbers of int4 end in half a byte."""


def modules():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for form, (rank, inputs, outputs) in SIZES.items():
        A = torch.randn(rank, inputs, generator=generator)
        B = torch.randn(outputs, rank, generator=generator)
        found[f"layers.1.{form}"] = packed(form, A, B)
        found[f"layers.1.{form}.inner"] = packed(form, A + 1, B)
    return found


def test_what_is_read_is_what_was_written(tmp_path):
    written = modules()
    write_packed(tmp_path, written)
    found = load_quantized(str(tmp_path))
    assert found.keys() == written.keys()
    assert {one.form for one in written.values()} == set(FORMATS)
    for name, (A, B) in found.items():
        wanted = written[name].factors()
        assert (A.dtype, B.dtype) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(A, wanted[0])
        assert torch.equal(B, wanted[1])


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a folder that grasp-lora shrink wrote"):
        load_quantized(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "of another tool", "a list", "without a scale"])
def test_a_damaged_file_is_said(tmp_path, damage):
    write_packed(tmp_path, modules())
    file = tmp_path / QUANTIZED_FILE
    tensors = load_file(file)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "of another tool":
        save_file(tensors, file)
    elif damage == "a list":
        save_file(tensors, file, metadata={"modules": json.dumps([1])})
    else:
        del tensors["layers.1.int4.A.scales"]
        about = {"layers.1.int4": ["int4", 33, 5]}
        save_file(tensors, file, metadata={"modules": json.dumps(about)})
    with pytest.raises(ValueError, match=r"^\S+ is damaged, or not of grasp-lora shrink .*copy it"):
        load_quantized(tmp_path)
