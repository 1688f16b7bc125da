"""Draw candidate ratios from a Gaussian policy, and update the policy from their rewards.

The published controller is called GRPO, but the published code runs a simpler method: REINFORCE on
one number, with the mean reward of a round as the baseline. It has no clipped importance ratio, and
its "KL" term is a pull towards the current ratio.

There are two rules, one per preset:

- `paper`: arXiv 2601.06702 exactly as published. Two known properties are kept on purpose. The
  gradients use the clipped sample. For reward spans under about 0.3 nats the entropy bonus
  dominates, and sigma grows until the policy is uniform random search.
- `standard`, our departure. The first rounds and every fifth round are stratified: they spread the
  candidates evenly over the range. The last rounds are confirmations: they measure the lowest ratio
  beside the incumbent. All other rounds sample antithetic pairs. If the number of candidates is
  odd, the last candidate is the incumbent, the best ratio of the history, so that it is measured
  again on other examples. Only ratios drawn from the policy move it: the score function holds for
  samples alone. Advantages are divided by their standard deviation, so that the step does not
  depend on the scale of the loss. The steps follow the natural gradient and are bounded. Both
  ratios of one antithetic pair lie as far from mu, so with up to three candidates sigma moves only
  where a ratio was clipped.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.pruning.profile import MOST_TILT, limited

RoundKind: TypeAlias = Literal["coverage", "policy", "confirmation"]

_MIN_PAPER_VARIANCE = 1e-4
_MIN_PAPER_SIGMA = 1e-3
_SIGMA_RANGE = (0.04, 0.2)
_MAX_MU_STEP = 0.1
_SAME_REWARDS = 1e-12
_GOLDEN = 0.618
_STRATIFIED_EVERY = 5
_LEAST_CONFIRMATIONS = 3
_MOST_CONFIRMATIONS = 6
TILT_SIGMAS = 2.0
"""Standard deviation of a tilt, in those of the ratio: it moves the ends of the groups by half."""
PRIOR_RATIO = 0.4
"""Centre of the `standard` policy until rewards move it."""


@dataclass(frozen=True)
class Policy:
    """A Gaussian over the prune ratio.

    Attributes:
        mu: Centre, a ratio in [0, 1).
        sigma: Standard deviation, in units of ratio.
        tilts: Centre of the tilts (`core.pruning.profile`), which have the standard deviation
            `TILT_SIGMAS` sigma; empty if the search has none.
    """

    mu: float
    sigma: float
    tilts: tuple[float, ...] = ()


def initial_policy(config: ControllerConfig) -> Policy:
    """Return the policy before the first round."""
    if config.preset == "paper":
        return Policy(config.start, config.sigma)
    return Policy(clip(PRIOR_RATIO, config.low, config.high), config.sigma)


def initial_stratified_rounds(horizon: int) -> int:
    """Return the number of stratified rounds of `standard` before its first policy round."""
    return max(3, math.ceil(horizon / 4))


def final_confirmation_rounds(horizon: int) -> int:
    """Return how many of the last rounds of `standard` are confirmation rounds.

    A confirmation round measures the lowest ratio beside the incumbent, the comparison that the
    verdict tests, on as many examples as the budget allows. It replaces a policy round and costs no
    more.
    """
    wanted = min(_MOST_CONFIRMATIONS, max(_LEAST_CONFIRMATIONS, horizon // 8))
    return min(wanted, max(0, horizon - initial_stratified_rounds(horizon)))


def round_kind(index: int, horizon: int, config: ControllerConfig) -> RoundKind:
    """Return the kind of round `index` (from 0) of `horizon`.

    `coverage` is the recorded name of a stratified round, which spreads the ratios evenly over the
    range. `policy` samples the ratios. `confirmation` measures the lowest ratio beside the
    incumbent.
    """
    if config.preset == "paper":
        return "policy"
    if config.candidates > 1 and horizon - final_confirmation_rounds(horizon) <= index < horizon:
        return "confirmation"
    repeated = index % _STRATIFIED_EVERY == _STRATIFIED_EVERY - 1
    return "coverage" if index < initial_stratified_rounds(horizon) or repeated else "policy"


def stratified_candidates(index: int, config: ControllerConfig) -> tuple[float, ...]:
    """Return evenly spaced ratios in [low, high), shifted by the golden section in each round."""
    count, span = config.candidates, config.high - config.low
    shift = math.fmod(_GOLDEN * index, 1.0)
    return tuple(config.low + span * math.fmod(j + shift, count) / count for j in range(count))


def sampled_candidates(
    policy: Policy,
    config: ControllerConfig,
    generator: torch.Generator,
    incumbent: float | None = None,
) -> tuple[float, ...]:
    """Return candidates drawn from the policy, clipped to [low, high].

    With `standard` and an odd number of candidates, the last candidate is the `incumbent`, unless
    it is None.
    """
    draw = _independent if config.preset == "paper" else _antithetic
    drawn = tuple(
        clip(policy.mu + policy.sigma * z, config.low, config.high)
        for z in draw(config.candidates, generator)
    )
    if incumbent is None or config.preset == "paper" or config.candidates % 2 == 0:
        return drawn
    return (*drawn[:-1], incumbent)


def stratified_tilts(
    index: int,
    levels: Sequence[float],
    config: ControllerConfig,
    generator: torch.Generator,
    count: int,
) -> tuple[tuple[float, ...], ...]:
    """Return `count` tilts for each level, evenly spaced and each in an order of its own.

    A tilt goes as far as its level leaves room. The tilts of a round are shifted by the golden
    section in the next.

    Args:
        index: Index of the round, from 0.
        levels: Ratios of the round.
        config: Settings of the controller.
        generator: Source of the orders.
        count: Number of tilts.
    """
    trials = len(levels)
    columns: list[list[float]] = []
    for place in range(count):
        order: list[int] = torch.randperm(trials, generator=generator).tolist()
        shift = math.fmod(_GOLDEN * (index + 1) * (place + 1), 1.0)
        columns.append([2 * math.fmod(one + shift, trials) / trials - 1 for one in order])
    return tuple(
        limited(level, [MOST_TILT * share for share in own], config.low, config.high)
        for level, *own in zip(levels, *columns, strict=True)
    )


def sampled_tilts(
    policy: Policy, levels: Sequence[float], config: ControllerConfig, generator: torch.Generator
) -> tuple[tuple[float, ...], ...]:
    """Return tilts drawn from the policy, in antithetic pairs as the levels are."""
    columns = [_antithetic(len(levels), generator) for _ in policy.tilts]
    wide = TILT_SIGMAS * policy.sigma
    return tuple(
        limited(
            level,
            [centre + wide * z for centre, z in zip(policy.tilts, own, strict=True)],
            config.low,
            config.high,
        )
        for level, *own in zip(levels, *columns, strict=True)
    )


def confirmation_candidates(
    policy: Policy, config: ControllerConfig, generator: torch.Generator, incumbent: float
) -> tuple[float, ...]:
    """Return `low`, the incumbent, and policy samples for the remaining candidates."""
    draws = _antithetic(config.candidates, generator)[: config.candidates - 2]
    drawn = (clip(policy.mu + policy.sigma * z, config.low, config.high) for z in draws)
    return (config.low, incumbent, *drawn)


def drawn_from_policy(
    kind: RoundKind,
    count: int,
    config: ControllerConfig,
    has_incumbent: bool,
    tilted: bool = False,
) -> tuple[bool, ...]:
    """Return for each candidate of a round whether it was drawn from the policy.

    Ratios of a stratified round, the lowest ratio, the incumbent and the profile of a confirmation
    are placed, not drawn.

    Args:
        kind: Kind of the round.
        count: Candidates of the round.
        config: Settings of the controller.
        has_incumbent: Whether there was an incumbent when the candidates were proposed.
        tilted: Whether the search has tilts.
    """
    if kind == "coverage":
        return (False,) * count
    if not has_incumbent or config.preset == "paper":
        return (True,) * count
    if kind == "confirmation":
        placed = 3 if tilted else 2
        return (False,) * placed + (True,) * (count - placed)
    return (*[True] * (count - 1), count % 2 == 0)


def updated_policy(
    policy: Policy,
    candidates: Sequence[float],
    rewards: Sequence[float],
    ratio: float,
    config: ControllerConfig,
    tilts: Sequence[tuple[float, ...]] = (),
) -> Policy:
    """Return the policy after one round.

    Args:
        policy: The policy that the candidates were drawn from.
        candidates: Ratios drawn from the policy whose trials have a finite reward, at least one.
        rewards: Reward of each trial in nats, loss of the reference - loss of the trial.
        ratio: Current ratio before this round's commit; the anchor pulls mu towards it.
        config: Settings of the controller.
        tilts: Tilts of each trial; empty if the search has none.
    """
    return _UPDATES[config.preset](policy, candidates, rewards, ratio, config, tilts)


def clip(value: float, low: float, high: float) -> float:
    """Return the value clipped to [low, high]."""
    return min(max(value, low), high)


def _paper_update(
    policy: Policy,
    candidates: Sequence[float],
    rewards: Sequence[float],
    ratio: float,
    config: ControllerConfig,
    tilts: Sequence[tuple[float, ...]],
) -> Policy:
    """Move mu and sigma by the score function, both gradients taken at the old values."""
    mu, sigma = policy.mu, policy.sigma
    variance = max(sigma**2, _MIN_PAPER_VARIANCE)
    advantages = _centred(rewards)
    offsets = [candidate - mu for candidate in candidates]
    slope_mu = _mean([a * s / variance for a, s in zip(advantages, offsets, strict=True)])
    slope_sigma = _mean(
        [a * (s**2 / variance - 1) for a, s in zip(advantages, offsets, strict=True)]
    )
    new_mu = mu + config.lr * (slope_mu - config.anchor * (mu - ratio))
    new_sigma = sigma + config.lr * slope_sigma + config.entropy
    return Policy(clip(new_mu, config.low, config.high), max(_MIN_PAPER_SIGMA, new_sigma))


def _standard_update(
    policy: Policy,
    candidates: Sequence[float],
    rewards: Sequence[float],
    ratio: float,
    config: ControllerConfig,
    tilts: Sequence[tuple[float, ...]],
) -> Policy:
    """Take one bounded natural-gradient step in mu, the tilts and log sigma.

    No step is taken if all rewards are equal.
    """
    centred = _centred(rewards)
    spread = math.sqrt(_mean([a**2 for a in centred]))
    if spread <= _SAME_REWARDS:
        return policy
    mu, sigma = policy.mu, policy.sigma
    advantages = [a / spread for a in centred]
    offsets = [candidate - mu for candidate in candidates]
    step_mu = _mean([a * s for a, s in zip(advantages, offsets, strict=True)])
    tilt_offsets = [
        [tilt - centre for tilt in own]
        for centre, own in zip(policy.tilts, zip(*tilts, strict=True), strict=True)
    ]
    squares = [[(s / sigma) ** 2 for s in offsets]]
    squares += [[(s / (TILT_SIGMAS * sigma)) ** 2 for s in own] for own in tilt_offsets]
    excess = [_mean(own) - 1 for own in zip(*squares, strict=True)]
    step_log_sigma = 0.5 * _mean([a * e for a, e in zip(advantages, excess, strict=True)])
    step_tilts = [
        _mean([a * s for a, s in zip(advantages, own, strict=True)]) for own in tilt_offsets
    ]
    move = clip(config.lr * (step_mu - config.anchor * (mu - ratio)), -_MAX_MU_STEP, _MAX_MU_STEP)
    growth = clip(config.lr * step_log_sigma + config.entropy, -1.0, 1.0)
    return Policy(
        clip(mu + move, config.low, config.high),
        clip(sigma * math.exp(growth), *_SIGMA_RANGE),
        tuple(
            clip(centre + config.lr * step, -MOST_TILT, MOST_TILT)
            for centre, step in zip(policy.tilts, step_tilts, strict=True)
        ),
    )


_UPDATES: dict[str, Callable[..., Policy]] = {"paper": _paper_update, "standard": _standard_update}


def _independent(count: int, generator: torch.Generator) -> list[float]:
    return torch.randn(count, generator=generator, dtype=torch.float64).tolist()


def _antithetic(count: int, generator: torch.Generator) -> list[float]:
    """Return pairs (q, -q), and one unpaired draw at the end if the count is odd."""
    draws = _independent(count // 2 + count % 2, generator)
    paired = [sign * q for q in draws[: count // 2] for sign in (1.0, -1.0)]
    return paired + draws[count // 2 :]


def _centred(values: Sequence[float]) -> list[float]:
    centre = _mean(values)
    return [value - centre for value in values]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
