"""Text and loss from one reading of the prompt equal those from two readings."""

import random
from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from grasp_lora.generation.answer import answer_examples, can_answer_in_one_pass
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.prefix import PrefixReader
from grasp_lora.tasks.encoding import Collator, EncodedExample
from helpers import tiny_bloom_model, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RULE = GenerationSettings(max_new_tokens=9, batch_size=3, pad_id=0, stop_ids=(2,))


def rows(count: int = 7, longest: int = 30) -> list[EncodedExample]:
    drawn = random.Random(3)
    lengths = [(drawn.randint(2, longest), drawn.randint(1, 6)) for _ in range(count)]
    ids = [tuple(drawn.randint(5, 200) for _ in range(p + a)) for p, a in lengths]
    pairs = zip(ids, lengths, strict=True)
    return [
        EncodedExample(str(i), str(i), x, prompt, 0) for i, (x, (prompt, _)) in enumerate(pairs)
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("one_line", [True, False])
def test_texts_and_losses_are_those_of_two_readings(arch, one_line):
    model, encoded = tiny_model(arch), rows()
    assert can_answer_in_one_pass(model)
    found = answer_examples(model, TOKENIZER, encoded, replace(RULE, one_line=one_line))
    prompts = [e.input_ids[: e.prompt_length] for e in encoded]
    texts = generate_texts(model, TOKENIZER, prompts, replace(RULE, one_line=one_line))
    batches = EncodedExamples(encoded, Collator(0), 3).batches(range(len(encoded)))
    losses = example_losses(model.eval(), batches, len(encoded))
    assert [text for text, _ in found] == texts
    assert [loss for _, loss in found] == pytest.approx(losses, abs=1e-5)


def test_a_full_sliding_window_costs_a_second_reading_and_no_error():
    model = tiny_model("gemma3_text")
    assert model.config.sliding_window == 64
    encoded = rows(longest=120)
    assert max(e.prompt_length for e in encoded) > 70
    found = answer_examples(model, TOKENIZER, encoded, RULE)
    prompts = [e.input_ids[: e.prompt_length] for e in encoded]
    assert [text for text, _ in found] == generate_texts(model, TOKENIZER, prompts, RULE)


def test_order_of_rows_and_size_of_batches_do_not_matter():
    model, encoded = tiny_model("llama"), rows()
    one = answer_examples(model, TOKENIZER, encoded, replace(RULE, batch_size=1))
    other = answer_examples(model, TOKENIZER, encoded[::-1], RULE)[::-1]
    assert [text for text, _ in one] == [text for text, _ in other]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], abs=1e-5)


def test_the_prompt_is_read_once():
    model, encoded = tiny_model("llama"), rows(count=2)
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answer_examples(model, TOKENIZER, encoded, RULE)
    assert read[0] == max(e.prompt_length for e in encoded) + max(e.label_tokens for e in encoded)
    assert set(read[1:]) == {1}


def test_models_and_searches_it_is_not_for_are_named():
    assert not can_answer_in_one_pass(tiny_bloom_model()), "takes no position_ids"
    assert not can_answer_in_one_pass(tiny_model("llama"), beams=2)
    prompted = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    assert not can_answer_in_one_pass(prompted)


def test_modes_are_left_as_they_were():
    model = tiny_model("llama").train()
    answer_examples(model, TOKENIZER, rows(count=2), RULE)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_least_tokens_of_an_answer_are_the_rule_here_too():
    model, encoded = tiny_model("llama"), rows()
    prompts = [e.input_ids[: e.prompt_length] for e in encoded]
    with torch.no_grad():
        firsts = {int(model(torch.tensor([p])).logits[0, -1].argmax()) for p in prompts}
        weight = model.get_output_embeddings().weight
        weight[2] = 2.0 * weight[sorted(firsts)].sum(0)
    free = answer_examples(model, TOKENIZER, encoded, RULE)
    ended = TOKENIZER.decode([2])
    assert ended in [text for text, _ in free], "a model that is to end at once somewhere"
    found = answer_examples(model, TOKENIZER, encoded, replace(RULE, min_new_tokens=2))
    texts = [text for text, _ in found]
    assert texts == generate_texts(model, TOKENIZER, prompts, replace(RULE, min_new_tokens=2))
    assert ended not in texts
    assert [loss for _, loss in found] == [loss for _, loss in free]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_a_prefix_read_once_changes_no_text_and_no_loss(arch):
    model, ahead = tiny_model(arch), tuple(random.Random(5).choices(range(5, 200), k=100))
    encoded = [
        replace(row, input_ids=ahead + row.input_ids, prompt_length=100 + row.prompt_length)
        for row in rows(longest=90)
    ]
    read: list[int] = []
    reader = PrefixReader(model, ahead)
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, inputs: read.append(inputs[0].shape[1])
    )
    found = answer_examples(model, TOKENIZER, encoded, RULE, prefix=reader)
    hook.remove()
    assert read[0] == 100
    longest = max(len(row.input_ids) for row in encoded)
    assert all(count <= longest - 100 + 6 for count in read[1:]), "it is not read again"
    prompts = [e.input_ids[: e.prompt_length] for e in encoded]
    assert [text for text, _ in found] == generate_texts(model, TOKENIZER, prompts, RULE)
    batches = EncodedExamples(encoded, Collator(0), 1).batches(range(len(encoded)))
    losses = example_losses(model, batches, len(encoded))
    assert [loss for _, loss in found] == pytest.approx(losses, abs=1e-5)
