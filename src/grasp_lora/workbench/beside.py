"""Rows that are trained on beside the labelled ones: which sets, and how many in an epoch.

This is our departure from arXiv 2601.06702, which trains on the labelled rows alone.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from grasp_lora.config.run_config import RunConfig
from grasp_lora.workbench.rows import RunData

Split = tuple[str, str]
Weights = Mapping[Split, float]
"""Set of examples, (role, split) -> rows of it that an epoch reads for every labelled row."""

EXTRA: Split = ("extra", "train")
SOURCE: Split = ("source", "train")
NOTHING: Weights = MappingProxyType({})


def beside_target(config: RunConfig, joint: bool = False) -> Weights:
    """Return the sets that stand beside the target rows of a training.

    Args:
        config: the run's settings; `data.extra` gives rows.
        joint: as many source rows as target rows stand beside them too.
    """
    found: dict[Split, float] = {}
    if config.data.extra is not None:
        found[EXTRA] = config.data.extra.weight
    return found | ({SOURCE: 1.0} if joint else {})


def settings_of(beside: Weights) -> tuple[str, ...]:
    """Return the dotted settings that decide what is read of these sets, and how often."""
    weights = ("data.extra.weight",) if EXTRA in beside else ()
    return (*(f"data.{role}.prompt" for role, _ in beside), *weights)


def wanted_beside(weight: float, labelled: int) -> int:
    """Return how many rows an epoch is to read beside `labelled` rows: the nearest, at least 1."""
    return max(1, math.floor(weight * labelled + 0.5))


def read_beside(weight: float, labelled: int, there: int) -> int:
    """Return how many of `there` rows an epoch reads beside `labelled` rows: none of them twice."""
    return min(there, wanted_beside(weight, labelled))


def target_epoch(config: RunConfig, data: RunData) -> int:
    """Return the rows of an epoch on the target train rows, with the extra rows beside them."""
    labelled = len(data.parts["target"].get("train", ()))
    return labelled + sum(
        read_beside(weight, labelled, len(data.parts[role][split]))
        for (role, split), weight in beside_target(config).items()
    )
