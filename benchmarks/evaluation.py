"""What a whole evaluation costs beside its generation alone.

    OMP_NUM_THREADS=2 python -m benchmarks.evaluation --json evaluation.json
    OMP_NUM_THREADS=1 python -m benchmarks.evaluation --rows 32 --language es

The evaluation answers the rows, takes the loss of their references, and computes every score but
BERTScore with 1000 resamples behind each interval; generation alone answers the same rows by the
same rule. They take turns batch by batch; scoring comes once, after the last batch.
A second table has the CPU seconds of answers and losses by part, of the bare model and with a
random adapter of rank 16 on all linear layers.

JSON: `evaluation_ratio`, the time of the whole evaluation over that of its generation.
"""

import time
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.generate import encoded_rows, parsed
from grasp_lora.generation.answer import answer_examples
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.metrics import METRICS, Options, Row, score
from grasp_lora.models.backbones import Backbone
from grasp_lora.tasks.base import task_named
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.training.live import attach_live_adapter

PARTS = ("prompts and losses, one forward", "steps of generation", "the rest")


def parts(
    backbone: Backbone, model: Any, rows: Sequence[EncodedExample], rule: GenerationSettings
) -> dict[str, float]:
    """Return part -> CPU seconds of the answers and losses of rows.

    Args:
        backbone: the backbone, whose forwards are told apart.
        model: the backbone's model, or that with an adapter.
        rows: encoded questions.
        rule: how they are answered.
    """
    spent, began = dict.fromkeys(PARTS, 0.0), 0.0

    def before(_module: Any, _args: Any, _kwargs: Any) -> None:
        nonlocal began
        began = time.process_time()

    def after(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        one_token = kwargs["input_ids"].shape[1] == 1
        spent[PARTS[1 if one_token else 0]] += time.process_time() - began

    hooks = [
        backbone.model.register_forward_pre_hook(before, with_kwargs=True),
        backbone.model.register_forward_hook(after, with_kwargs=True),
    ]
    start = time.process_time()
    answer_examples(model, backbone.tokenizer, rows, rule)
    whole = time.process_time() - start
    for hook in hooks:
        hook.remove()
    return spent | {PARTS[2]: whole - sum(spent.values())}


def by_part(
    backbone: Backbone, rows: Sequence[EncodedExample], rule: GenerationSettings
) -> list[dict[str, Any]]:
    """Return a row for each part, with the CPU seconds of the bare model and with an adapter."""
    answer_examples(backbone.model, backbone.tokenizer, rows[:1], rule)  # the first call is slower
    bare = parts(backbone, backbone.model, rows, rule)
    factors = common.adapters(backbone.model, "all-linear", rank=8, seed=0)
    live = attach_live_adapter(backbone.model, factors, "merged")
    adapted = parts(backbone, live.model, rows, rule)
    live.model.unload()  # type: ignore[operator]
    return [{"part": part, "bare": bare[part], "with an adapter": adapted[part]} for part in PARTS]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both, print the ratio and return the result."""
    options = parsed(__doc__, argv)
    common.ready(options)
    backbone = common.open_backbone(options)
    task = task_named("qa")
    examples, encoded = encoded_rows(backbone, options)
    rule = GenerationSettings(
        max_new_tokens=options.new_tokens,
        batch_size=options.batch_size,
        pad_id=backbone.pad_id,
        stop_ids=backbone.stop_ids,
    )
    order = sorted(range(len(encoded)), key=lambda i: -encoded[i].prompt_length)
    seconds = {"generation": 0.0, "answers and losses": 0.0}
    answered: dict[int, tuple[str, float]] = {}
    for turn, start in enumerate(range(0, len(order), options.batch_size)):
        chunk = order[start : start + options.batch_size]
        batch = [encoded[i] for i in chunk]
        for name in sorted(seconds, reverse=turn % 2 == 0):
            began = time.perf_counter()
            if name == "generation":
                prompts = [row.input_ids[: row.prompt_length] for row in batch]
                generate_texts(backbone.model, backbone.tokenizer, prompts, rule)
            else:
                found = answer_examples(backbone.model, backbone.tokenizer, batch, rule)
                answered |= dict(zip(chunk, found, strict=True))
            seconds[name] += time.perf_counter() - began
    began = time.perf_counter()
    names = [name for name in METRICS if name != "bertscore_f1"]
    scored = score(
        [
            Row(e.id, task.clean(text), e.references, e.group, loss, encoded[i].label_tokens)
            for i, e in enumerate(examples)
            for text, loss in [answered[i]]
        ],
        names,
        Options(language=options.language),
    )
    seconds["scores"] = time.perf_counter() - began
    whole = seconds["answers and losses"] + seconds["scores"]
    ratio = whole / seconds["generation"]
    rows: list[dict[str, Any]] = [
        {"part": name, "seconds": taken} for name, taken in seconds.items()
    ]
    common.table("one evaluation", ["part", "seconds"], [list(row.values()) for row in rows])
    print(
        f"{len(scored)} scores of {len(examples)} rows: the evaluation takes {ratio:.2f} times"
        " its generation"
    )
    split = by_part(backbone, encoded, rule)
    common.table(
        f"answers and losses of {len(encoded)} rows by part, CPU seconds",
        list(split[0]),
        [list(row.values()) for row in split],
    )
    rows += split
    figures = {"evaluation_ratio": ratio}
    return common.write_result(options.json, figures, rows, options, backbone.device)


if __name__ == "__main__":
    main()
