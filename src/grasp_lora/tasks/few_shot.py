"""Prompts with solved examples ahead of the question (few-shot prompts).

Each part is tokenised as rows are: a prompt as one text, its answer as a continuation of it. So the
tokens ahead of the question are the same for all questions, and an answer has as many tokens as
without solved examples.
"""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from grasp_lora.tasks.chat import FewShotFrames, Frame
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.tasks.fitting import continuation_ids, prompt_ids
from grasp_lora.tasks.records import Example, Prompt
from grasp_lora.tasks.sides import ONE_SIDE


@dataclass(frozen=True)
class Solved:
    """A solved example as a part of a prompt."""

    id: str
    """Id of the example."""
    text: str
    """Its prompt and its answer, with what stands between it and the part ahead."""
    ids: tuple[int, ...]
    """The token ids of the text."""


def draw_order(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return examples in a random order in which they are taken as solved examples.

    Every group gives one example before any gives a second. The order does not depend on that of
    `examples`, nor on how many are taken.

    Args:
        examples: the examples, each with an id of its own.
        seed: seed of the order.
    """
    generator = random.Random(seed)
    groups: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda one: (one.group, one.id)):
        groups.setdefault(example.group, []).append(example)
    shuffled = list(groups.values())
    generator.shuffle(shuffled)
    for group in shuffled:
        generator.shuffle(group)
    return [one for turn in zip_longest(*shuffled) for one in turn if one is not None]


def solved_examples(
    parts: Sequence[tuple[EncodedExample, Prompt, str]], tokenizer: Any, frames: FewShotFrames
) -> list[Solved]:
    """Return solved examples in the order of a prompt.

    Args:
        parts: (the example as it is trained on, its prompt, its answer); the body of the prompt is
            cut as it was for training.
        tokenizer: a Hugging Face tokenizer.
        frames: the frames of the prompt.
    """
    found: list[Solved] = []
    for row, prompt, answer in parts:
        frame = frames.middle if found else frames.first
        asked = _cut(frame, prompt, row).text
        if found:
            ids = continuation_ids(tokenizer, found[-1].text, asked)
        else:
            special = not frame.chat and row.sides == ONE_SIDE
            ids = prompt_ids(tokenizer, asked, special)
        given = frame.completion(answer, asked)
        ids = [*ids, *continuation_ids(tokenizer, asked, given)]
        found.append(Solved(row.id, asked + given, tuple(ids)))
    return found


def asked_after(
    solved: Sequence[Solved], row: EncodedExample, prompt: Prompt, tokenizer: Any, frame: Frame
) -> EncodedExample:
    """Return an example with solved examples ahead of its prompt.

    The answer has the tokens that it has without them, but for the last one, which ends it. In a
    chat that is the end of the turn, else the token that the question begins with: as it stands
    behind the answers of the solved examples, it begins the blank line. The answer of an
    encoder-decoder stays as it is, because it stands in no row with those.

    Args:
        solved: the solved examples, at least one.
        row: the example alone; its body is cut as it is there.
        prompt: its prompt.
        tokenizer: a Hugging Face tokenizer.
        frame: the frame of a question after solved examples.
    """
    ahead = tuple(token for one in solved for token in one.ids)
    asked = continuation_ids(tokenizer, solved[-1].text, _cut(frame, prompt, row).text)
    end = frame.end_id if frame.chat else asked[0]
    if row.sides != ONE_SIDE:
        end = row.input_ids[-1]
    answer = (*row.input_ids[row.prompt_length : -1], end)
    ids = (*row.sides.before, *ahead, *asked, *row.sides.after, *answer)
    return replace(row, input_ids=ids, prompt_length=len(ids) - len(answer))


def before_next(text: str, openings: Collection[str]) -> str:
    """Return the part of a generated text before the next example, which models tend to write.

    That begins at the first blank line, or at the first line break before one of `openings`.
    """
    words = [re.escape(opening) for opening in openings if opening]
    begins = [r"\n\s*\n", *([rf"\n[ \t]*(?:{'|'.join(words)})"] if words else [])]
    found = re.search("|".join(begins), text)
    return text[: found.start()] if found else text


def _cut(frame: Frame, prompt: Prompt, row: EncodedExample) -> Prompt:
    framed = frame.wrap(prompt)
    return replace(framed, body=framed.body[: row.body_length])
