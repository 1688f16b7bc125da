"""Ways to search for a ratio in a world without a model, each at a given number of probes.

A probe is the loss of one ratio on the rows of a round. A way is a row of `CONTROLLERS`; it gets
(world, probes, seed) and returns what it found and what it read.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.worlds import HIGH, MICRO_DEV, World
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.policy import Policy, round_kind, sampled_candidates
from grasp_lora.core.controller.rounds import ControllerConfig, ControllerState, RoundRecord
from grasp_lora.core.evidence.history import curve_minimum, observations

GRID = tuple(round(0.1 * n, 1) for n in range(1, 9))


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        ratio: the ratio found.
        verdict: the controller's, None where the way has none.
        forwards: rows read, each at one ratio.
        in_force: mean regret of the masks in force over the search, None where there were none.
        interval: the controller's, around the ratio; None where it gives none.
    """

    ratio: float
    verdict: str | None
    forwards: int
    in_force: float | None = None
    interval: tuple[float, float] | None = None


Search = Callable[[World, int, int], Found]
Proposal = Callable[[ControllerState, ControllerConfig, torch.Generator], tuple[float, ...]]
Conclusion = Callable[..., tuple[ControllerState, RoundRecord]]
"""Arguments and results are those of `rounds.conclude`."""


def library(
    world: World,
    probes: int,
    seed: int,
    *,
    fresh: bool = True,
    dealt: bool = True,
    propose: Proposal = rounds.propose,
    **settings: Any,
) -> Found:
    """Search with the library's controller.

    Args:
        world: what is searched.
        probes: ratios tried in all.
        seed: of the controller's generator.
        fresh: rows of a round are drawn from all, not always the first.
        dealt: rows probed less come first.
        propose: chooses the ratios of a round.
        settings: of the controller, that differ from the preset's.
    """
    candidates = settings.get("candidates", 3)
    config = ControllerConfig(**({"rounds": probes // candidates} | settings))
    state, forwards, in_force = searched(world, config, seed, fresh, dealt, propose)
    choice = rounds.choose_ratio(state, config)
    return Found(choice.ratio, choice.verdict, forwards, in_force, choice.interval)


def searched(
    world: World,
    config: ControllerConfig,
    seed: int,
    fresh: bool = True,
    dealt: bool = True,
    propose: Proposal = rounds.propose,
    conclude: Conclusion = rounds.conclude,
) -> tuple[ControllerState, int, float]:
    """Return where a search ends, the rows it read, and the mean regret of its masks in force."""
    assert config.rounds is not None, "a world has rounds and no steps"
    generator = torch.Generator().manual_seed(seed)
    state = rounds.begin(config, config.rounds)
    groups = [str(row) for row in range(world.pool)]
    forwards, in_force = 0, []
    for turn in range(config.rounds):
        done = (turn + 1) / (config.rounds + 1)
        rows = _rows(state, groups, config, generator, fresh, dealt)
        tried = propose(state, config, generator)
        losses = [world.losses(ratio, rows, done) for ratio in tried]
        baseline = None
        if rounds.needs_baseline(config):
            baseline = world.losses(state.mask_ratio, rows, done)
        forwards += len(rows) * (len(tried) + (baseline is not None))
        state, _ = conclude(state, config, tried, baseline, losses, rows, turn)
        in_force.append(world.regret(state.mask_ratio))
    return state, forwards, fmean(in_force)


def _rows(
    state: ControllerState,
    groups: Sequence[str],
    config: ControllerConfig,
    generator: torch.Generator,
    fresh: bool,
    dealt: bool,
) -> tuple[int, ...]:
    if not fresh:
        return tuple(range(min(config.rows, len(groups))))
    if dealt:
        return rounds.next_examples(state, groups, config, generator)
    return rounds.draw_examples(groups, config.rows, generator)


def paper(world: World, probes: int, seed: int) -> Found:
    """Search as published: fixed rows, a baseline per round."""
    settings = {"preset": "paper", "rounds": probes // 3}
    return library(world, probes, seed, fresh=False, **settings)


def conclude_at_candidate(
    state: ControllerState, *measured: Any
) -> tuple[ControllerState, RoundRecord]:
    """Conclude a round as the published code does, a fault that the library does not repeat.

    The mask is cut at the best candidate although the bounded ratio is recorded.
    """
    after, record = rounds.conclude(state, *measured)
    if not record.committed:
        return after, record
    assert record.best is not None, "a commit has a best candidate"
    record = replace(record, mask_ratio=record.best)
    records = (*after.records[:-1], record)
    return replace(after, mask_ratio=record.best, records=records), record


def stratified(
    state: ControllerState, config: ControllerConfig, generator: torch.Generator
) -> tuple[float, ...]:
    """Return one ratio from each of as many equal parts of the range, at random."""
    del state
    shares = torch.rand(config.candidates, generator=generator, dtype=torch.float64).tolist()
    width = (config.high - config.low) / config.candidates
    return tuple(config.low + width * (part + share) for part, share in enumerate(shares))


def unconfirmed(
    state: ControllerState, config: ControllerConfig, generator: torch.Generator
) -> tuple[float, ...]:
    """Return samples of the policy where the library would measure the lowest ratio again."""
    if round_kind(state.round, state.horizon, config) != "confirmation":
        return rounds.propose(state, config, generator)
    incumbent = curve_minimum(observations(state.records), state.horizon, config)
    return sampled_candidates(Policy(state.mu, state.sigma), config, generator, incumbent)


def grid(world: World, probes: int, seed: int, *, fresh: bool, rows: int = MICRO_DEV) -> Found:
    """Try eight ratios in passes, all ratios of a pass on the same rows; take the lowest mean."""
    generator = torch.Generator().manual_seed(seed)
    groups = [str(row) for row in range(world.pool)]
    passes = max(1, probes // len(GRID))
    losses: list[np.ndarray] = []
    for turn in range(passes):
        drawn = rounds.draw_examples(groups, rows, generator) if fresh else tuple(range(rows))
        done = (turn + 1) / (passes + 1)
        seen = np.array([world.losses(ratio, drawn, done) for ratio in GRID])
        losses.append(seen.mean(1))
    best = int(np.mean(losses, axis=0).argmin())
    return Found(GRID[best], None, passes * len(GRID) * rows)


def optuna_search(
    world: World, probes: int, seed: int, *, sampler: str, rows: int = MICRO_DEV
) -> Found:
    """Let Optuna minimise the mean loss of the same rows, all probes one after another."""
    import optuna  # noqa: PLC0415 (optional)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made: Any = getattr(optuna.samplers, sampler)(seed=seed)
    study = optuna.create_study(sampler=made)
    fixed = range(rows)
    for turn in range(probes):
        trial = study.ask()
        ratio = trial.suggest_float("ratio", 0.0, HIGH)
        study.tell(trial, fmean(world.losses(ratio, fixed, (turn + 1) / (probes + 1))))
    return Found(float(study.best_params["ratio"]), None, probes * rows)


@dataclass(frozen=True)
class Controller:
    """A way to search.

    Attributes:
        search: (world, probes, seed) -> what it found.
        about: a few words for the table.
        most_probes: more are not simulated, for their time.
        share_of_seeds: of the seeds asked for, likewise.
        needs: a package that may be missing.
    """

    search: Search
    about: str
    most_probes: int = 10**6
    share_of_seeds: float = 1.0
    needs: str | None = None


def _with(search: Callable[..., Found], **settings: Any) -> Search:
    return lambda world, probes, seed: search(world, probes, seed, **settings)


DEFAULT = "standard"
CONTROLLERS: Mapping[str, Controller] = {
    "paper": Controller(paper, "as published: 16 fixed rows and a baseline"),
    "standard": Controller(_with(library), "the default: 12 rows dealt, no baseline"),
    "standard, 16 rows": Controller(_with(library, rows=16), "16 rows dealt"),
    "standard, fixed rows": Controller(
        _with(library, rows=16, fresh=False), "always the 16 micro-dev rows"
    ),
    "standard, unconfirmed": Controller(
        _with(library, propose=unconfirmed), "no confirmation rounds, 12 rows dealt"
    ),
    "stratified": Controller(
        _with(library, propose=stratified), "stratified random ratios, history: 12 rows dealt"
    ),
    "stratified, 16 rows": Controller(
        _with(library, propose=stratified, rows=16), "the same, 16 rows dealt"
    ),
    "grid": Controller(_with(grid, fresh=True), "8 points in passes, 16 rows drawn anew"),
    "grid, fixed rows": Controller(_with(grid, fresh=False), "8 points on the micro-dev rows"),
    "TPE": Controller(
        _with(optuna_search, sampler="TPESampler"),
        "Optuna's TPE on the micro-dev rows",
        share_of_seeds=0.25,
        needs="optuna",
    ),
    "GP": Controller(
        _with(optuna_search, sampler="GPSampler"),
        "Optuna's GP on the micro-dev rows",
        most_probes=51,
        share_of_seeds=0.1,
        needs="optuna",
    ),
}
"""Name -> way. All have the same number of probes."""


def available() -> dict[str, Controller]:
    """Return the ways whose packages are installed; a missing one is named on the terminal."""
    found: dict[str, Controller] = {}
    for name, way in CONTROLLERS.items():
        if way.needs is not None and importlib.util.find_spec(way.needs) is None:
            print(f"left out: {name}, which needs {way.needs}: pip install {way.needs}")
            continue
        found[name] = way
    return found


def floor(world: World, rows: int) -> float:
    """Return the ratio an exact search on the first `rows` rows would find at the end."""
    return world.exact(range(rows))


def limited(way: Controller, seeds: Sequence[int]) -> Sequence[int]:
    """Return the first of the seeds, as many as the way is simulated for."""
    return seeds[: max(2, round(len(seeds) * way.share_of_seeds))]
