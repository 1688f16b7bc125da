"""What stands around a prompt and its answer: nothing, or the turns of a chat template.

A chat template is a program, so what it puts around a text is found by rendering a conversation of
two marks, one for the user's words and one for the answer. Whatever else the template writes (a
system turn, a date, empty thinking tags) is thereby kept. The date it writes is always the same
one: a run that goes on after midnight, or is done again, has to see the same prompts.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from grasp_lora.tasks.records import Prompt

# What a chat template that asks for the date is told: the day that Llama's templates fall back on.
_TODAY = datetime(2024, 7, 26)
# transformers hands no functions on to a template, so the one that tells the date is written in
# its language, for every directive of strftime that does not depend on the machine.
_DATED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{d}', '{_TODAY.strftime('%' + d)}')" for d in "aAbBdHIjmMpSUwyY")
    + " }}{%- endmacro +%}"
)

_ASKED, _ANSWERED = "asked7c1f", "answered7c1f"
_NO_TEMPLATE = (
    "the tokenizer has no chat template; set data.chat to false, or take a model that was trained "
    "on conversations (their names often end in -Instruct, -it or -Chat)"
)


@dataclass(frozen=True)
class Frame:
    """The texts around a prompt and around its answer, and the token that ends the answer."""

    before: str
    """Ahead of the user's words."""
    between: str
    """From the user's words to where generation starts."""
    lead: str
    """White space that belongs to the answer: the model generates it. Without a chat it is left
    out where prompt or answer bring their own."""
    after: str
    """Between the answer and the end token."""
    end_id: int
    """Last token of every answer; generation must stop there."""
    chat: bool
    """Whether the texts hold all special tokens, so that the tokenizer adds none."""

    def wrap(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the frame around it; its body can be shortened as before.

        In a chat, white space at the ends of the user's words is dropped, as most templates do.
        """
        inner = _trimmed(prompt) if self.chat else prompt
        return Prompt(self.before + inner.prefix, inner.body, inner.suffix + self.between)

    def completion(self, answer: str, prompt: str) -> str:
        """Return the text the model should write behind a framed prompt, up to the end token."""
        if self.chat:
            return self.lead + answer.strip() + self.after
        parted = prompt[-1:].isspace() or answer[:1].isspace()
        return ("" if parted else self.lead) + answer + self.after


def plain_frame(tokenizer: Any) -> Frame:
    """Return the frame of plain text: a space between prompt and answer, the end token behind it.

    Raises:
        ValueError: if the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    return Frame(before="", between="", lead=" ", after="", end_id=int(end), chat=False)


def chat_frame(tokenizer: Any) -> Frame:
    """Return the frame that a tokenizer's chat template puts around one question and its answer.

    What a finished conversation shows between question and answer is the start of generation,
    also where the generation prompt says less or more: the empty thinking tags of some templates
    are given to the model, not asked of it. The end token is the first special token behind the
    answer, or the tokenizer's own end token where the template writes none.

    Raises:
        ValueError: if there is no chat template, it does not show both texts once and unchanged,
            or no token ends the answer.
    """
    if not tokenizer.chat_template:
        raise ValueError(_NO_TEMPLATE)
    asked = {"role": "user", "content": _ASKED}
    answered = {"role": "assistant", "content": _ANSWERED}
    _, opening = _halves(_rendered(tokenizer, [asked], add_generation_prompt=True), _ASKED)
    whole = _rendered(tokenizer, [asked, answered], add_generation_prompt=False)
    before, rest = _halves(whole, _ASKED)
    between, closing = _halves(rest, _ANSWERED)
    lead = between.removeprefix(opening)
    if lead.strip() or not between.startswith(opening):
        lead = ""
    after, end_id = _ending(tokenizer, closing)
    return Frame(before, between.removesuffix(lead), lead, after, end_id, chat=True)


def _ending(tokenizer: Any, closing: str) -> tuple[str, int]:
    """Return what stands between the answer and its end token, and that token."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    # Of two tokens that start at one place the tokenizer takes the longer.
    found = [(closing.index(t), -len(t), t) for t in special if t and t in closing]
    if not found:
        return closing.rstrip(), plain_frame(tokenizer).end_id
    place, _, token = min(found)
    return closing[:place], int(tokenizer.convert_tokens_to_ids(token))


def _rendered(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError  # transformers renders by it

    template = tokenizer.get_chat_template()
    try:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=f"{_DATED}{template}" if "strftime_now" in template else template,
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template fails on a question and its answer ({error}); switch "
            "chat off, or mend tokenizer.chat_template"
        ) from error


def _halves(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(
            f"the chat template shows a text {text.count(mark)} times or changes it: {text!r}; "
            "it must show it once, as it is; set data.chat to false"
        )
    before, _, after = text.partition(mark)
    return before, after


def _trimmed(prompt: Prompt) -> Prompt:
    prefix, body, suffix = prompt.prefix.lstrip(), prompt.body, prompt.suffix.rstrip()
    body = body if prefix else body.lstrip()
    return Prompt(prefix, body if suffix else body.rstrip(), suffix)
