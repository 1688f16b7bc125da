"""Schedule the rounds of a search, and draw the examples that each round probes."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping, Sequence

import torch

from grasp_lora.core.controller.settings import ControllerConfig


def is_due(step: int, total_steps: int, config: ControllerConfig) -> bool:
    """Return whether a round follows optimizer step `step` (from 1) of `total_steps`.

    With `interval`, a round follows every `interval` steps. With `rounds` = T, rounds follow the
    steps round(total * t / (T + 1)), t = 1..T: training comes before the first round and after the
    last. A run of T steps or fewer has fewer rounds, at most one per step.
    """
    if config.interval is not None:
        return 0 < step <= total_steps and step % config.interval == 0
    return step in _spread_steps(total_steps, config)


def planned_rounds(total_steps: int, config: ControllerConfig) -> int:
    """Return the number of rounds of a run of `total_steps` optimizer steps; 0 if too short."""
    if config.interval is not None:
        return max(total_steps, 0) // config.interval
    return len(_spread_steps(total_steps, config))


def draw_examples(
    groups: Sequence[str],
    count: int,
    generator: torch.Generator,
    probed: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """Return `count` example positions drawn at random, ascending, spread over the groups.

    Every group gives its first example before any group gives its second, and so on. Within one
    turn, examples that fewer rounds have probed come first. All examples are returned if there are
    no more than `count`.

    Args:
        groups: Group of each example; examples of one group (one context) are not independent.
        count: How many examples to draw, at least 1.
        generator: Source of the randomness.
        probed: Example position -> number of rounds that probed it; 0 for one left out.

    Raises:
        ValueError: If the count is below 1 or there is no example.
    """
    if count < 1:
        raise ValueError(
            f"a round probes at least 1 example, got {count}; raise the number of examples"
        )
    if not groups:
        raise ValueError("there is no example to probe; give the micro-dev split at least one")
    before = probed or {}
    shuffled: list[int] = torch.randperm(len(groups), generator=generator).tolist()
    # The sort is stable: examples with equal counts stay shuffled.
    shuffled.sort(key=lambda example: before.get(example, 0))
    given: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []  # (turn within its group, rounds so far, example)
    for example in shuffled:
        turn = given.get(groups[example], 0)
        given[groups[example]] = turn + 1
        turns.append((turn, before.get(example, 0), example))
    turns.sort(key=lambda each: each[:2])
    return tuple(sorted(example for *_, example in turns[:count]))


def _spread_steps(total_steps: int, config: ControllerConfig) -> frozenset[int]:
    assert config.rounds is not None  # the config holds exactly one of rounds and interval
    parts = config.rounds + 1
    steps = ((2 * total_steps * t + parts) // (2 * parts) for t in range(1, parts))
    return frozenset(step for step in steps if 0 < step < total_steps)
