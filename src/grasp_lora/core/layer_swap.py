"""Merge two adapters by layers: one in the outer layers, the other in the middle."""

from collections.abc import Mapping

from grasp_lora.core.lora import Adapter, MergedModule, merge

OUTER = 0.25
"""Share of the layers that counts as outer at each end."""


def layer_of(module: str) -> int | None:
    """Return the first number in a module's name, which is its layer; None without one."""
    numbers = [part for part in module.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def outer_layers(adapters: Mapping[str, Adapter]) -> frozenset[int]:
    """Return the layers that count as outer, of those that any of the adapters changes.

    At each end these are a quarter of the layers, rounded half up, at least one.

    Raises:
        ValueError: There are fewer than three layers, so there is no middle.
    """
    names = {name for adapter in adapters.values() for name in adapter}
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    if len(layers) < 3:
        raise ValueError(
            f"a layer swap needs adapters that change at least three layers, these change "
            f"{len(layers)}; use another merge"
        )
    count = max(1, int(OUTER * len(layers) + 0.5))
    return frozenset(layers[:count] + layers[-count:])


def layer_swap(source: Adapter, target: Adapter) -> dict[str, MergedModule]:
    """Return the target adapter's outer layers and the source adapter's middle ones.

    Modules outside all layers are the target adapter's. A module that its adapter lacks is left
    out. As in Layer Swapping (arXiv 2410.01335), but for adapters of one task in two languages, in
    place of fully trained experts of a task and of a language, and without layers of transition.

    Raises:
        ValueError: There is no middle, or an adapter has no module in its layers.
    """
    outer = outer_layers({"source": source, "target": target})

    def of_target(name: str) -> bool:
        layer = layer_of(name)
        return layer is None or layer in outer

    middle = {name: one for name, one in source.items() if not of_target(name)}
    ends = {name: one for name, one in target.items() if of_target(name)}
    for role, kept, where in (("source", middle, "middle"), ("target", ends, "outer")):
        if not kept:
            raise ValueError(
                f"the {role} adapter changes none of the {where} layers, so a layer swap would "
                "leave nothing of it; use another merge"
            )
    return merge("cat", [middle, ends], [1.0, 1.0])
