"""Generate text in batches with the KV cache, greedily or by beam search."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from grasp_lora.models.example_losses import rank_and_size
from grasp_lora.models.key_values import CACHE_NAME
from grasp_lora.models.modules import bare_model
from grasp_lora.models.shards import is_sharded

Result = TypeVar("Result")


class StopAtNewline(StoppingCriteria):
    """Ends a text at a line break: at the first one after a word, or as `ended` says.

    A text is decoded only if its newest token contains a line break, so most texts are decoded once
    or twice. For each token it is remembered whether its text contains a line break.

    Args:
        tokenizer: decodes the tokens.
        prompt_length: padded prompt length of the batch, in tokens.
        breaks: token id -> whether its text contains a line break. It is filled as tokens occur;
            pass the same dict for all batches of a tokenizer.
        ended: whether a text that contains a line break ends; None asks for one after a word.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int,
        breaks: dict[int, bool] | None = None,
        ended: Callable[[str], bool] | None = None,
    ):
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._breaks = {} if breaks is None else breaks
        self._ended = ended or _has_line

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return [batch] booleans, True for texts that end now; ended ones may be True or False."""
        newest = input_ids[:, -1].tolist()
        unknown = sorted(set(newest) - self._breaks.keys())
        if unknown:
            texts = self._decode(torch.tensor(unknown).unsqueeze(1))
            self._breaks.update((t, "\n" in text) for t, text in zip(unknown, texts, strict=True))
        done = [self._breaks[token] for token in newest]
        candidates = [index for index, has_break in enumerate(done) if has_break]
        if candidates:
            texts = self._decode(input_ids[candidates, self._prompt_length :])
            for index, text in zip(candidates, texts, strict=True):
                done[index] = self._ended(text)
        return torch.tensor(done, device=input_ids.device)

    def _decode(self, ids: Tensor) -> list[str]:
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)


@dataclass(frozen=True)
class GenerationSettings:
    """Rules by which texts are generated.

    Attributes:
        max_new_tokens: most tokens of a text.
        batch_size: texts per batch; it is halved, with a notice, whenever CUDA memory runs out.
        pad_id: id of the padding token.
        stop_ids: ids of tokens that end a text.
        beams: width of the beam search; 1 is greedy.
        min_new_tokens: number of tokens before a stop token may follow. The most likely answer of a
            weak model is often empty.
        one_line: end a text at the first line break after a word.
        ended: also end a text at a line break if this is true of the text so far.
        start: what the decoder of an encoder-decoder begins with, such as the token of a language;
            () for causal models. It counts for no limit.

    Raises:
        ValueError: a number is out of its range.
    """

    max_new_tokens: int
    batch_size: int
    pad_id: int
    stop_ids: Sequence[int]
    beams: int = 1
    min_new_tokens: int = 0
    one_line: bool = True
    ended: Callable[[str], bool] | None = None
    start: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be 0 to {self.max_new_tokens} (max_new_tokens), got "
                f"{self.min_new_tokens}"
            )


class TextGenerator:
    """Generates batches of texts with one model and one set of rules.

    Args:
        model: a causal LM or an encoder-decoder with active adapters.
        tokenizer: decodes the tokens.
        settings: rules of generation.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: GenerationSettings):
        self.model = model
        self.settings = settings
        self.device = next(model.parameters()).device
        self._tokenizer = tokenizer
        self._config = _generation_config(settings)
        self._breaks: dict[int, bool] = {}

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the text that the model generates after each prompt, in one batch."""
        length = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.settings.pad_id)
        mask = torch.zeros_like(ids)
        for index, prompt in enumerate(prompts):
            # A text goes on behind its prompt, but for an encoder-decoder.
            first = 0 if self.settings.start else length - len(prompt)
            ids[index, first : first + len(prompt)] = torch.tensor(prompt)
            mask[index, first : first + len(prompt)] = 1
        return self.texts_after(ids.to(self.device), mask.to(self.device))

    def texts_after(self, ids: Tensor, mask: Tensor, cache: Any = None) -> list[str]:
        """Return the text that the model generates after each left-padded prompt.

        Args:
            ids: token ids of the prompts, [batch, length]; padded on the right for an
                encoder-decoder.
            mask: [batch, length], 0 on padding.
            cache: keys and values of all positions except the last, or None.
        """
        start = torch.tensor([list(self.settings.start)] * len(ids), device=ids.device)
        written = {"decoder_input_ids": start} if self.settings.start else {}
        length = (start if written else ids).shape[1]
        criteria = StoppingCriteriaList()
        rules = [_has_line] if self.settings.one_line else []
        rules += [self.settings.ended] if self.settings.ended else []
        if rules and self.settings.beams == 1:
            ended = lambda text: any(rule(text) for rule in rules)  # noqa: E731
            criteria.append(StopAtNewline(self._tokenizer, length, self._breaks, ended))
        cached = {} if cache is None else {CACHE_NAME: cache}
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._config,
            stopping_criteria=criteria,
            **cached,
            **written,
        )
        return self._tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    advance: Callable[[int], None] = lambda _count: None,
    notice: Callable[[str], None] = lambda _message: None,
) -> list[str]:
    """Return the text generated after each prompt, in the order of the prompts.

    Special tokens are removed. The texts are not trimmed or cut otherwise; that is the caller's
    task. Prompts of similar length share a batch, longest first, padded on the left; on the
    right for an encoder-decoder. A batch runs until its last text has ended. Each process generates
    its part of the batches, and every process returns all texts. Nothing is sampled. The model's
    own `generation_config` (temperature, repetition penalty, ...) is ignored, so that all models
    are decoded by the same rules.

    With beams a line break does not end a text, whatever `one_line` says. transformers applies a
    stopping rule to every candidate continuation, and no candidate would be left if all of them
    contain a line break. A beam ends at a stop token or at the limit. Its score is the mean log
    probability of its tokens (`length_penalty` 1). The search for a text ends when `beams` beams
    have ended. Cut such texts at the line break afterwards.

    Args:
        model: a causal LM or an encoder-decoder with active adapters. It is in eval mode during the
            call.
        tokenizer: decodes the tokens.
        prompts: token ids of each prompt; none may be empty.
        settings: rules of generation.
        advance: called with the number of texts just finished.
        notice: called with messages for the user.

    Raises:
        ValueError: a prompt is empty, or a single prompt does not fit the GPU's memory.
    """
    if not all(prompts):
        raise ValueError("a prompt holds no tokens; give every prompt at least a start token")
    generator = TextGenerator(model, tokenizer, settings)
    return run_in_batches(prompts, generator.texts, generator, advance, notice)


def run_in_batches(
    items: Sequence[Sequence[int]],
    work: Callable[[list[Any]], list[Result]],
    generator: TextGenerator,
    advance: Callable[[int], None],
    notice: Callable[[str], None],
) -> list[Result]:
    """Return the result of `work` for every item, in the order of the items.

    Items are processed in batches, longest first, with the model in eval mode.

    Args:
        items: token ids, or objects with the same length as their token ids.
        work: maps a batch of items to one result for each.
        generator: the generator that `work` uses.
        advance: called with the number of items just finished.
        notice: called with messages for the user.

    Raises:
        ValueError: a single item does not fit the GPU's memory.
    """
    batch_size = generator.settings.batch_size
    # With a model in shards all processes must generate as many tokens, so each does all.
    rank, size = (0, 1) if is_sharded(generator.model) else rank_and_size()
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own = [i for batch in batches[rank::size] for i in batch]
    results: dict[int, Result] = {}
    with torch.no_grad(), _eval_mode(generator.model), _own_config_hidden(generator.model):
        while len(results) < len(own):
            batch = own[len(results) : len(results) + batch_size]
            done = _within_memory(work, [items[i] for i in batch], generator.device)
            if done is None:
                batch_size = len(batch) // 2
                notice(
                    f"out of memory with a batch size of {len(batch)}; continuing with {batch_size}"
                )
                continue
            results |= dict(zip(batch, done, strict=True))
            advance(len(batch))
    if size > 1:
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, results)
        results = {i: result for part in gathered for i, result in part.items()}
    return [results[i] for i in range(len(items))]


def _has_line(text: str) -> bool:
    return "\n" in text.lstrip()


def _generation_config(settings: GenerationSettings) -> GenerationConfig:
    search: dict[str, Any] = {}
    if settings.beams > 1:
        search = {"early_stopping": True, "length_penalty": 1.0}
    if settings.start:
        search["decoder_start_token_id"] = settings.start[0]
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        do_sample=False,
        num_beams=settings.beams,
        use_cache=True,
        pad_token_id=settings.pad_id,
        eos_token_id=list(settings.stop_ids) or None,
        **search,
    )


def _within_memory(
    work: Callable[[list[Any]], list[Result]], items: list[Any], device: torch.device
) -> list[Result] | None:
    """Return the results of one batch, or None if CUDA has not enough memory for it."""
    try:
        return work(items)
    except torch.OutOfMemoryError as error:
        if len(items) == 1:
            raise ValueError(
                f"a prompt of {len(items[0])} tokens does not fit the memory of {device} even by "
                "itself; shorten the prompts, or use fewer beams or a smaller model"
            ) from error
    # Outside the handler, because the error keeps the tensors of the failed batch alive.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _own_config_hidden(model: nn.Module) -> Iterator[None]:
    """Hide the model's `generation_config`, which would fill in values that a call leaves unset."""
    base: Any = bare_model(model)
    own_config = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own_config
