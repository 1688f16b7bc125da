"""The texts around a prompt and its answer: none, or the turns of a chat template.

A chat template is a program. The texts that it puts around a prompt and an answer are found by
rendering a conversation of two placeholders. This keeps everything that the template adds, such as
a system turn, a date or empty thinking tags. The date is fixed, so that a run resumed after
midnight, or repeated later, sees the same prompts.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from grasp_lora.base.words import shown
from grasp_lora.tasks.fitting import continuation_ids
from grasp_lora.tasks.records import Prompt

# The date given to chat templates: the default of Llama's templates.
_TODAY = datetime(2024, 7, 26)
# transformers passes no functions to a template, so this macro defines `strftime_now` in Jinja. It
# covers the directives of strftime that do not depend on the machine.
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{d}', '{_TODAY.strftime('%' + d)}')" for d in "aAbBdHIjmMpSUwyY")
    + " }}{%- endmacro +%}"
)

SEPARATOR = "\n\n"
"""What ends the answer of a solved example and separates it from what follows, in plain text."""

_QUESTION_MARK, _ANSWER_MARK = "asked7c1f", "answered7c1f"
_NO_TEMPLATE = (
    "the tokenizer has no chat template; set data.chat to false, or use a model that was trained "
    "on conversations (their names often end in -Instruct, -it or -Chat)"
)


@dataclass(frozen=True)
class Frame:
    """The texts around a prompt and around its answer, and the token that ends the answer."""

    before: str
    """Text before the prompt."""
    between: str
    """Text between the prompt and the place where generation starts."""
    lead: str
    """White space before the answer, which the model generates.

    Without a chat template it is omitted if the prompt ends or the answer begins with white space.
    """
    after: str
    """Text between the answer and the end token."""
    end_id: int
    """Id of the last token of every answer, which ends a generation."""
    chat: bool
    """Whether the texts are a chat template's; then the tokenizer adds no special tokens."""

    def wrap(self, prompt: Prompt) -> Prompt:
        """Return the prompt within the frame; its body can still be shortened.

        In a chat, white space at both ends of the prompt is removed, as most templates do.
        """
        inner = _trimmed(prompt) if self.chat else prompt
        return Prompt(self.before + inner.prefix, inner.body, inner.suffix + self.between)

    def completion(self, answer: str, prompt: str) -> str:
        """Return the text that the model should write between a framed prompt and the end token."""
        if self.chat:
            return self.lead + answer.strip() + self.after
        separated = prompt[-1:].isspace() or answer[:1].isspace()
        return ("" if separated else self.lead) + answer + self.after


def plain_frame(tokenizer: Any) -> Frame:
    """Return the frame of plain text: a space before the answer, and the end token after it.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    return Frame(before="", between="", lead=" ", after="", end_id=int(end), chat=False)


@dataclass(frozen=True)
class FewShotFrames:
    """The frames of solved examples and of the question that follows them.

    In `middle` and `last`, `before` is all that stands between the answer ahead and the prompt.
    """

    first: Frame
    """Of the first solved example."""
    middle: Frame
    """Of every further one."""
    last: Frame
    """Of the question. Its end token is what ends the answers of the solved examples."""


def few_shot_frames(tokenizer: Any, chat: bool) -> FewShotFrames:
    """Return the frames of a prompt that holds solved examples.

    In plain text a blank line ends an answer, as in the few-shot prompts of lm-evaluation-harness.
    In a chat the solved examples are earlier turns of the user and the assistant.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat: use the tokenizer's chat template.

    Raises:
        ValueError: as in `plain_frame` and `chat_frame`, or the chat template does not treat all
            earlier turns alike, or the last turn as it treats a single one.
    """
    if not chat:
        first = plain_frame(tokenizer)
        middle = replace(first, before=SEPARATOR)
        # A word ahead, since some tokenizers put a space before a text.
        end = continuation_ids(tokenizer, "a", SEPARATOR)[0]
        return FewShotFrames(first, middle, replace(middle, end_id=end))
    single = chat_frame(tokenizer)
    marks = [f"{mark}{n}" for n in "abc" for mark in (_QUESTION_MARK, _ANSWER_MARK)]
    roles = ("user", "assistant") * 3
    turns = [{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)]
    between: list[str] = []
    rest = _rendered(tokenizer, turns, add_generation_prompt=False)
    for mark in marks:
        text, rest = _halves(rest, mark)
        between.append(text)
    before, asked, joint, asked_again, joint_again, last = between
    if (asked, joint, last) != (asked_again, joint_again, single.between + single.lead):
        raise ValueError(
            "the chat template does not write all turns of a conversation alike, so no solved "
            "examples can be earlier turns; set data.chat to false"
        )
    lead = asked[len(asked.rstrip()) :] if single.lead else ""
    first = Frame(before, asked.removesuffix(lead), lead, "", single.end_id, chat=True)
    return FewShotFrames(first, replace(first, before=joint), replace(single, before=joint))


def chat_frame(tokenizer: Any) -> Frame:
    """Return the frame that a tokenizer's chat template puts around one question and its answer.

    Generation starts after the text between question and answer in a complete conversation, even
    if the template's generation prompt is another text. Empty thinking tags of some templates are
    thus part of the prompt; the model need not generate them. The end token is the first special
    token after the answer, or the tokenizer's end token if there is none.

    Raises:
        ValueError: there is no chat template, it does not contain both texts once and unchanged,
            or no token ends the answer.
    """
    if not tokenizer.chat_template:
        raise ValueError(_NO_TEMPLATE)
    asked = {"role": "user", "content": _QUESTION_MARK}
    answered = {"role": "assistant", "content": _ANSWER_MARK}
    _, opening = _halves(_rendered(tokenizer, [asked], add_generation_prompt=True), _QUESTION_MARK)
    whole = _rendered(tokenizer, [asked, answered], add_generation_prompt=False)
    before, rest = _halves(whole, _QUESTION_MARK)
    between, closing = _halves(rest, _ANSWER_MARK)
    lead = between.removeprefix(opening)
    if lead.strip() or not between.startswith(opening):
        lead = ""
    after, end_id = _ending(tokenizer, closing)
    return Frame(before, between.removesuffix(lead), lead, after, end_id, chat=True)


def _ending(tokenizer: Any, closing: str) -> tuple[str, int]:
    """Return (text between the answer and its end token, id of the end token)."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    # If two special tokens start at the same place, the tokenizer uses the longer one.
    found = [(closing.index(t), -len(t), t) for t in special if t and t in closing]
    if not found:
        return closing.rstrip(), plain_frame(tokenizer).end_id
    place, _, token = min(found)
    return closing[:place], int(tokenizer.convert_tokens_to_ids(token))


def _rendered(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError  # transformers needs jinja2 only to render templates

    template = tokenizer.get_chat_template()
    try:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=f"{_DATE_MACRO}{template}" if "strftime_now" in template else template,
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template fails on a question and its answer ({error}); set "
            "data.chat to false, or correct tokenizer.chat_template"
        ) from error


def _halves(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(
            f"the chat template contains a text {text.count(mark)} times or changes it: "
            f"{shown(text)}; it must contain the text once and unchanged; set data.chat to false"
        )
    before, _, after = text.partition(mark)
    return before, after


def _trimmed(prompt: Prompt) -> Prompt:
    prefix, body, suffix = prompt.prefix.lstrip(), prompt.body, prompt.suffix.rstrip()
    body = body if prefix else body.lstrip()
    return Prompt(prefix, body if suffix else body.rstrip(), suffix)
