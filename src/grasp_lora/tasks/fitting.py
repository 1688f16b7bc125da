"""Tokenise texts, and shorten prompts to a number of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from grasp_lora.tasks.records import Prompt

_OF_ALL_TOKENIZERS = "transformers.tokenization_utils"
"""Beginning of the modules in which transformers has what the tokenizers of all models share."""
_ANCHOR_LENGTH = 32
"""Characters before an answer that are enough to determine its first token."""


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits into a number of tokens."""

    ids: list[int]
    """Its token ids."""
    cut_tokens: int
    """Number of tokens removed from the whole prompt."""
    body_length: int
    """Characters left of its body."""


def token_lists(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Return the token ids of each text, in one call: fast tokenizers use all cores for it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        special: let the tokenizer add its start and end tokens.
    """
    own, others = _tokenised(tokenizer, texts, special)
    return own + [one.ids for one in others]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, without start and end tokens of the tokenizer."""
    own, others = _tokenised(tokenizer, texts, special=False)
    return [*map(len, own), *map(len, others)]


def _tokenised(
    tokenizer: Any, texts: Sequence[str], special: bool
) -> tuple[list[list[int]], list[Any]]:
    """Return the token ids of the first texts, and what the backend makes of the others.

    The backend is asked for token ids alone, which takes two thirds of the time of a call of the
    tokenizer. The call for the first text sets the backend as the tokenizer wants it.
    """
    first = list(texts[:1] if _only_calls_backend(tokenizer) else texts)
    if not first:
        return [], []
    # verbose=False: texts may exceed model_max_length here; they are cut afterwards.
    own = tokenizer(first, add_special_tokens=special, verbose=False)["input_ids"]
    others = list(texts[len(first) :])
    if not others:
        return own, []
    return own, tokenizer.backend_tokenizer.encode_batch_fast(others, add_special_tokens=special)


def _only_calls_backend(tokenizer: Any) -> bool:
    """Return whether a tokenizer is fast and its class does nothing of its own with a text."""
    calls = [getattr(type(tokenizer), name, None) for name in ("__call__", "_encode_plus")]
    return tokenizer.is_fast and all(
        getattr(call, "__module__", "").startswith(_OF_ALL_TOKENIZERS) for call in calls
    )


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without start and end tokens of the tokenizer."""
    return token_lists(tokenizer, [text])[0]


def prompts_ids(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the prompts.
        special: put the tokenizer's start token first, if it has one. An end token that the
            tokenizer adds is removed; one in the text is kept.
    """
    found = token_lists(tokenizer, texts, special)
    if not special:
        return found
    end = tokenizer.eos_token_id
    ended = [at for at, ids in enumerate(found) if ids and ids[-1] == end]
    bare = token_lists(tokenizer, [texts[at] for at in ended])
    for at, ids in zip(ended, bare, strict=True):
        if ids[-1:] != [end]:
            found[at] = found[at][:-1]
    return found


def prompt_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the token ids of a prompt; see `prompts_ids`."""
    return prompts_ids(tokenizer, [text], special)[0]


def continuations_ids(
    tokenizer: Any, before: Sequence[str], texts: Sequence[str]
) -> list[list[int]]:
    """Return the token ids of each text as a continuation of the text `before` it.

    Some tokenizers put a space before every text, which would be one too many here. So the end of
    `before` is tokenised with the text, and its tokens are removed. If a token spans both texts,
    the text is tokenised by itself. If `before` ends in white space that would join the first
    word's token, the text is tokenised as if after a line break.
    """
    found: dict[int, list[int]] = {}
    ends = [text[-_ANCHOR_LENGTH:] for text in before]
    breaks = ["\n" if text[-1:].isspace() else "" for text in before]
    for anchors in (ends, breaks, [""] * len(before)):
        waiting = [at for at in range(len(texts)) if at not in found]
        distinct = list(dict.fromkeys(anchors[at] for at in waiting))
        starts = dict(zip(distinct, token_lists(tokenizer, distinct), strict=True))
        joined = token_lists(tokenizer, [anchors[at] + texts[at] for at in waiting])
        for at, both in zip(waiting, joined, strict=True):
            start = starts[anchors[at]]
            if both[: len(start)] == start:
                found[at] = both[len(start) :]
    return [found[at] for at in range(len(texts))]


def continuation_ids(tokenizer: Any, before: str, text: str) -> list[int]:
    """Return the token ids of `text` as a continuation of `before`; see `continuations_ids`."""
    return continuations_ids(tokenizer, [before], [text])[0]


def fit_prompt(
    prompt: Prompt, whole: list[int], tokenizer: Any, budget: int, special: bool
) -> FittedPrompt | None:
    """Return the prompt with the longest beginning of its body that fits into `budget` tokens.

    Args:
        prompt: the prompt.
        whole: its token ids.
        tokenizer: the tokenizer that they are of.
        budget: most tokens of the prompt.
        special: see `prompts_ids`.

    Returns:
        None if the prompt does not fit even without its body.
    """
    if len(whole) <= budget:
        return FittedPrompt(whole, 0, len(prompt.body))

    @cache
    def ids_up_to(end: int) -> list[int]:
        text = prompt.prefix + prompt.body[:end].rstrip() + prompt.suffix
        return prompt_ids(tokenizer, text, special)

    ends = _cut_points(tokenizer, prompt.body)
    # There is one cut point per token, so drop about as many points as there are excess tokens.
    guess = len(ends) - (len(whole) - budget)
    last = _last_true(lambda i: len(ids_up_to(ends[i])) <= budget, guess, len(ends))
    # A longer text may have fewer tokens, so the search can be wrong. Check its result.
    ids = ids_up_to(ends[last])
    if len(ids) > budget:
        return None
    return FittedPrompt(ids, len(whole) - len(ids), len(prompt.body[: ends[last]].rstrip()))


def _last_true(holds: Callable[[int], bool], guess: int, count: int) -> int:
    """Return the last index below `count` for which `holds`, or 0 if there is none.

    It assumes that `holds` is true up to some index and false after it. The search starts at
    `guess` and moves away in growing steps, so it is fast if the guess is close.
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
    """Return the positions where a body may be cut: token ends, or any character if unknown."""
    if not tokenizer.is_fast:
        return list(range(max(len(body), 1)))
    encoded = tokenizer(body, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sorted([0, *(end for _, end in encoded["offset_mapping"] if end < len(body))])
