"""Batched generation equals one row at a time, and one row at a time equals plain argmax."""

import pytest
import torch

from grasp_lora.hf.generate import first_line, generate_lines
from helpers import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 6, 7, 8, 9, 10], [40, 41], [100], [7, 6, 5, 4]]


def lines(model, prompts, **changes):
    settings = {
        "max_new_tokens": 6,
        "batch_size": 4,
        "pad_id": TOKENIZER.pad_token_id,
        "stop_ids": [TOKENIZER.eos_token_id],
    }
    return generate_lines(model, TOKENIZER, prompts, **(settings | changes))


@torch.no_grad()
def by_hand(model, prompt, count=6):
    ids = list(prompt)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        ids.append(token)
    return first_line(TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_batched_generation_equals_argmax_without_batch_or_cache(arch):
    model = tiny_model(arch).eval()
    assert lines(model, PROMPTS) == [by_hand(model, prompt) for prompt in PROMPTS]


def test_the_batch_size_changes_nothing():
    model = tiny_model("llama").eval()
    assert lines(model, PROMPTS, batch_size=1) == lines(model, PROMPTS, batch_size=3)


def test_progress_counts_every_row_once():
    seen: list[int] = []
    lines(tiny_model("llama"), PROMPTS, batch_size=3, advance=seen.append)
    assert sum(seen) == len(PROMPTS)


def test_the_model_is_in_eval_mode_although_its_config_asks_for_sampling():
    model = tiny_model("llama").train()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert lines(model, PROMPTS) == lines(model, PROMPTS)
    assert not model.training


@pytest.mark.parametrize(
    ("text", "line"),
    [("\n  París \nPregunta", "París"), ("", ""), ("  \n ", ""), ("uno", "uno")],
)
def test_first_line_is_the_first_that_holds_text(text, line):
    assert first_line(text) == line
