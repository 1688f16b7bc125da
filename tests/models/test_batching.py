"""A batch of 8 examples of different length equals 8 batches of 1: losses and answers."""

import pytest
import torch
from transformers import PreTrainedModel

from grasp_lora.data.builtin import builtin_examples
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.models.backbones import forward_accepts
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.encoding import Collator, EncodedExample, encode_examples
from helpers import EOS_ID, PAD_ID, tiny_bloom_model, tiny_model, tiny_tokenizer

MODELS = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2"),
    "gemma3": lambda: tiny_model("gemma3_text"),
    "bloom": tiny_bloom_model,
}
TOKENIZER = tiny_tokenizer()


class Numbers:
    """Decodes tokens to their ids, because different invalid bytes give the same text."""

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(str(i) for i in row if i not in (PAD_ID, EOS_ID)) for row in ids.tolist()]


def rows() -> list[EncodedExample]:
    """Return 8 questions of over 64 tokens, the longest more than twice the shortest."""
    examples = builtin_examples("en", count=8, seed=3)
    encoded = [
        encode_examples([example], TASKS["qa"], TOKENIZER, 120 + 20 * i)[0][0]
        for i, example in enumerate(examples)
    ]
    lengths = [len(row.input_ids) for row in encoded]
    # Longer than the sliding window of the tiny Gemma 3.
    assert min(lengths) > 64
    assert max(lengths) > 2 * min(lengths)
    return encoded


def collator(model: PreTrainedModel) -> Collator:
    return Collator(
        PAD_ID,
        with_position_ids=forward_accepts(model, "position_ids"),
        with_logits_to_keep=forward_accepts(model, "logits_to_keep"),
    )


def largest_gap(model: PreTrainedModel, collate: Collator) -> float:
    """Return the largest difference of an example's loss in a batch of 8 and in a batch of 1."""
    encoded = rows()
    together, alone = (
        example_losses(model, EncodedExamples(encoded, collate, size).batches(range(8)), 8)
        for size in (8, 1)
    )
    assert len(set(alone)) == 8
    return max(abs(a - b) for a, b in zip(together, alone, strict=True))


def test_the_models_cover_both_kinds_of_positions() -> None:
    taken = {name: forward_accepts(build(), "position_ids") for name, build in MODELS.items()}
    assert taken == {"llama": True, "gpt2": True, "gemma3": True, "bloom": False}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_the_loss_of_a_row_does_not_depend_on_its_batch(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = MODELS[name]().to(dtype)
    gap = largest_gap(model, collator(model))
    assert gap < tolerance


def test_gpt2_without_position_ids_is_wrong_in_a_batch() -> None:
    model = tiny_model("gpt2")
    assert largest_gap(model, Collator(PAD_ID, with_position_ids=False)) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_padding_that_is_not_masked_would_be_seen(name: str) -> None:
    model = MODELS[name]()
    collate = collator(model)

    def unmasked(chosen: list[EncodedExample]) -> dict[str, torch.Tensor]:
        batch = collate(chosen)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}

    assert largest_gap(model, unmasked) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_do_not_depend_on_the_batch(name: str, beams: int) -> None:
    model = MODELS[name]()
    prompts = [row.input_ids[: row.prompt_length] for row in rows()]

    def texts(batch_size: int) -> list[str]:
        return generate_texts(
            model,
            Numbers(),
            prompts,
            GenerationSettings(
                max_new_tokens=12,
                batch_size=batch_size,
                pad_id=PAD_ID,
                stop_ids=[EOS_ID],
                beams=beams,
                one_line=False,
            ),
        )

    together = texts(8)
    assert together == texts(1)
    assert len(set(together)) > 4
    assert max(len(text.split()) for text in together) == 12
