"""Text and loss of each row from one reading of its prompt.

Scoring a row needs the model twice: for the loss of the reference, and to write an answer. Both
begin with the prompt, which is most of the work; here it is read once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from grasp_lora.adapters.virtual_tokens import VirtualTokenModel
from grasp_lora.generation.generate import TextGenerator, run_in_batches, text_generator
from grasp_lora.models.example_losses import IGNORED, losses_from_logits
from grasp_lora.models.modules import forward_accepts


def can_answer_in_one_pass(model: nn.Module, beams: int = 1) -> bool:
    """Return whether `answer_examples` is for this model and search."""
    config = getattr(model, "active_peft_config", None)
    virtual = isinstance(model, VirtualTokenModel) or getattr(config, "is_prompt_learning", False)
    named = all(forward_accepts(model, name) for name in ("position_ids", "logits_to_keep"))
    return beams == 1 and named and not virtual


def answer_examples(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Any],
    *,
    max_new_tokens: int,
    batch_size: int,
    pad_id: int,
    stop_ids: Sequence[int],
    min_new_tokens: int = 0,
    one_line: bool = True,
    advance: Callable[[int], None] = lambda _count: None,
    notice: Callable[[str], None] = lambda _message: None,
) -> list[tuple[str, float]]:
    """Return, for each row, the text written greedily after its prompt and its answer's loss.

    The loss is that of `example_losses`, the text that of `generate_texts`. A batch is laid out as
    prompts padded on the left, answers padded on the right: one forward gives the losses, and its
    keys and values, answers cut off again, are what generation goes on from. Where a model's cache
    cannot be cut (a sliding window that is full), the prompt is read again.

    Args:
        model: as `can_answer_in_one_pass` allows.
        tokenizer: decodes.
        rows: with `input_ids`, `prompt_length` and `label_tokens` of at least 1.
        max_new_tokens: limit per row.
        batch_size: rows per batch; halved, with a notice, whenever CUDA memory runs out.
        pad_id: padding token.
        stop_ids: tokens that end a row.
        min_new_tokens: no stop token is chosen before so many tokens.
        one_line: end a row at the first line break behind a word.
        advance: called with the number of rows just finished.
        notice: takes a line for the user.

    Raises:
        ValueError: as `generate_texts`.
    """
    made = text_generator(
        model, tokenizer, max_new_tokens, pad_id, stop_ids,
        one_line=one_line, min_new_tokens=min_new_tokens,
    )  # fmt: skip

    def work(batch: list[_Sized]) -> list[tuple[str, float]]:
        return _answered(made, [sized.row for sized in batch])

    return run_in_batches([_Sized(row) for row in rows], work, made, batch_size, advance, notice)


class _Sized(Sequence[int]):
    """A row that is as long as its prompt, which is what batches are formed by."""

    def __init__(self, row: Any):
        self.row = row

    def __len__(self) -> int:
        return int(self.row.prompt_length)

    def __getitem__(self, index: Any) -> Any:
        return self.row.input_ids[: self.row.prompt_length][index]


def _answered(made: TextGenerator, rows: Sequence[Any]) -> list[tuple[str, float]]:
    prompts = max(row.prompt_length for row in rows)
    answers = max(row.label_tokens for row in rows)
    ids = torch.full((len(rows), prompts + answers), made.pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        start, end = prompts - row.prompt_length, prompts + row.label_tokens
        ids[index, start:end] = torch.tensor(row.input_ids)
        mask[index, start:end] = 1
        labels[index, prompts:end] = ids[index, prompts:end]
    ids, mask, labels = (tensor.to(made.device) for tensor in (ids, mask, labels))
    output = made.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        logits_to_keep=torch.arange(prompts - 1, prompts + answers - 1, device=made.device),
        use_cache=True,
    )
    losses = losses_from_logits(output.logits, labels).tolist()
    cache = _prompt_cache(output.past_key_values, answers)
    texts = made.continued(ids[:, :prompts], mask[:, :prompts], cache)
    return list(zip(texts, losses, strict=True))


def _prompt_cache(cache: Any, answers: int) -> DynamicCache | None:
    """Return a cache without the answers and the last prompt token, None if it cannot be cut."""
    if not isinstance(cache, DynamicCache):
        return None
    try:
        cache.crop(-(answers + 1))
    except (ValueError, RuntimeError):  # the window of a sliding layer is full
        return None
    return cache
