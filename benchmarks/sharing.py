"""What it saves to read the text that several questions share once.

    OMP_NUM_THREADS=2 python -m benchmarks.sharing --data qa.jsonl --language es --json sharing.json

Losses of `--rows` questions, as after every epoch of a fine-tuning: with the common beginning of
rows read once for all of them, and with every row read whole. Both ways get the same rows and take
turns; each is cut into forwards as is best for it.

JSON: `sharing_speedup`, the time of reading rows whole over that of reading beginnings once;
`largest_difference` of a row's loss, in nats.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import common
from grasp_lora.models.example_losses import (
    SHARED_PREFIX,
    Batch,
    EncodedExamples,
    can_share_prefix,
    example_losses,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both, print the ratio and return the result."""
    made = common.parser(__doc__)
    made.add_argument("--data", help="file of questions; the embedded ones if left out")
    made.add_argument("--language", default="en", help="of the questions")
    made.add_argument("--rows", type=int, default=50)
    made.add_argument("--length", type=int, default=320, help="most tokens of a row")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--repeat", type=int, default=3)
    options = made.parse_args(argv)
    if options.quick:
        options.rows, options.length, options.repeat = 8, 200, 1
    common.ready(options)
    backbone = common.open_backbone(options)
    encoded = common.question_rows(
        backbone, options.rows, options.length, options.data, options.language
    )
    if not can_share_prefix(backbone.model, max(len(row.input_ids) for row in encoded)):
        raise SystemExit(f"{options.model} cannot go on from a common beginning")
    whole = EncodedExamples(encoded, common.collator(backbone), options.batch_size)
    count = len(encoded)
    batches = {
        "rows read whole": whole.batches(range(count)),
        "beginnings read once": replace(whole, share_prefix=True).batches(range(count)),
    }
    backbone.model.eval()
    losses: dict[str, list[float]] = {}

    def reading(name: str) -> None:
        losses[name] = example_losses(backbone.model, batches[name], count)

    ways = {name: lambda name=name: reading(name) for name in batches}
    seconds = common.in_turns(ways, options.repeat)
    rows = [
        {
            "way": name,
            "seconds": taken,
            "forwards": sum(1 + (SHARED_PREFIX in batch) for _, batch in batches[name]),
            "tokens": sum(_tokens(batch) for _, batch in batches[name]),
        }
        for name, taken in seconds.items()
    ]
    speedup = common.median(rows[0]["seconds"]) / common.median(rows[1]["seconds"])
    pairs = zip(*losses.values(), strict=True)
    figures = {
        "sharing_speedup": speedup,
        "largest_difference": max(abs(one - other) for one, other in pairs),
    }
    shown = [[r["way"], common.median(r["seconds"]), r["forwards"], r["tokens"]] for r in rows]
    common.table(f"losses of {count} rows", ["way", "seconds", "forwards", "tokens"], shown)
    print(f"{speedup:.2f} times as fast; largest difference {figures['largest_difference']:.2g}")
    return common.write_result(options.json, figures, rows, options, backbone.device)


def _tokens(batch: Batch) -> int:
    shared = batch[SHARED_PREFIX].numel() if SHARED_PREFIX in batch else 0
    return shared + batch["input_ids"].numel()


if __name__ == "__main__":
    main()
