"""Choose the lowest of several losses; what is not finite is never chosen.

A comparison with NaN is always false, so `min` may return NaN as the lowest of all.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def lowest(losses: Mapping[Name, float | None]) -> Name | None:
    """Return the name with the lowest finite loss, the first of equal ones; None if none is finite.

    Args:
        losses: name -> loss; None (JSON's null) counts as not finite.
    """
    finite = {n: loss for n, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=lambda name: finite[name]) if finite else None


def not_finite(losses: Mapping[Name, float | None]) -> list[Name]:
    """Return the names whose loss is NaN, infinite or None."""
    return [n for n, loss in losses.items() if loss is None or not math.isfinite(loss)]
