"""Generate the text and compute the loss of each example, reading its prompt only once.

Scoring an example uses the model twice: for the loss of the reference, and to generate an answer.
Both begin with the prompt, which is most of the work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from grasp_lora.adapters.virtual_tokens import VirtualTokenModel
from grasp_lora.generation.generate import GenerationSettings, TextGenerator, run_in_batches
from grasp_lora.models.example_losses import IGNORED, losses_from_logits
from grasp_lora.models.key_values import output_cache
from grasp_lora.models.modules import forward_accepts, is_encoder_decoder
from grasp_lora.models.prefix import PrefixReader


def can_answer_in_one_pass(model: nn.Module, beams: int = 1) -> bool:
    """Return whether `answer_examples` supports a model and a number of beams."""
    config = getattr(model, "active_peft_config", None)
    virtual = isinstance(model, VirtualTokenModel) or getattr(config, "is_prompt_learning", False)
    arguments = ("position_ids", "logits_to_keep")
    if beams > 1 or virtual or is_encoder_decoder(model):
        return False
    return all(forward_accepts(model, name) for name in arguments)


def answer_examples(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Any],
    settings: GenerationSettings,
    *,
    prefix: PrefixReader | None = None,
    advance: Callable[[int], None] = lambda _count: None,
    notice: Callable[[str], None] = lambda _message: None,
) -> list[tuple[str, float]]:
    """Return for each example the greedily generated text and the loss of its reference in nats.

    The loss is that of `example_losses`, the text that of `generate_texts`. A batch has prompts
    padded on the left and answers padded on the right. One forward pass gives the losses.
    Generation continues from its keys and values, without those of the answers. If a model's cache
    cannot be shortened (a full sliding window), the prompt is read again.

    Args:
        model: a model that `can_answer_in_one_pass` accepts.
        tokenizer: decodes the tokens.
        examples: encoded examples that each have an answer.
        settings: rules of generation, with 1 beam.
        prefix: a reader of this model, if all prompts begin with its tokens.
        advance: called with the number of examples just finished.
        notice: called with messages for the user.

    Raises:
        ValueError: a single example does not fit the GPU's memory.
    """
    generator = TextGenerator(model, tokenizer, settings)

    def work(batch: list[_PromptSized]) -> list[tuple[str, float]]:
        return _answer_batch(generator, [sized.example for sized in batch], prefix)

    sized = [_PromptSized(example) for example in examples]
    return run_in_batches(sized, work, generator, advance, notice)


class _PromptSized(Sequence[int]):
    """An example whose length is that of its prompt, since batches are formed by prompt length."""

    def __init__(self, example: Any):
        self.example = example

    def __len__(self) -> int:
        return int(self.example.prompt_length)

    def __getitem__(self, index: Any) -> Any:
        return self.example.input_ids[: self.example.prompt_length][index]


def _answer_batch(
    generator: TextGenerator, examples: Sequence[Any], prefix: PrefixReader | None
) -> list[tuple[str, float]]:
    prompts = max(example.prompt_length for example in examples)
    answers = max(example.label_tokens for example in examples)
    ids = torch.full((len(examples), prompts + answers), generator.settings.pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, example in enumerate(examples):
        start, end = prompts - example.prompt_length, prompts + example.label_tokens
        ids[index, start:end] = torch.tensor(example.input_ids)
        mask[index, start:end] = 1
        labels[index, prompts:end] = ids[index, prompts:end]
    ids, mask, labels = (tensor.to(generator.device) for tensor in (ids, mask, labels))
    output = (prefix or generator.model)(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        logits_to_keep=torch.arange(prompts - 1, prompts + answers - 1, device=generator.device),
        use_cache=True,
    )
    losses = losses_from_logits(output.logits, labels).tolist()
    cache = _prompt_cache(output_cache(output), answers)
    texts = generator.texts_after(ids[:, :prompts], mask[:, :prompts], cache)
    return list(zip(texts, losses, strict=True))


def _prompt_cache(cache: Any, answers: int) -> DynamicCache | None:
    """Return the cache without the answers and the last prompt token, or None if impossible."""
    if not isinstance(cache, DynamicCache):
        return None
    try:
        cache.crop(-(answers + 1))
    except (ValueError, RuntimeError):  # the window of a sliding layer is full
        return None
    return cache
