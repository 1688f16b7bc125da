"""A cache is passed and found under the name that a model and transformers use."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from grasp_lora.models.example_losses import can_share_prefix
from grasp_lora.models.key_values import CACHE_NAME, cache_argument, empty_cache, output_cache
from helpers import random_ids, tiny_bloom_model, tiny_config, tiny_model, tiny_peft_model


class OldName(LlamaForCausalLM):
    """A model whose code came with it, in the form of older releases."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **others):
        others[CACHE_NAME] = past_key_values
        return super().forward(input_ids=input_ids, position_ids=position_ids, **others)


class NewName(LlamaForCausalLM):
    """The same in the form of newer releases."""

    def forward(self, input_ids=None, position_ids=None, cache=None, **others):
        others[CACHE_NAME] = cache
        return super().forward(input_ids=input_ids, position_ids=position_ids, **others)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_the_models_of_transformers_use_its_own_name(arch):
    model = tiny_model(arch)
    assert cache_argument(model) == CACHE_NAME
    cache = output_cache(model(random_ids(rows=2, length=7), use_cache=True))
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 7
    assert output_cache(model(random_ids(), use_cache=False)) is None


def test_an_adapter_hides_no_argument():
    assert cache_argument(tiny_peft_model(tiny_model())) == CACHE_NAME
    assert cache_argument(tiny_bloom_model()) == CACHE_NAME


@pytest.mark.parametrize(("kind", "name"), [(OldName, "past_key_values"), (NewName, "cache")])
def test_a_models_own_code_may_use_either_name(kind, name):
    torch.manual_seed(0)
    model = kind(tiny_config()).eval()
    assert cache_argument(model) == name
    assert can_share_prefix(model, 30)
    ids, cache = random_ids(rows=2, length=9), empty_cache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :5], **{name: cache}, use_cache=True)
        rest = model(input_ids=ids[:, 5:], **{name: cache}, use_cache=True).logits
        torch.testing.assert_close(rest, model(input_ids=ids).logits[:, 5:], rtol=0, atol=1e-5)


def test_a_model_without_a_cache_has_no_argument_for_one():
    assert cache_argument(nn.Linear(2, 2)) is None
    assert not can_share_prefix(nn.Linear(2, 2), 5)
