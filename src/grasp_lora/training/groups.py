"""Groups of blocks that each have their own ratio, and how the groups differ."""

from collections.abc import Callable, Mapping

from grasp_lora.base.words import shown
from grasp_lora.core.layer_swap import layer_of
from grasp_lora.core.pruning.profile import Place, Slopes, slopes_of
from grasp_lora.training.live import Block, BlockRatio, LiveAdapter

SCOPES: Mapping[str, Callable[[Block], str]] = {
    "global": lambda block: "all",
    "module-type": lambda block: block.module.rpartition(".")[2],
    "layer": lambda block: _layer(block.module),
    "adapter": lambda block: f"adapter {block.source}",
    "policy": lambda block: (
        block.module if block.source is None else f"{block.module} adapter {block.source}"
    ),
}
"""Scope -> function from a block to the name of its group."""


def _layer(module: str) -> str:
    """Return the group of a module's layer, or "outside"."""
    layer = layer_of(module)
    return "outside" if layer is None else f"layer {layer}"


def place_of(block: Block) -> Place:
    """Return where a block lies: its layer, the part of the layer, its type and its adapter."""
    layer, names = layer_of(block.module), block.module.split(".")
    part = "" if layer is None else names[names.index(str(layer)) + 1]
    return Place(layer, part, names[-1], block.source)


def slopes(live: LiveAdapter) -> Slopes:
    """Return how the groups of scope `policy` differ, in the order of the model."""
    order = {module: place for place, module in enumerate(live.layers)}
    blocks = sorted(live.blocks, key=lambda block: order[block.module])
    places = {SCOPES["policy"](block): place_of(block) for block in blocks}
    return slopes_of(places, group_sizes(live, "policy"))


def group_sizes(live: LiveAdapter, scope: str) -> dict[str, int]:
    """Return group -> number of entries, in the order of the adapter's blocks."""
    sizes: dict[str, int] = {}
    for block, a, b in live.effective_blocks():
        group = SCOPES[scope](block)
        sizes[group] = sizes.get(group, 0) + a.numel() + b.numel()
    return sizes


def ratio_by_group(scope: str, ratios: Mapping[str, float]) -> BlockRatio:
    """Return the function from a block to its group's ratio, for `LiveAdapter.masks`.

    The returned function raises a ValueError for a block whose group has no ratio.

    Args:
        scope: a key of `SCOPES`.
        ratios: group -> fraction removed, in [0, 1].
    """

    def ratio_of(block: Block) -> float:
        group = SCOPES[scope](block)
        if group not in ratios:
            raise ValueError(
                f"no ratio for {shown(group)} of scope {scope}, only for {', '.join(ratios)}; the "
                "ratios were learned on another adapter, so search again"
            )
        return ratios[group]

    return ratio_of
