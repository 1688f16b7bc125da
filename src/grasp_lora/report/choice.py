"""What a run that chose its recipe ships, why, what it tried and what it cost, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

NO_VALUE = "\N{EN DASH}"


def ship_line(choice: Mapping[str, Any], final: str) -> str:
    """Return the first line of the result.

    Args:
        choice: the content of `recipe.json`.
        final: the path of the adapter.
    """
    parts = [f"SHIP {final}: {choice['ships']}", f"dev {choice['dev_loss']:.3f}"]
    simple, gain = choice["simple"], choice["gain"]
    if simple is not None and choice["trained"]:
        parts.append(f"best without training {simple['dev_loss']:.3f} ({simple['name']})")
        if gain is not None:
            low, high = gain["interval"]
            parts.append(f"{-gain['gain']:+.3f} [{-high:+.3f}, {-low:+.3f}]")
    return " | ".join(parts)


def tried_lines(choice: Mapping[str, Any], ratio: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that was tried and is not shipped, then one on the price."""
    lines = [f"tried, not shipped: {_tried(one)}" for one in choice["tried"] if not one["shipped"]]
    lines.append(_ratio_line(ratio))
    price = choice["price"]
    lines.append(
        f"cost: {price['plain_runs']:.2f} of {price['budget']:g} plain fine-tuning runs "
        f"({price['tokens']:,} tokens), the training on all labels included"
    )
    return lines


def _tried(one: Mapping[str, Any]) -> str:
    if one["refused"]:
        return f"{one['says']}: {one['refused']}"
    return f"{one['says']}: dev {one['dev_loss']:.3f} after {one['epochs']} epochs ({one['path']})"


def _ratio_line(ratio: Mapping[str, Any]) -> str:
    evidence = ratio.get("evidence") or {}
    shown = ""
    if evidence:
        shown = f" (gain of the best ratio {evidence['gain']:+.3f} nats, standard error "
        shown += f"{evidence['standard_error']:.3f})"
    return f"prune ratio {ratio['ratio']:g}, verdict {ratio['verdict']}{shown}"


def choice_markdown(choice: Mapping[str, Any], ratio: Mapping[str, Any]) -> str:
    """Return the head of the report: what is shipped, then a table of all that was measured."""
    lines = [f"**{ship_line(choice, 'final')}**", "", choice["why"], ""]
    lines += ["![loss of the held examples by trial and epoch](recipe.png)", ""]
    lines += ["| what | dev loss | epochs | path |", "|---|---:|---:|---|"]
    for one in choice["tried"]:
        loss = NO_VALUE if one["dev_loss"] is None else f"{one['dev_loss']:.3f}"
        epochs = NO_VALUE if one["epochs"] is None else str(one["epochs"])
        lines.append(f"| {one['says']} | {loss} | {epochs} | `{one['path']}` |")
    for one in choice["simple_systems"]:
        lines.append(f"| {one['name']} | {one['dev_loss']:.3f} | {NO_VALUE} | `{one['path']}` |")
    return "\n".join([*lines, "", *(f"- {line}" for line in tried_lines(choice, ratio)), ""])


def systems_with_paths(systems: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each system of a table that has a folder."""
    return [f"- {one['name']}: `{one['path']}`" for one in systems if one.get("path")]
