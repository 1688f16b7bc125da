"""Stage `evaluate`: an adapter, or none -> predictions and scores on the target test rows."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from grasp_lora.config import RunConfig
from grasp_lora.hf.generate import generate_lines
from grasp_lora.hf.probe import Rows, row_losses
from grasp_lora.recipes.context import Context, open_context
from grasp_lora.recipes.folders import (
    data_digest,
    finish_stage,
    read_start,
    stage_is_done,
    stage_key,
)
from grasp_lora.recipes.processes import is_main, join, wait_for_all
from grasp_lora.runs import write_json, write_jsonl


def evaluate_adapter(
    config: RunConfig,
    adapter: Path | None,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
    title: str = "evaluate",
) -> Path:
    """Answer the target test rows greedily and score the answers.

    Args:
        config: the run's settings.
        adapter: a PEFT adapter folder; None scores the bare backbone.
        out: receives `scores.json` and `predictions.jsonl`.
        overwrite: replace a finished result made with other settings.
        context: of the run this is part of.
        title: what the progress bar says.

    Returns:
        `out`.

    Raises:
        ValueError: there are no test rows, or the adapter is none for this backbone.
    """
    join(config)
    key = stage_key(config, data=data_digest(config), adapter=adapter)
    if stage_is_done(out, key, overwrite):
        return out
    context = context or open_context(config)
    if not context.examples("target", "test"):
        raise ValueError("there are no target test rows: give data.target.rows.test or files.test")
    started = time.perf_counter()
    attached: Any = nullcontext()
    if adapter is not None:
        attached = context.live(read_start(adapter, context.backbone), "merged")
    with attached as live:
        model = live.model if live is not None else context.backbone.model
        scores, rows = _score(context, model, title)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_jsonl(out / "predictions.jsonl", rows)
        write_json(out / "scores.json", scores)
        finish_stage(out, key, {"seconds": time.perf_counter() - started})
    wait_for_all()
    return out


def _score(context: Context, model: Any, title: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config, backbone = context.config, context.backbone
    limit = config.evaluate.limit
    examples = context.examples("target", "test")[:limit]
    encoded = context.encoded("target", "test")[:limit]
    model.eval()
    batches = Rows(encoded, context.collator, config.evaluate.batch_size).batches(
        range(len(encoded))
    )
    losses = row_losses(model, batches, len(encoded))
    with context.narrator.bar(title, len(encoded)) as done:
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            done(finished)

        lines = generate_lines(
            model,
            backbone.tokenizer,
            [e.input_ids[: e.prompt_length] for e in encoded],
            max_new_tokens=config.evaluate.max_new_tokens or context.task.max_new_tokens,
            batch_size=config.evaluate.batch_size,
            pad_id=backbone.pad_id,
            stop_ids=backbone.stop_ids,
            advance=advance,
        )
    rows: list[dict[str, Any]] = []
    for example, line, loss in zip(examples, lines, losses, strict=True):
        marks = {
            name: metric(line, example.references, example.language, config.evaluate.metric_rules)
            for name, metric in context.task.metrics.items()
        }
        rows.append(
            {"id": example.id, "prediction": line, "references": list(example.references)}
            | marks
            | {"loss": loss}
        )
    means = {name: sum(r[name] for r in rows) / len(rows) for name in context.task.metrics}
    scores = {name: 100 * value for name, value in means.items()}
    scores |= {"loss": sum(losses) / len(losses), "n": len(rows)}
    scores |= {"metric_rules": config.evaluate.metric_rules}
    return scores, rows
