"""Examples to token ids, and token ids to left-padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp_lora.tasks.records import Example, Prompt, Task

IGNORED = -100
"""Label of a position that has no loss."""


@dataclass(frozen=True)
class Encoded:
    """One row as token ids: the prompt, then the answer and the end token."""

    id: str
    group: str
    input_ids: tuple[int, ...]
    prompt_length: int
    """Tokens of the prompt; `input_ids[:prompt_length]` is what generation starts from."""
    cut_tokens: int
    """Tokens the context was shortened by."""

    @property
    def label_tokens(self) -> int:
        """Tokens that carry the loss: the answer and the end token."""
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class EncodingReport:
    """What encoding did to a list of rows; all but `rows` and `truncated` in tokens."""

    rows: int
    truncated: int
    """Rows whose context was shortened."""
    cut_tokens_total: int
    longest: int
    label_tokens: int


def encode(
    prompt: Prompt,
    completion: str | None,
    tokenizer: Any,
    max_length: int,
    *,
    example_id: str = "",
    group: str = "",
    reserve: int = 0,
) -> Encoded:
    """Tokenise a prompt and its answer into at most `max_length` tokens.

    The prompt is tokenised as one text, with the tokenizer's own start token; where it is too
    long, the end of its body is cut off. The answer is tokenised by itself, after a space, and
    closed by the end token.

    Args:
        prompt: the text before the answer.
        completion: the answer; None encodes the prompt alone.
        tokenizer: a Hugging Face tokenizer, fast or not.
        max_length: most tokens in all, at least 1.
        example_id: names the row in messages.
        group: kept with the row.
        reserve: tokens kept free after the prompt even if the answer is shorter, so that the
            text a model sees does not depend on the length of the answer it is asked for.

    Raises:
        ValueError: if the tokenizer has no end token, the prompt is empty, or it does not fit
            even without its body.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    answer: list[int] = []
    if completion is not None:
        answer = [*_ids(tokenizer, " " + completion, special=False), int(end)]
    budget = max_length - max(len(answer), reserve)
    ids = _prompt_ids(tokenizer, prompt.text)
    if not ids:
        raise ValueError(f"row {example_id!r}: the prompt is empty")
    cut_tokens = 0
    if len(ids) > budget:
        short = _shorten(prompt, tokenizer, budget)
        if short is None:
            least = len(_prompt_ids(tokenizer, prompt.prefix + prompt.suffix))
            raise ValueError(
                f"row {example_id!r} does not fit: question and instruction take {least} tokens "
                f"and {max_length - budget} are kept for the answer, max_length is {max_length}; "
                f"raise it to at least {least + max_length - budget}"
            )
        cut_tokens = len(ids) - len(short)
        ids = short
    return Encoded(example_id, group, (*ids, *answer), len(ids), cut_tokens)


def _shorten(prompt: Prompt, tokenizer: Any, budget: int) -> list[int] | None:
    """Return the ids of the prompt with the longest start of its body that fits, or None."""

    def ids_up_to(end: int) -> list[int]:
        return _prompt_ids(tokenizer, prompt.prefix + prompt.body[:end].rstrip() + prompt.suffix)

    ends = _cut_points(tokenizer, prompt.body)
    low, high = 0, len(ends)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(ids_up_to(ends[middle])) <= budget else (low, middle)
    # Token counts may fall a little as a text grows, so the last word is a count, not the search.
    ids = ids_up_to(ends[low])
    return ids if len(ids) <= budget else None


def _cut_points(tokenizer: Any, body: str) -> list[int]:
    """Return where a body may end: 0 and its token borders, or every character without offsets."""
    if not tokenizer.is_fast:
        return list(range(len(body)))
    encoded = tokenizer(body, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sorted({0, *(end for _, end in encoded["offset_mapping"] if end < len(body))})


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False: a text over model_max_length is expected here, it is cut afterwards.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids with the tokenizer's start token and without an end token it may add."""
    ids = _ids(tokenizer, text, special=True)
    end = tokenizer.eos_token_id
    if ids and ids[-1] == end and _ids(tokenizer, text, special=False)[-1:] != [end]:
        return ids[:-1]
    return ids


def encode_examples(
    examples: Sequence[Example],
    task: Task,
    tokenizer: Any,
    max_length: int,
    template: str | None = None,
    for_training: bool = True,
) -> tuple[list[Encoded], EncodingReport]:
    """Encode rows with their first reference as the answer.

    Args:
        examples: the rows.
        task: how a row becomes a prompt.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of prompt and answer together.
        template: prompt template; None takes the one of each row's language.
        for_training: False keeps room for `task.max_new_tokens` and the end token behind every
            prompt, so that generation fits and a cut prompt says nothing about its answer.

    Raises:
        ValueError: if a row does not fit even without its context.
    """
    reserve = 0 if for_training else task.max_new_tokens + 1
    encoded = [
        encode(
            task.render(example, template),
            example.references[0],
            tokenizer,
            max_length,
            example_id=example.id,
            group=example.group,
            reserve=reserve,
        )
        for example in examples
    ]
    report = EncodingReport(
        rows=len(encoded),
        truncated=sum(row.cut_tokens > 0 for row in encoded),
        cut_tokens_total=sum(row.cut_tokens for row in encoded),
        longest=max((len(row.input_ids) for row in encoded), default=0),
        label_tokens=sum(row.label_tokens for row in encoded),
    )
    return encoded, report


@dataclass(frozen=True)
class Collator:
    """Rows to one left-padded batch of int64 tensors."""

    pad_id: int
    """Fills the left side; it may equal the end token, labels do not depend on it."""
    with_position_ids: bool = True
    """False for models whose forward takes no `position_ids`."""
    with_logits_to_keep: bool = True
    """False for models whose forward takes no `logits_to_keep`: logits are then full length."""

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return the batch of B rows padded to L tokens, with K the longest answer.

        `input_ids`, `attention_mask`, `position_ids` and `labels` are [B, L]; `logits_to_keep`
        is [K], the positions whose logits predict the last K tokens. It is a tensor, as a number
        would make the model slice a view that multiplies slowly.

        Raises:
            ValueError: if there is no row, or a row has no answer.
        """
        unlabelled = [row.id for row in rows if row.label_tokens == 0]
        if unlabelled:
            raise ValueError(f"row {unlabelled[0]!r} has no answer, so it has no loss")
        batch = self._padded([row.input_ids for row in rows])
        length = batch["input_ids"].shape[1]
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for index, row in enumerate(rows):
            labels[index, length - row.label_tokens :] = batch["input_ids"][
                index, length - row.label_tokens :
            ]
        batch["labels"] = labels
        if self.with_logits_to_keep:
            longest = max(row.label_tokens for row in rows)
            batch["logits_to_keep"] = torch.arange(length - longest - 1, length - 1)
        return batch

    def _padded(self, sequences: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        if not sequences:
            raise ValueError("a batch needs at least one row")
        length = max(map(len, sequences))
        input_ids = torch.full((len(sequences), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for index, ids in enumerate(sequences):
            input_ids[index, length - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
            mask[index, length - len(ids) :] = 1
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if self.with_position_ids:
            batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return batch
