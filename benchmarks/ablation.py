"""What the parts of a controller are worth, without a model: one of them changed at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.ablation --preset paper --json ablation-paper.json
    OMP_NUM_THREADS=1 python -m benchmarks.ablation --preset standard

The variants are those of `grasp-lora ablate`, less what needs a model (moments), on the curves of
`benchmarks.controller`. `candidate-committed` is a fault of the published code besides: a commit
cuts the mask at the best candidate, not at the bounded ratio. `paper` has its published number of
rounds (a round every ten examples of 50 x 10), `standard` its own eight. Curves and seeds are the
same for every variant.

JSON: `variants`, by name: `regret` (mean over the families in spans) with `standard_error` over
seeds and the paired `difference` to the preset with its own; by family `ratio` (mean of the ratio
found), `in_force` (of the ratio that the masks end with) and `high` (share of searches whose masks
end at 0.7 or more); `commits`, `sigma` at the end, `forwards`.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks import common
from benchmarks.controllers import Conclusion, conclude_at_candidate, searched
from benchmarks.worlds import FAMILIES, IN_SPANS, SyntheticWorld
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import ControllerConfig
from grasp_lora.plans.ablate import AS_CONFIGURED, CHANGES

ROUNDS = {"paper": 50, "standard": 8}
HIGH_RATIO = 0.7
SHOWN = ("flat", "rising", "cliff", "quadratic")
NEEDS_A_MODEL = {"clear_moments"}
AT_CANDIDATE = "candidate-committed"
"""Variant that differs by how a round is concluded and not by a setting."""


def variants_of(preset: str) -> dict[str, ControllerConfig]:
    """Return name -> settings of the variants that differ from the preset."""
    base = ControllerConfig(preset=preset, rounds=ROUNDS[preset])  # type: ignore[arg-type]
    found = {AS_CONFIGURED: base}
    for name, variant in CHANGES.items():
        if NEEDS_A_MODEL & set(variant.changes):
            continue
        changed = variant.of(base)
        if changed != base:
            found[name] = changed
    return found


def one_search(
    config: ControllerConfig,
    family: str,
    seed: int,
    conclude: Conclusion = rounds.conclude,
) -> dict[str, Any]:
    """Return what one search ends with."""
    world = SyntheticWorld(family, seed)
    fresh = config.probe_rows != "micro-dev"
    state, forwards, _ = searched(world, config, seed, fresh=fresh, conclude=conclude)
    ratio = rounds.choose_ratio(state, config).ratio
    return {
        "regret": world.regret(ratio),
        "ratio": ratio,
        "in_force": state.mask_ratio,
        "high": float(state.mask_ratio >= HIGH_RATIO),
        "commits": float(sum(record.committed for record in state.records)),
        "sigma": state.sigma,
        "forwards": float(forwards),
    }


def figures_of(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    reference: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, Any]:
    """Return the figures of a variant; both arguments are family -> search of each seed."""
    over_seeds = _regrets(found)
    apart = [one - other for one, other in zip(over_seeds, _regrets(reference), strict=True)]
    every = [search for searches in found.values() for search in searches]
    return {
        "regret": fmean(over_seeds),
        "standard_error": _error(over_seeds),
        "difference": fmean(apart),
        "difference_error": _error(apart),
        **{
            name: {family: fmean(s[name] for s in searches) for family, searches in found.items()}
            for name in ("ratio", "in_force", "high")
        },
        **{name: fmean(s[name] for s in every) for name in ("commits", "sigma", "forwards")},
    }


def _regrets(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[float]:
    counted = [found[family] for family in IN_SPANS]
    return [fmean(search["regret"] for search in seed) for seed in zip(*counted, strict=True)]


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def markdown(variants: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    titles = [
        "variant",
        "forwards",
        "regret (spans)",
        "against the preset",
        "commits",
        "sigma, end",
    ]
    titles += [f"masks end at, {family}" for family in SHOWN]
    titles += ["at 0.7 or more, flat", "rising"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for name, one in variants.items():
        apart = f"{one['difference']:+.4f} ± {one['difference_error']:.4f}"
        cells = [
            name,
            f"{one['forwards']:.0f}",
            f"{one['regret']:.4f}",
            "" if name == AS_CONFIGURED else apart,
            f"{one['commits']:.1f}",
            f"{one['sigma']:.3f}",
            *(f"{one['in_force'][family]:.2f}" for family in SHOWN),
            *(f"{one['high'][family]:.0%}" for family in ("flat", "rising")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--preset", choices=ROUNDS, default="standard")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--seeds", type=int, default=60, help="searches of each kind")
    parser.add_argument("--first-seed", type=int, default=30000, help="of those searches")
    simulated = [name for name, one in CHANGES.items() if not one.settings]  # these need a model
    parser.add_argument("--only", nargs="+", choices=[*simulated, AT_CANDIDATE], metavar="VARIANT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Simulate every variant, print the table and return the result."""
    options = parsed(argv)
    common.versions()
    torch.set_num_threads(1)
    count = 2 if options.quick else options.seeds
    seeds = range(options.first_seed, options.first_seed + count)
    configs = variants_of(options.preset)
    if options.only:
        configs = {n: c for n, c in configs.items() if n in options.only or n == AS_CONFIGURED}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    if not options.only or AT_CANDIDATE in options.only:
        configs[AT_CANDIDATE] = configs[AS_CONFIGURED]
    for name, config in configs.items():
        conclude = conclude_at_candidate if name == AT_CANDIDATE else rounds.conclude
        found[name] = {
            family: [one_search(config, family, seed, conclude) for seed in seeds]
            for family in FAMILIES
        }
    variants = {name: figures_of(one, found[AS_CONFIGURED]) for name, one in found.items()}
    print(markdown(variants))
    settings = {name: dataclasses.asdict(config) for name, config in configs.items()}
    rows = [{"variant": name, "settings": one} for name, one in settings.items()]
    return common.write_result(options.json, {"variants": variants}, rows, options)


if __name__ == "__main__":
    main()
