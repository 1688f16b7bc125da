"""What the terminal and the report say of a run's examples, in the same words."""

from collections.abc import Mapping
from typing import Any


def known_line(facts: Mapping[str, Any]) -> str:
    """Return a warning of examples that the target adapter may have been trained on.

    Args:
        facts: those of `core.evidence.known.KnownRows`, with `all`, the number of examples that
            were looked at.
    """
    return (
        f"adapters.target knows {len(facts['rows'])} of {facts['all']} dev and micro-dev rows "
        f"suspiciously well (loss {facts['loss']:.3f}, and {facts['others']:.3f} at best without "
        "it): if it was trained on them, they choose for it; name them in "
        "adapters.trained_on.target"
    )


def trained_on_line(role: str, facts: Mapping[str, Any]) -> str:
    """Return a line on the rows that a given adapter was trained on.

    Args:
        role: "source" or "target".
        facts: what `data.json` has of them: `from`, `rows` and `in_train`.
    """
    return (
        f"adapters.{role} was trained on the {facts['rows']} rows of {facts['from']}: "
        f"{facts['in_train']} of the target train rows are of their contexts"
    )
