"""Solved examples in the prompt of the bare backbone: drawn, fitted into its positions, counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp_lora.config.run_config import section_of
from grasp_lora.models.prefix import PrefixReader, can_read_prefix
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Split
from grasp_lora.tasks.chat import SEPARATOR, FewShotFrames, few_shot_frames
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.tasks.few_shot import Solved, asked_after, before_next, draw_order, solved_examples
from grasp_lora.tasks.prompts import first_words, render, template_for
from grasp_lora.workbench.context import Context, new_tokens

DRAWN_FROM: Split = ("target", "train")
"""The set that solved examples are drawn from."""


@dataclass(frozen=True)
class FewShot:
    """The solved examples ahead of every question of an evaluation.

    Attributes:
        context: examples and backbone.
        wanted: how many were asked for.
        solved: the solved examples, in their order in the prompt.
        frames: the frames of the prompt.
        reader: reads them once for all questions; None if the model reads them with each.
    """

    context: Context
    wanted: int
    solved: tuple[Solved, ...]
    frames: FewShotFrames
    reader: PrefixReader | None = None

    def rows(self, split: Split, limit: int | None = None) -> list[EncodedExample]:
        """Return the first `limit` examples of a set with the solved examples ahead."""
        return _asked(self.context, self.solved, self.frames, split, limit)

    @property
    def stop_ids(self) -> set[int]:
        """Ids of the tokens that end an answer; none if a blank line is several tokens."""
        end = self.frames.last.end_id
        whole = self.context.backbone.tokenizer.decode([end]) == SEPARATOR
        return {end} if whole or self.context.config.data.chat else set()

    def ended(self, split: Split) -> Callable[[str], bool] | None:
        """Return whether a generated text holds more than an answer; None if only a token says."""
        if self.context.config.data.chat:
            return None
        return lambda text: self.answer(split, text) != text

    def answer(self, split: Split, text: str) -> str:
        """Return the part of a generated text before the next example.

        In a chat the answer ends with the turn, so nothing is cut.
        """
        if self.context.config.data.chat:
            return text
        return before_next(text, {_first_words(self.context, one) for one in (DRAWN_FROM, split)})

    def record(self) -> Mapping[str, Any]:
        """Return what `scores.json` holds of them: numbers, ids and tokens."""
        return {
            "wanted": self.wanted,
            "used": len(self.solved),
            "ids": [one.id for one in self.solved],
            "tokens": sum(len(one.ids) for one in self.solved),
        }


def few_shot(context: Context, wanted: int, sets: Sequence[Split]) -> FewShot:
    """Return the solved examples for an evaluation; a line tells the user if they are fewer.

    They are drawn from the target train examples by the seed of the run. The first n are the same
    for every `wanted`. The questions keep their room, so the examples must fit beside the longest.

    Args:
        context: examples and backbone.
        wanted: how many solved examples are asked for, at least 1.
        sets: the sets of examples that are measured.

    Raises:
        NotApplicable: there are no train examples, not even one fits, or the chat template has no
            place for them.
    """
    drawn = draw_order(context.examples(*DRAWN_FROM), context.config.seed)[:wanted]
    if not drawn:
        raise NotApplicable("there are no target train rows to draw solved examples from")
    tokenizer = context.backbone.tokenizer
    try:
        frames = few_shot_frames(tokenizer, context.config.data.chat)
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    prompt = section_of(context.config, *DRAWN_FROM).prompt
    encoded = {row.id: row for row in context.encoded(*DRAWN_FROM)}
    parts = [
        (encoded[one.id], render(context.task, one, prompt), one.references[0]) for one in drawn
    ]
    whole = tuple(solved_examples(parts, tokenizer, frames))
    solved, reason = whole, f"there are {len(whole)} train rows"
    reach = context.positions
    while solved and reach is not None and _longest(context, solved, frames, sets) > reach:
        solved, reason = solved[:-1], f"more do not fit the model's {reach} positions"
    if not solved:
        raise NotApplicable(
            f"not even one solved example ({len(whole[0].ids)} tokens) fits ahead of the longest "
            f"question in the model's {reach} positions"
        )
    if len(solved) < wanted:
        context.reporter.say(f"{len(solved)} solved examples, not {wanted}: {reason}")
    model, reader = context.backbone.model, None
    if can_read_prefix(model):
        reader = PrefixReader(model, [token for one in solved for token in one.ids])
    return FewShot(context, wanted, solved, frames, reader)


def _asked(
    context: Context,
    solved: Sequence[Solved],
    frames: FewShotFrames,
    split: Split,
    limit: int | None = None,
) -> list[EncodedExample]:
    prompt = section_of(context.config, *split).prompt
    pairs = zip(context.examples(*split), context.encoded(*split), strict=True)
    return [
        asked_after(
            solved,
            row,
            render(context.task, example, prompt),
            context.backbone.tokenizer,
            frames.last,
        )
        for example, row in list(pairs)[:limit]
    ]


def _longest(
    context: Context, solved: Sequence[Solved], frames: FewShotFrames, sets: Sequence[Split]
) -> int:
    """Return the most tokens of a question and its answer, the given or a generated one."""
    lengths = [0]
    for split in sets:
        room = 0 if split in JUDGING else new_tokens(context.config, *split) + 1
        lengths += [
            row.prompt_length + max(row.label_tokens, room)
            for row in _asked(context, solved, frames, split)
        ]
    return max(lengths)


def _first_words(context: Context, split: Split) -> str:
    section = section_of(context.config, *split)
    return first_words(
        context.task, section.prompt or template_for(context.task, section.language)[0]
    )


JUDGING: tuple[Split, ...] = (("target", "micro_dev"), ("target", "dev"))
"""Sets of the labelled examples whose losses decide choices; they are not answered."""
