"""Choose rank and number format of every module so that an adapter fits a number of bytes.

The idea is that of HAQ (Wang et al., arXiv 1811.08886): bits are chosen layer by layer under a
budget. There an agent learns the bits over hundreds of trained networks. Here the loss of every
option of a group of modules is measured once, nothing is trained, and the choice is exact: of all
combinations that fit, the one with the lowest sum of added losses. That these add up is checked by
measuring the whole.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from grasp_lora.base.choice import lowest
from grasp_lora.core.evidence.groups import Gain, mean_gain
from grasp_lora.core.layer_swap import layer_of
from grasp_lora.core.packing import FORMATS, stored_bytes

MOST_GROUPS = 7
"""Most groups of modules whose options are measured by themselves."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a module's factors: A is [rank, inputs], B is [outputs, rank]."""

    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Option:
    """What may become of the modules of a group.

    Attributes:
        part: the rank is divided by this, rounded up; 0 drops the modules.
        form: number format, a key of `packing.FORMATS`.
    """

    part: int
    form: str = "bf16"

    @property
    def name(self) -> str:
        """The option in words, such as "r/2 int8"."""
        if self.part == 0:
            return "drop"
        return f"r{'' if self.part == 1 else f'/{self.part}'} {self.form}"

    def rank(self, whole: int) -> int:
        """Return the rank that is left of a rank."""
        return math.ceil(whole / self.part) if self.part else 0

    def size(self, shapes: Sequence[Shape]) -> int:
        """Return the bytes of modules under this option, the header of their file aside."""
        return sum(
            stored_bytes(self.form, self.rank(one.rank), one.inputs, one.outputs) for one in shapes
        )


WHOLE = Option(1)
"""All components, rounded to bf16."""
DROP = Option(0)
OPTIONS = (*(Option(part, form) for part in (1, 2, 4) for form in FORMATS), DROP)
"""All options of a group, `WHOLE` first."""
_THIRDS = ("first third", "middle third", "last third")
_OUTSIDE = "outside the layers"
MOST_PROBES = MOST_GROUPS * (len(OPTIONS) - 1)
"""Most measurements of single options."""


def groups_of(modules: Sequence[str], most: int = MOST_GROUPS) -> dict[str, list[str]]:
    """Return group -> its modules: as many groups as `most` allows.

    The modules are grouped one by one, by layer, by type and third of the depth, by type, by third,
    or all together.

    Args:
        modules: full names.
        most: most groups, at least 1.
    """
    layers = sorted({layer for name in modules if (layer := layer_of(name)) is not None})
    thirds = {layer: _THIRDS[3 * place // len(layers)] for place, layer in enumerate(layers)}
    grouped: list[dict[str, list[str]]] = [{} for _ in range(6)]
    for name in modules:
        layer, kind = layer_of(name), name.rpartition(".")[2]
        third = _OUTSIDE if layer is None else thirds[layer]
        own = _OUTSIDE if layer is None else f"layer {layer}"
        labels = (name, own, f"{kind}, {third}", kind, third, "all")
        for groups, label in zip(grouped, labels, strict=True):
            groups.setdefault(label, []).append(name)
    return max((groups for groups in grouped if len(groups) <= most), key=len)


def options_of(shapes: Sequence[Shape]) -> list[Option]:
    """Return the options of modules of these sizes, without those that equal an earlier one."""
    known: dict[tuple[object, ...], Option] = {}
    for option in OPTIONS:
        ranks = tuple(option.rank(one.rank) for one in shapes)
        known.setdefault((option.form, ranks), option)
    return list(known.values())


def least_bytes(groups: Mapping[str, Sequence[Shape]]) -> int:
    """Return the fewest bytes of an adapter that is not dropped whole: one group is left."""
    return min(
        option.size(shapes) for shapes in groups.values() for option in OPTIONS if option != DROP
    )


@dataclass(frozen=True)
class Priced:
    """An option of a group with what it takes and costs.

    Attributes:
        option: the option.
        size: bytes of the group's modules.
        cost: loss that the option adds, in nats, at least 0; not finite where the model overflows.
    """

    option: Option
    size: int
    cost: float


_Sums: TypeAlias = dict[int, tuple[float, dict[str, Option]]]
"""Sum of bytes -> (sum of costs, the choice)."""


def best_fit(groups: Mapping[str, Sequence[Priced]], budget: int) -> dict[str, Option] | None:
    """Return group -> option: of all combinations that fit, the one with the lowest sum of costs.

    Args:
        groups: group -> its options.
        budget: most bytes of all groups together.

    Returns:
        The choice, of the fewest bytes where sums are equal; None if no combination fits that has
        finite costs and leaves a module.
    """
    sums: _Sums = {0: (0.0, {})}
    for group, priced in groups.items():
        grown: _Sums = {}
        for taken, (paid, chosen) in sums.items():
            for one in priced:
                size, cost = taken + one.size, paid + one.cost
                if size > budget or not math.isfinite(cost):
                    continue
                if size not in grown or cost < grown[size][0]:
                    grown[size] = cost, chosen | {group: one.option}
        sums = _undominated(grown)
    left = {size: cost for size, (cost, _) in sums.items() if size > 0}
    best = lowest(left)
    return None if best is None else sums[best][1]


def _undominated(sums: _Sums) -> _Sums:
    """Leave out sums that another one with fewer bytes matches; the empty adapter matches none."""
    found: _Sums = {}
    least = math.inf
    for size in sorted(sums):
        cost = sums[size][0]
        if size == 0 or cost < least:
            found[size] = sums[size]
            least = least if size == 0 else cost
    return found


def added(losses: Sequence[float], base: Sequence[float], groups: Sequence[Hashable]) -> Gain:
    """Return the loss added to that of the same examples, as a mean with its standard error.

    Args:
        losses: of each example, in nats.
        base: of each example without the change.
        groups: group of each example.

    Returns:
        The mean; it is infinite where a loss is not finite. The error is 0 where all examples are
        of one group, which tells none.
    """
    gaps = [loss - before for loss, before in zip(losses, base, strict=True)]
    if not all(map(math.isfinite, gaps)):
        return Gain(math.inf, 0.0, len(set(groups)))
    return mean_gain(gaps, groups) or Gain(statistics.fmean(gaps), 0.0, 1)


def cost_of(gain: Gain) -> float:
    """Return what an option counts as: the loss it adds, at least 0, and one standard error.

    So an option that seems to gain does not count as a gain, which may be chance, and of options
    that seem free the one whose losses are nearest to the adapter's is taken first.
    """
    return max(gain.gain, 0.0) + gain.error


def adds_up(
    whole: Sequence[float],
    base: Sequence[float],
    singles: Sequence[Sequence[float]],
    groups: Sequence[Hashable],
) -> Gain:
    """Return how much worse the whole is than the sum of its options says, in nats.

    Args:
        whole: loss of each example with all options at once.
        base: loss of each example without any.
        singles: the same with each option alone.
        groups: group of each example.
    """
    expected = [
        before + math.fsum(own[place] - before for own in singles)
        for place, before in enumerate(base)
    ]
    return added(whole, expected, groups)
