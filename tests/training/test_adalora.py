"""AdaLoRA: the plain export is equivalent, ranks are reduced, and the penalty is PEFT's."""

import pytest
import torch
from peft.tuners.adalora.layer import SVDLinear

from architectures import ENCODER_DECODERS
from grasp_lora.adapters.attach import attach_adapter
from grasp_lora.models.modules import resolve_targets
from grasp_lora.training.adalora import (
    ORTHOGONALITY,
    AdaLoraCallback,
    attach_adalora,
    orthogonality_penalty,
    plain_lora_of,
)
from helpers import logits_of, random_ids, tiny_model

TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


def attached(steps=24, seed=0):
    return attach_adalora(tiny_model(), TARGETS, 2, 8.0, 0.0, steps, seed)


class State:
    global_step = 0


def trained(live, steps):
    """Run a few steps of a plain loop that calls the callback like the Trainer."""
    optimizer = torch.optim.AdamW(live.params.values(), lr=0.05)
    callback, state = AdaLoraCallback(live), State()
    for step in range(steps):
        state.global_step = step
        ids = random_ids(rows=4, length=8)
        loss = live.model(input_ids=ids).logits.float().logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        callback.on_pre_optimizer_step(None, state, None)
        optimizer.step()
        callback.on_optimizer_step(None, state, None)
    return live


def test_a_fresh_adapter_starts_with_one_and_a_half_ranks_that_depend_on_the_seed():
    live = attached()
    assert {p.shape[0] for n, p in live.params.items() if "lora_A" in n} == {3}
    assert all(p.dtype == torch.float32 for p in live.params.values())
    same, other = attached(), attached(seed=1)
    for name, param in live.params.items():
        if "lora_A" in name:
            assert torch.equal(param, same.params[name])
            assert not torch.equal(param, other.params[name])


def test_ranks_are_given_up_to_the_budget_and_the_export_adds_the_same():
    live = trained(attached(), 24)
    alive = sum(
        int(m.lora_E["default"].count_nonzero())
        for m in live.model.modules()
        if isinstance(m, SVDLinear)
    )
    assert alive == 2 * len(TARGETS)
    live.model.eval()
    expected = logits_of(live.model, random_ids())
    plain = plain_lora_of(live)
    assert sum(a.shape[0] for a, _ in plain.values()) == alive
    live.model.unload()
    got = logits_of(attach_adapter(tiny_model(), plain).eval(), random_ids())
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, logits_of(tiny_model(), random_ids()), atol=1e-3)


def test_the_orthogonality_is_pefts():
    live = trained(attached(), 3)
    ids = random_ids()
    with_labels = live.model(input_ids=ids, labels=ids).loss
    logits = live.model(input_ids=ids).logits.float()
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    price = ORTHOGONALITY * orthogonality_penalty(live.params)
    assert with_labels.item() == pytest.approx((plain + price).item(), abs=1e-4)


def test_its_gradient_is_added_to_the_losses():
    live = attached()
    for param in live.params.values():
        param.grad = torch.ones_like(param)
    AdaLoraCallback(live).on_pre_optimizer_step(None, State(), None)
    name, factor = next((n, p) for n, p in live.params.items() if "lora_A" in n)
    step = torch.zeros_like(factor)
    step[0, 0] = 1e-2
    with torch.no_grad():
        moved = [orthogonality_penalty(live.params | {name: factor + s * step}) for s in (1, -1)]
    slope = ORTHOGONALITY * float(moved[0] - moved[1]) / 2e-2
    assert factor.grad[0, 0].item() == pytest.approx(1 + slope, abs=1e-3)
    scale = next(p for n, p in live.params.items() if "lora_E" in n)
    assert torch.equal(scale.grad, torch.ones_like(scale))


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="total_step|tfinal|schedule"):
        attached(steps=0)


def test_an_encoder_decoder_gets_an_adapter_of_its_kind():
    model = ENCODER_DECODERS[0].model()
    names = resolve_targets(model, ["q", "v"])
    live = attach_adalora(model, names, 2, 4.0, 0.0, 60, seed=0)
    assert live.model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert plain_lora_of(live).keys() == set(names)
