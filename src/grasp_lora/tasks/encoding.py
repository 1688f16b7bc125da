"""Encode examples as token ids, and collate them to left-padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grasp_lora.base.texts import UNSEGMENTED, contains
from grasp_lora.base.words import shown
from grasp_lora.tasks.chat import Frame, chat_frame, plain_frame
from grasp_lora.tasks.fitting import continuation_ids, fit_prompt, prompt_ids, token_ids
from grasp_lora.tasks.prompts import render
from grasp_lora.tasks.records import Example, Prompt, Task, main_language

IGNORED = -100
"""Label of a position without a loss."""


class TooLong(ValueError):
    """An example does not fit even without its body; `needed` is the length it would take."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class EncodedExample:
    """One example as token ids: the prompt, then the answer and the end token."""

    id: str
    group: str
    input_ids: tuple[int, ...]
    prompt_length: int
    """Number of prompt tokens; generation continues `input_ids[:prompt_length]`."""
    cut_tokens: int
    """Tokens by which the body was shortened; the body of a question is its context."""
    body_length: int = 0
    """Characters left of the body."""

    @property
    def label_tokens(self) -> int:
        """Number of tokens with a loss: the answer and the end token."""
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class EncodingReport:
    """Statistics of encoding a list of examples; lengths are in tokens."""

    rows: int
    """Number of encoded examples."""
    truncated: int
    """Examples whose body was shortened."""
    cut_tokens_total: int
    cut_share: float
    """Mean fraction of their body's tokens that those examples lost, in [0, 1]; 0 if none did."""
    longest: int
    """Tokens of the longest example."""
    label_tokens: int
    """Tokens with a loss, over all examples."""
    answers_lost: int
    """Examples whose whole body contains a reference, but whose shortened body contains none."""
    fertility: float | None
    """Tokens per `fertility_unit` over the distinct whole bodies; None if there is no text."""
    fertility_unit: str
    """"word" (between white space), or "character" (code points that are not white space).

    "character" is used if some examples are in a language written without spaces between words.
    """
    end_id: int
    """Id of the last token of every answer, which ends a generation."""
    end_text: str
    """Text before that token that is not part of the answer; "" if there is none."""
    left_out: tuple[str, ...] = ()
    """Ids of the examples that do not fit even without their body; they are not encoded."""
    needed: int = 0
    """Most tokens that one of those would take without its body; 0 if there is none."""

    def answer_in(self, text: str) -> str:
        """Return the part of a generated text before `end_text`.

        A token that marks the end of a turn is decoded as text if the tokenizer does not treat it
        as special.
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

    The prompt is tokenised as one text, with the tokenizer's start token. If it is too long, the
    end of its body is cut off. The answer is never cut. It is tokenised separately, as a
    continuation of the prompt, and followed by the end token.

    Args:
        prompt: the text before the answer.
        completion: the answer; None encodes only the prompt.
        tokenizer: a Hugging Face tokenizer, fast or slow.
        max_length: most tokens of prompt and answer, at least 1.
        example_id: id of the example, also for messages.
        group: group of the example.
        reserve: least number of tokens left free after the prompt. With it, the text that the model
            sees does not depend on the length of the reference.
        frame: texts around the prompt and the answer; None means plain text.

    Raises:
        TooLong: the prompt does not fit even without its body.
        ValueError: the tokenizer has no end token, or the prompt is empty.
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
        raise TooLong(
            f"row {shown(example_id)} does not fit: the prompt without its body takes {least} "
            f"tokens and {kept_free} are kept for the answer, but max_length is {max_length}; "
            f"raise it to at least {least + kept_free}",
            least + kept_free,
        )
    if not fit.ids:
        raise ValueError(f"row {shown(example_id)}: the prompt is empty; give it a text")
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
    """Encode examples with their first reference as the answer.

    Args:
        examples: the examples.
        task: task of the examples.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of prompt and answer together.
        template: prompt template; None means the task's template for each example's language.
        for_training: False leaves room for `new_tokens` and the end token after every prompt. Then
            generation fits, and the length of a cut prompt does not reveal that of its reference.
        chat: put the tokenizer's chat template around prompt and answer.
        new_tokens: most tokens of a generated answer; None means the task's limit for the language.

    Returns:
        The encoded examples in their order, without those that do not fit even without their
        body, and statistics.

    Raises:
        TooLong: no example fits.
        ValueError: `chat` is set and the tokenizer has no usable chat template.
    """
    frame = chat_frame(tokenizer) if chat else plain_frame(tokenizer)
    encoded: list[EncodedExample] = []
    bodies: list[tuple[str, str]] = []
    fitting: list[Example] = []
    too_long: dict[str, TooLong] = {}
    for example in examples:
        prompt = render(task, example, template)
        limit = task.new_tokens(example.language) if new_tokens is None else new_tokens
        try:
            one = encode(
                prompt,
                example.references[0],
                tokenizer,
                max_length,
                example_id=example.id,
                group=example.group,
                reserve=0 if for_training else limit + 1,
                frame=frame,
            )
        except TooLong as error:
            too_long[example.id] = error
            continue
        fitting.append(example)
        body = frame.wrap(prompt).body
        encoded.append(one)
        bodies.append((body, body[: one.body_length]))
    if too_long and not fitting:
        raise next(iter(too_long.values()))
    report = _report(fitting, encoded, bodies, tokenizer, frame)
    needed = max((error.needed for error in too_long.values()), default=0)
    return encoded, replace(report, left_out=tuple(too_long), needed=needed)


def _report(
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
    bodies: Sequence[tuple[str, str]],
    tokenizer: Any,
    frame: Frame,
) -> EncodingReport:
    """Return the statistics; `bodies` holds (whole body, kept part) of each example."""
    tokens = {body: len(token_ids(tokenizer, body)) for body in dict.fromkeys(b for b, _ in bodies)}
    shares = [
        min(1.0, one.cut_tokens / max(tokens[body], 1))
        for one, (body, _) in zip(encoded, bodies, strict=True)
        if one.cut_tokens > 0
    ]
    lost = [
        kept != body
        and any(contains(body, reference) for reference in example.references)
        and not any(contains(kept, reference) for reference in example.references)
        for example, (body, kept) in zip(examples, bodies, strict=True)
    ]
    by_character = any(main_language(example.language) in UNSEGMENTED for example in examples)
    words = sum(sum(map(len, b.split())) if by_character else len(b.split()) for b in tokens)
    return EncodingReport(
        rows=len(encoded),
        truncated=len(shares),
        cut_tokens_total=sum(one.cut_tokens for one in encoded),
        cut_share=sum(shares) / len(shares) if shares else 0.0,
        longest=max((len(one.input_ids) for one in encoded), default=0),
        label_tokens=sum(one.label_tokens for one in encoded),
        answers_lost=sum(lost),
        fertility=sum(tokens.values()) / words if words else None,
        fertility_unit="character" if by_character else "word",
        end_id=frame.end_id,
        end_text=frame.after.strip(),
    )


@dataclass(frozen=True)
class Collator:
    """Collates encoded examples to one left-padded batch of int64 tensors."""

    pad_id: int
    """Id of the padding token. It may equal the end token, since labels do not depend on it."""
    with_position_ids: bool = True
    """False for models whose forward has no `position_ids`."""
    with_logits_to_keep: bool = True
    """False for models whose forward has no `logits_to_keep`, which return all logits."""

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Return a batch of B examples padded to L tokens, where K is the longest answer's length.

        `input_ids`, `attention_mask`, `position_ids` and `labels` are [B, L]. `logits_to_keep` is
        [K], the positions whose logits predict the last K tokens. It is a tensor, because a number
        would make the model slice a view that is slow to multiply.

        Raises:
            ValueError: there is no example, or an example has no answer.
        """
        _check_answers(examples)
        batch = self._padded([example.input_ids for example in examples])
        length = batch["input_ids"].shape[1]
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for index, example in enumerate(examples):
            labels[index, length - example.label_tokens :] = batch["input_ids"][
                index, length - example.label_tokens :
            ]
        batch["labels"] = labels
        if self.with_logits_to_keep:
            longest = max(example.label_tokens for example in examples)
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


class PackingCollator:
    """Collates encoded examples to one row of int64 tensors without padding.

    Positions begin anew with every example, which tells attention to keep them apart; see
    `grasp_lora.models.attention.can_pack`.
    """

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Return `input_ids`, `position_ids` and `labels` [1, T], and `logits_to_keep` [K].

        T is the sum of the examples' tokens, K that of their answers' tokens. The last K labels are
        those that the K kept positions predict.

        Raises:
            ValueError: an example has no answer.
        """
        _check_answers(examples)
        ids = [token for example in examples for token in example.input_ids]
        positions = [place for example in examples for place in range(len(example.input_ids))]
        labels: list[int] = []
        kept: list[int] = []
        end = 0
        for example in examples:
            end += len(example.input_ids)
            labels += example.input_ids[example.prompt_length :]
            kept += range(end - example.label_tokens - 1, end - 1)
        without = [IGNORED] * (len(ids) - len(labels))
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([without + labels]),
            "logits_to_keep": torch.tensor(kept),
        }


def _check_answers(examples: Sequence[EncodedExample]) -> None:
    unlabelled = [example.id for example in examples if example.label_tokens == 0]
    if unlabelled:
        row = shown(unlabelled[0])
        raise ValueError(f"row {row} has no answer, so it has no loss; give it one")
