"""Product attention equals the textbook's and transformers', and is used where it applies."""

import math

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grasp_lora.models import attention
from grasp_lora.models.attention import (
    ATTENTION_NAME,
    attention_forward,
    attention_products,
    can_pack,
    packed_edges,
    use_short_attention,
)
from grasp_lora.models.backbones import ModelSpec, load_backbone
from helpers import logits_of, random_ids, tiny_model


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def textbook(query, key, value, visible, scale):
    """Return attention computed for one head and one query at a time."""
    examples, heads, length, _ = query.shape
    shared = heads // key.shape[1]
    out = torch.zeros(examples, length, heads, value.shape[-1], dtype=query.dtype)
    for b in range(examples):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(length) if visible[b, i, j]]
                scores = torch.stack(
                    [scale * query[b, h, i] @ key[b, h // shared, j] for j in seen]
                )
                weights = scores.softmax(0)
                values = torch.stack([value[b, h // shared, j] for j in seen])
                out[b, i, h] = weights @ values
    return out


def bias_of(visible):
    lowest = torch.finfo(torch.float64).min
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, lowest)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("cached", [1, 10_000])
@pytest.mark.parametrize("span", [1, 2, 3, 100])
def test_products_equal_the_textbook(heads, key_heads, cached, span, monkeypatch):
    monkeypatch.setattr(attention, "_CACHED_SCORES", cached)
    monkeypatch.setattr(attention, "_QUERIES_PER_SPAN", span)
    query, key = drawn(2, heads, 5, 4, seed=1), drawn(2, key_heads, 5, 4, seed=2)
    value = drawn(2, key_heads, 5, 3, seed=3)
    visible = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    visible[1, :, 0] = False  # a row with padding on its left, which itself still sees something
    visible[1, 0, 0] = True
    got = attention_products(query, key, value, bias_of(visible).unsqueeze(1), 0.3)
    assert torch.allclose(got, textbook(query, key, value, visible, 0.3), atol=1e-12)


def test_queries_that_see_later_keys_are_not_cut(monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES_PER_SPAN", 2)
    query, key, value = drawn(1, 2, 6, 4, seed=1), drawn(1, 2, 6, 4, seed=2), drawn(1, 2, 6, 4)
    visible = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    visible[0, 1, 5] = True
    got = attention_products(query, key, value, bias_of(visible).unsqueeze(1), 0.3)
    assert torch.allclose(got, textbook(query, key, value, visible, 0.3), atol=1e-12)


@pytest.mark.parametrize("span", [1, 2, 100])
def test_the_gradients_are_those_of_finite_differences(span, monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES_PER_SPAN", span)
    inputs = [
        drawn(2, 4, 4, 3, seed=1).requires_grad_(),
        drawn(2, 2, 4, 3, seed=2).requires_grad_(),
        drawn(2, 2, 4, 5, seed=3).requires_grad_(),
    ]
    bias = bias_of(torch.ones(1, 4, 4, dtype=torch.bool).tril()).unsqueeze(1)
    assert torch.autograd.gradcheck(lambda q, k, v: attention_products(q, k, v, bias, 0.7), inputs)


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("padded", [False, True])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_fused_kernel(padded):
    layer, length = Layer(), 48
    query = drawn(2, 4, length, 16, seed=1, dtype=torch.float32)
    key, value = (drawn(2, 2, length, 16, seed=s, dtype=torch.float32) for s in (2, 3))
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril() if padded else None
    if mask is not None:
        mask[0, :, 7:, :7] = False
    exact, _ = sdpa_attention_forward(layer, query, key, value, mask)
    lower = [t.bfloat16() for t in (query, key, value)]
    ours, _ = attention_forward(layer, *lower, mask)
    fused, _ = sdpa_attention_forward(layer, *lower, mask)
    assert ours.shape == fused.shape
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.5 * (fused - exact).abs().mean()


def test_rows_of_padding_that_see_nothing_stay_finite():
    query, key, value = (drawn(1, 2, 4, 8, seed=s).bfloat16().requires_grad_() for s in range(3))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    layer = Layer()
    layer.num_key_value_groups = 1
    out, _ = attention_forward(layer, query, key, value, mask)
    out.sum().backward()
    assert all(bool(t.isfinite().all()) for t in (out, query.grad, key.grad, value.grad))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "another dtype"),
        ({"length": attention.MAX_LENGTH + 1}, "a long row"),
        ({"keys": 9}, "decoding with a cache"),
        ({"dropout": 0.1}, "dropout"),
        ({"mask": "additive"}, "a mask that is not boolean"),
        ({"is_causal": False}, "attention both ways"),
    ],
)
def test_everything_else_goes_to_sdpa(change, why, monkeypatch):
    monkeypatch.setattr(attention, "attention_products", lambda *_: pytest.fail(f"used for {why}"))
    length = change.get("length", 6)
    dtype = change.get("dtype", torch.bfloat16)
    query = drawn(1, 2, length, 8, seed=1).to(dtype)
    key, value = (drawn(1, 2, change.get("keys", length), 8, seed=s).to(dtype) for s in (2, 3))
    layer = Layer()
    layer.num_key_value_groups = 1
    mask = torch.zeros(1, 1, length, length, dtype=dtype) if change.get("mask") else None
    settings = {k: v for k, v in change.items() if k in ("dropout", "is_causal")}
    torch.manual_seed(0)
    got, _ = attention_forward(layer, query, key, value, mask, **settings)
    torch.manual_seed(0)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, **settings)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3"])
def test_a_model_gives_the_same_logits_and_gradients_within_bfloat16(arch):
    ids = random_ids(rows=3, length=20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    found = []
    for way in (False, True):
        model = tiny_model(arch).to(torch.bfloat16)
        assert not way or use_short_attention(model)
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=mask).logits[mask.bool()]
        logits.float().logsumexp(-1).sum().backward()
        found.append((logits.detach().float(), embeddings.grad[mask.bool()].float()))
    for fused, ours in zip(*found, strict=True):
        assert (fused - ours).abs().max() < 0.03 * max(1.0, float(fused.abs().max()))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3"])
def test_every_layer_of_a_model_uses_products(arch, monkeypatch):
    model = tiny_model(arch).to(torch.bfloat16)
    assert use_short_attention(model)
    used = []

    def products(*arguments):
        used.append(arguments[0].shape[2])
        return attention_products(*arguments)

    monkeypatch.setattr(attention, "attention_products", products)
    logits_of(model, random_ids(rows=2, length=9))
    assert used == [9] * model.config.num_hidden_layers


def test_only_bfloat16_models_that_chose_sdpa_themselves_are_changed(tiny_backbone_folder):
    folder = str(tiny_backbone_folder())
    chosen = load_backbone(ModelSpec(folder, dtype="bfloat16", device="cpu")).model
    assert chosen.config._attn_implementation == ATTENTION_NAME
    for spec in (
        ModelSpec(folder, dtype="float32", device="cpu"),
        ModelSpec(folder, dtype="bfloat16", device="cpu", attn_implementation="sdpa"),
        ModelSpec(folder, dtype="bfloat16", device="cpu", attn_implementation="eager"),
    ):
        assert load_backbone(spec).model.config._attn_implementation != ATTENTION_NAME
    assert math.isfinite(float(logits_of(chosen, random_ids()).float().sum()))


@pytest.mark.parametrize(
    ("positions", "edges"),
    [
        ([0, 1, 2, 0, 1], [0, 3, 5]),
        ([0, 1, 0, 1, 2, 0, 1], [0, 2, 5, 7]),
        ([0, 1, 2, 3, 4], []),
        ([0, 0, 0, 1, 2], []),  # padding on the left
        ([0, 1, 2, 0, 0, 1], []),
        ([3, 4, 5, 6], []),  # what follows a cached beginning
        ([0, 1, 3, 0, 1], []),
        ([1, 2, 0, 1], []),
    ],
)
def test_a_packed_row_is_known_by_its_positions(positions, edges):
    query = torch.zeros(1, 2, len(positions), 4)
    assert packed_edges(torch.tensor([positions]), query) == edges
    assert packed_edges(None, query) == []
    assert packed_edges(torch.tensor([positions, positions]), query.expand(2, 2, -1, 4)) == []


@pytest.mark.parametrize("mask", [None, "blocks"])
def test_examples_of_a_packed_row_attend_to_themselves_alone(mask):
    layer, lengths = Layer(), [5, 130, 2]
    total = sum(lengths)
    query = drawn(1, 4, total, 16, seed=1).bfloat16().requires_grad_()
    key, value = (drawn(1, 2, total, 16, seed=s).bfloat16().requires_grad_() for s in (2, 3))
    positions = torch.tensor([[place for length in lengths for place in range(length)]])
    given = None
    if mask is not None:
        owner = torch.tensor(
            [number for number, length in enumerate(lengths) for _ in range(length)]
        )
        given = (owner[:, None] == owner).tril()[None, None]
    together, _ = attention_forward(layer, query, key, value, given, position_ids=positions)
    together.float().square().sum().backward()
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        parts = [t.detach()[:, :, own].clone().requires_grad_() for t in (query, key, value)]
        alone, _ = attention_forward(layer, *parts, None)
        assert torch.equal(together[:, own], alone)
        alone.float().square().sum().backward()
        for whole, part in zip((query, key, value), parts, strict=True):
            torch.testing.assert_close(whole.grad[:, :, own], part.grad, rtol=0.02, atol=0.02)
        start += length


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3"])
def test_a_model_packs_where_it_uses_this_attention_and_hands_positions_on(arch):
    model = tiny_model(arch).eval()
    assert not can_pack(model), "float32"
    model = model.to(torch.bfloat16)
    assert use_short_attention(model)
    assert can_pack(model)


def test_a_model_that_lets_packed_examples_see_each_other_does_not_pack(monkeypatch):
    model = tiny_model("llama").eval().to(torch.bfloat16)
    assert use_short_attention(model)
    assert can_pack(model)
    monkeypatch.setattr(attention, "packed_edges", lambda *_: [])
    assert not can_pack(model)
