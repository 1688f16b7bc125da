"""Stage `evaluate`: an adapter, or none -> predictions and scores on every test set."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lora.adapters.opening import base_mismatch_line, model_with_adapter
from grasp_lora.base.files import provenance, write_json, write_jsonl
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.generation.answer import answer_examples, can_answer_in_one_pass
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.metrics import Row
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.scoring.sets import missing_metrics, score_sets
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.workbench.context import Context, new_tokens, open_context
from grasp_lora.workbench.folders import (
    begin_stage,
    finish_stage,
    model_content,
    stage_is_done,
    stage_key,
)
from grasp_lora.workbench.processes import is_main, join, wait_for_all
from grasp_lora.workbench.reporter import Narrator
from grasp_lora.workbench.rows import load_run_data


def evaluate_adapter(
    config: RunConfig,
    adapter: Path | None,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
    title: str = "evaluate",
) -> Path:
    """Answer the test rows and score the answers.

    Args:
        config: the run's settings.
        adapter: a PEFT adapter folder; None scores the bare backbone.
        out: receives `scores.json`, `predictions.jsonl` and `provenance.json`.
        overwrite: replace a finished result made with other settings.
        context: of the run this is part of.
        title: what the progress bar says.

    Returns:
        `out`.

    Raises:
        ValueError: there are no test rows, a score cannot be computed here, or the adapter is
            none for this backbone.
    """
    join(config)
    if context is None:
        faults = missing_metrics(config)
        if faults:
            raise ConfigError(faults)
        data = load_run_data(config, Narrator(not is_main()).say, training=False)
    else:
        data = context.data
    if not data.test_sets():
        raise ValueError(
            "there are no test rows: give data.target.rows.test, data.target.files.test or"
            " data.tests"
        )
    key = stage_key(
        config, data=data.digest(), adapter=adapter, base=model_content(config.model.name)
    )
    if stage_is_done(out, key, overwrite):
        return out
    context = context or open_context(config, data=data, training=False)
    started, clock = time.perf_counter(), context.clock
    attached: Any = nullcontext(context.backbone.model)
    if adapter is not None:
        attached = model_with_adapter(context.backbone, adapter)
        other = base_mismatch_line(adapter, config.model.name, context.backbone)
        if other is not None:
            context.narrator.say(other)
    with ExitStack() as stack:
        with clock.span("load"):
            model = stack.enter_context(attached)
        with clock.span("generate"):
            predictions = {
                name: _answers(context, model, role, split, f"{title}, {name}")
                for name, (role, split) in data.test_sets().items()
            }
    generated = time.perf_counter()
    if is_main():
        begin_stage(out, key)
        out.mkdir(parents=True, exist_ok=True)
        name = context.backbone.public_name
        with clock.span("score"):
            scores, per_row = score_sets(
                config, data.test_sets(), predictions, name, str(context.backbone.device)
            )
        with clock.span("write"):
            write_jsonl(out / "predictions.jsonl", _records(predictions, per_row, name))
            if data.leaks:
                scores["leaks"] = [asdict(leak) for leak in data.leaks]
            write_json(out / "scores.json", scores)
            made = {"settings": config.to_dict(), "dtype": str(context.backbone.dtype)}
            made |= {"adapter": str(adapter) if adapter else None, "data": data.manifest()}
            write_json(out / "provenance.json", provenance() | made)
            seconds = {
                "seconds": time.perf_counter() - started,
                "seconds_answering": generated - started,
                "seconds_scoring": time.perf_counter() - generated,
            }
            finish_stage(out, key, seconds)
    wait_for_all()
    return out


def _answers(context: Context, model: Any, role: str, split: str, title: str) -> list[Row]:
    config, backbone, task = context.config, context.backbone, context.task
    limit = config.evaluate.limit
    examples = context.examples(role, split)[:limit]
    encoded = context.encoded(role, split)[:limit]
    prompts = [e.input_ids[: e.prompt_length] for e in encoded]
    with context.narrator.bar(title, len(encoded)) as done:
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            done(finished)

        settings = GenerationSettings(
            max_new_tokens=new_tokens(config, role, split),
            min_new_tokens=config.evaluate.min_new_tokens,
            batch_size=config.evaluate.batch_size,
            pad_id=backbone.pad_id,
            stop_ids=sorted({*backbone.stop_ids, context.end_id(role, split)}),
            beams=config.evaluate.beams,
            one_line=task.one_line,
        )
        calls = {"advance": advance, "notice": context.narrator.say}
        if can_answer_in_one_pass(model, settings.beams):
            answered = answer_examples(model, backbone.tokenizer, encoded, settings, **calls)
            texts, losses = [text for text, _ in answered], [loss for _, loss in answered]
        else:
            losses = _losses(context, model, encoded)
            texts = generate_texts(model, backbone.tokenizer, prompts, settings, **calls)
    return [
        Row(
            e.id,
            context.prediction(role, split, text),
            e.references,
            e.group,
            loss,
            row.label_tokens,
        )
        for e, row, text, loss in zip(examples, encoded, texts, losses, strict=True)
    ]


def _losses(context: Context, model: Any, encoded: Sequence[EncodedExample]) -> list[float]:
    rows = EncodedExamples(encoded, context.collator, context.config.evaluate.batch_size)
    model.eval()
    return example_losses(model, rows.batches(range(len(encoded))), len(encoded))


def _records(
    predictions: dict[str, list[Row]],
    per_row: dict[str, dict[str, tuple[float, ...]]],
    tokenizer: str,
) -> list[dict[str, Any]]:
    return [
        {
            "set": name,
            "id": row.id,
            "group": row.group,
            "prediction": row.prediction,
            "references": list(row.references),
            "tokens": row.tokens,
            "tokenizer": tokenizer,
        }
        | {metric: scores[index] for metric, scores in per_row[name].items()}
        | {"loss": row.loss}
        for name, rows in predictions.items()
        for index, row in enumerate(rows)
    ]
