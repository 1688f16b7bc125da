"""Give every group of tensors a ratio by a few numbers: a level and at most three tilts.

A *profile* is an overall ratio, the level, and one *tilt* for each way in which groups differ: how
deep they lie, which module they belong to, and which adapter they came from. A tilt says how much
more is pruned at the later end than at the first. So a layer-wise policy has at most four numbers,
few enough for the probes of a search.

Our departure from AMC (arXiv 1802.03494), whose policy gives one ratio after the other, layer by
layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grasp_lora.core.pruning.group_ratios import balanced_ratios

TILTS = ("depth", "module", "adapter")
"""Names of the tilts: last layer against first, later modules against first, later adapters against
first."""
MOST_TILT = 0.6
"""Largest size of a tilt, in units of ratio."""


@dataclass(frozen=True)
class Profile:
    """The ratios of all groups in a few numbers.

    Attributes:
        level: overall fraction removed, in [0, 1].
        tilts: how much more is removed at the later end of each way to differ than at the first,
            before clipping, in [-1, 1]; empty for one ratio for all.
    """

    level: float
    tilts: tuple[float, ...] = ()

    @property
    def tilted(self) -> bool:
        """Whether groups may differ."""
        return any(self.tilts)


@dataclass(frozen=True)
class Place:
    """Where a group of tensors lies.

    Attributes:
        layer: number of the layer; None outside all layers.
        part: part of the layer, such as its attention.
        kind: type of the module.
        adapter: number of the adapter it came from; None if adapters are not told apart.
    """

    layer: int | None
    part: str
    kind: str
    adapter: int | None


@dataclass(frozen=True)
class Slopes:
    """How groups of tensors differ.

    Attributes:
        names: the tilts that tell groups apart, a part of `TILTS` in its order.
        positions: group -> position along each tilt, from -0.5 (first) to 0.5 (last).
        sizes: group -> number of entries.
    """

    names: tuple[str, ...]
    positions: Mapping[str, tuple[float, ...]]
    sizes: Mapping[str, int]


def slopes_of(places: Mapping[str, Place], sizes: Mapping[str, int]) -> Slopes:
    """Return how groups differ; a way in which all are alike is left out.

    Depth goes evenly from the first layer that is adapted to the last. The module is the first part
    of a layer (its attention) against the others. If only one part is adapted, it is the first half
    of its types of modules, rounded up, against the others (q against v; q and k against v and o).
    The adapter is the first one against the others. What lies outside all layers is in the middle
    of depth and module.

    Args:
        places: group -> where it lies, in the order of the model.
        sizes: group -> number of entries.
    """
    inside = [place for place in places.values() if place.layer is not None]
    layers = sorted({place.layer for place in inside if place.layer is not None})
    parts = list(dict.fromkeys(place.part for place in inside))
    kinds = list(dict.fromkeys(place.kind for place in inside))
    first = set(parts[:1]) if len(parts) > 1 else set(kinds[: math.ceil(len(kinds) / 2)])
    adapters = sorted({p.adapter for p in places.values() if p.adapter is not None})

    def along(place: Place) -> tuple[float, float, float]:
        depth = module = adapter = 0.0
        if place.layer is not None:
            depth = layers.index(place.layer) / max(1, len(layers) - 1) - 0.5
            own = place.part if len(parts) > 1 else place.kind
            module = -0.5 if own in first else 0.5
        if place.adapter is not None:
            adapter = -0.5 if place.adapter == adapters[0] else 0.5
        return depth, module, adapter

    found = {group: along(place) for group, place in places.items()}
    columns = list(zip(*found.values(), strict=True))
    kept = [i for i in range(len(TILTS)) if columns and len(set(columns[i])) > 1]
    return Slopes(
        tuple(TILTS[i] for i in kept),
        {group: tuple(position[i] for i in kept) for group, position in found.items()},
        dict(sizes),
    )


def profile_ratios(
    profile: Profile, slopes: Slopes, low: float = 0.0, high: float = 1.0
) -> dict[str, float]:
    """Return group -> fraction removed, in [low, high]; overall it is the profile's level.

    A group's ratio is the level plus each tilt times the group's position, plus one offset for all
    that keeps the overall fraction of entries, clipped to [low, high].

    Args:
        profile: level in [low, high], and a tilt for each name of `slopes`, or none.
        slopes: how the groups differ, with their numbers of entries.
        low: smallest ratio of a group.
        high: largest ratio of a group.
    """
    tilts = profile.tilts or (0.0,) * len(slopes.names)
    shifts = {
        group: math.fsum(t * p for t, p in zip(tilts, position, strict=True))
        for group, position in slopes.positions.items()
    }
    return balanced_ratios(profile.level, shifts, slopes.sizes, bounds=(low, high))


def limited(level: float, tilts: Sequence[float], low: float, high: float) -> tuple[float, ...]:
    """Return the tilts, all of them smaller where the level leaves them too little room.

    At the level `low` or `high` all groups have one ratio. In between no group at an end of every
    tilt leaves [low, high], and a tilt is at most `MOST_TILT`.

    Args:
        level: overall fraction removed, in [low, high].
        tilts: in units of ratio.
        low: smallest ratio of a group.
        high: largest ratio of a group.
    """
    room = max(0.0, min(2 * (level - low), 2 * (high - level)))
    held = [min(MOST_TILT, max(-MOST_TILT, tilt)) for tilt in tilts]
    needed = math.fsum(map(abs, held))
    return tuple(tilt * min(1.0, room / needed) if needed else 0.0 for tilt in held)
