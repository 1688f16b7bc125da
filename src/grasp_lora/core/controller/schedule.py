"""When a round is due, and on which rows it probes."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping, Sequence

import torch

from grasp_lora.core.controller.settings import ControllerConfig


def is_due(step: int, total_steps: int, config: ControllerConfig) -> bool:
    """Return whether a round follows optimizer step `step` (from 1) of `total_steps`.

    With `interval` after every so many steps. With `rounds` = T after the steps
    round(total * t / (T + 1)), t = 1..T, so that some training comes before the first round and
    some after the last; a run of T steps or fewer has fewer rounds, at most one per step.
    """
    if config.interval is not None:
        return 0 < step <= total_steps and step % config.interval == 0
    return step in _spread_steps(total_steps, config)


def planned_rounds(total_steps: int, config: ControllerConfig) -> int:
    """Return how many rounds a run of `total_steps` optimizer steps has; 0 if it is too short."""
    if config.interval is not None:
        return max(total_steps, 0) // config.interval
    return len(_spread_steps(total_steps, config))


def draw_rows(
    groups: Sequence[str],
    count: int,
    generator: torch.Generator,
    probed: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """Return `count` row positions drawn at random, ascending, spread over the groups.

    A group gives a second row only when every group has given its first, and so on; within that,
    rows probed less often come first. All rows if there are no more than `count`.

    Args:
        groups: Group of each row; rows of one group (one context) are not independent.
        count: How many rows to draw, at least 1.
        generator: Source of the randomness.
        probed: Row position -> how many rounds have probed it; a row left out, none.

    Raises:
        ValueError: If the count is below 1 or there is no row.
    """
    if count < 1:
        raise ValueError(f"a round probes at least 1 row, got {count}; raise the number of rows")
    if not groups:
        raise ValueError("there is no row to probe; give the micro-dev split at least one example")
    before = probed or {}
    shuffled: list[int] = torch.randperm(len(groups), generator=generator).tolist()
    shuffled.sort(key=lambda row: before.get(row, 0))  # stable: equal ones stay shuffled
    given: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []  # (how many its group gave before, rounds, row)
    for row in shuffled:
        turn = given.get(groups[row], 0)
        given[groups[row]] = turn + 1
        turns.append((turn, before.get(row, 0), row))
    turns.sort(key=lambda each: each[:2])
    return tuple(sorted(row for *_, row in turns[:count]))


def _spread_steps(total_steps: int, config: ControllerConfig) -> frozenset[int]:
    assert config.rounds is not None  # the config holds exactly one of rounds and interval
    parts = config.rounds + 1
    steps = ((2 * total_steps * t + parts) // (2 * parts) for t in range(1, parts))
    return frozenset(step for step in steps if 0 < step < total_steps)
