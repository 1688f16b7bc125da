"""Compute the method on tensors and numbers: merge, importance, masks, controller.

Nothing here reads or writes files or logs. Each name is imported at its first use (PEP 562), so
reading the settings does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "IMPORTANCE": "pruning.importance",
    "MERGES": "lora",
    "CONTROLLER_PRESETS": "controller.settings",
    "Adapter": "lora",
    "ControllerConfig": "controller.settings",
    "ControllerState": "controller.rounds",
    "LoraFactors": "lora",
    "Mask": "pruning.masks",
    "MergedModule": "lora",
    "Part": "lora",
    "RatioChoice": "evidence.verdict",
    "RoundRecord": "evidence.history",
    "average_weights": "lora",
    "begin": "controller.rounds",
    "choose_ratio": "controller.rounds",
    "conclude": "controller.rounds",
    "draw_examples": "controller.schedule",
    "is_blank": "pruning.importance",
    "is_due": "controller.schedule",
    "keep_masks": "pruning.masks",
    "lora_scaling": "lora",
    "merge": "lora",
    "planned_rounds": "controller.schedule",
    "propose": "controller.rounds",
    "pruned_count": "pruning.masks",
    "state_from_json": "controller.rounds",
    "state_to_json": "controller.rounds",
    "zero_fraction": "pruning.masks",
}

__all__ = [
    "CONTROLLER_PRESETS",
    "IMPORTANCE",
    "MERGES",
    "Adapter",
    "ControllerConfig",
    "ControllerState",
    "LoraFactors",
    "Mask",
    "MergedModule",
    "Part",
    "RatioChoice",
    "RoundRecord",
    "average_weights",
    "begin",
    "choose_ratio",
    "conclude",
    "draw_examples",
    "is_blank",
    "is_due",
    "keep_masks",
    "lora_scaling",
    "merge",
    "planned_rounds",
    "propose",
    "pruned_count",
    "state_from_json",
    "state_to_json",
    "zero_fraction",
]

if TYPE_CHECKING:
    from grasp_lora.core.controller.rounds import (
        ControllerState,
        begin,
        choose_ratio,
        conclude,
        propose,
        state_from_json,
        state_to_json,
    )
    from grasp_lora.core.controller.schedule import draw_examples, is_due, planned_rounds
    from grasp_lora.core.controller.settings import CONTROLLER_PRESETS, ControllerConfig
    from grasp_lora.core.evidence.history import RoundRecord
    from grasp_lora.core.evidence.verdict import RatioChoice
    from grasp_lora.core.lora import (
        MERGES,
        Adapter,
        LoraFactors,
        MergedModule,
        Part,
        average_weights,
        lora_scaling,
        merge,
    )
    from grasp_lora.core.pruning.importance import IMPORTANCE, is_blank
    from grasp_lora.core.pruning.masks import Mask, keep_masks, pruned_count, zero_fraction


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_lora.core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"grasp_lora.core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
