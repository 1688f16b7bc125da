"""Choose one prune ratio per group of tensors, at a given overall ratio.

Each group is tried slightly above and slightly below the overall ratio. The other groups compensate
for the difference. The shifts that lower the loss are then combined, as if their effects added up.
The caller measures the combination on examples that it was not chosen on.

Our departure from arXiv 2601.06702, which uses one ratio.
"""

import math
from collections.abc import Collection, Mapping, Sequence

SHIFT = 0.15
"""Difference between the tried ratio of a group and the overall ratio."""
_HALVINGS = 60


def group_trials(
    ratio: float, sizes: Mapping[str, int]
) -> dict[tuple[str, float], dict[str, float]]:
    """Return (group, shift) -> group -> ratio; two trials per group, at `-SHIFT` and `+SHIFT`.

    With two groups, only the first is shifted, because the second compensates for it.

    Args:
        ratio: overall fraction removed, in (0, 1).
        sizes: group -> number of entries.

    Raises:
        ValueError: there are fewer than two groups.
    """
    groups = list(sizes)
    if len(groups) < 2:
        raise ValueError(
            f"one ratio per group needs at least two groups, got {groups}; set scope: global"
        )
    moved = groups[:1] if len(groups) == 2 else groups
    return {
        (group, shift): balanced_ratios(ratio, {group: shift}, sizes, fixed=group)
        for group in moved
        for shift in (-SHIFT, SHIFT)
    }


def balanced_ratios(
    ratio: float,
    shifts: Mapping[str, float],
    sizes: Mapping[str, int],
    fixed: str | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Return group -> ratio so that the overall fraction removed is `ratio`.

    A group's ratio is `ratio` + its shift + a common offset, clipped to the bounds. The offset is
    the same for all groups and keeps the overall fraction.

    Args:
        ratio: overall fraction removed, within the bounds.
        shifts: group -> shift; 0 for a group left out.
        sizes: group -> number of entries.
        fixed: a group that gets no offset. Its ratio changes only where the other groups reach
            their bounds and cannot compensate.
        bounds: smallest and largest ratio of a group, in [0, 1].
    """
    least, most = bounds
    total = sum(sizes.values())
    wanted = {group: ratio + shifts.get(group, 0.0) for group in sizes}

    def moved(by: float) -> dict[str, float]:
        return {
            group: min(most, max(least, value if group == fixed else value + by))
            for group, value in wanted.items()
        }

    def overall(by: float) -> float:
        found = moved(by)
        return math.fsum(sizes[group] * found[group] for group in sizes) / total

    low, high = -2.0, 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if overall(middle) < ratio:
            low = middle
        else:
            high = middle
    found = moved(high)
    gap = ratio - overall(high)
    if fixed is not None and abs(gap) > 1e-9:  # the other groups are at their bounds
        found[fixed] += gap * total / sizes[fixed]
    return found


def combined_ratios(
    ratio: float,
    losses: Mapping[tuple[str, float], Sequence[float]],
    base: Sequence[float],
    rows: Collection[int],
    sizes: Mapping[str, int],
) -> dict[str, float]:
    """Return group -> ratio: each group takes the shift that lowers the loss most, if any does.

    Args:
        ratio: overall fraction removed, in (0, 1).
        losses: (group, shift) -> loss of each example, in nats.
        base: loss of each example with one ratio for all groups, in nats.
        rows: positions of the examples to choose on.
        sizes: group -> number of entries.
    """
    shifts: dict[str, float] = {}
    best: dict[str, float] = {}
    for (group, shift), values in losses.items():
        saved = math.fsum(base[row] - values[row] for row in rows)
        if saved > best.get(group, 0.0):
            best[group], shifts[group] = saved, shift
    return balanced_ratios(ratio, shifts, sizes)
