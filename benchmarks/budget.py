"""What a search's forwards buy: regret of the learned ratio and quality of the verdict, by design.

    OMP_NUM_THREADS=1 python -m benchmarks.budget --json budget.json

No model: the synthetic families of `benchmarks.worlds`. The controller is that of the library.
Curves, rows and the controller's seed are the same for every design, so differences to the first
row are paired by seed.

Regret is the loss at the learned ratio less the least loss of the curve at the end of the run, in
spans; of `shallow`, whose gain is 0.02 nats, in thousandths of a nat. `flat` has no regret.
The first row is the default before this budget was examined, read from the repository's history;
it is left out, and another reference taken, where that is not to be had.

The constants of the default were set on seeds 1000-3249, its number of rows on 6000-6299
and 7000-7299.

JSON: `designs`, by name: forwards, share of a fine-tuning of 50 examples x 10 epochs (a forward
being half of a training example), mean regret over the families in spans with its standard error
over seeds, the paired difference to the reference, and the share called learned by family; `rows`,
the means by design and family.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.worlds import CLEAR_GAIN, FAMILIES, IN_SPANS, NO_GAIN, POOL, SyntheticWorld
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import ControllerConfig

TRAINING = 50 * 10  # examples of a fine-tuning run at the published size
FORMER = "8b5f6c8"  # the last commit with the former default


@dataclass(frozen=True)
class Design:
    """How a search spends its forwards; the default is the library's.

    Attributes:
        rounds: Rounds.
        rows: Rows per round.
        candidates: Ratios tried per round.
        baseline: Measure the model as it is as well.
        reuse: Do not measure it again where a candidate is the ratio in force.
        dealt: Rows probed less come first.
        with_lowest: The lowest ratio is one of the candidates of every round.
        racing: After half of the rows the worst candidate is dropped if it is evidently losing.
    """

    rounds: int = 8
    rows: int = 12
    candidates: int = 3
    baseline: bool = False
    reuse: bool = False
    dealt: bool = True
    with_lowest: bool = False
    racing: bool = False


FORMER_DESIGN = Design(rows=16, baseline=True, dealt=False)
DESIGNS = {
    "16 rows redrawn, baseline": FORMER_DESIGN,
    "16 rows redrawn": Design(rows=16, dealt=False),
    "16 rows": Design(rows=16),
    "default (12 rows)": Design(),
    "10 rows": Design(rows=10),
    "8 rows": Design(rows=8),
    "6 rows": Design(rows=6),
    "4 rows": Design(rows=4),
    "default, redrawn": Design(dealt=False),
    "default, baseline": Design(baseline=True),
    "default, baseline reused": Design(baseline=True, reuse=True),
    "default, racing": Design(racing=True),
    "default, low among the 3": Design(with_lowest=True),
    "default, low and 3": Design(candidates=4, with_lowest=True),
    "4 rounds of 16": Design(rounds=4, rows=16),
    "6 rounds of 12": Design(rounds=6, rows=12),
    "6 rounds of 8": Design(rounds=6, rows=8),
    "10 rounds of 8": Design(rounds=10, rows=8),
    "10 rounds of 6": Design(rounds=10, rows=6),
    "2 candidates, 12 rows": Design(rows=12, candidates=2),
    "4 candidates, 8 rows": Design(rows=8, candidates=4),
}


def _raced(world: SyntheticWorld, tried: Sequence[float], rows: Sequence[int], done: float) -> Any:
    """Return the losses and their number where the worst trial may be dropped half way.

    A dropped trial's other rows are given what the best trial lost there plus its own mean gap.
    """
    half = len(rows) // 2
    losses = [world.losses(ratio, rows, done) for ratio in tried]
    order = sorted(range(len(tried)), key=lambda i: fmean(losses[i][:half]))
    best, worst = order[0], order[-1]
    gaps = [b - a for a, b in zip(losses[best][:half], losses[worst][:half], strict=True)]
    if fmean(gaps) < 2 * stdev(gaps) / math.sqrt(half):
        return losses, len(rows) * len(tried)
    losses[worst][half:] = [loss + fmean(gaps) for loss in losses[best][half:]]
    return losses, len(rows) * len(tried) - (len(rows) - half)


def _proposed(state: Any, config: Any, design: Design, generator: torch.Generator) -> Any:
    if not design.with_lowest:
        return rounds.propose(state, config, generator)
    fewer = _config(design, design.candidates - 1)
    return (config.low, *rounds.propose(state, fewer, generator))


def _config(design: Design, candidates: int) -> ControllerConfig:
    return ControllerConfig(rounds=design.rounds, rows=design.rows, candidates=candidates)


def search(family: str, seed: int, design: Design) -> dict[str, Any]:
    """Return what one simulated search ends with."""
    world = SyntheticWorld(family, seed)
    config = _config(design, design.candidates)
    generator = torch.Generator().manual_seed(seed)
    state = rounds.begin(config, design.rounds)
    groups = [str(row) for row in range(POOL)]
    forwards, in_force = 0, []
    for turn in range(design.rounds):
        done = (turn + 1) / (design.rounds + 1)
        rows = (
            rounds.next_examples(state, groups, config, generator)
            if design.dealt
            else rounds.draw_examples(groups, design.rows, generator)
        )
        tried = _proposed(state, config, design, generator)
        if design.racing:
            losses, spent = _raced(world, tried, rows, done)
        else:
            losses = [world.losses(ratio, rows, done) for ratio in tried]
            spent = len(rows) * len(tried)
        forwards += spent
        baseline = None
        if design.baseline:
            # A mask of ratio 0 is the model as it is; another is cut by fresh importance.
            same = state.mask_ratio == 0.0 and 0.0 in tried
            as_it_is = losses[tried.index(0.0)] if same else None
            baseline = as_it_is or world.losses(state.mask_ratio, rows, done)
            forwards += 0 if same and design.reuse else len(rows)
        state, _ = rounds.conclude(state, config, tried, baseline, losses, rows, turn)
        in_force.append(world.regret(state.mask_ratio))
    choice = rounds.choose_ratio(state, config)
    return {
        "regret": world.regret(choice.ratio),
        "in_force": fmean(in_force),
        "learned": choice.verdict == "learned",
        "forwards": forwards,
    }


def searches(design: Design, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Return the ends of the searches of every family, by seed."""
    return {family: [search(family, seed, design) for seed in seeds] for family in FAMILIES}


def former_searches(seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]] | None:
    """Return the same for the former default, by the code of its time; None without that code."""
    git = ["git", "archive", FORMER, "src/grasp_lora"]
    root = Path(__file__).resolve().parents[1]
    archive = subprocess.run(git, cwd=root, capture_output=True, check=False)
    if archive.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
            packed.extractall(folder, filter="data")
        out = Path(folder) / "former.json"
        command = [sys.executable, "-m", "benchmarks.budget", "--former-to", str(out)]
        command += ["--first-seed", str(seeds[0]), "--seeds", str(len(seeds))]
        path = os.pathsep.join((str(Path(folder) / "src"), str(root)))
        environment = os.environ | {"PYTHONPATH": path}
        subprocess.run(command, cwd=root, env=environment, check=True)
        return json.loads(out.read_text())


def _by_seed(found: Mapping[str, list[dict[str, Any]]], name: str = "regret") -> list[float]:
    """Return each seed's mean over the families in spans."""
    columns = ([end[name] for end in found[family]] for family in IN_SPANS)
    return [fmean(values) for values in zip(*columns, strict=True)]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / math.sqrt(len(values))


def summary(found: Mapping[str, list[dict[str, Any]]], reference: Any) -> dict[str, Any]:
    """Return the figures of a design, differences being paired with the reference's."""
    regrets, references = _by_seed(found), _by_seed(reference)
    mean, error = _mean_and_error(regrets)
    worse, worse_error = _mean_and_error([a - b for a, b in zip(regrets, references, strict=True)])
    thousandths = [
        [1000 * each["regret"] for each in side["shallow"]] for side in (found, reference)
    ]
    flatter, flatter_error = _mean_and_error([a - b for a, b in zip(*thousandths, strict=True)])
    learned = {family: fmean(each["learned"] for each in found[family]) for family in FAMILIES}
    forwards = fmean(each["forwards"] for family in FAMILIES for each in found[family])
    return {
        "forwards": forwards,
        "share_of_fine_tuning": forwards / 2 / TRAINING,
        "regret": mean,
        "regret_error": error,
        "regret_difference": worse,
        "regret_difference_error": worse_error,
        "shallow_thousandths": fmean(thousandths[0]),
        "shallow_difference": flatter,
        "shallow_difference_error": flatter_error,
        "regret_in_force": fmean(_by_seed(found, "in_force")),
        "learned_clear": fmean(learned[family] for family in CLEAR_GAIN),
        "learned_no_gain": max(learned[family] for family in NO_GAIN),
        "learned": learned,
    }


def _family_rows(name: str, found: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "design": name,
            "family": family,
            "regret": fmean(each["regret"] for each in ends),
            "learned": fmean(each["learned"] for each in ends),
        }
        for family, ends in found.items()
    ]


def markdown(designs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the designs as a Markdown table."""
    lines = [
        "| design | forwards | of fine-tuning | regret (spans) | difference | `shallow` (mnat) "
        "| difference | clear gain called learned | worst family without gain |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, d in designs.items():
        lines.append(
            f"| {name} | {d['forwards']:.0f} | {d['share_of_fine_tuning']:.0%} "
            f"| {d['regret']:.4f} ± {d['regret_error']:.4f} "
            f"| {d['regret_difference']:+.4f} ± {d['regret_difference_error']:.4f} "
            f"| {d['shallow_thousandths']:.2f} "
            f"| {d['shallow_difference']:+.2f} ± {d['shallow_difference_error']:.2f} "
            f"| {d['learned_clear']:.1%} | {d['learned_no_gain']:.1%} |"
        )
    return "\n".join(lines)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="few seeds and designs")
    parser.add_argument("--seeds", type=int, default=200, help="searches per family and design")
    parser.add_argument("--first-seed", type=int, default=5000, help="of those searches")
    parser.add_argument("--only", nargs="+", choices=DESIGNS, metavar="DESIGN", help="of the table")
    parser.add_argument("--former-to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Simulate every design, print the table and return the result."""
    options = _parsed(argv)
    torch.set_num_threads(1)
    count = 4 if options.quick else options.seeds
    seeds = range(options.first_seed, options.first_seed + count)
    if options.former_to is not None:
        options.former_to.write_text(json.dumps(searches(FORMER_DESIGN, seeds)))
        return {}
    # Only here: the former core has no part in the tables.
    from benchmarks import common

    former = former_searches(seeds)
    found = {} if former is None else {"former default": former}
    for name in options.only or list(DESIGNS)[: 3 if options.quick else None]:
        found[name] = searches(DESIGNS[name], seeds)
    reference = next(iter(found.values()))
    designs = {name: summary(ends, reference) for name, ends in found.items()}
    print(markdown(designs))
    rows = [row for name, ends in found.items() for row in _family_rows(name, ends)]
    return common.write_result(options.json, {"designs": designs}, rows, options)


if __name__ == "__main__":
    main()
