"""How much faster answers come in batches with the KV cache than one by one without it.

    OMP_NUM_THREADS=2 python -m benchmarks.generate --json generate.json
    OMP_NUM_THREADS=2 python -m benchmarks.generate --data my.jsonl --language de --rows 50

One by one, greedy, with `use_cache=False` is how research code often scores test rows. Both ways
get the same prompts, limit and stop rules; they take turns batch by batch, so that whatever else
the machine does hits both. On a machine that is busy with other work use one thread: several wait
for each other at every small operation, which measures the other work. Texts may differ in
bfloat16, where the rounding of a sum depends on the batch; in float32 they should not.

JSON: `generate_speedup`, tokens per second of the first way over those of the second; the time of
a way is the sum over batches of the median over `--repeat` passes.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from benchmarks import common
from grasp_lora.data.builtin import builtin_examples
from grasp_lora.data.files import load_examples
from grasp_lora.generation.generate import GenerationSettings, StopAtNewline, generate_texts
from grasp_lora.models.backbones import Backbone
from grasp_lora.tasks.base import Example, task_named
from grasp_lora.tasks.encoding import EncodedExample, encode_examples

Prompts = Sequence[Sequence[int]]
Way = Callable[[Prompts], list[str]]

OURS, THEIRS = "batches, KV cache", "one by one, no cache"


def in_batches(backbone: Backbone, options: argparse.Namespace) -> Way:
    """Return the library's way."""

    def answer(prompts: Prompts) -> list[str]:
        return generate_texts(
            backbone.model,
            backbone.tokenizer,
            prompts,
            GenerationSettings(
                max_new_tokens=options.new_tokens,
                batch_size=options.batch_size,
                pad_id=backbone.pad_id,
                stop_ids=backbone.stop_ids,
            ),
        )

    return answer


def one_by_one(backbone: Backbone, options: argparse.Namespace) -> Way:
    """Return the way to compare with: batches of one, the whole text read again for each token."""
    model: Any = backbone.model
    tokenizer: Any = backbone.tokenizer
    settings = GenerationConfig(
        max_new_tokens=options.new_tokens,
        do_sample=False,
        use_cache=False,
        pad_token_id=backbone.pad_id,
        eos_token_id=list(backbone.stop_ids),
    )

    @torch.no_grad()
    def answer(prompts: Prompts) -> list[str]:
        texts: list[str] = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=backbone.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([StopAtNewline(tokenizer, ids.shape[1])]),
            )
            texts += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    return answer


def measured(
    ways: Mapping[str, Way], prompts: Prompts, chunk: int, repeat: int, tokenizer: Any
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return a row per way, pass and batch, and the texts of each way.

    Who goes first changes with every batch.
    """
    rows: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {name: [] for name in ways}
    turn = 0
    for number in range(repeat):
        for start in range(0, len(prompts), chunk):
            turn += 1
            for name in list(ways) if turn % 2 else reversed(ways):
                began = time.perf_counter()
                found = ways[name](prompts[start : start + chunk])
                common.synchronised()
                seconds = time.perf_counter() - began
                written = sum(
                    len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in found
                )
                rows.append(
                    {"way": name, "pass": number, "batch": start // chunk}
                    | {"rows": len(found), "seconds": seconds, "tokens": written}
                )
                if number == 0:
                    texts[name] += found
    return rows, texts


def totals(rows: Sequence[Mapping[str, Any]], way: str) -> tuple[float, float]:
    """Return (seconds, tokens written) of one pass: the batches' medians, summed."""
    own = [row for row in rows if row["way"] == way]
    seconds = tokens = 0.0
    for batch in {row["batch"] for row in own}:
        seconds += common.median([row["seconds"] for row in own if row["batch"] == batch])
        tokens += common.median([row["tokens"] for row in own if row["batch"] == batch])
    return seconds, tokens


def encoded_rows(
    backbone: Backbone, options: argparse.Namespace
) -> tuple[list[Example], list[EncodedExample]]:
    """Return the questions, and each as token ids with room for its answer."""
    task = task_named("qa")
    if options.data is None:
        examples = builtin_examples(options.language, options.rows)
    else:
        examples = load_examples(options.data, task, options.language)[0][: options.rows]
    rows, _ = encode_examples(
        examples,
        task,
        backbone.tokenizer,
        options.max_length,
        for_training=False,
        new_tokens=options.new_tokens,
    )
    return examples, rows


def encoded_prompts(backbone: Backbone, options: argparse.Namespace) -> list[tuple[int, ...]]:
    """Return the prompts as token ids, the longest first, as `generate_texts` orders them."""
    _, rows = encoded_rows(backbone, options)
    return sorted((row.input_ids[: row.prompt_length] for row in rows), key=len, reverse=True)


def parsed(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(doc)
    parser.add_argument("--data", help="file of questions; the built-in ones if left out")
    parser.add_argument("--language", default="en", help="language code of the questions")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and answer")
    parser.add_argument("--repeat", type=int, default=3, help="times the rows are gone through")
    options = parser.parse_args(argv)
    if options.quick:
        options.rows, options.new_tokens, options.batch_size, options.repeat = 4, 4, 4, 1
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both ways, print them and return the result."""
    options = parsed(__doc__, argv)
    common.ready(options)
    backbone = common.open_backbone(options)
    tokenizer: Any = backbone.tokenizer
    prompts = encoded_prompts(backbone, options)
    ways = {OURS: in_batches(backbone, options), THEIRS: one_by_one(backbone, options)}
    for way in ways.values():
        way(prompts[:1])  # not measured: the first call of each is slower
    rows, texts = measured(ways, prompts, options.batch_size, options.repeat, tokenizer)
    seconds = {name: totals(rows, name)[0] for name in ways}
    # A text that stops at once has no token: the rate then still is that of one token a row.
    rates = {name: max(totals(rows, name)[1], len(prompts)) / seconds[name] for name in ways}
    length = sum(map(len, prompts)) / len(prompts)
    common.table(
        f"{backbone.public_name}, {backbone.dtype} on {backbone.device}, {len(prompts)} prompts of"
        f" {length:.0f} tokens, at most {options.new_tokens} new ones, {options.repeat} passes",
        ["way", "seconds a pass", "rows/s", "tokens/s"],
        [[name, seconds[name], len(prompts) / seconds[name], rates[name]] for name in ways],
    )
    same = sum(a == b for a, b in zip(texts[OURS], texts[THEIRS], strict=True))
    speedup = rates[OURS] / rates[THEIRS]
    print(f"{speedup:.1f} times as fast; {same} of {len(prompts)} texts identical")
    figures = {
        "generate_speedup": speedup,
        "tokens_per_second": rates,
        "identical_texts": same,
        "prompts": len(prompts),
        "prompt_tokens_mean": length,
    }
    return common.write_result(options.json, figures, rows, options, backbone.device)


if __name__ == "__main__":
    main()
