"""grasp-lora: merge LoRA adapters and learn how much of the merge to prune.

The public names are looked up when first used (PEP 562), so `import grasp_lora` and
`grasp-lora --help` load neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "grasp_lora.config.run_config",
    "ControllerConfig": "grasp_lora.core.controller.settings",
    "RatioSearch": "grasp_lora.training.ratio_search",
    "RunConfig": "grasp_lora.config.run_config",
    "evaluate": "grasp_lora.plans.public",
    "export": "grasp_lora.sharing.public",
    "load_config": "grasp_lora.config.run_config",
    "load_quantized": "grasp_lora.adapters.packed",
    "merge_adapters": "grasp_lora.adapters.merging",
    "run": "grasp_lora.plans.public",
}

__all__ = [
    "ConfigError",
    "ControllerConfig",
    "RatioSearch",
    "RunConfig",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "load_quantized",
    "merge_adapters",
    "run",
]

if TYPE_CHECKING:
    from grasp_lora.adapters.merging import merge_adapters
    from grasp_lora.adapters.packed import load_quantized
    from grasp_lora.config.run_config import ConfigError, RunConfig, load_config
    from grasp_lora.core.controller.settings import ControllerConfig
    from grasp_lora.plans.public import evaluate, run
    from grasp_lora.sharing.public import export
    from grasp_lora.training.ratio_search import RatioSearch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
