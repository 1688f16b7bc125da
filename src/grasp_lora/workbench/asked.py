"""How adapters are asked: the prompts in force, and whether a given adapter knows another one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grasp_lora.adapters.chat import own_template, saved_template
from grasp_lora.adapters.folder import read_adapter
from grasp_lora.config.run_config import RunConfig, section_of
from grasp_lora.core.controller.rounds import draw_examples
from grasp_lora.core.evidence.prompts import better_prompt
from grasp_lora.core.lora import merge
from grasp_lora.models.example_losses import EncodedExamples, example_losses, forward_tokens
from grasp_lora.tasks.base import Example, Task, task_named
from grasp_lora.tasks.chat import chat_frame
from grasp_lora.tasks.encoding import EncodedExample, Encoding
from grasp_lora.tasks.prompts import bare_template, template_for
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.rows import RunData


@dataclass(frozen=True)
class Way:
    """A way to ask.

    Attributes:
        template: the prompt template.
        chat: whether the prompt is put into the chat template.
    """

    template: str
    chat: bool


def template_in_force(config: RunConfig, role: str, split: str) -> str:
    """Return the prompt template of a split: the one given, else that of task and language."""
    section, task = section_of(config, role, split), task_named(config.data.task)
    return section.prompt or template_for(task, section.language)[0]


def prompts_in_force(config: RunConfig, data: RunData, tokenizer: Any) -> dict[str, Any]:
    """Return role, or "tests/<name>" -> its prompt template, and the texts that a chat puts around.

    JSON-able: `template`, and in a chat `before` and `between` (prompt and answer).
    """
    frame = chat_frame(tokenizer) if config.data.chat else None
    around = {} if frame is None else {"before": frame.before, "between": frame.between}
    places = {
        f"tests/{split}" if role == "tests" else role: (role, split)
        for role, parts in data.parts.items()
        for split in parts
    }
    return {
        name: {"template": template_in_force(config, *place)} | around
        for name, place in places.items()
    }


def ways_to_ask(task: Task, template: str, chat: bool, has_chat: bool) -> dict[str, Way]:
    """Return name -> way, of those that are compared; the one in force comes first.

    Args:
        task: the task.
        template: the prompt template in force.
        chat: whether it is put into the chat template.
        has_chat: whether there is a chat template.
    """
    templates = {"the prompt": template, "the bare question": bare_template(task, template)}
    if templates["the bare question"] == template:
        del templates["the bare question"]
    frames = (chat, not chat) if has_chat else (chat,)
    return {
        f"{name} in the chat template" if within else name: Way(text, within)
        for within in frames
        for name, text in templates.items()
    }


def compare_prompts(context: Context, role: str, folder: Path, rows: int) -> dict[str, Any]:
    """Return how well a given adapter knows the prompt in force and other ways to ask; JSON-able.

    The losses of the answers are those of train examples of its role, or of the target where the
    role has none.

    Args:
        context: examples and backbone.
        role: "source" or "target".
        folder: the adapter.
        rows: how many examples are drawn; all are taken if there are fewer.

    Returns:
        `rows` (ids), `used`, `losses` (way -> mean, in nats), `forwards`, and `better`: None, or
        the way that is better by more than its standard error over contexts, `gain`, `error`, and
        the `settings` that ask in it.

    Raises:
        ValueError: the adapter does not fit the backbone.
    """
    config, tokenizer = context.config, context.backbone.tokenizer
    asked = role if context.data.parts.get(role, {}).get("train") else "target"
    pool = context.examples(asked, "train")
    generator = torch.Generator().manual_seed(config.seed)
    examples = [pool[i] for i in draw_examples([e.group for e in pool], rows, generator)]
    template = template_in_force(config, asked, "train")
    saved = None if config.data.chat else saved_template(folder)
    own = saved or own_template(tokenizer)
    ways = ways_to_ask(context.task, template, config.data.chat, bool(own))
    with _chat_template(tokenizer, own):
        encoded = _encoded(context, examples, ways)
    losses = _losses(context, folder, encoded)
    used, kept = next(iter(ways)), next(iter(encoded.values()))
    found: dict[str, Any] = {
        "rows": [row.id for row in kept],
        "used": used,
        "losses": {name: fmean(values) for name, values in losses.items()},
        "forwards": sum(map(len, losses.values())),
        "better": None,
    }
    better = better_prompt(losses, used, [row.group for row in kept])
    if better is not None:
        name, gain = better
        settings = _settings(asked, ways[used], ways[name])
        found["better"] = {"name": name, "settings": settings} | asdict(gain)
    return found


def _settings(role: str, used: Way, better: Way) -> list[str]:
    """Return the lines that make a configuration ask in another way."""
    lines: list[str] = []
    if better.template != used.template:
        # JSON's quotes are YAML too, and show line breaks.
        lines.append(f"data.{role}.prompt: {json.dumps(better.template, ensure_ascii=False)}")
    if better.chat != used.chat:
        lines.append(f"data.chat: {json.dumps(better.chat)}")
    return lines


@contextmanager
def _chat_template(tokenizer: Any, text: str | None) -> Iterator[None]:
    before, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        yield
    finally:
        tokenizer.chat_template = before


def _encoded(
    context: Context, examples: Sequence[Example], ways: Mapping[str, Way]
) -> dict[str, list[EncodedExample]]:
    """Return way -> the encoded examples that fit in every way, without ways that cannot be used.

    Raises:
        ValueError: the way in force cannot be used.
    """
    found: dict[str, list[EncodedExample]] = {}
    for name, way in ways.items():
        try:
            encoding = Encoding(
                context.task,
                context.backbone.tokenizer,
                context.longest,
                way.template,
                chat=way.chat,
                decoder_start=context.backbone.decoder_start,
            )
            found[name] = list(encoding.rows(examples))
        except ValueError:
            if not found:
                raise
    fits = set.intersection(*({row.id for row in rows} for rows in found.values()))
    return {name: [row for row in rows if row.id in fits] for name, rows in found.items()}


def _losses(
    context: Context, folder: Path, encoded: Mapping[str, Sequence[EncodedExample]]
) -> dict[str, list[float]]:
    """Return way -> loss of each example's answer under an adapter, in nats."""
    adapter = read_adapter(folder, context.backbone.model).adapter
    device, size = context.backbone.device, context.config.evaluate.batch_size
    found: dict[str, list[float]] = {}
    with context.live(merge("cat", [adapter], [1.0]), "merged") as live:
        live.model.eval()
        for name, rows in encoded.items():
            examples = EncodedExamples(rows, context.collator, size, forward_tokens(device))
            batches = examples.batches(range(len(rows)))
            found[name] = example_losses(live.model, batches, len(rows))
    return found
