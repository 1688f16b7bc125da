"""Examples to token ids, and token ids to left-padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp_lora.tasks.chat import Frame, chat_frame, plain_frame
from grasp_lora.tasks.fitting import continuation_ids, fit_prompt, prompt_ids, token_ids
from grasp_lora.tasks.prompts import render
from grasp_lora.tasks.records import Example, Prompt, Task, main_language

IGNORED = -100
"""Label of a position that has no loss."""

UNSEGMENTED = frozenset({"bo", "dz", "ja", "km", "lo", "my", "th", "yue", "zh"})
"""Languages written without a space between words."""


@dataclass(frozen=True)
class EncodedExample:
    """One row as token ids: the prompt, then the answer and the end token."""

    id: str
    group: str
    input_ids: tuple[int, ...]
    prompt_length: int
    """Tokens of the prompt; `input_ids[:prompt_length]` is what generation starts from."""
    cut_tokens: int
    """Tokens the body (of a question: the context) was shortened by."""
    body_length: int = 0
    """Characters of the body that are left."""

    @property
    def label_tokens(self) -> int:
        """Tokens that carry the loss: the answer and the end token."""
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class EncodingReport:
    """What encoding did to a list of rows; lengths in tokens."""

    rows: int
    truncated: int
    """Rows whose body was shortened."""
    cut_tokens_total: int
    cut_share: float
    """Mean share of the body's tokens that those rows lost, in [0, 1]; 0 if there are none."""
    longest: int
    label_tokens: int
    answers_lost: int
    """Rows with a reference in the whole body and none in what is left of it."""
    fertility: float | None
    """Tokens per `fertility_unit` over the distinct whole bodies; None without any text."""
    fertility_unit: str
    """"word" (between white space), or "character" (code points that are not white space) if the
    rows are of a language that writes no space between words."""
    end_id: int
    """Last token of every answer: generation has to stop at it."""
    end_text: str
    """Text ahead of that token which is no part of an answer; "" if there is none."""

    def answer_in(self, text: str) -> str:
        """Return a generated text up to where the answer ends.

        The mark of a turn's end is decoded as text where the tokenizer does not call it special.
        """
        return text.partition(self.end_text)[0] if self.end_text else text


def encode(
    prompt: Prompt,
    completion: str | None,
    tokenizer: Any,
    max_length: int,
    *,
    example_id: str = "",
    group: str = "",
    reserve: int = 0,
    frame: Frame | None = None,
) -> EncodedExample:
    """Tokenise a prompt and its answer into at most `max_length` tokens.

    The prompt is tokenised as one text, with the tokenizer's own start token; where it is too
    long, the end of its body is cut off. The answer is never cut: it is tokenised as what follows
    the prompt, apart from it, and closed by the end token.

    Args:
        prompt: the text before the answer.
        completion: the answer; None encodes the prompt alone.
        tokenizer: a Hugging Face tokenizer, fast or not.
        max_length: most tokens in all, at least 1.
        example_id: names the row in messages.
        group: kept with the row.
        reserve: tokens kept free after the prompt even if the answer is shorter, so that the
            text a model sees does not depend on the length of the answer it is asked for.
        frame: what stands around the prompt and the answer; None is plain text.

    Raises:
        ValueError: if the tokenizer has no end token, the prompt is empty, or it does not fit
            even without its body.
    """
    frame = frame or plain_frame(tokenizer)
    framed = frame.wrap(prompt)
    answer: list[int] = []
    if completion is not None:
        text = frame.completion(completion, framed.text)
        written = continuation_ids(tokenizer, framed.text, text)
        answer = [*written, frame.end_id]
    kept_free = max(len(answer), reserve)
    special = not frame.chat
    fit = fit_prompt(framed, tokenizer, max_length - kept_free, special)
    if fit is None:
        least = len(prompt_ids(tokenizer, framed.prefix + framed.suffix, special))
        raise ValueError(
            f"row {example_id!r} does not fit: what may not be cut of its prompt takes {least} "
            f"tokens and {kept_free} are kept for the answer, max_length is {max_length}; "
            f"raise it to at least {least + kept_free}"
        )
    if not fit.ids:
        raise ValueError(f"row {example_id!r}: the prompt is empty")
    ids = (*fit.ids, *answer)
    return EncodedExample(example_id, group, ids, len(fit.ids), fit.cut_tokens, fit.body_length)


def encode_examples(
    examples: Sequence[Example],
    task: Task,
    tokenizer: Any,
    max_length: int,
    template: str | None = None,
    for_training: bool = True,
    *,
    chat: bool = False,
    new_tokens: int | None = None,
) -> tuple[list[EncodedExample], EncodingReport]:
    """Encode rows with their first reference as the answer.

    Args:
        examples: the rows.
        task: how a row becomes a prompt.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of prompt and answer together.
        template: prompt template; None takes the one of each row's language.
        for_training: False keeps room for `new_tokens` and the end token behind every prompt, so
            that generation fits and a cut prompt says nothing about its answer.
        chat: put the tokenizer's chat template around prompt and answer.
        new_tokens: longest answer that is generated; None takes the task's for each language.

    Raises:
        ValueError: if a row does not fit even without its body, or `chat` is asked of a tokenizer
            without a usable chat template.
    """
    frame = chat_frame(tokenizer) if chat else plain_frame(tokenizer)
    encoded: list[EncodedExample] = []
    bodies: list[tuple[str, str]] = []
    for example in examples:
        prompt = render(task, example, template)
        limit = task.new_tokens(example.language) if new_tokens is None else new_tokens
        row = encode(
            prompt,
            example.references[0],
            tokenizer,
            max_length,
            example_id=example.id,
            group=example.group,
            reserve=0 if for_training else limit + 1,
            frame=frame,
        )
        body = frame.wrap(prompt).body
        encoded.append(row)
        bodies.append((body, body[: row.body_length]))
    return encoded, _report(examples, encoded, bodies, tokenizer, frame)


def _report(
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
    bodies: Sequence[tuple[str, str]],
    tokenizer: Any,
    frame: Frame,
) -> EncodingReport:
    """Sum up; `bodies` holds each row's body, whole and as far as it was kept."""
    tokens = {body: len(token_ids(tokenizer, body)) for body in dict.fromkeys(b for b, _ in bodies)}
    shares = [
        min(1.0, row.cut_tokens / max(tokens[body], 1))
        for row, (body, _) in zip(encoded, bodies, strict=True)
        if row.cut_tokens > 0
    ]
    lost = [
        any(reference in body for reference in example.references)
        and not any(reference in kept for reference in example.references)
        for example, (body, kept) in zip(examples, bodies, strict=True)
    ]
    by_character = any(main_language(example.language) in UNSEGMENTED for example in examples)
    words = sum(sum(map(len, b.split())) if by_character else len(b.split()) for b in tokens)
    return EncodingReport(
        rows=len(encoded),
        truncated=len(shares),
        cut_tokens_total=sum(row.cut_tokens for row in encoded),
        cut_share=sum(shares) / len(shares) if shares else 0.0,
        longest=max((len(row.input_ids) for row in encoded), default=0),
        label_tokens=sum(row.label_tokens for row in encoded),
        answers_lost=sum(lost),
        fertility=sum(tokens.values()) / words if words else None,
        fertility_unit="character" if by_character else "word",
        end_id=frame.end_id,
        end_text=frame.after.strip(),
    )


@dataclass(frozen=True)
class Collator:
    """Rows to one left-padded batch of int64 tensors."""

    pad_id: int
    """Fills the left side; it may equal the end token, labels do not depend on it."""
    with_position_ids: bool = True
    """False for models whose forward takes no `position_ids`."""
    with_logits_to_keep: bool = True
    """False for models whose forward takes no `logits_to_keep`: logits are then full length."""

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
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
