"""LoRA added in place is as near to float32 as PEFT's, and is used only where it is the same."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from grasp_lora.adapters import products
from grasp_lora.adapters.attach import adapter_modules, attach_adapter
from grasp_lora.adapters.products import use_added_products
from helpers import random_ids, tiny_model


def changed(model):
    return [m for m in model.modules() if isinstance(m, LoraLinear) and "forward" in vars(m)]


def layer_of(rank=4, features=(96, 80), scaling=1.0, **settings):
    """Return a layer of PEFT over a frozen bfloat16 layer with a bias, its factors random."""
    torch.manual_seed(0)
    base = nn.Linear(*features).to(torch.bfloat16).requires_grad_(False)
    layer = LoraLinear(base, "default", LoraConfig(r=rank, lora_alpha=rank, **settings), r=rank)
    layer.scaling["default"] = scaling
    layer.lora_A.float()
    layer.lora_B.float()
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(0, 0.1)
        layer.lora_B["default"].weight.normal_(0, 0.1)
    return layer


def output_and_gradients(layer, rows, arriving):
    """Return the output, and the gradients of the inputs, A and B, in float64."""
    rows = rows.clone().requires_grad_()
    layer.zero_grad()
    output = layer(rows)
    output.backward(arriving)
    factors = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
    return [one.detach().double() for one in (output, rows.grad, *factors)]


@pytest.mark.parametrize("scaling", [1.0, 0.3, 4.0])
def test_it_is_as_near_to_the_exact_layer_as_peft(scaling):
    layer = layer_of(scaling=scaling)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 40, 96, generator=generator).bfloat16()
    arriving = torch.randn(3, 40, 80, generator=generator).bfloat16()
    peft = output_and_gradients(layer, rows, arriving)
    exact = output_and_gradients(copy.deepcopy(layer).double(), rows.double(), arriving.double())
    assert use_added_products(nn.ModuleList([layer])) == 1
    ours = output_and_gradients(layer, rows, arriving)

    def distance(found, right):
        return float((found - right).norm() / right.norm())

    for own, other, right in zip(ours[:2], peft[:2], exact[:2], strict=True):
        assert distance(own, right) <= distance(other, right) + 2**-10
    for own, right in zip(ours[2:], exact[2:], strict=True):
        assert distance(own, right) < 2**-8  # one rounding of each operand and of the result


def test_gradients_of_a_model_are_about_as_near_to_the_exact_ones_as_pefts():
    model = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    ids = random_ids(4, 24)
    names = [n for n, m in model.named_modules() if n.endswith("_proj")]
    generator = torch.Generator().manual_seed(5)

    def gradients(dtype, change):
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
        generator.manual_seed(5)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1, generator=generator)
        wrapped = wrapped if dtype is None else wrapped.to(dtype)
        assert not change or use_added_products(wrapped) == len(names)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad.double().flatten() for p in wrapped.parameters() if p.requires_grad]
        return torch.cat(found)

    exact, peft = gradients(torch.float64, False), gradients(None, False)
    ours = gradients(None, True)
    # The factors of this small model add as much as its weights do.
    assert 0 < (ours - exact).norm() <= 1.3 * (peft - exact).norm()


def test_the_frozen_layer_is_as_it_was_and_nothing_is_lost_between_two_calls():
    layer = layer_of()
    before = layer.base_layer.weight.clone()
    use_added_products(nn.ModuleList([layer]))
    rows = torch.randn(2, 7, 96).bfloat16()
    first, second = layer(rows), layer(rows)
    assert torch.equal(first, second)
    assert torch.equal(layer.base_layer.weight, before)
    assert not torch.equal(first, layer.base_layer(rows))


def test_disabled_merged_and_other_adapters_are_left_to_peft():
    layer = layer_of()
    rows = torch.randn(2, 7, 96).bfloat16()
    expected = {"bare": layer.base_layer(rows)}
    layer.update_layer("other", r=4, lora_alpha=4, config=LoraConfig(r=4, lora_alpha=4))
    layer.set_adapter("other")
    with torch.no_grad():
        layer.lora_B["other"].weight.normal_()
    expected["other"] = layer(rows)
    layer.set_adapter(["default", "other"])
    expected["both"] = layer(rows)
    use_added_products(nn.ModuleList([layer]))
    assert torch.equal(layer(rows), expected["both"])
    layer.set_adapter("other")
    assert torch.equal(layer(rows), expected["other"])
    layer.enable_adapters(False)
    assert torch.equal(layer(rows), expected["bare"])
    layer.enable_adapters(True)
    layer.set_adapter("default")
    layer.merge()
    merged = layer(rows)
    assert torch.equal(merged, layer.base_layer(rows))


def test_dropout_is_torchs_for_the_same_mask(monkeypatch):
    layer = layer_of(lora_dropout=0.5)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 40, 96, generator=generator).bfloat16()
    arriving = torch.randn(3, 40, 80, generator=generator).bfloat16()
    kept = products._kept(rows, 0.5)
    exact = copy.deepcopy(layer).double()
    exact.lora_dropout["default"] = Times(kept.double())
    use_added_products(nn.ModuleList([layer]))
    monkeypatch.setattr(products, "_kept", lambda x, p: kept if p == 0.5 else None)
    right = output_and_gradients(exact.train(), rows.double(), arriving.double())
    for own, other in zip(output_and_gradients(layer.train(), rows, arriving), right, strict=True):
        assert (own - other).norm() < 2**-7 * other.norm()
    with torch.no_grad():
        assert torch.equal(layer(rows), layer(rows))
    layer.eval()
    assert not torch.equal(layer(rows).double(), exact(rows.double()))


class Times(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        return x * self.kept


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(301, 33), (2, 7, 5), (1, 1)])
def test_dropout_drops_as_often_as_it_says_and_follows_the_seed(p, shape):
    x = torch.ones(shape).bfloat16()
    torch.manual_seed(3)
    masks = [products._kept(x, p) for _ in range(40)]
    torch.manual_seed(3)
    again = [products._kept(x, p) for _ in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    whole = torch.stack(masks)
    assert whole.shape[1:] == x.shape
    share = (whole == 0).double().mean()
    assert abs(share - p) < 5 * (p * (1 - p) / whole.numel()) ** 0.5
    assert torch.allclose(
        whole[whole != 0].double(), torch.tensor(1 / (1 - p)).double(), rtol=2**-8
    )
    if whole.numel() > 10_000:
        flat = (whole.flatten() == 0).double() - p
        for lag in (1, 2, 3, 4, 5):  # entries of one draw are as independent as others
            assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / len(flat) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_bfloat16_layers_are_changed(dtype):
    model = tiny_model("llama").to(dtype).requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    count = use_added_products(wrapped)
    assert count == len(changed(wrapped)) == (4 if dtype == torch.bfloat16 else 0)


def test_variants_of_lora_are_left_to_peft():
    model = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert use_added_products(wrapped) == 0


def test_an_attached_adapter_uses_it_and_the_model_is_plain_again_afterwards():
    model = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    ids = random_ids(2, 9)
    bare = model(ids).logits
    shapes = {n: m.weight.shape for n, m in model.named_modules() if n.endswith("q_proj")}
    factors = {n: (torch.randn(2, i), torch.randn(o, 2)) for n, (o, i) in shapes.items()}
    wrapped = attach_adapter(model, factors)
    assert len(changed(wrapped)) == len(adapter_modules(wrapped)) == len(shapes)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(ids).logits, bare)
    assert not torch.equal(wrapped(ids).logits, bare)
    plain = wrapped.unload()
    assert torch.equal(plain(ids).logits, bare)
