"""Measure gains without selection bias: choose on some of the examples, test on others.

The best of many noisy numbers overstates its gain. So the groups of examples are put in a random
order. The first third only choose. Each later group is tested under the choice that all groups
before it make. No group is tested under a choice that it took part in, and each tested gain is
independent of the luck of those before it, so the plain t test over groups has its level. Two
halves that choose for each other do not have that property. This is our departure from
arXiv 2601.06702, which takes the largest reward as it is.
"""

# torch and numpy leave these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
import torch

from grasp_lora.core.evidence.groups import Gain, mean_gain, own_groups, standard_error

LEAST_GROUPS = 4
"""Fewer groups of examples are not divided: one would choose, and two be tested."""
_SPLIT_SEED = 0


def forward_splits(
    groups: Sequence[Hashable], steps: int | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (examples to choose on, examples to test on), the second never among the first.

    All examples of a group are on one side. The order of the groups is random and always the same.

    Args:
        groups: group of each example.
        steps: number of tested parts, of as many groups as possible; None tests every group by
            itself.

    Raises:
        ValueError: there are fewer than `LEAST_GROUPS` groups.
    """
    members: dict[Hashable, list[int]] = {}
    for example, label in enumerate(groups):
        members.setdefault(label, []).append(example)
    count = len(members)
    if count < LEAST_GROUPS:
        raise ValueError(
            f"choosing on some groups and testing on others needs {LEAST_GROUPS} groups, got "
            f"{count}; measure examples of more contexts"
        )
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    parts_of = list(members.values())
    shuffled = [parts_of[place] for place in order]
    first = count // 3
    parts = count - first if steps is None else steps
    ends = [first + (count - first) * part // parts for part in range(parts + 1)]
    for begin, end in zip(ends, ends[1:], strict=False):
        yield (
            sorted(example for own in shuffled[:begin] for example in own),
            sorted(example for own in shuffled[begin:end] for example in own),
        )


def gain_of_best(
    challengers: Mapping[str, Sequence[float]],
    references: Mapping[str, Sequence[float]],
    groups: Sequence[Hashable] | None = None,
) -> Gain | None:
    """Return the gain of the best challenger over the best reference, on examples of its own.

    The challenger is chosen on earlier groups of examples and tested on the next one; see
    `forward_splits`. The reference is the one with the lowest loss over all examples, so luck is on
    its side: a shown gain is one over every reference. With several references that are level, a
    gain is shown less often than the level allows.

    Args:
        challengers: name -> loss of each example, in nats, [examples].
        references: name -> loss of each example, in nats, on the same examples.
        groups: group of each example; None makes each its own group.

    Returns:
        The gain; None with fewer than `LEAST_GROUPS` groups of examples, or if every member of a
        side has a loss that is not finite.

    Raises:
        ValueError: a side is empty, or the numbers of examples differ.
    """
    lengths = {len(losses) for side in (challengers, references) for losses in side.values()}
    labels = own_groups(max(lengths, default=0)) if groups is None else groups
    if not challengers or not references or lengths != {len(labels)}:
        raise ValueError(
            f"two sides with losses on the same examples are compared, got {len(challengers)} "
            f"challengers and {len(references)} references with {sorted(lengths)} examples in "
            f"{len(labels)} places; measure all on the same examples"
        )
    sides = [finite_only(side) for side in (challengers, references)]
    if len(set(labels)) < LEAST_GROUPS or not all(sides):
        return None
    tried = np.array(list(sides[0].values()))  # [challengers, examples]
    reference = np.array(min(sides[1].values(), key=math.fsum))
    gains: list[float] = []
    tested: list[int] = []
    for chosen_on, tested_on in forward_splits(labels):
        best = tried[tried[:, chosen_on].sum(axis=1).argmin()]
        gains += (reference - best)[tested_on].tolist()
        tested += tested_on
    return mean_gain(gains, [labels[i] for i in tested])


def finite_only(losses: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Return the entries whose losses are all finite; the others cannot be chosen."""
    return {name: values for name, values in losses.items() if all(map(math.isfinite, values))}


def within_one_error_of_best(
    losses: Mapping[str, Sequence[float]], groups: Sequence[Hashable] | None = None
) -> list[str]:
    """Return the names whose mean loss is at most one standard error above the lowest mean.

    The standard error, over groups of examples, is that of the differences to the losses with the
    lowest mean. The lowest of a few noisy means is often lowest by luck, so the caller may choose
    among these names for other reasons. With one group nothing tells the error, and all are within.

    Args:
        losses: name -> loss of each example, in nats, on the same examples, at least two.
        groups: group of each example; None makes each its own group.

    Returns:
        Names in the order given. A name with a loss that is not finite is left out.

    Raises:
        ValueError: the numbers of examples differ, or there are fewer than two.
    """
    lengths = {len(values) for values in losses.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"losses on the same examples are compared, at least 2, got {sorted(lengths)}; measure "
            "all on the same examples"
        )
    finite = finite_only(losses)
    if not finite:
        return []
    best = min(finite.values(), key=math.fsum)
    gaps = {
        name: [value - lowest for value, lowest in zip(values, best, strict=True)]
        for name, values in finite.items()
    }
    if groups is not None and len(set(groups)) < 2:
        return list(finite)
    return [n for n, gap in gaps.items() if statistics.fmean(gap) <= standard_error(gap, groups)]
