"""Refuse adapter folders with anything but plain LoRA on linear modules.

Only adapters that add `scaling * B @ A` to weights can be merged and pruned. Ignoring other
features would silently load another model.
"""

import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from grasp_lora.base.words import shown

# Initialisations that change the base weights, so that the factors belong to another base model.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Who gives an adapter has seldom trained it.
_REMEDY = "give one trained without it; only grasp-lora evaluate takes other kinds"

# Setting of PEFT's LoraConfig -> (whether a value means it is used, its meaning, the remedy).
_REFUSED_SETTINGS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "use_dora": (bool, "DoRA (a learned magnitude beside A and B)", _REMEDY),
    "lora_bias": (bool, "a bias inside the LoRA factors", _REMEDY),
    "bias": (lambda value: value not in (None, "none"), "trained bias vectors", _REMEDY),
    "modules_to_save": (bool, "modules trained in full beside LoRA", _REMEDY),
    "trainable_token_indices": (bool, "trained token embeddings", _REMEDY),
    "target_parameters": (
        bool,
        "LoRA on bare parameters (experts of a mixture)",
        _REMEDY,
    ),
    "layer_replication": (bool, "replicated layers", _REMEDY),
    "alora_invocation_tokens": (bool, "activated LoRA (active only after an invocation)", _REMEDY),
    "use_qalora": (bool, "QALoRA (inputs pooled before A)", _REMEDY),
    "use_bdlora": (bool, "block-diagonal LoRA", _REMEDY),
    "velora_config": (bool, "VeLoRA", _REMEDY),
    "monteclora_config": (bool, "MonteCLoRA", _REMEDY),
    "kasa_config": (bool, "KaSA", _REMEDY),
    "arrow_config": (bool, "Arrow routing", _REMEDY),
    "init_lora_weights": (
        lambda value: isinstance(value, str) and value.lower().startswith(BASE_CHANGING_INITS),
        "an initialisation that changes the base weights",
        "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
    ),
}

# Part of a tensor name -> meaning of the tensor. The first part that occurs is reported.
_REFUSED_TENSORS: dict[str, str] = {
    "experts.base_layer.": "LoRA on the experts of a mixture",
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

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embeddings", "embed_in", *_OUTPUT_LAYERS)
"""Usual names of input and output embeddings, which PEFT may save along."""

# PEFT removes it: it says how an adapter is run, not what it computes.
_OF_A_PROCESS = "runtime_config"


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


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of an adapter config that the installed PEFT does not know, sorted.

    They come from a newer PEFT, which writes all its settings whether they are used or not.

    Args:
        config: content of `adapter_config.json`. If PEFT does not know its type, none are returned.
    """
    if config.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return []
    return sorted(config.keys() - _known(config) - {_OF_A_PROCESS})


def known_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an adapter config that the installed PEFT reads from a file.

    Args:
        config: content of `adapter_config.json`, of a type that PEFT knows.
    """
    return {name: config[name] for name in config.keys() & _known(config) - {_OF_A_PROCESS}}


def _known(config: Mapping[str, Any]) -> Set[str]:
    return inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]).parameters.keys()


def refuse_unknown(config: Mapping[str, Any], folder: object) -> None:
    """Refuse a setting that the installed PEFT does not know, if it is in use.

    PEFT ignores such a setting, and the adapter computes something else than it was trained to. A
    setting that is false, empty or none is not in use.

    Args:
        config: content of `adapter_config.json`, of a type that PEFT knows.
        folder: adapter folder, for messages.

    Raises:
        ValueError: a setting is in use.
    """
    for setting in unknown_settings(config):
        if config[setting]:
            raise ValueError(
                f"{folder}: the installed PEFT does not know the setting {setting}="
                f"{_shortened(config[setting])} in adapter_config.json, which may change what the "
                "adapter computes; upgrade PEFT (pip install -U peft), or take the setting out of "
                "the file if it changes nothing"
            )


def _shortened(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def refuse_tensor(key: str, folder: object) -> None:
    """Raise the error for a tensor that is not a LoRA factor of a linear module.

    Raises:
        ValueError: always; it says what the tensor is.
    """
    for part, meaning in _REFUSED_TENSORS.items():
        if part in key:
            raise ValueError(
                f"{folder}: tensor {shown(key)} is {meaning}; only A and B of linear modules can "
                f"be merged and pruned: {_REMEDY}"
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
            "often tied to the input embedding and a merge would then change both; give one "
            "without it in target_modules; only grasp-lora evaluate takes other kinds"
        )
