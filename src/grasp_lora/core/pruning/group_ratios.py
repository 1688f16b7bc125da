"""One ratio for each group of tensors, around one overall ratio.

Every group is tried a little above and a little below the overall ratio, the others making up for
it, and what lowers the loss is put together as if the effects added up. What is put together is
measured itself, on rows it was not chosen on, before it is believed.

Our departure from arXiv 2601.06702, which knows one ratio.
"""

import math
from collections.abc import Collection, Mapping, Sequence

SHIFT = 0.15
"""How far a group's ratio is tried from the overall one."""
_HALVINGS = 60


def trials(ratio: float, sizes: Mapping[str, int]) -> dict[tuple[str, float], dict[str, float]]:
    """Return (group, shift) -> the ratio of every group, two for each group.

    Of two groups only the first is moved: the other mirrors it.

    Args:
        ratio: overall fraction removed, in (0, 1).
        sizes: group -> its entries.

    Raises:
        ValueError: there are fewer than two groups.
    """
    groups = list(sizes)
    if len(groups) < 2:
        raise ValueError(
            f"ratios of groups need at least two groups, got {groups}; set scope: global"
        )
    moved = groups[:1] if len(groups) == 2 else groups
    return {
        (group, shift): balanced(ratio, {group: shift}, sizes, fixed=group)
        for group in moved
        for shift in (-SHIFT, SHIFT)
    }


def balanced(
    ratio: float, shifts: Mapping[str, float], sizes: Mapping[str, int], fixed: str | None = None
) -> dict[str, float]:
    """Return the ratio of every group so that the overall fraction removed is `ratio`.

    A group's ratio is `ratio` + its shift + what all others are moved by to make up for it, cut to
    [0, 1].

    Args:
        ratio: overall fraction, in [0, 1].
        shifts: group -> shift; 0 where left out.
        sizes: group -> its entries.
        fixed: a group that does not make up for itself; as far as the others can make up for it.
    """
    total = sum(sizes.values())
    wanted = {group: ratio + shifts.get(group, 0.0) for group in sizes}

    def moved(by: float) -> dict[str, float]:
        return {
            group: min(1.0, max(0.0, value if group == fixed else value + by))
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
    if fixed is not None and abs(gap) > 1e-9:  # the others are at their bounds already
        found[fixed] += gap * total / sizes[fixed]
    return found


def combined(
    ratio: float,
    losses: Mapping[tuple[str, float], Sequence[float]],
    base: Sequence[float],
    rows: Collection[int],
    sizes: Mapping[str, int],
) -> dict[str, float]:
    """Return the ratios of the groups that the trials speak for on some of the rows.

    Args:
        ratio: overall fraction, in (0, 1).
        losses: (group, shift) -> loss of each row, in nats.
        base: losses with one ratio for all.
        rows: positions of the rows to choose on.
        sizes: group -> its entries.
    """
    shifts: dict[str, float] = {}
    best: dict[str, float] = {}
    for (group, shift), values in losses.items():
        saved = math.fsum(base[row] - values[row] for row in rows)
        if saved > best.get(group, 0.0):
            best[group], shifts[group] = saved, shift
    return balanced(ratio, shifts, sizes)
