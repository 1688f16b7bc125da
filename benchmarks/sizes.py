"""Loss against size: what pruning, lower ranks and shorter numbers of an adapter give, untrained.

    python -m benchmarks.sizes CONFIG --adapter FOLDER --work FOLDER --json FILE [--set KEY=VALUE]

Every way is one for all modules, but for the last ones, which `grasp-lora shrink` chooses under a
budget: a half, a quarter and an eighth of the adapter in bf16. Without `--adapter` it is the
average of the two adapters of CONFIG. Printed are the bytes of the numbers in a safetensors file,
and the loss added to that of the adapter as it is, paired by row, with its standard error over
contexts: on the micro-dev and dev rows that chose, and on test rows, which chose nothing.

A pruned adapter has the bytes of a whole one in any file that something loads. Told beside it is
what it would take with its zeros left out: a bit for each entry, and two bytes for each that is not
zero.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import common
from benchmarks.landscape import config_of, open_pair, pair_parser
from grasp_lora.base.files import jsonable
from grasp_lora.core.budget import DROP, WHOLE, Option, added
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.example_losses import losses_in_states
from grasp_lora.training.live import block_fit, block_importance
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.sizes import (
    Choice,
    Drawn,
    Resizable,
    drawn_for_sizes,
    fitted,
    probed_options,
    resizable,
)

RATIOS = (0.2, 0.4, 0.6, 0.8)
UNIFORM = (
    *(Option(part) for part in (2, 4, 8)),
    *(Option(1, form) for form in ("int8", "int4")),
    *(Option(part, form) for part in (2, 4) for form in ("int8", "int4")),
)
SHARES = (2, 4, 8)
"""A budget is the adapter in bf16 divided by one of these."""
AS_IT_IS = "as it is"


def first_tests(context: Context, count: int) -> Drawn:
    """Return the first test rows."""
    pool = context.rows("target", ["test"])
    own = pool.encoded[:count]
    return Drawn([e.id for e in own], [e.group for e in own], pool.batches(range(len(own))))


def pruned_losses(
    context: Context, sizes: Resizable, rows: Sequence[Drawn], ratios: Sequence[float]
) -> dict[str, list[list[float]]]:
    """Return way -> losses of each set of rows, for each ratio by the configured importance."""
    live, rule = sizes.live, context.config.importance
    norms = context.norms(live, rule)
    masks = live.masks(block_importance(IMPORTANCE[rule], norms), ratios)
    states = [partial(live.trial, one, block_fit(rule, norms)) for one in masks]
    found = [losses_in_states(live.model, states, one.batches, len(one.ids)) for one in rows]
    names = [f"prune {ratio:g}" for ratio in ratios]
    return {name: [own[place] for own in found] for place, name in enumerate(names)}


def measured(
    context: Context, adapter: Path, rows: int, tests: int, ratios: Sequence[float]
) -> dict[str, Any]:
    """Return way -> `bytes`, and for "chose" and "test" the `losses`, `added` and its error."""
    drawn, test = drawn_for_sizes(context, rows), first_tests(context, tests)
    with resizable(context, adapter) as sizes:
        whole = sizes.uniform(WHOLE)
        size = sizes.bytes_of(whole)
        choices: dict[str, Choice | None] = {AS_IT_IS: None, WHOLE.name: whole}
        choices |= {one.name: sizes.uniform(one) for one in (*UNIFORM, DROP)}
        single, about = probed_options(sizes, drawn, lambda count: print(count, flush=True)), {}
        for share in SHARES:
            found = fitted(sizes, single, drawn, size // share)
            excess = found.excess
            name = f"budget 1/{share}"
            choices[name] = found.choice
            about[name] = {
                "by": found.by,
                "options": {part: option.name for part, option in found.choice.items()},
                "beyond_the_sum": None if excess is None else [excess.gain, excess.error],
            }
        both = (drawn, test)
        losses = [sizes.losses(list(choices.values()), one) for one in both]
        found_by = {name: [own[place] for own in losses] for place, name in enumerate(choices)}
        found_by |= pruned_losses(context, sizes, both, ratios)
        taken = {n: size if c is None else sizes.bytes_of(c) for n, c in choices.items()}
        entries = size // 2
    sparse = {f"prune {r:g}": round(2 * entries * (1 - r) + entries / 8) for r in ratios}
    return {
        name: {
            "bytes": taken.get(name, size),
            "sparse_bytes": sparse.get(name),
            "chose": _told(own[0], found_by[AS_IT_IS][0], drawn),
            "test": _told(own[1], found_by[AS_IT_IS][1], test),
            **about.get(name, {}),
        }
        for name, own in found_by.items()
    }


def _told(losses: list[float], base: list[float], rows: Drawn) -> dict[str, Any]:
    gain = added(losses, base, rows.groups)
    return {"losses": losses, "added": gain.gain, "standard_error": gain.error}


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Return a table of bytes and added losses."""
    lines = ["| way | MB | rows that chose | test |", "|---|---:|---:|---:|"]
    for name, one in found.items():
        size = f"{one['bytes'] / 1e6:.3f}"
        if one["sparse_bytes"] is not None:
            size += f" (without zeros {one['sparse_bytes'] / 1e6:.3f})"
        sides = [one[side] for side in ("chose", "test")]
        cells = [f"{side['added']:+.3f} ± {side['standard_error']:.3f}" for side in sides]
        if name == AS_IT_IS:
            cells = [f"{fmean(side['losses']):.3f}" for side in sides]
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return lines


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = pair_parser(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the losses are written")
    parser.add_argument("--adapter", type=Path, help="a finished adapter; default: the average")
    parser.add_argument("--rows", type=int, default=48, help="micro-dev and dev rows that choose")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--tests", type=int, default=100, help="test rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    options = parsed(argv)
    config, adapter = config_of(options), options.adapter
    if adapter is None:
        pair = open_pair(config, options.work)
        context, adapter = pair.context, pair.merged((0.5, 0.5))
    else:
        context = open_context(config, training=False)
    found = measured(context, adapter, options.rows, options.tests, options.ratios)
    about = {"config": options.config.name, "seed": config.seed, "adapter": adapter.name}
    common.write_result(options.json, {"ways": jsonable(found)}, [], about)
    print("\n".join(lines_of(found)))


if __name__ == "__main__":
    main()
