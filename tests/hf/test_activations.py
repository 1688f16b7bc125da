"""Input norms against sums worked out by hand."""

import torch

from grasp_lora.core.lora import LoraFactors, merge
from grasp_lora.hf.activations import input_norms
from grasp_lora.hf.live import go_live
from grasp_lora.tasks.encoding import Collator, Encoded
from helpers import tiny_model

NAME = "model.layers.1.self_attn.q_proj"


def live():
    model = tiny_model("llama")
    layer = dict(model.named_modules())[NAME]
    factors = LoraFactors(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 1)
    return go_live(model, merge("cat", [{NAME: factors}], [1.0]), "merged")


def test_norms_are_those_of_all_real_tokens_padding_left_out():
    adapter = live()
    rows = [Encoded(str(n), str(n), tuple(range(3, 3 + n)), n - 1, 0) for n in (3, 7, 5)]
    collate = Collator(pad_id=0)
    batched = input_norms(adapter.model, adapter.layers, [collate(rows)])
    seen: list[torch.Tensor] = []
    hook = adapter.layers[NAME].register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    adapter.model.eval()
    with torch.no_grad():
        for row in rows:
            adapter.model(input_ids=torch.tensor([row.input_ids]))
    hook.remove()
    expected = torch.cat(seen).square().sum(0).sqrt()
    assert torch.allclose(batched[NAME], expected, rtol=1e-4)


def test_hooks_are_gone_and_modes_are_back():
    adapter = live()
    adapter.model.train()
    rows = [Encoded("a", "a", (1, 2, 3), 2, 0)]
    input_norms(adapter.model, adapter.layers, [Collator(pad_id=0)(rows)])
    assert adapter.model.training
    assert not adapter.layers[NAME]._forward_pre_hooks
