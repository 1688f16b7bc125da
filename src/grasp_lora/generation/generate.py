"""Batched generation with the KV cache: greedy, or a beam search."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from grasp_lora.models.example_losses import rank_and_size
from grasp_lora.models.modules import bare_model

Done = TypeVar("Done")


class StopAtNewline(StoppingCriteria):
    """A row is finished once the text after its prompt has a line break behind its first word.

    Only rows whose newest token holds a line break are decoded, so a text is read once or twice
    and not once a token. Of the tokens' texts only "has a line break" is remembered.

    Args:
        tokenizer: decodes the rows.
        prompt_length: padded prompt length of the batch.
        breaks: token id -> whether its text holds a line break; filled as tokens come up. Give
            the same dict to all batches of a tokenizer.
    """

    def __init__(self, tokenizer: Any, prompt_length: int, breaks: dict[int, bool] | None = None):
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._breaks = {} if breaks is None else breaks

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return [batch] booleans; a row that was finished before need not be True again."""
        newest = input_ids[:, -1].tolist()
        fresh = sorted(set(newest) - self._breaks.keys())
        if fresh:
            texts = self._decode(torch.tensor(fresh).unsqueeze(1))
            self._breaks.update((t, "\n" in text) for t, text in zip(fresh, texts, strict=True))
        done = [self._breaks[token] for token in newest]
        rows = [row for row, candidate in enumerate(done) if candidate]
        if rows:
            texts = self._decode(input_ids[rows, self._prompt_length :])
            for row, text in zip(rows, texts, strict=True):
                done[row] = "\n" in text.lstrip()
        return torch.tensor(done, device=input_ids.device)

    def _decode(self, ids: Tensor) -> list[str]:
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, eq=False)
class TextGenerator:
    """What every batch of one call shares; `text_generator` makes one."""

    model: nn.Module
    tokenizer: Any
    settings: GenerationConfig
    device: torch.device
    breaks: dict[int, bool] | None
    """For `StopAtNewline`; None lets texts run over several lines."""

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return int(self.settings.pad_token_id)  # type: ignore[arg-type]

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return what the model writes after each prompt; the prompts make up one batch."""
        length = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        return self.continued(ids.to(self.device), mask.to(self.device))

    def continued(self, ids: Tensor, mask: Tensor, cache: Any = None) -> list[str]:
        """Return what the model writes after left-padded prompts [batch, length].

        Args:
            ids: the prompts.
            mask: 0 on padding.
            cache: keys and values of all positions but the last, if they are known.
        """
        length = ids.shape[1]
        criteria = StoppingCriteriaList()
        if self.breaks is not None:
            criteria.append(StopAtNewline(self.tokenizer, length, self.breaks))
        known = {} if cache is None else {"past_key_values": cache}
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=self.settings,
            stopping_criteria=criteria,
            **known,
        )
        return self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    pad_id: int,
    stop_ids: Sequence[int],
    beams: int = 1,
    min_new_tokens: int = 0,
    one_line: bool = True,
    advance: Callable[[int], None] = lambda _count: None,
    notice: Callable[[str], None] = lambda _message: None,
) -> list[str]:
    """Return the text generated after each prompt, in the prompts' order.

    Special tokens are left out; all else stays as generated, so the caller cuts and trims. Prompts
    of like length share a batch (longest first, padded on the left), and a batch runs until its
    last row is finished. Each process generates its share of the batches; every process returns
    all texts. Nothing is sampled, and what the model's own `generation_config` asks for
    (temperature, repetition penalty, ...) is set aside: all models are decoded by the same rule.

    With `beams` the line break ends nothing: transformers asks a stopping rule about every
    candidate continuation, and where all of a row's candidates hold a line break none is left to
    go on with. A beam ends at a stop token or at the limit, its score being the mean log
    probability of all its tokens (`length_penalty` 1), and a row ends with its first `beams`
    finished ones. Cut such texts at the line break afterwards.

    Args:
        model: a causal LM, adapters active; in eval mode meanwhile.
        tokenizer: decodes.
        prompts: token ids of each prompt, none empty.
        max_new_tokens: limit per row.
        batch_size: rows per batch; halved, with a notice, whenever CUDA memory runs out.
        pad_id: padding token.
        stop_ids: tokens that end a row.
        beams: width of the beam search; 1 is greedy.
        min_new_tokens: no stop token is chosen before so many tokens; a weak model's most likely
            answer is often to say nothing.
        one_line: end a row at the first line break behind a word.
        advance: called with the number of rows just finished.
        notice: takes a line for the user.

    Raises:
        ValueError: a number is out of its range, a prompt is empty, or the memory does not hold one
            row.
    """
    if not all(prompts):
        raise ValueError("a prompt holds no tokens; give every prompt at least a start token")
    made = text_generator(
        model, tokenizer, max_new_tokens, pad_id, stop_ids, beams, one_line, min_new_tokens
    )
    return run_in_batches(prompts, made.texts, made, batch_size, advance, notice)


def text_generator(
    model: nn.Module,
    tokenizer: Any,
    max_new_tokens: int,
    pad_id: int,
    stop_ids: Sequence[int],
    beams: int = 1,
    one_line: bool = True,
    min_new_tokens: int = 0,
) -> TextGenerator:
    """Return what generates batches by one rule; see `generate_texts` for the arguments."""
    _check(max_new_tokens=max_new_tokens, beams=beams)
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"min_new_tokens must be 0 to {max_new_tokens} (max_new_tokens), got {min_new_tokens}"
        )
    return TextGenerator(
        model=model,
        tokenizer=tokenizer,
        settings=_settings(max_new_tokens, pad_id, stop_ids, beams, min_new_tokens),
        device=next(model.parameters()).device,
        breaks={} if one_line and beams == 1 else None,
    )


def run_in_batches(
    rows: Sequence[Sequence[int]],
    work: Callable[[list[Any]], list[Done]],
    made: TextGenerator,
    batch_size: int,
    advance: Callable[[int], None],
    notice: Callable[[str], None],
) -> list[Done]:
    """Return `work` of every row, in the rows' order: longest first, by batches, in eval mode.

    Args:
        rows: token ids, or anything as long as its token ids.
        work: batch of rows -> one result each.
        made: the generator behind `work`.
        batch_size: rows per batch; halved, with a notice, whenever CUDA memory runs out.
        advance: called with the number of rows just finished.
        notice: takes a line for the user.

    Raises:
        ValueError: the batch size is below 1, or the memory does not hold one row.
    """
    _check(batch_size=batch_size)
    rank, size = rank_and_size()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = [i for chunk in chunks[rank::size] for i in chunk]
    found: dict[int, Done] = {}
    with torch.no_grad(), _evaluating(made.model), _own_settings_aside(made.model):
        while len(found) < len(mine):
            chunk = mine[len(found) : len(found) + batch_size]
            done = _within_memory(work, [rows[i] for i in chunk], made.device)
            if done is None:
                batch_size = len(chunk) // 2
                notice(f"out of memory with {len(chunk)} rows a batch: going on with {batch_size}")
                continue
            found |= dict(zip(chunk, done, strict=True))
            advance(len(chunk))
    if size > 1:
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, found)
        found = {i: one for share in shares for i, one in share.items()}
    return [found[i] for i in range(len(rows))]


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}")


def _settings(
    max_new_tokens: int, pad_id: int, stop_ids: Sequence[int], beams: int, min_new_tokens: int
) -> GenerationConfig:
    search = {"early_stopping": True, "length_penalty": 1.0} if beams > 1 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        do_sample=False,
        num_beams=beams,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(stop_ids) or None,
        **search,
    )


def _within_memory(
    work: Callable[[list[Any]], list[Done]], rows: list[Any], device: torch.device
) -> list[Done] | None:
    """Return the results of one batch, None where CUDA has no memory for it."""
    try:
        return work(rows)
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise ValueError(
                f"a prompt of {len(rows[0])} tokens does not fit the memory of {device} even by "
                "itself; shorten the prompts, take fewer beams or a smaller model"
            ) from error
    # Behind the handler, as the error keeps the tensors of the failed batch alive.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Hide the model's `generation_config`, which fills in whatever a call leaves unset."""
    base: Any = bare_model(model)
    kept = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = kept
