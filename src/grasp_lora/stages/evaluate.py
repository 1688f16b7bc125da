"""Stage `evaluate`: an adapter, or none -> predictions and scores on every test set.

The input `adapter` is a PEFT adapter folder; without it the bare backbone is scored. Where inputs
are called "trial 0", "trial 1", ..., the one with the lowest best dev loss is scored.

With option `shots` the bare backbone has so many solved examples in its prompt (see
`grasp_lora.stages.few_shot`).

The folder holds `scores.json`, `predictions.jsonl` and `provenance.json`. With option `labelled` it
also holds `losses.json`, the losses of the micro-dev and dev examples. With option `unanswered`
these losses are all that is measured: no test example is read.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import adapter_in
from grasp_lora.adapters.opening import lines_about, model_with_adapter
from grasp_lora.base.choice import lowest
from grasp_lora.base.files import provenance, write_json, write_jsonl
from grasp_lora.base.words import without_home
from grasp_lora.generation.answer import answer_examples, can_answer_in_one_pass
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.metrics import Row
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.scoring.sets import score_sets
from grasp_lora.stages.few_shot import DRAWN_FROM, JUDGING, FewShot, few_shot
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.tasks.encoding import EncodedExample, decoder_begin
from grasp_lora.workbench.context import Context, new_tokens
from grasp_lora.workbench.merged_folder import read_start
from grasp_lora.workbench.processes import is_main

NO_TEST_EXAMPLES = (
    "there are no test rows: give data.target.rows.test, data.target.files.test or data.tests"
)


def run(work: Work) -> Mapping[str, Any]:
    """Answer the test examples and score the answers.

    Raises:
        ValueError: there are no test examples, or the adapter does not fit this backbone.
        NotApplicable: no solved example fits the model, see `few_shot`.
    """
    context, sets = work.context, work.context.data.test_sets()
    answers = not work.stage.option("unanswered", False)
    if answers and not sets:
        raise ValueError(NO_TEST_EXAMPLES)
    adapter, labelled = chosen_adapter(work.inputs), work.stage.option("labelled")
    started, clock, shots = time.perf_counter(), context.clock, None
    if work.stage.option("shots"):
        assert adapter is None, "solved examples are for the bare backbone"
        with clock.span("load"):
            shots = few_shot(context, work.stage.option("shots"), (*sets.values(), *JUDGING))
    attached: Any = nullcontext(context.backbone.model)
    if adapter is not None:
        attached = model_with_adapter(context.backbone, adapter)
        for line in lines_about(
            work.inputs.get("adapter", adapter), work.config.model.name, context.backbone
        ):
            context.reporter.say(line)
    with ExitStack() as stack:
        with clock.span("load"):
            model = stack.enter_context(attached)
        with clock.span("generate"):
            predictions = {
                name: _answers(context, model, one, f"{work.title}, {name}", shots)
                for name, one in (sets if answers else {}).items()
            }
    generated = time.perf_counter()
    losses = _labelled_losses(context, adapter, shots) if labelled else None
    if is_main():
        if losses is not None:
            write_json(work.out / "losses.json", losses)
        if answers:
            _write(work, predictions, adapter, shots)
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "seconds_answering": generated - started,
        "seconds_scoring": ended - generated,
    }


def chosen_adapter(inputs: Mapping[str, Path]) -> Path | None:
    """Return the folder of the adapter to score; None for the bare backbone.

    Raises:
        ValueError: it is to be chosen among trials, and none has a finite loss.
    """
    trials = [folder for role, folder in inputs.items() if role.startswith("trial")]
    if trials:
        best = lowest({folder: facts_of(folder)["best"]["loss"] for folder in trials})
        if best is None:
            raise ValueError(
                f"none of the {len(trials)} trials has a finite dev loss, so none can be chosen: "
                "lower train.finetune.learning_rate"
            )
        return best
    return adapter_in(inputs["adapter"]) if "adapter" in inputs else None


def _labelled_losses(
    context: Context, adapter: Path | None, shots: FewShot | None
) -> dict[str, list[float]]:
    """Return the losses of the micro-dev and dev examples, in nats."""

    def read(model: Any) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for role, split in JUDGING:
            rows = context.rows(role, [split])
            if shots is not None:
                rows = replace(rows, encoded=shots.rows((role, split)), share_prefix=False)
            count = len(rows.encoded)
            found[split] = example_losses(model, rows.batches(range(count)), count) if count else []
        return found

    if adapter is None:
        model = (shots and shots.reader) or context.backbone.model
        return read(model)
    with context.live(read_start(adapter, context.backbone), "merged") as live:
        live.model.eval()
        return read(live.model)


def _write(
    work: Work, predictions: dict[str, list[Row]], adapter: Path | None, shots: FewShot | None
) -> None:
    """Score the predictions and write them with their scores."""
    context, config = work.context, work.config
    data, name = context.data, context.backbone.public_name
    with context.clock.span("score"):
        device = str(context.backbone.device)
        scores, per_row = score_sets(config, data.test_sets(), predictions, name, device)
    with context.clock.span("write"):
        records = _records(predictions, per_row, name, _asked(context))
        write_jsonl(work.out / "predictions.jsonl", records)
        if data.leaks:
            scores["leaks"] = [asdict(leak) for leak in data.leaks]
        if shots is not None:
            scores["shots"] = shots.record()
        write_json(work.out / "scores.json", scores)
        made = {"settings": config.to_record(), "dtype": str(context.backbone.dtype)}
        made |= {"adapter": _named(work, adapter), "data": data.manifest()}
        write_json(work.out / "provenance.json", provenance() | made)


def _named(work: Work, adapter: Path | None) -> str | None:
    """Return a stage of the plan by its name, and another folder by its path."""
    if adapter is None:
        return None
    folders = {work.inputs[role]: str(one) for role, one in work.stage.inputs.items()}
    return without_home(folders.get(adapter, adapter))


def _answers(
    context: Context, model: Any, one: Split, title: str, shots: FewShot | None
) -> list[Row]:
    config, backbone, task, (role, split) = context.config, context.backbone, context.task, one
    limit = config.evaluate.limit
    examples = context.examples(role, split)[:limit]
    encoded = shots.rows(one, limit) if shots else context.encoded(role, split)[:limit]
    reader, ends = (shots.reader, shots.stop_ids(encoded)) if shots else (None, set[int]())
    prompts = [e.input_ids[: e.prompt_length] for e in encoded]
    with context.reporter.bar(title, len(encoded)) as done:
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
            stop_ids=sorted({*backbone.stop_ids, context.end_id(role, split), *ends}),
            beams=config.evaluate.beams,
            one_line=task.one_line,
            ended=shots.ended(one) if shots else None,
            start=decoder_begin(encoded),
        )
        calls = {"advance": advance, "notice": context.reporter.say}
        if can_answer_in_one_pass(model, settings.beams):
            answered = answer_examples(
                model, backbone.tokenizer, encoded, settings, prefix=reader, **calls
            )
            texts, losses = [text for text, _ in answered], [loss for _, loss in answered]
        else:
            losses = _losses(context, reader or model, encoded)
            texts = generate_texts(model, backbone.tokenizer, prompts, settings, **calls)
    if shots is not None:
        texts = [shots.answer(one, text) for text in texts]
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


def _asked(context: Context) -> dict[tuple[str, str], str]:
    """Return (test set, id) -> what is asked: the last input of the task, cut if it is long."""
    return {
        (name, one.id): list(one.fields.values())[-1][:_MOST_ASKED]
        for name, (role, split) in context.data.test_sets().items()
        for one in context.examples(role, split)
    }


def _records(
    predictions: dict[str, list[Row]],
    per_row: dict[str, dict[str, tuple[float, ...]]],
    tokenizer: str,
    asked: Mapping[tuple[str, str], str],
) -> list[dict[str, Any]]:
    return [
        {
            "set": name,
            "id": row.id,
            "group": row.group,
            "question": asked[name, row.id],
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


_MOST_ASKED = 600
"""Characters of a question that `predictions.jsonl` has; an article is longer."""
_NO_RESULT = ("baselines",)
_OF_A_TEST = ("prompt", "language")


def _settings(stage: Stage) -> tuple[str, ...]:
    encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
    if stage.option("unanswered", False):
        return ("seed", "model", "evaluate.batch_size", *encoding)
    own = [f"evaluate.{n}" for n in type(stage.config.evaluate).model_fields if n not in _NO_RESULT]
    # The key holds the content of the examples, so their files and columns are left out.
    tests = [f"data.tests.{n}.{key}" for n in stage.config.data.tests for key in _OF_A_TEST]
    return ("seed", "model", *own, *tests, *encoding, "data.target.language")


def _examples(stage: Stage, known: tuple[Split, ...]) -> tuple[Split, ...]:
    tests = tuple(one for one in known if one[0] == "tests" or one == ("target", "test"))
    if stage.option("shots"):  # the solved examples must fit ahead of all that may be asked
        return (*tests, *JUDGING, DRAWN_FROM)
    tests = () if stage.option("unanswered", False) else tests
    return tests + (JUDGING if stage.option("labelled") else ())


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    tested = [(r, s) for r, s in sizes.count if r == "tests" or (r, s) == ("target", "test")]
    tested = [] if stage.option("unanswered", False) else tested
    answers = sum(
        min(sizes.examples(one), stage.config.evaluate.limit or sizes.examples(one))
        for one in tested
    )
    read = sizes.reading(1 if stage.option("labelled") else 0, *JUDGING)
    # The solved examples are read once, but by a model whose cache cannot be shared.
    shots = min(stage.option("shots", 0), sizes.examples(DRAWN_FROM))
    tokens = answers * sizes.length(*tested) + shots * sizes.length(DRAWN_FROM)
    return Cost(0, round(tokens), 0, answers) + read


EVALUATE = Kind(2, _settings, _examples, run, _cost)
