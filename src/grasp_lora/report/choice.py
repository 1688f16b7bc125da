"""What a run that chose its recipe ships, why, what it tried and what it cost, in words."""

from collections.abc import Mapping, Sequence
from typing import Any


def not_applicable(why: str) -> str:
    """Return how everything that is read says that something cannot be used here."""
    return f"n/a: {why}"


def budget_line(budget: float, plain: tuple[int, int, float], reserved: tuple[float, float]) -> str:
    """Return what a choice may spend, what a plain run is, and what is kept in reserve.

    Args:
        budget: in plain runs.
        plain: epochs, train examples and tokens of a plain run.
        reserved: tokens kept for measurements, and for one training on all labels.
    """
    epochs, rows, tokens = plain
    measured, labelled = (share / tokens for share in reserved)
    return (
        f"budget: {budget:g} plain runs ({budget * tokens:,.0f} tokens); a plain run fine-tunes an "
        f"adapter as configured, {epochs} epochs of {rows} rows ({tokens:,.0f} tokens); reserved: "
        f"{measured:.2f} runs for measurements, {labelled:.2f} for a training on all labels; what "
        "is left goes to trials. The two adapters and the test scores are not counted"
    )


def asked_line(names: Sequence[str], spent: float, most: float) -> str:
    """Return which trials are next, what was spent before and what they cost, in plain runs."""
    return f"spent {spent:.2f} plain runs; next: {', '.join(names)}, at most {most:.2f}"


def ship_parts(choice: Mapping[str, Any], final: str) -> list[str]:
    """Return the first line of the result, in parts.

    Args:
        choice: the content of `recipe.json`.
        final: the path of the adapter.
    """
    parts = [f"SHIP {final}: {choice['ships']}"]
    if choice["dev_loss"] is not None:
        parts.append(f"dev {choice['dev_loss']:.3f}")
    simple, gain = choice["simple"], choice["gain"]
    if simple is not None and choice["trained"]:
        parts.append(f"best without training {simple['dev_loss']:.3f} ({simple['name']})")
        if gain is not None:
            low, high = gain["interval"]
            parts.append(f"expected {-gain['gain']:+.3f} [{-high:+.3f}, {-low:+.3f}]")
    return parts


def tried_lines(choice: Mapping[str, Any], ratio: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that was tried and is not shipped, then one on the price."""
    lines = [
        f"tried, not shipped: {_tried(one)}"
        for one in choice["tried"]
        if not one["shipped"] and not one["refused"]
    ]
    lines += [f"{name}: {why}" for name, why in choice["not_applicable"].items()]
    lines += choice["notes"]
    lines.append(ratio_line(ratio))
    price = choice["price"]
    lines.append(
        f"cost: {price['plain_runs']:.2f} of {price['budget']:g} plain fine-tuning runs "
        f"({price['tokens']:,} tokens), the training on all labels included"
    )
    return lines


def _tried(one: Mapping[str, Any]) -> str:
    return f"{one['says']}: dev {one['dev_loss']:.3f} after {one['epochs']} epochs ({one['path']})"


def ratio_line(ratio: Mapping[str, Any]) -> str:
    """Return the ratio, its verdict, and the gain of the best ratio where ratios were judged."""
    evidence = ratio.get("evidence") or {}
    shown = ""
    if evidence:
        shown = f" (gain of the best ratio {evidence['gain']:+.3f} nats, standard error "
        shown += f"{evidence['standard_error']:.3f})"
    return f"prune ratio {ratio['ratio']:g}, verdict {ratio['verdict']}{shown}"


def measured_trials(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the trials that measured anything."""
    return [one for one in choice["tried"] if one["curve"] and not one["refused"]]
