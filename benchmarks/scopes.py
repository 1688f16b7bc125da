"""What a ratio for each group, whole components, and importance are worth, by probes of a merge.

    python -m benchmarks.scopes CONFIG --work FOLDER --json FILE --set adapters.source=FOLDER ...

The average of the two adapters of CONFIG is pruned, untrained, at a few overall ratios: with one
ratio for all, with one for each group of every `scope` that is probed after a search (chosen on 16
of the micro-dev and dev rows, as a search would), with whole components (`structure: rank`), and
with entries drawn at random.
Printed are the losses of the rows that chose nothing, and their differences to one ratio for all by
importance, paired by row.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import common
from benchmarks.landscape import SPLITS, config_of, open_pair, pair_parser
from grasp_lora.core.evidence.groups import standard_error
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.example_losses import example_losses
from grasp_lora.stages.prune import random_score
from grasp_lora.stages.spread import spread_ratio
from grasp_lora.training.groups import SCOPES, ratio_by_group
from grasp_lora.training.live import BlockImportance, BlockRatio, LiveAdapter, block_importance
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.merged_folder import read_start

RATIOS = (0.2, 0.4, 0.6)
ONE = "one ratio"


def losses_of(
    context: Context, live: LiveAdapter, score: BlockImportance, ratio: float | BlockRatio
) -> list[float]:
    """Return the loss of every micro-dev and dev row under a mask."""
    rows = context.rows("target", SPLITS)
    (masks,) = live.masks(score, [ratio])
    with live.trial(masks):
        return example_losses(live.model, rows.batches(range(len(rows.encoded))), len(rows.encoded))


def measured(context: Context, start: Path, ratio: float) -> dict[str, Any]:
    """Return way to prune -> `losses` of the rows it was not chosen on, `ratios` of its groups."""
    config, found = context.config, {}
    ids = [e.id for e in context.rows("target", SPLITS).encoded]
    merged, rule = read_start(start, context.backbone), IMPORTANCE[config.importance]
    drawn: set[str] = set()
    with context.live(merged, config.mask_unit) as live:
        live.model.eval()
        norms = context.norms(live, config.importance)
        score = block_importance(rule, norms)
        found[ONE] = {"losses": losses_of(context, live, score, ratio)}
        found["drawn at random"] = {
            "losses": losses_of(context, live, random_score(config.seed), ratio)
        }
        for scope in SCOPES:
            if scope in ("global", "policy"):
                continue
            asked = replace(context, config=config.model_copy(update={"scope": scope}))
            evidence = spread_ratio(asked, live, norms, ratio, SPLITS)["evidence"]
            chosen = evidence["chosen"]
            drawn |= set(evidence["rows"])
            losses = losses_of(context, live, score, ratio_by_group(scope, chosen))
            found[f"by {scope}"] = {"losses": losses, "ratios": chosen, "shown": evidence["shown"]}
    whole = replace(context, config=config.model_copy(update={"structure": "rank"}))
    with whole.live(merged, config.mask_unit) as live:
        live.model.eval()
        score = block_importance(rule, whole.norms(live, config.importance))
        found["whole components"] = {"losses": losses_of(whole, live, score, ratio)}
    for one in found.values():
        one["losses"] = [loss for i, loss in zip(ids, one["losses"], strict=True) if i not in drawn]
    return found


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return a table of differences to one ratio for all."""
    ratios = list(found)
    lines = [f"| pruned | {' | '.join(ratios)} |", f"|---|{'---:|' * len(ratios)}"]
    for name in found[ratios[0]]:
        cells: list[str] = []
        for ratio in ratios:
            base, own = found[ratio][ONE]["losses"], found[ratio][name]["losses"]
            gaps = [a - b for a, b in zip(own, base, strict=True)]
            apart = f"{fmean(gaps):+.3f} ± {standard_error(gaps):.3f}"
            cells.append(f"{fmean(own):.3f}" if name == ONE else apart)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = pair_parser(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the losses are written")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    options = parsed(argv)
    pair = open_pair(config_of(options), options.work)
    start = pair.merged((0.5, 0.5))
    found = {str(ratio): measured(pair.context, start, ratio) for ratio in options.ratios}
    about = {"config": options.config.name, "seed": pair.config.seed}
    common.write_result(options.json, {"ratios": found}, [], about)
    print("\n".join(lines_of(found)))


if __name__ == "__main__":
    main()
