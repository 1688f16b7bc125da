"""Input norms equal sums computed by hand."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from architectures import ENCODER_DECODERS, Architecture, spanish_questions
from grasp_lora.core.lora import LoraFactors, merge
from grasp_lora.models.modules import resolve_targets
from grasp_lora.tasks.encoding import Collator, EncodedExample, TwoSidedCollator
from grasp_lora.training.activations import input_moments, input_norms
from grasp_lora.training.live import attach_live_adapter
from helpers import EOS_ID, PAD_ID, TINY_VOCAB, tiny_model

NAME = "model.layers.1.self_attn.q_proj"
ROWS = [EncodedExample(str(n), str(n), tuple(range(3, 3 + n)), n - 1, 0) for n in (3, 7, 5)]


class Routed(nn.Module):
    """A layer of two experts, each reading the tokens routed to it, without the batch's shape."""

    def __init__(self, experts: list[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden):
        flat, out = hidden.flatten(0, 1), torch.empty_like(hidden.flatten(0, 1))
        first = flat.argmax(1) % 2 == 0
        for expert, mine in zip(self.experts, (first, ~first), strict=True):
            out[mine] = expert(flat[mine])
        return out.view_as(hidden)


def routed_model():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = Routed([mlp, copy.deepcopy(mlp)])
    return model


def opt_model():
    config = OPTConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def live(model=None, names=(NAME,)):
    model = model or tiny_model("llama")
    layers = {name: model.get_submodule(name) for name in names}
    # Which expert a token is routed to depends on them: of all draws some leave one without any.
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    factors = {
        name: LoraFactors(drawn(2, layer.in_features), drawn(layer.out_features, 2), 1)
        for name, layer in layers.items()
    }
    return attach_live_adapter(model, merge("cat", [factors], [1.0]), "merged")


def norms_of_rows_alone(adapter):
    """Return name -> norms over all inputs when each example is read alone."""
    seen = {name: [] for name in adapter.layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name, layer in adapter.layers.items()
    ]
    adapter.model.eval()
    with torch.no_grad():
        for row in ROWS:
            adapter.model(input_ids=torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).square().sum(0).sqrt() for name, parts in seen.items()}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (tiny_model, [NAME]),
        # OPT hands its MLP [batch * length, hidden].
        (
            opt_model,
            [f"model.decoder.layers.1.{end}" for end in ("fc1", "fc2", "self_attn.q_proj")],
        ),
        (routed_model, [NAME, *(f"model.layers.1.mlp.experts.{i}.up_proj" for i in (0, 1))]),
    ],
    ids=["by batch", "flat", "routed"],
)
def test_norms_are_those_of_all_real_tokens_padding_left_out(build, names):
    adapter = live(build(), names)
    batched = input_norms(adapter.model, adapter.layers, [Collator(PAD_ID)(ROWS)])
    expected = norms_of_rows_alone(adapter)
    assert batched.keys() == expected.keys() == set(names)
    for name, norms in expected.items():
        assert torch.allclose(batched[name], norms, rtol=1e-4), name


def test_moments_are_the_products_of_the_inputs_of_all_real_tokens():
    adapter = live(tiny_model())
    (found,) = input_moments(adapter.model, adapter.layers, [Collator(PAD_ID)(ROWS)]).values()
    seen = []
    hook = adapter.layers[NAME].register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in ROWS:
            adapter.model(input_ids=torch.tensor([row.input_ids]))
    hook.remove()
    inputs = torch.cat(seen)
    assert torch.allclose(found, inputs.T @ inputs, rtol=1e-3, atol=1e-4)
    norms = input_norms(adapter.model, adapter.layers, [Collator(PAD_ID)(ROWS)])[NAME]
    assert torch.allclose(found.diagonal().sqrt(), norms, rtol=1e-4)


def test_a_module_that_reads_no_token_has_no_norms():
    model = tiny_model("llama")
    model.idle = nn.Linear(16, 16)
    adapter = live(model, [NAME, "idle"])
    assert list(input_norms(adapter.model, adapter.layers, [Collator(0)(ROWS)])) == [NAME]


def test_hooks_are_gone_and_modes_are_back():
    adapter = live()
    adapter.model.train()
    rows = [EncodedExample("a", "a", (1, 2, 3), 2, 0)]
    input_norms(adapter.model, adapter.layers, [Collator(pad_id=0)(rows)])
    assert adapter.model.training
    assert not adapter.layers[NAME]._forward_pre_hooks


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
def test_each_side_of_an_encoder_decoder_counts_its_own_tokens(
    one: Architecture, same_length: bool
):
    """The reference reads each example alone, with the labels that transformers shifts."""
    model, rows = one.model(), [asked.row for asked in spanish_questions(one)]
    names = resolve_targets(model, one.targets)
    adapter = live(model, names)
    batch = TwoSidedCollator(model.config.pad_token_id)(rows)
    if same_length:
        more = batch["input_ids"].shape[1] - batch["decoder_input_ids"].shape[1]
        filled = (("decoder_input_ids", model.config.pad_token_id), ("decoder_attention_mask", 0))
        for key, value in filled:
            batch[key] = torch.nn.functional.pad(batch[key], (0, more), value=value)
    read = {name: [] for name in names}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _module, args, name=name: read[name].append(args[0].flatten(0, -2))
        )
        for name, layer in adapter.layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            answer = row.input_ids[row.prompt_length : -1]
            adapter.model(
                input_ids=torch.tensor([row.input_ids[: row.prompt_length]]),
                decoder_input_ids=torch.tensor([[*row.sides.start, *answer]]),
            )
    for hook in hooks:
        hook.remove()
    prompts = sum(row.prompt_length for row in rows)
    answers = sum(len(row.sides.start) + row.label_tokens - 1 for row in rows)
    counts = {name: sum(map(len, parts)) for name, parts in read.items()}
    assert set(counts.values()) == {prompts, answers}
    found = input_norms(adapter.model, adapter.layers, [batch])
    moments = input_moments(adapter.model, adapter.layers, [batch])
    for name, parts in read.items():
        inputs = torch.cat(parts)
        torch.testing.assert_close(found[name], inputs.norm(dim=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments[name], inputs.T @ inputs, rtol=1e-3, atol=1e-3)
