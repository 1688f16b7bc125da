"""What a whole evaluation costs beside its generation alone.

    OMP_NUM_THREADS=2 python -m benchmarks.evaluation --json evaluation.json

The evaluation answers the rows, takes the loss of their references, and computes every score but
BERTScore with 1000 resamples behind each interval; generation alone answers the same rows by the
same rule. They take turns batch by batch; scoring comes once, after the last batch.

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
from grasp_lora.tasks.base import task_named


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
        rows = [encoded[i] for i in chunk]
        for name in sorted(seconds, reverse=turn % 2 == 0):
            began = time.perf_counter()
            if name == "generation":
                prompts = [row.input_ids[: row.prompt_length] for row in rows]
                generate_texts(backbone.model, backbone.tokenizer, prompts, rule)
            else:
                found = answer_examples(backbone.model, backbone.tokenizer, rows, rule)
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
    rows = [{"part": name, "seconds": taken} for name, taken in seconds.items()]
    common.table("one evaluation", ["part", "seconds"], [list(row.values()) for row in rows])
    print(
        f"{len(scored)} scores of {len(examples)} rows: the evaluation takes {ratio:.2f} times"
        " its generation"
    )
    figures = {"evaluation_ratio": ratio}
    return common.write_result(options.json, figures, rows, options, backbone.device)


if __name__ == "__main__":
    main()
