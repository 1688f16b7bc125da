"""Names of an adapter's tensors: those in its file, and those of the model it is put on.

transformers has renamed modules of some models, so an adapter that was saved earlier has the older
names. The rules of PEFT and transformers turn them into the names of today.
"""

import re
from collections.abc import Mapping

from peft import PeftConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import Tensor, nn

_PREFIX = "base_model.model."


def by_model_rules(
    tensors: Mapping[str, Tensor], config: PeftConfig, model: nn.Module
) -> dict[str, Tensor]:
    """Return the tensors by the names that the model's own class gives to older ones.

    Models whose code comes with their weights may have such rules; `PeftModel.from_pretrained`
    applies the first that matches.

    Args:
        tensors: name in the adapter's file -> tensor.
        config: config of the adapter; names of prompts are kept.
        model: the base model.
    """
    rules: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    if config.is_prompt_learning or not rules:
        return dict(tensors)
    return {_renamed(key, rules): tensor for key, tensor in tensors.items()}


def _renamed(key: str, rules: Mapping[str, str]) -> str:
    name = key.removeprefix(_PREFIX)
    for pattern, replacement in rules.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return key.removesuffix(name) + renamed
    return key


def names_of_today(
    tensors: Mapping[str, Tensor], config: PeftConfig, model: nn.Module, folder: object
) -> dict[str, Tensor]:
    """Return the tensors as `set_peft_model_state_dict` renames and joins them for a model.

    Args:
        tensors: name in the adapter's file -> tensor.
        config: config of the adapter.
        model: the base model, or the PeftModel around it.
        folder: adapter folder, for messages.

    Raises:
        ValueError: PEFT cannot bring the tensors into the form of this model.
    """
    try:
        return convert_peft_adapter_state_dict_for_transformers(model, config, dict(tensors))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder}: PEFT cannot bring the tensors into the form that this model has today "
            f"({str(error).splitlines()[0]}); give an adapter "
            "saved by newer versions, or install those that saved this one"
        ) from error
