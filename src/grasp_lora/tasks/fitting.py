"""Texts to token ids, and prompts cut to a number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from grasp_lora.tasks.records import Prompt

_ANCHOR = 32
"""Characters ahead of an answer that decide how its first token is written."""


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits."""

    ids: list[int]
    cut_tokens: int
    """Tokens the prompt is shorter than the whole one."""
    body_length: int
    """Characters of its body that are left."""


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without the tokenizer's own start and end tokens."""
    # verbose=False: a text over model_max_length is expected here, it is cut afterwards.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the ids of a prompt; with `special`, after the tokenizer's start token if it has one.

    An end token that the tokenizer adds is left out, one that is in the text is kept.
    """
    if not special:
        return token_ids(tokenizer, text)
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if ids and ids[-1] == end and token_ids(tokenizer, text)[-1:] != [end]:
        return ids[:-1]
    return ids


def continuation_ids(tokenizer: Any, before: str, text: str) -> list[int]:
    """Return the ids of `text` as it is written behind `before`.

    Some tokenizers put a space ahead of every text, which would be one too many here. Where the
    two texts share a token, `text` is tokenised by itself. A space that the first word would take
    into its token is shared too: then `text` is written as behind a line break.
    """
    anchors = [before[-_ANCHOR:], *(["\n"] if before[-1:].isspace() else [])]
    for anchor in anchors:
        start, both = token_ids(tokenizer, anchor), token_ids(tokenizer, anchor + text)
        if both[: len(start)] == start:
            return both[len(start) :]
    return token_ids(tokenizer, text)


def fit_prompt(prompt: Prompt, tokenizer: Any, budget: int, special: bool) -> FittedPrompt | None:
    """Return the prompt with as much of its body, from the start, as `budget` tokens hold.

    None if it does not fit even without its body. `special` is as in `prompt_ids`.
    """
    whole = prompt_ids(tokenizer, prompt.text, special)
    if len(whole) <= budget:
        return FittedPrompt(whole, 0, len(prompt.body))

    @cache
    def ids_up_to(end: int) -> list[int]:
        text = prompt.prefix + prompt.body[:end].rstrip() + prompt.suffix
        return prompt_ids(tokenizer, text, special)

    ends = _cut_points(tokenizer, prompt.body)
    # One point a token, so the points to drop are about the tokens that are too many.
    guess = len(ends) - (len(whole) - budget)
    last = _last_true(lambda i: len(ids_up_to(ends[i])) <= budget, guess, len(ends))
    # Token counts may fall a little as a text grows, so the last word is a count, not the search.
    ids = ids_up_to(ends[last])
    if len(ids) > budget:
        return None
    return FittedPrompt(ids, len(whole) - len(ids), len(prompt.body[: ends[last]].rstrip()))


def _last_true(holds: Callable[[int], bool], guess: int, count: int) -> int:
    """Return the last of `count` indices that holds, if they hold up to some index; 0 if none does.

    Few are tried if the guess is near: the search walks away from it in growing steps.
    """
    low, high, step = 0, count, 1
    probe = min(max(guess, 0), count - 1)
    while high - low > 1:
        if holds(probe):
            low, probe = probe, probe + step
        else:
            high, probe = probe, probe - step
        step *= 2
        if not low < probe < high:
            probe = (low + high) // 2
    return low


def _cut_points(tokenizer: Any, body: str) -> list[int]:
    """Return where a body may end: 0 and its tokens' ends, or every character without offsets."""
    if not tokenizer.is_fast:
        return list(range(max(len(body), 1)))
    encoded = tokenizer(body, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sorted([0, *(end for _, end in encoded["offset_mapping"] if end < len(body))])
