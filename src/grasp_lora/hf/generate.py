"""Greedy batched generation with the KV cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from grasp_lora.hf.probe import world


class StopAtNewline(StoppingCriteria):
    """A row is finished once the text after its prompt has a line break behind its first word.

    Args:
        tokenizer: decodes the rows.
        prompt_length: padded prompt length of the batch.
    """

    def __init__(self, tokenizer: Any, prompt_length: int):
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return [batch] booleans."""
        texts = self._tokenizer.batch_decode(
            input_ids[:, self._prompt_length :], skip_special_tokens=True
        )
        done = ["\n" in text.lstrip() for text in texts]
        return torch.tensor(done, device=input_ids.device)


def first_line(text: str) -> str:
    """Return the first non-empty line of a generated text, stripped."""
    return text.strip().split("\n", 1)[0].strip()


@torch.no_grad()
def generate_lines(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    pad_id: int,
    stop_ids: Sequence[int],
    advance: Callable[[int], None] = lambda _n: None,
) -> list[str]:
    """Return one generated line per prompt, in order.

    Prompts of like length share a batch, padded on the left. Each process generates its share of
    the batches; every process returns all lines.

    Args:
        model: a causal LM, adapters active; set to eval mode.
        tokenizer: decodes.
        prompts: token ids of each prompt.
        max_new_tokens: limit per row.
        batch_size: rows per batch.
        pad_id: padding token.
        stop_ids: tokens that end a row.
        advance: called with the number of rows just finished.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    # A config of our own: a backbone's generation_config may ask for sampling.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(stop_ids),
    )
    rank, size = world()
    lines: dict[int, str] = {}
    for chunk in chunks[rank::size]:
        length = max(len(prompts[i]) for i in chunk)
        ids = torch.full((len(chunk), length), pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chunk):
            ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, length - len(prompts[i]) :] = 1
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([StopAtNewline(tokenizer, length)]),
        )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        lines |= {i: first_line(text) for i, text in zip(chunk, texts, strict=True)}
        advance(len(chunk))
    if size > 1:
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, lines)
        lines = {i: line for share in shares for i, line in share.items()}
    return [lines[i] for i in range(len(prompts))]
