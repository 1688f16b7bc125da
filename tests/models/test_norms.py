"""Fused norms equal the textbook's and transformers', and are used where they are equal."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from grasp_lora.models import norms
from grasp_lora.models.backbones import ModelSpec, load_backbone
from grasp_lora.models.norms import has_fused_kernel, use_fused_norms
from helpers import random_ids, tiny_model

needs_kernel = pytest.mark.skipif(not has_fused_kernel(), reason="this torch has no fused norm")


def norms_of(model):
    return [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]


def is_fused(module):
    return "forward" in vars(module)


def textbook(rows, weight, eps):
    """Return the textbook norm in float64."""
    rows = rows.double()
    return rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def drawn_model(arch):
    """Return a model whose norms have weights other than 1."""
    model = tiny_model(arch).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for norm in norms_of(model):
        norm.weight.add_(torch.randn(norm.weight.shape, generator=generator).bfloat16() * 0.3)
    return model


@needs_kernel
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_kernel_is_nearer_to_the_textbook_than_the_module(scale):
    model = drawn_model("llama")
    norm = norms_of(model)[0]
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(64, len(norm.weight), generator=generator) * scale).bfloat16()
    arriving = torch.randn(rows.shape, generator=generator).bfloat16()

    def output_and_gradient(forward, rows, arriving):
        rows = rows.clone().requires_grad_()
        output = forward(rows)
        output.backward(arriving)
        return output.detach().double(), rows.grad.double()

    own = output_and_gradient(norm, rows, arriving)
    assert use_fused_norms(model) == len(norms_of(model))
    fused = output_and_gradient(norm, rows, arriving)
    exact = output_and_gradient(
        lambda r: textbook(r, norm.weight, norm.variance_epsilon), rows.double(), arriving.double()
    )
    for ours, theirs, true in zip(fused, own, exact, strict=True):
        assert (ours - true).norm() <= (theirs - true).norm() * 1.001
        assert (ours - true).norm() < 0.004 * true.norm()


@needs_kernel
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_model_is_as_near_to_float32_as_with_its_own_norms(arch):
    ids = random_ids(rows=3, length=20)
    found = {}
    for way in ("float32", "own", "fused"):
        model = drawn_model(arch)
        if way == "float32":
            model.float()
        if way == "fused":
            assert use_fused_norms(model) == len(norms_of(model)) > 0
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.float().logsumexp(-1).sum().backward()
        found[way] = (logits.detach().float(), embeddings.grad.float())
    for exact, own, fused in zip(*found.values(), strict=True):
        assert not torch.equal(own, fused)
        assert (fused - exact).norm() < 1.3 * (own - exact).norm()


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5])
def test_norms_that_scale_otherwise_stay_as_they_are(weight):
    model = drawn_model("gemma3_text")
    for norm in norms_of(model):
        norm.weight.fill_(weight)
    assert use_fused_norms(model) == 0
    assert not any(is_fused(norm) for norm in norms_of(model))


class ShiftedRMSNorm(LlamaRMSNorm):
    """A module built like the other norms in which one weight counts twice."""

    def forward(self, hidden_states):
        scale = torch.ones_like(self.weight)
        scale[-1] = 2
        return super().forward(hidden_states) * scale


@needs_kernel
@pytest.mark.parametrize(
    ("norm", "fused"),
    [
        (LlamaRMSNorm(8, 1e-5), 1),
        (LlamaRMSNorm(8, 0.5), 1),
        (ShiftedRMSNorm(8), 0),
        (Gemma3RMSNorm(8), 0),
        (nn.LayerNorm(8), 0),
    ],
)
def test_only_norms_with_the_same_output_are_changed(norm, fused):
    model = tiny_model("gpt2").to(torch.bfloat16)
    model.added = norm.to(torch.bfloat16)
    assert use_fused_norms(model) == fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_alone(dtype):
    model = tiny_model("llama").to(dtype)
    assert use_fused_norms(model) == 0


@needs_kernel
def test_a_copy_uses_its_own_weights():
    model = drawn_model("llama")
    use_fused_norms(model)
    other = copy.deepcopy(model)
    norm, copied = norms_of(model)[0], norms_of(other)[0]
    with torch.no_grad():
        copied.weight.zero_()
    rows = torch.ones(1, len(norm.weight), dtype=torch.bfloat16)
    assert is_fused(copied)
    assert not copied(rows).any()
    assert norm(rows).all()


@needs_kernel
def test_a_loaded_backbone_uses_them(tiny_backbone_folder):
    folder = str(tiny_backbone_folder())
    loaded = load_backbone(ModelSpec(folder, dtype="bfloat16", device="cpu")).model
    assert all(is_fused(norm) for norm in norms_of(loaded))
    loaded = load_backbone(ModelSpec(folder, dtype="float32", device="cpu")).model
    assert not any(is_fused(norm) for norm in norms_of(loaded))


def test_without_the_kernel_nothing_changes(monkeypatch):
    monkeypatch.setattr(norms, "has_fused_kernel", lambda: False)
    model = drawn_model("llama")
    assert use_fused_norms(model) == 0
    assert not any(is_fused(norm) for norm in norms_of(model))
