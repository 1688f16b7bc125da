"""Refuse adapter folders with anything but plain LoRA on linear modules.

Only adapters that add `scaling * B @ A` to weights can be merged and pruned. Ignoring other
features would silently load another model.
"""

from collections.abc import Callable, Mapping
from typing import Any

from grasp_lora.base.words import shown

# Initialisations that change the base weights, so that the factors belong to another base model.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_RETRAIN = "train the adapter without it"

# Setting of PEFT's LoraConfig -> (whether a value means it is used, its meaning, the remedy).
_REFUSED_SETTINGS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "use_dora": (bool, "DoRA (a learned magnitude beside A and B)", _RETRAIN),
    "lora_bias": (bool, "a bias inside the LoRA factors", _RETRAIN),
    "bias": (lambda value: value not in (None, "none"), "trained bias vectors", "use bias='none'"),
    "modules_to_save": (bool, "modules trained in full beside LoRA", _RETRAIN),
    "trainable_token_indices": (bool, "trained token embeddings", _RETRAIN),
    "target_parameters": (
        bool,
        "LoRA on bare parameters (experts of a mixture)",
        "target linear modules with target_modules",
    ),
    "layer_replication": (bool, "replicated layers", _RETRAIN),
    "alora_invocation_tokens": (bool, "activated LoRA (active only after an invocation)", _RETRAIN),
    "use_qalora": (bool, "QALoRA (inputs pooled before A)", _RETRAIN),
    "use_bdlora": (bool, "block-diagonal LoRA", _RETRAIN),
    "velora_config": (bool, "VeLoRA", _RETRAIN),
    "monteclora_config": (bool, "MonteCLoRA", _RETRAIN),
    "kasa_config": (bool, "KaSA", _RETRAIN),
    "arrow_config": (bool, "Arrow routing", _RETRAIN),
    "init_lora_weights": (
        lambda value: isinstance(value, str) and value.lower().startswith(BASE_CHANGING_INITS),
        "an initialisation that changes the base weights",
        "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
    ),
}

# Part of a tensor name -> meaning of the tensor. The first part that occurs is reported.
_REFUSED_TENSORS: dict[str, str] = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_": "LoRA on an embedding",
    "token_adapter": "trained token embeddings",
    "trainable_tokens": "trained token embeddings",
    "modules_to_save": "a module trained in full",
    "lora_A.bias": "a bias inside the LoRA factors",
    "lora_B.bias": "a bias inside the LoRA factors",
    "base_layer": "a base weight saved with the adapter",
    "embed": "an embedding saved with the adapter",
    "lm_head": "an output layer saved with the adapter",
    ".bias": "a trained bias",
}

# Usual names of output layers, to refuse LoRA on them before a model is loaded.
_OUTPUT_LAYERS = ("lm_head", "embed_out")


def refuse_settings(config: Mapping[str, Any], folder: object) -> None:
    """Refuse an adapter config that is not plain LoRA.

    Args:
        config: content of `adapter_config.json`.
        folder: adapter folder, for messages.

    Raises:
        ValueError: the adapter is not LoRA, or uses a setting that cannot be merged.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{folder}: peft_type is {shown(kind)}, only 'LORA' adapters can be merged and pruned; "
            "give a LoRA adapter"
        )
    for setting, (in_use, meaning, remedy) in _REFUSED_SETTINGS.items():
        value = config.get(setting)
        if in_use(value):
            raise ValueError(
                f"{folder}: {setting}={shown(value)} means {meaning}, which plain LoRA factors "
                f"cannot carry; {remedy}"
            )


def refuse_tensor(key: str, folder: object) -> None:
    """Raise the error for a tensor that is not a LoRA factor of a linear module.

    Raises:
        ValueError: always; it says what the tensor is.
    """
    for part, meaning in _REFUSED_TENSORS.items():
        if part in key:
            raise ValueError(
                f"{folder}: tensor {shown(key)} is {meaning}; only A and B of linear modules can "
                f"be merged and pruned: {_RETRAIN}"
            )
    raise ValueError(
        f"{folder}: tensor {shown(key)} has an unknown name; expected names like "
        "'base_model.model.<module>.lora_A.weight' as PEFT's save_pretrained writes them"
    )


def refuse_output_layer(module: str, folder: object) -> None:
    """Refuse LoRA on an output layer, recognised by its usual names.

    Raises:
        ValueError: `module` is an output layer.
    """
    if module.rsplit(".", 1)[-1] in _OUTPUT_LAYERS:
        raise ValueError(
            f"{folder}: LoRA on the output layer ({shown(module)}) is not supported, since it is "
            "often tied to the input embedding and a merge would then change both; train the "
            "adapter without it in target_modules"
        )
