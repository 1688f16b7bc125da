"""What the terminal and the report say of a run's examples, in the same words."""

from collections.abc import Mapping
from typing import Any


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
