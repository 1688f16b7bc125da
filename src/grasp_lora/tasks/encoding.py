"""Encode examples as token ids, and collate them to padded batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from grasp_lora.base.texts import UNSEGMENTED, contains
from grasp_lora.base.words import shown
from grasp_lora.tasks.chat import Frame, chat_frame, plain_frame
from grasp_lora.tasks.fitting import (
    FittedPrompt,
    continuations_ids,
    fit_prompt,
    prompt_ids,
    prompts_ids,
    token_counts,
)
from grasp_lora.tasks.prompts import render
from grasp_lora.tasks.records import Example, Prompt, Task, main_language
from grasp_lora.tasks.sides import ONE_SIDE, Sides, two_sides

IGNORED = -100
"""Label of a position without a loss."""

COUNTED = 10_000
"""Most bodies whose tokens are counted for `Encoding.fertility`."""

_AT_ONCE = 1024
"""Rows that are tokenised in one call."""


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
    sides: Sides = ONE_SIDE
    """Tokens around the prompt, which are part of it, and ahead of the answer, which are not."""

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
    asked = _Asked(frame.wrap(prompt), completion, example_id, group, reserve)
    encoded = _encode_all([asked], tokenizer, max_length, frame)[0]
    if isinstance(encoded, TooLong):
        raise encoded
    return encoded


@dataclass(frozen=True)
class _Asked:
    """An example to encode: its prompt in its frame, and the arguments of `encode`."""

    prompt: Prompt
    completion: str | None
    id: str
    group: str
    reserve: int
    sides: Sides = ONE_SIDE


def _encode_all(
    rows: Sequence[_Asked], tokenizer: Any, max_length: int, frame: Frame
) -> list[EncodedExample | TooLong]:
    """Return each row encoded as `encode` says, or why it does not fit."""
    one_side = all(row.sides == ONE_SIDE for row in rows)
    special = one_side and not frame.chat
    texts = [row.prompt.text for row in rows]
    wholes = prompts_ids(tokenizer, texts, special)
    written = [at for at, row in enumerate(rows) if row.completion is not None]
    completions = [frame.completion(rows[at].completion or "", texts[at]) for at in written]
    ahead = [texts[at] if one_side else "" for at in written]
    continued = continuations_ids(tokenizer, ahead, completions)
    answers = {at: [*ids, frame.end_id] for at, ids in zip(written, continued, strict=True)}
    found: list[EncodedExample | TooLong] = []
    for at, (row, whole) in enumerate(zip(rows, wholes, strict=True)):
        answer = answers.get(at, [])
        kept_free = max(len(answer), row.reserve)
        around = len(row.sides.before) + len(row.sides.after)
        fit = fit_prompt(row.prompt, whole, tokenizer, max_length - kept_free - around, special)
        if fit is None:
            bare = prompt_ids(tokenizer, row.prompt.prefix + row.prompt.suffix, special)
            found.append(_too_long(row.id, len(bare) + around, kept_free, max_length))
        else:
            found.append(_encoded(row, fit, answer))
    return found


def _encoded(row: _Asked, fit: FittedPrompt, answer: list[int]) -> EncodedExample:
    if not fit.ids:
        raise ValueError(f"row {shown(row.id)}: the prompt is empty; give it a text")
    prompt = (*row.sides.before, *fit.ids, *row.sides.after)
    return EncodedExample(
        row.id,
        row.group,
        (*prompt, *answer),
        len(prompt),
        fit.cut_tokens,
        fit.body_length,
        row.sides,
    )


def _too_long(example_id: str, least: int, kept_free: int, max_length: int) -> TooLong:
    return TooLong(
        f"row {shown(example_id)} does not fit: the prompt without its body takes {least} "
        f"tokens and {kept_free} are kept for the answer, but max_length is {max_length}; "
        f"raise it to at least {least + kept_free}",
        least + kept_free,
    )


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
    """Return the encoded examples in their order, and statistics; see `Encoding`.

    Raises:
        TooLong: no example fits.
        ValueError: as in `Encoding`.
    """
    encoding = Encoding(task, tokenizer, max_length, template, for_training, chat, new_tokens)
    encoded = list(encoding.rows(examples))
    return encoded, encoding.report()


def decoder_begin(rows: Sequence[EncodedExample]) -> tuple[int, ...]:
    """Return what the decoder begins with for rows of one language; () for a causal model."""
    return rows[0].sides.start if rows else ()


@dataclass
class Encoding:
    """Encodes examples with their first reference as the answer, and counts what it does.

    Examples that do not fit even without their body are left out.

    Args:
        task: task of the examples.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of prompt and answer together.
        template: prompt template; None means the task's template for each example's language.
        for_training: False leaves room for `new_tokens` and the end token after every prompt. Then
            generation fits, and the length of a cut prompt does not reveal that of its reference.
        chat: put the tokenizer's chat template around prompt and answer.
        new_tokens: most tokens of a generated answer; None means the task's limit for the language.
        decoder_start: id that the decoder of an encoder-decoder begins with; None for a causal
            language model. See `grasp_lora.tasks.sides`.

    Raises:
        ValueError: `chat` is set and the tokenizer has no usable chat template, or the model is an
            encoder-decoder.
    """

    task: Task
    tokenizer: Any
    max_length: int
    template: str | None = None
    for_training: bool = True
    chat: bool = False
    new_tokens: int | None = None
    decoder_start: int | None = None
    _sides: dict[str, Sides] = field(init=False, default_factory=dict)
    _frame: Frame = field(init=False)
    _counts: "_Counts" = field(init=False)

    def __post_init__(self) -> None:
        if self.chat and self.decoder_start is not None:
            raise ValueError(
                "an encoder-decoder has no turns of a chat, as its answers do not follow their "
                "prompts; set data.chat to false"
            )
        self._frame = chat_frame(self.tokenizer) if self.chat else plain_frame(self.tokenizer)
        if self.decoder_start is not None:
            self._frame = replace(self._frame, lead="")  # an answer begins a text of its own
        self._counts = _Counts()

    def rows(self, examples: Sequence[Example]) -> Iterator[EncodedExample]:
        """Yield the encoded examples in their order, without those that do not fit.

        Few of them are held at a time.

        Raises:
            TooLong: no example fits.
        """
        counts, waiting = self._counts, iter(examples)
        while some := list(islice(waiting, _AT_ONCE)):
            asked = [self._asked(example) for example in some]
            found = _encode_all(asked, self.tokenizer, self.max_length, self._frame)
            pairs = list(zip(some, asked, found, strict=True))
            cut = [row.prompt.body for _, row, one in pairs if _is_cut(one)]
            counts.tokens_of(cut, self.tokenizer)
            for example, row, one in pairs:
                counts.add(example, row.prompt.body, one)
                if isinstance(one, EncodedExample):
                    yield one
        if counts.too_long and not counts.rows:
            raise next(iter(counts.too_long.values()))

    def _asked(self, example: Example) -> _Asked:
        prompt = self._frame.wrap(render(self.task, example, self.template))
        limit = (
            self.task.new_tokens(example.language) if self.new_tokens is None else self.new_tokens
        )
        reserve = 0 if self.for_training else limit + 1
        sides = self.sides(example.language)
        return _Asked(prompt, example.references[0], example.id, example.group, reserve, sides)

    def sides(self, language: str) -> Sides:
        """Return the tokens around the prompts and ahead of the answers in a language.

        Raises:
            ValueError: as in `two_sides`.
        """
        if self.decoder_start is None:
            return ONE_SIDE
        if language not in self._sides:
            self._sides[language] = two_sides(self.tokenizer, self.decoder_start, language)
        return self._sides[language]

    def report(self) -> EncodingReport:
        """Return statistics of the rows so far."""
        counts, shares = self._counts, self._counts.shares
        return EncodingReport(
            rows=counts.rows,
            truncated=len(shares),
            cut_tokens_total=counts.cut_tokens,
            cut_share=sum(shares) / len(shares) if shares else 0.0,
            longest=counts.longest,
            label_tokens=counts.label_tokens,
            answers_lost=counts.answers_lost,
            end_id=self._frame.end_id,
            end_text=self._frame.after.strip(),
            left_out=tuple(counts.too_long),
            needed=max((error.needed for error in counts.too_long.values()), default=0),
        )

    def fertility(self) -> tuple[float | None, str, int | None]:
        """Return the tokens per unit over the distinct whole bodies so far, the unit, and of what.

        The unit is "word" (between white space), or "character" (code points that are not white
        space) if some examples are in a language written without spaces between words. The number
        is None if there is no text. Of more than `COUNTED` bodies that many are counted, drawn at
        random, and their number comes last; it is None if all are.
        """
        counts, bodies = self._counts, list(self._counts.bodies)
        drawn = COUNTED if len(bodies) > COUNTED else None
        if drawn:
            bodies = random.Random(0).sample(bodies, drawn)
        for at in range(0, len(bodies), _AT_ONCE):
            counts.tokens_of(bodies[at : at + _AT_ONCE], self.tokenizer)
        words = sum(
            sum(map(len, body.split())) if counts.by_character else len(body.split())
            for body in bodies
        )
        tokens = sum(counts.bodies[body] or 0 for body in bodies)
        unit = "character" if counts.by_character else "word"
        return (tokens / words if words else None), unit, drawn


def _is_cut(one: EncodedExample | TooLong) -> bool:
    return isinstance(one, EncodedExample) and one.cut_tokens > 0


@dataclass
class _Counts:
    """What an encoding has met so far; see `EncodingReport`."""

    rows: int = 0
    cut_tokens: int = 0
    longest: int = 0
    label_tokens: int = 0
    answers_lost: int = 0
    by_character: bool = False
    shares: list[float] = field(default_factory=list)
    bodies: dict[str, int | None] = field(default_factory=dict)
    """Distinct whole body -> its tokens, None if they are not counted yet."""
    too_long: dict[str, TooLong] = field(default_factory=dict)

    def tokens_of(self, bodies: Sequence[str], tokenizer: Any) -> None:
        """Count the tokens of bodies."""
        new = [body for body in dict.fromkeys(bodies) if self.bodies.get(body) is None]
        self.bodies.update(zip(new, token_counts(tokenizer, new), strict=True))

    def add(self, example: Example, body: str, one: EncodedExample | TooLong) -> None:
        """Count an example whose whole body is `body`."""
        if isinstance(one, TooLong):
            self.too_long[example.id] = one
            return
        self.rows += 1
        self.cut_tokens += one.cut_tokens
        self.longest = max(self.longest, len(one.input_ids))
        self.label_tokens += one.label_tokens
        self.by_character |= main_language(example.language) in UNSEGMENTED
        tokens = self.bodies.setdefault(body, None)
        if one.cut_tokens > 0:
            self.shares.append(min(1.0, one.cut_tokens / max(tokens or 0, 1)))
        kept = body[: one.body_length]
        if kept != body:
            held = [r for r in example.references if contains(body, r)]
            self.answers_lost += bool(held) and not any(
                contains(kept, r) for r in example.references
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


@dataclass(frozen=True)
class TwoSidedCollator:
    """Collates encoded examples of an encoder-decoder to one batch, padded on the right."""

    pad_id: int
    """Id of the padding token. It may equal the end token, since labels do not depend on it."""

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Return a batch of B examples with prompts of up to L and answers of up to D tokens.

        `input_ids` and `attention_mask` are [B, L], the prompts. `decoder_input_ids` and
        `decoder_attention_mask` are [B, D], what the decoder reads: its start, and the answer
        without its last token. `labels` are [B, D + 1], the start without a loss, and the answer.
        So the last D of them are what the D positions predict.

        Raises:
            ValueError: there is no example, or an example has no answer.
        """
        _check_answers(examples)
        answers = [e.input_ids[e.prompt_length :] for e in examples]
        starts = [e.sides.start for e in examples]
        written = [(*s, *a) for s, a in zip(starts, answers, strict=True)]
        labels = [(*(IGNORED for _ in s), *a) for s, a in zip(starts, answers, strict=True)]
        ids, mask = _right_padded([e.input_ids[: e.prompt_length] for e in examples], self.pad_id)
        decoder_ids, decoder_mask = _right_padded([one[:-1] for one in written], self.pad_id)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
            "labels": _right_padded(labels, IGNORED)[0],
        }


def _right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return rows [B, longest] of int64 padded on the right, and their mask, 0 on padding."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return ids, mask


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
