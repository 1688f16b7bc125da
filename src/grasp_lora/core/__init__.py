"""The method in tensors and numbers: merge, importance, masks, controller. No I/O, no logging.

The names are looked up when first used (PEP 562), so reading the settings does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "IMPORTANCE": "importance",
    "MERGES": "lora",
    "PRESETS": "settings",
    "Adapter": "lora",
    "ControllerConfig": "settings",
    "ControllerState": "rounds",
    "LoraFactors": "lora",
    "Mask": "masks",
    "MergedModule": "lora",
    "Part": "lora",
    "RatioChoice": "verdict",
    "RoundRecord": "history",
    "average_weights": "lora",
    "begin": "rounds",
    "choose_ratio": "rounds",
    "conclude": "rounds",
    "draw_rows": "schedule",
    "is_blank": "importance",
    "is_due": "schedule",
    "keep_masks": "masks",
    "lora_scaling": "lora",
    "merge": "lora",
    "planned_rounds": "schedule",
    "propose": "rounds",
    "pruned_count": "masks",
    "state_from_json": "rounds",
    "state_to_json": "rounds",
    "zero_fraction": "masks",
}

__all__ = [
    "IMPORTANCE",
    "MERGES",
    "PRESETS",
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
    "draw_rows",
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
    from grasp_lora.core.history import RoundRecord
    from grasp_lora.core.importance import IMPORTANCE, is_blank
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
    from grasp_lora.core.masks import Mask, keep_masks, pruned_count, zero_fraction
    from grasp_lora.core.rounds import (
        ControllerState,
        begin,
        choose_ratio,
        conclude,
        propose,
        state_from_json,
        state_to_json,
    )
    from grasp_lora.core.schedule import draw_rows, is_due, planned_rounds
    from grasp_lora.core.settings import PRESETS, ControllerConfig
    from grasp_lora.core.verdict import RatioChoice


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_lora.core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"grasp_lora.core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
