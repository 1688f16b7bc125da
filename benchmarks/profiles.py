"""The laboratory of profiles: whether a search finds ratios that differ between groups, no model.

    OMP_NUM_THREADS=1 python -m benchmarks.profiles --json docs/results/laboratory/profiles.json

A world has 16 groups: four layers, two modules (the second twice as large) and two adapters. Each
group has a ratio of its own that is best, and the loss is the mean squared distance to these, in
spans of one ratio for all between 0 and 0.8. The families differ in how these ratios lie:

- `even`: the same for all groups;
- `depth`, `module`, `adapter`: 0.3 to 0.6 apart from one end to the other, in either direction;
- `all three`: 0.2 to 0.4 apart in each;
- `interaction`: up in the layers of one adapter and down in those of the other, by 0.3 to 0.6,
  which no profile has, and a tilt of depth half as large;
- `flat`: nothing to be learned, with a tenth of the noise.

Rows are those of `benchmarks.worlds`: half of the variance of what a row sees by itself is a
function of the ratio that all groups share, half one of each group.

Ways, with the same rounds and probes: `one ratio` is the default search; `policy` searches tilts in
the same rounds, and takes them if they gain on rows that they were not chosen on (`untested` always
takes them); `by layer`, `by module-type`, `by adapter` probe groups after the search, and read more
for it; `TPE` is Optuna's, on level and tilts, on 16 fixed rows. `floor` is the best one ratio, and
the best profile. Regret is the loss above that of the best ratio of every group. 51 probes get half
of the seeds, and 150 a fifth. How often `policy` takes tilts where all groups are alike is counted
over more seeds, at 24 probes. The constants of the library were set on seeds below 8000; these
start at 20000.

JSON: `ways`, by name and number of probes: `regret` by family with `mean` (without `flat`) and its
`standard_error` over seeds, `forwards`, and `taken`, the share of searches by family that end with
ratios that differ; `floor`, by name: regret by family; `taken_wrongly`, by family: the share of
`searches` in which `policy` took tilts.
"""

import argparse
import copy
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.worlds import HIGH, MICRO_DEV, POOL, RATIOS, ROUGHNESS, SMOOTH, SPREAD
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.profiles import can_tilt, choose_profile, propose_profiles
from grasp_lora.core.controller.rounds import ControllerConfig, ControllerState
from grasp_lora.core.evidence.crossfit import forward_splits
from grasp_lora.core.evidence.groups import mean_gain
from grasp_lora.core.pruning.group_ratios import combined_ratios, group_trials
from grasp_lora.core.pruning.profile import (
    MOST_TILT,
    Place,
    Profile,
    limited,
    profile_ratios,
    slopes_of,
)

PROBES = {24: 1.0, 51: 0.5, 150: 0.2}
"""Number of probes -> share of the seeds."""
ALIKE = ("even", "flat")
PARTS = {0: 1.0, 1: 2.0}
PLACES = {
    f"{layer}{part}{adapter}": Place(layer, str(part), str(part), adapter)
    for layer in range(4)
    for part in PARTS
    for adapter in range(2)
}
SLOPES = slopes_of(PLACES, {name: int(PARTS[int(p.part)]) for name, p in PLACES.items()})
GROUPS = tuple(PLACES)
WEIGHTS = np.array([SLOPES.sizes[group] for group in GROUPS]) / sum(SLOPES.sizes.values())
POSITIONS = np.array([SLOPES.positions[group] for group in GROUPS])
SCOPES: Mapping[str, Callable[[Place], str]] = {
    "layer": lambda place: str(place.layer),
    "module-type": lambda place: place.kind,
    "adapter": lambda place: str(place.adapter),
}
FAMILIES = ("even", "depth", "module", "adapter", "all three", "interaction", "flat")
ROWS_AFTER = 16
"""Rows on which groups are probed after a search."""
Random = np.random.Generator
Ratios = Mapping[str, float]


def best_ratios(family: str, random: Random) -> np.ndarray:
    """Return the best ratio of every group, within [0, HIGH], [groups]."""
    centre = random.uniform(0.3, 0.5)
    tilts, crossed = np.zeros(3), 0.0
    apart = random.uniform(0.3, 0.6) * random.choice((-1, 1))
    if family in ("depth", "module", "adapter"):
        tilts[("depth", "module", "adapter").index(family)] = apart
    if family == "all three":
        tilts = random.uniform(0.2, 0.4, 3) * random.choice((-1, 1), 3)
    if family == "interaction":
        tilts[0], crossed = apart / 2, 2 * apart
    wanted = centre + POSITIONS @ tilts + crossed * POSITIONS[:, 0] * POSITIONS[:, 2]
    return np.clip(wanted, 0.0, HIGH)


class ProfileWorld:
    """Groups with best ratios of their own, and the rows that see them, each in its own way."""

    def __init__(self, family: str, seed: int):
        self._random = np.random.default_rng((seed, FAMILIES.index(family), 5))
        self.best = best_ratios(family, self._random)
        scale = 0.1 if family == "flat" else 1.0
        levels = [float(WEIGHTS @ (ratio - self.best) ** 2) for ratio in RATIOS]
        self._height = 0.0 if family == "flat" else 1 / (max(levels) - min(levels))
        shape = (POOL, len(GROUPS), len(RATIOS))
        alone = self._random.standard_normal(shape) / np.sqrt((WEIGHTS**2).sum())
        shared = self._random.standard_normal((POOL, 1, len(RATIOS)))
        own = np.sqrt(0.5) * (alone + shared) @ SMOOTH.T
        self._own = scale * SPREAD * own * WEIGHTS[:, None]
        self._hardness = self._random.standard_normal(POOL)
        self._roughness = ROUGHNESS * scale

    def losses(self, ratios: Ratios, rows: Sequence[int]) -> list[float]:
        """Return the loss of each row under the ratios of the groups."""
        own = np.array([ratios[group] for group in GROUPS])
        places = own / HIGH * (len(RATIOS) - 1)
        below = np.minimum(places.astype(int), len(RATIOS) - 2)
        share, chosen, each = places - below, list(rows), np.arange(len(GROUPS))
        values = self._own[chosen]
        seen = (1 - share) * values[:, each, below] + share * values[:, each, below + 1]
        rough = self._roughness * self._random.standard_normal(len(chosen))
        return (2.0 + self._hardness[chosen] + self.loss(own) + seen.sum(1) + rough).tolist()

    def loss(self, ratios: np.ndarray) -> float:
        """Return how much worse the ratios [groups] are than the best, in spans."""
        return self._height * float(WEIGHTS @ (ratios - self.best) ** 2)

    def regret(self, ratios: Ratios) -> float:
        """Return how much worse the ratios are than the best, in spans."""
        return self.loss(np.array([ratios[group] for group in GROUPS]))


@dataclass(frozen=True)
class Found:
    """What a search ends with: ratios of the groups, whether they differ, and the rows it read."""

    ratios: Ratios
    differ: bool
    forwards: int


@dataclass(frozen=True)
class Search:
    """Where a search of the library ends, its settings, the world after it, and the rows read."""

    state: ControllerState
    config: ControllerConfig
    world: ProfileWorld
    forwards: int


@functools.cache
def searched(family: str, seed: int, probes: int, tilts: int) -> Search:
    """Return a search of the library, which several ways go on from."""
    world = ProfileWorld(family, seed)
    config = ControllerConfig(rounds=probes // 3)
    assert config.rounds is not None, "a world has rounds and no steps"
    generator = torch.Generator().manual_seed(seed)
    groups = [str(row) for row in range(POOL)]
    assert can_tilt(config, config.rounds, groups)
    state, forwards = rounds.begin(config, config.rounds, tilts), 0
    for turn in range(config.rounds):
        rows = rounds.next_examples(state, groups, config, generator)
        tried = propose_profiles(state, config, generator, groups)
        losses = [world.losses(ratios_of(profile), rows) for profile in tried]
        forwards += len(rows) * len(tried)
        levels = [profile.level for profile in tried]
        tilted = [profile.tilts for profile in tried] if tilts else ()
        state, _ = rounds.conclude(state, config, levels, None, losses, rows, turn, tilted)
    return Search(state, config, world, forwards)


def ratios_of(profile: Profile) -> Ratios:
    """Return the ratios of the groups under a profile."""
    return profile_ratios(profile, SLOPES, 0.0, HIGH)


def one_ratio(family: str, seed: int, probes: int) -> Found:
    """Search one ratio for all groups."""
    done = searched(family, seed, probes, 0)
    ratio = rounds.choose_ratio(done.state, done.config).ratio
    return Found(ratios_of(Profile(ratio)), False, done.forwards)


def policy(family: str, seed: int, probes: int, *, tested: bool = True) -> Found:
    """Search tilts in the rounds of the ratio."""
    done = searched(family, seed, probes, len(SLOPES.names))
    found = choose_profile(done.state, done.config, list(range(POOL)))
    assert found is not None, "the rounds of a world have losses"
    if found.shown or not tested:
        return Found(ratios_of(found.chosen), found.chosen.tilted, done.forwards)
    ratio = rounds.choose_ratio(done.state, done.config).ratio
    return Found(ratios_of(Profile(ratio)), False, done.forwards)


def after_search(family: str, seed: int, probes: int, *, scope: str) -> Found:
    """Search one ratio and probe the groups of a scope after it, as the library does."""
    done = searched(family, seed, probes, 0)
    world, forwards = copy.deepcopy(done.world), done.forwards
    ratio = rounds.choose_ratio(done.state, done.config).ratio
    alike = Found(ratios_of(Profile(ratio)), False, forwards)
    if not 0.0 < ratio < 1.0:
        return alike
    group_of = {name: SCOPES[scope](place) for name, place in PLACES.items()}
    sizes: dict[str, int] = {}
    for name, group in group_of.items():
        sizes[group] = sizes.get(group, 0) + SLOPES.sizes[name]
    generator = torch.Generator().manual_seed(seed)
    drawn = rounds.draw_examples([str(row) for row in range(POOL)], ROWS_AFTER, generator)

    def measured(ratios: Ratios) -> list[float]:
        each = {name: min(HIGH, ratios[group]) for name, group in group_of.items()}
        return world.losses(each, drawn)

    base = measured(dict.fromkeys(sizes, ratio))
    tried = {trial: measured(ratios) for trial, ratios in group_trials(ratio, sizes).items()}
    gains: list[float] = []
    for chosen_on, tested_on in forward_splits(range(len(drawn)), 2):
        values = measured(combined_ratios(ratio, tried, base, chosen_on, sizes))
        gains += [base[row] - values[row] for row in tested_on]
    forwards += len(drawn) * (len(tried) + 3)
    gain = mean_gain(gains)
    if gain is None or not gain.shown:
        return Found(alike.ratios, False, forwards)
    chosen = combined_ratios(ratio, tried, base, range(len(drawn)), sizes)
    ratios = {name: min(HIGH, chosen[group]) for name, group in group_of.items()}
    return Found(ratios, True, forwards)


def tpe(family: str, seed: int, probes: int) -> Found:
    """Let Optuna's TPE minimise the mean loss of the same rows over level and tilts."""
    import optuna  # noqa: PLC0415 (optional)

    world = ProfileWorld(family, seed)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))

    def profile(values: Mapping[str, float]) -> Profile:
        level, *tilts = (values[name] for name in ("level", *SLOPES.names))
        return Profile(level, limited(level, tilts, 0.0, HIGH))

    for _ in range(probes):
        trial = study.ask()
        drawn = {"level": trial.suggest_float("level", 0.0, HIGH)}
        for name in SLOPES.names:
            drawn[name] = trial.suggest_float(name, -MOST_TILT, MOST_TILT)
        losses = world.losses(ratios_of(profile(drawn)), range(MICRO_DEV))
        study.tell(trial, fmean(losses))
    return Found(ratios_of(profile(study.best_params)), True, probes * MICRO_DEV)


def _with(search: Callable[..., Found], **settings: Any) -> Callable[..., Found]:
    return lambda family, seed, probes: search(family, seed, probes, **settings)


WAYS: Mapping[str, Callable[..., Found]] = {
    "one ratio": one_ratio,
    "policy": policy,
    "policy, untested": _with(policy, tested=False),
    **{f"by {scope}": _with(after_search, scope=scope) for scope in SCOPES},
    "TPE": tpe,
}
"""Name -> (family, seed, probes) -> what it found."""


def floors(family: str, seeds: Sequence[int]) -> tuple[float, float]:
    """Return the mean regret of the best one ratio, and of the best profile on a fine grid."""
    levels = np.linspace(0.0, HIGH, 81)
    tilts = np.stack(np.meshgrid(*[np.linspace(-MOST_TILT, MOST_TILT, 13)] * 3), -1).reshape(-1, 3)
    one, profile = [], []
    for seed in seeds:
        world = ProfileWorld(family, seed)
        one.append(min(world.loss(np.full(len(GROUPS), level)) for level in levels))
        # Within the bounds a profile is level and tilts about their weighted mean.
        shifts = tilts @ (POSITIONS - WEIGHTS @ POSITIONS).T
        near = np.clip(levels[::4, None, None] + shifts, 0.0, HIGH)
        profile.append(float((((near - world.best) ** 2) @ WEIGHTS).min()) * world._height)
    return fmean(one), fmean(profile)


def taken_wrongly(seeds: Sequence[int]) -> dict[str, Any]:
    """Return how often tilts are taken where all groups are alike, at 24 probes."""
    shares = {family: fmean(policy(family, seed, 24).differ for seed in seeds) for family in ALIKE}
    return {"searches": len(seeds), **shares}


def figures_of(way: str, probes: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the figures of a way at a number of probes."""
    regrets: dict[str, list[float]] = {}
    taken: dict[str, float] = {}
    forwards: list[int] = []
    for family in FAMILIES:
        found = [(ProfileWorld(family, s), WAYS[way](family, s, probes)) for s in seeds]
        regrets[family] = [world.regret(one.ratios) for world, one in found]
        taken[family] = fmean(one.differ for _, one in found)
        forwards += [one.forwards for _, one in found]
    judged = [family for family in FAMILIES if family != "flat"]
    by_seed = [fmean(own) for own in zip(*(regrets[family] for family in judged), strict=True)]
    regret = {family: fmean(regrets[family]) for family in judged} | {"mean": fmean(by_seed)}
    error = stdev(by_seed) / len(by_seed) ** 0.5
    return {
        "regret": regret,
        "standard_error": error,
        "taken": taken,
        "forwards": fmean(forwards),
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """Return the figures as Markdown tables."""
    judged = [family for family in FAMILIES if family != "flat"]
    parts: list[str] = []
    for probes in figures["probes"]:
        parts += [
            f"\n{probes} probes\n",
            f"| way | forwards | {' | '.join(judged)} | mean |",
            f"|---|---:|{'---:|' * (len(judged) + 1)}",
        ]
        for name, one in figures["ways"].items():
            found = one[str(probes)]
            cells = [f"{found['regret'][family]:.3f}" for family in judged]
            mean = f"{found['regret']['mean']:.3f} ± {found['standard_error']:.3f}"
            parts.append(f"| {name} | {found['forwards']:.0f} | {' | '.join(cells)} | {mean} |")
        for name, own in figures["floor"].items():
            cells = [f"{own[family]:.3f}" for family in judged]
            mean = f"{fmean(own[family] for family in judged):.3f}"
            parts.append(f"| floor, {name} |  | {' | '.join(cells)} | {mean} |")
    parts += [
        "\nSearches that end with ratios that differ\n",
        f"| way | probes | {' | '.join(FAMILIES)} |",
        f"|---|---:|{'---:|' * len(FAMILIES)}",
    ]
    for name, one in figures["ways"].items():
        if name in ("one ratio", "TPE", "policy, untested"):
            continue
        for probes in figures["probes"]:
            taken = one[str(probes)]["taken"]
            cells = [f"{taken[family]:.0%}" for family in FAMILIES]
            parts.append(f"| {name} | {probes} | {' | '.join(cells)} |")
    wrong = figures["taken_wrongly"]
    told = ", ".join(f"{family} {wrong[family]:.1%}" for family in ALIKE)
    parts.append(f"\n`policy` takes tilts in {wrong['searches']} searches each: {told}")
    return "\n".join(parts)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="few seeds, 24 probes")
    parser.add_argument("--seeds", type=int, default=20, help="searches of each kind")
    parser.add_argument("--alike", type=int, default=100, help="searches where groups are alike")
    parser.add_argument("--first-seed", type=int, default=20000, help="of those searches")
    parser.add_argument("--probes", type=int, nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help="of the ways")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Simulate every way, print the tables and return the result."""
    options = parsed(argv)
    common.versions()
    torch.set_num_threads(1)
    count, probes = (2, [24]) if options.quick else (options.seeds, options.probes)
    seeds = range(options.first_seed, options.first_seed + count)
    ways: dict[str, Any] = {}
    for name in options.only or WAYS:
        if name == "TPE" and importlib.util.find_spec("optuna") is None:
            print("left out: TPE, which needs optuna: pip install optuna")
            continue
        began = time.perf_counter()
        ways[name] = {
            str(n): figures_of(name, n, seeds[: max(2, round(count * PROBES[n]))]) for n in probes
        }
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    lowest = {family: floors(family, seeds) for family in FAMILIES}
    floor = {n: {f: own[i] for f, own in lowest.items()} for i, n in enumerate(("one", "profile"))}
    alike = count if options.quick else options.alike
    figures = {
        "probes": list(probes),
        "ways": ways,
        "floor": floor,
        "taken_wrongly": taken_wrongly(range(options.first_seed, options.first_seed + alike)),
    }
    print(markdown(figures))
    rows = [
        {"way": name, "probes": n, "family": family, "regret": regret}
        for name, one in ways.items()
        for n, found in one.items()
        for family, regret in found["regret"].items()
    ]
    return common.write_result(options.json, figures, rows, options)


if __name__ == "__main__":
    main()
