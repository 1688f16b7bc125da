"""grasp-lora: merge LoRA adapters and learn how much of the merge to prune.

The public names are looked up when first used (PEP 562), so `import grasp_lora` and
`grasp-lora --help` load neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "grasp_lora.config.run_config",
    "RunConfig": "grasp_lora.config.run_config",
    "load_config": "grasp_lora.config.run_config",
}

__all__ = ["ConfigError", "RunConfig", "__version__", "load_config"]

if TYPE_CHECKING:
    from grasp_lora.config.run_config import ConfigError, RunConfig, load_config


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
