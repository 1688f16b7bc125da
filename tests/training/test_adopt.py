"""A live adapter of a PeftModel that was built elsewhere: what is taken, and what is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from grasp_lora.adapters.merging import merge_adapters
from grasp_lora.training.adopt import adopt_adapter
from helpers import logits_of, random_ids, tiny_adapter_folder, tiny_model, tiny_peft_model


def with_two(active: str = "second") -> PeftModel:
    model = tiny_peft_model(tiny_model())
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter(active)
    return model


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_the_factors_are_those_of_the_model_and_nothing_changes(arch):
    model = tiny_peft_model(tiny_model(arch), use_rslora=True)
    ids = random_ids()
    before = logits_of(model, ids)
    live = adopt_adapter(model)
    assert torch.equal(logits_of(model, ids), before)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in live.params.values()} == trained
    assert len(live.blocks) == len(live.layers) == len(trained) / 2


def test_a_compiled_model_is_that_inside():
    model = tiny_peft_model(tiny_model())
    assert adopt_adapter(torch.compile(model, backend="eager")).model is model


def test_the_adapter_that_is_named_or_active_is_taken():
    assert adopt_adapter(with_two()).adapter == "second"
    live = adopt_adapter(with_two("default"), "default")
    assert live.adapter == "default"
    with live.scaled(0.0):
        off = logits_of(live.model, random_ids())
    with live.model.disable_adapter():
        assert torch.equal(logits_of(live.model, random_ids()), off)


def test_the_parts_of_a_merge_are_blocks_of_their_own(tmp_path):
    folders = [tiny_adapter_folder(tmp_path / str(r), tiny_model(), r=r) for r in (2, 5)]
    live = adopt_adapter(merge_adapters(tiny_model(), folders), mask_unit="source")
    assert {(b.source, b.rows.start, b.rows.stop) for b in live.blocks} == {(0, 0, 2), (1, 2, 7)}


def merged_in(model: PeftModel) -> PeftModel:
    model.merge_adapter()
    return model


def frozen(model: PeftModel) -> PeftModel:
    model.requires_grad_(False)
    return model


def both_active(model: PeftModel) -> PeftModel:
    model.base_model.set_adapter(["default", "second"])
    return model


def plain(**config) -> PeftModel:
    settings = {"task_type": "CAUSAL_LM", "r": 2} | config
    return get_peft_model(tiny_model(), LoraConfig(**settings))


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (tiny_model, {}, "the model is a LlamaForCausalLM, but the ratio search needs a PeftModel"),
        (with_two, {"adapter": "third"}, "has no adapter 'third'; its adapters are ['default', "),
        (with_two, {"adapter": "default"}, "adapter 'default' is not active (active: ['second'])"),
        (lambda: both_active(with_two()), {}, "2 adapters are active (['default', 'second'])"),
        (lambda: merged_in(tiny_peft_model(tiny_model())), {}, "is merged into the base weights"),
        (lambda: frozen(tiny_peft_model(tiny_model())), {}, "is not trained (requires_grad is off"),
        (lambda: plain(target_modules=["q_proj"], use_dora=True), {}, "use_dora=True means DoRA"),
        (lambda: plain(target_modules=["q_proj"], bias="all"), {}, "means trained bias vectors"),
        (lambda: plain(target_modules=["embed_tokens"]), {}, "has LoRA on the embedding"),
        (lambda: plain(target_modules=["lm_head"]), {}, "has LoRA on the output layer"),
        (
            lambda: plain(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            {},
            "means modules trained in full beside LoRA",
        ),
        (
            lambda: plain(target_modules=["q_proj"], task_type="SEQ_CLS"),
            {},
            "only causal language models",
        ),
        (
            lambda: tiny_peft_model(tiny_model()),
            {"mask_unit": "source"},
            "mask_unit='source' prunes the parts of the source adapters separately, but",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_refused(make, arguments, said):
    model = make()
    with pytest.raises(ValueError, match=r"adapter|PeftModel") as told:
        adopt_adapter(model, **arguments)
    assert said in str(told.value)
