"""How much faster answers come in batches with the KV cache than one by one without it.

Run from the repository root:

    OMP_NUM_THREADS=2 python benchmarks/generation.py
    OMP_NUM_THREADS=2 python benchmarks/generation.py --data my.jsonl --language de --rows 50

One by one, greedy, with `use_cache=False` is how research code often scores test rows. Both ways
get the same prompts, limit and stop rules; they take turns batch by batch, so that whatever else
the machine does hits both. On a machine that is busy with other work use one thread: several wait
for each other at every small operation, which measures the other work. Texts may differ in
bfloat16, where the rounding of a sum depends on the batch; in float32 they should not.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from grasp_lora.data.builtin import builtin_examples
from grasp_lora.data.files import load_examples
from grasp_lora.hf.backbones import Backbone, ModelSpec, load_backbone
from grasp_lora.hf.generate import StopAtNewline, generate_texts
from grasp_lora.tasks.base import Example, task_named
from grasp_lora.tasks.encoding import Encoded, encode_examples

Prompts = Sequence[Sequence[int]]
Way = Callable[[Prompts], list[str]]


def in_batches(backbone: Backbone, options: argparse.Namespace) -> Way:
    """Return the library's way."""

    def answer(prompts: Prompts) -> list[str]:
        return generate_texts(
            backbone.model,
            backbone.tokenizer,
            prompts,
            max_new_tokens=options.new_tokens,
            batch_size=options.batch_size,
            pad_id=backbone.pad_id,
            stop_ids=backbone.stop_ids,
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
    ways: Sequence[Way], prompts: Prompts, chunk: int, repeat: int
) -> tuple[list[float], list[list[str]]]:
    """Return the seconds and the texts of each way; who goes first changes with every chunk."""
    seconds = [0.0 for _ in ways]
    texts: list[list[str]] = [[] for _ in ways]
    turn = 0
    for _ in range(repeat):
        for start in range(0, len(prompts), chunk):
            turn += 1
            for way in sorted(range(len(ways)), reverse=turn % 2 == 0):
                began = time.perf_counter()
                texts[way] += ways[way](prompts[start : start + chunk])
                seconds[way] += time.perf_counter() - began
    return seconds, texts


def encoded_rows(
    backbone: Backbone, options: argparse.Namespace
) -> tuple[list[Example], list[Encoded]]:
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


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2", help="short name, folder or hub id")
    parser.add_argument("--data", help="file of questions; the built-in ones if left out")
    parser.add_argument("--language", default="en", help="language code of the questions")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and answer")
    parser.add_argument("--repeat", type=int, default=1, help="times the rows are gone through")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    """Measure both ways and print them."""
    options = parsed()
    spec = ModelSpec(options.model, dtype=options.dtype, device=options.device)
    backbone = load_backbone(spec, print)
    prompts = encoded_prompts(backbone, options)
    ways = (in_batches(backbone, options), one_by_one(backbone, options))
    for way in ways:
        way(prompts[:1])  # not measured: the first call of each is slower
    seconds, texts = measured(ways, prompts, options.batch_size, options.repeat)
    names = (f"batches of {options.batch_size}, KV cache", "one by one, no cache")
    tokenizer: Any = backbone.tokenizer
    tokens = sum(len(prompt) for prompt in prompts) / len(prompts)
    print(
        f"{backbone.public_name}, {backbone.dtype} on {backbone.device}, "
        f"{torch.get_num_threads()} threads; {len(prompts)} prompts of {tokens:.0f} tokens on "
        f"average, at most {options.new_tokens} new ones, {options.repeat} times"
    )
    for name, time_taken, found in zip(names, seconds, texts, strict=True):
        written = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in found)
        print(
            f"{name:26} {time_taken:8.1f} s {len(found) / time_taken:8.2f} rows/s "
            f"{written / time_taken:8.1f} tokens/s"
        )
    same = sum(a == b for a, b in zip(*texts, strict=True))
    print(f"{seconds[1] / seconds[0]:.1f} times as fast; {same} of {len(texts[0])} texts identical")


if __name__ == "__main__":
    main()
