"""Which reward tells ratios apart on few rows? The same trials, judged by loss and by answers.

    python -m benchmarks.rewards CONFIG --adapter runs/en-es/merged --json rewards.json

Every micro-dev and dev row is read and answered under nine ratios of the adapter as it is. Then,
many times over, a round's worth of rows is drawn: how often do two ratios tie on them, how often
are two in the order that the other rows put them in, and what does the ratio that is best on them
lose on the other rows? `--from FILE` prints the table of a recorded file again.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from grasp_lora.base.files import read_jsonl, write_jsonl
from grasp_lora.config.run_config import load_config
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.metrics import Row, score
from grasp_lora.models.example_losses import example_losses
from grasp_lora.scoring.sets import metric_options
from grasp_lora.training.live import block_importance
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.merged_folder import read_start
from grasp_lora.workbench.objective import answers_of

RATIOS = tuple(round(0.1 * n, 1) for n in range(9))
SPLITS = ("micro_dev", "dev")
METRICS = ("exact_match", "token_f1", "chrf", "rougeL")
DRAWS = 2000


def record(config_file: Path, adapter: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Return each row's loss and scores at every ratio, [ratios][rows]."""
    config = load_config(config_file, changes)
    context = open_context(config)
    rows = context.rows("target", SPLITS)
    count = len(rows.encoded)
    examples = [e for split in SPLITS for e in context.examples("target", split)]
    batches, answered = rows.batches(range(count)), answers_of(context, SPLITS)
    options = replace(metric_options(config, config.data.target.language), resamples=0)
    found: dict[str, list[list[float]]] = {name: [] for name in ("loss", *METRICS)}
    with context.live(read_start(adapter, context.backbone), config.mask_unit) as live:
        rule = block_importance(
            IMPORTANCE[config.importance], context.norms(live, config.importance)
        )
        for ratio, masks in zip(RATIOS, live.masks(rule, RATIOS), strict=True):
            with live.trial(masks):
                losses = example_losses(live.model, batches, count)
                texts = answered(live.model, range(count))
            pairs = zip(examples, texts, strict=True)
            table = [Row(e.id, text, e.references) for e, text in pairs]
            values = score(table, METRICS, options)
            found["loss"].append([round(loss, 4) for loss in losses])
            for name in METRICS:
                found[name].append([round(one, 2) for one in values[name].per_row])
            print(f"ratio {ratio:g}: loss {np.mean(losses):.3f}", flush=True)
    return {"ratios": RATIOS, "rows": [e.id for e in examples], "values": found}


def judged(
    values: Mapping[str, Sequence[Sequence[float]]], drawn_rows: int, draws: int = DRAWS
) -> dict[str, dict[str, float]]:
    """Return reward -> how it does on `drawn_rows` rows, judged by the others.

    `tied`: share of pairs of ratios with equal means. `right`: share of pairs in the order that the
    other rows give by the same reward, a tie on either side counting one half. `lost_loss` and
    `lost_f1`: what the ratio chosen is worse by, on the other rows, than the best of them there.
    """
    tables = {name: np.array(rows) for name, rows in values.items()}
    benefits = {name: -t if name == "loss" else t for name, t in tables.items()}
    rows = tables["loss"].shape[1]
    generator = np.random.default_rng(0)
    upper = np.triu_indices(tables["loss"].shape[0], 1)
    found: dict[str, list[list[float]]] = {name: [] for name in tables}
    for _ in range(draws):
        order = generator.permutation(rows)
        drawn, others = order[:drawn_rows], order[drawn_rows:]
        for name, table in benefits.items():
            here, there = (table[:, part].mean(1).round(9) for part in (drawn, others))
            signs, truth = (np.sign(m[:, None] - m[None])[upper] for m in (here, there))
            # Equal means are broken at random, not towards the lowest ratio.
            best = int(generator.choice(np.flatnonzero(here == here.max())))
            losses = tables["loss"][:, others].mean(1)
            f1 = tables["token_f1"][:, others].mean(1)
            found[name].append(
                [
                    float((signs == 0).mean()),
                    float(((1 + signs * truth) / 2).mean()),
                    float(losses[best] - losses.min()),
                    float(f1.max() - f1[best]),
                ]
            )
    columns = ("tied", "right", "lost_loss", "lost_f1")
    return {
        name: dict(zip(columns, np.mean(lines, axis=0).tolist(), strict=True))
        for name, lines in found.items()
    }


def tables(found: Mapping[str, Any], drawn_rows: int) -> Iterator[str]:
    """Yield the mean of every reward by ratio, then how they tell ratios apart."""
    yield f"| reward | {' | '.join(f'{r:g}' for r in found['ratios'])} |"
    yield f"|---|{'---:|' * len(found['ratios'])}"
    for name, values in found["values"].items():
        form = ".3f" if name == "loss" else ".1f"
        yield f"| {name} | {' | '.join(f'{np.mean(row):{form}}' for row in values)} |"
    yield ""
    yield f"| reward, {drawn_rows} rows | tied | in the right order | loss lost | F1 lost |"
    yield "|---|---:|---:|---:|---:|"
    for name, one in judged(found["values"], drawn_rows).items():
        yield (
            f"| {name} | {one['tied']:.0%} | {one['right']:.0%} | {one['lost_loss']:.3f} "
            f"| {one['lost_f1']:.1f} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Record, or read what was recorded, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("config", type=Path, nargs="?", help="configuration of a run")
    parser.add_argument("--adapter", type=Path, help="adapter folder, such as a merge")
    parser.add_argument("--rows", type=int, default=12, help="of a round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--from", dest="recorded", type=Path, metavar="FILE")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(argv)
    if options.recorded is not None:
        found = read_jsonl(options.recorded)[0]
    elif options.config is None or options.adapter is None:
        parser.error("give a configuration and --adapter, or --from a recorded file")
    else:
        found = record(options.config, options.adapter, options.changes)
        found |= {"machine": common.machine(), "versions": common.versions()}
        if options.json is not None:
            write_jsonl(options.json, [found])
    print("\n".join(tables(found, options.rows)))


if __name__ == "__main__":
    main()
