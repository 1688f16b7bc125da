"""Put a PEFT adapter of any type on its base model, to generate and score with it.

Merging and pruning need plain LoRA (see `adapters.rules`); scoring does not. PEFT builds and loads
the adapter. Problems that PEFT ignores are errors here: tensors that belong nowhere, missing
tensors, NaN, and another base model.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, TaskType
from torch import Tensor, nn

from grasp_lora.adapters.attach import task_type
from grasp_lora.adapters.chat import given_template, put_template
from grasp_lora.adapters.config_content import check_patterns
from grasp_lora.adapters.folder import (
    ADAPTER_CONFIG_FILE,
    NOTES_FILE,
    WEIGHTS_FILE,
    adapter_in,
    check_no_prompt,
    finite_floats,
    its_base,
    read_config_file,
    read_notes,
    read_tensors,
)
from grasp_lora.adapters.names import by_model_rules, names_of_today
from grasp_lora.adapters.restore import restored_on_exit
from grasp_lora.adapters.rules import (
    BASE_CHANGING_INITS,
    known_settings,
    refuse_unknown,
    unknown_settings,
)
from grasp_lora.adapters.virtual_tokens import (
    PREFIX_TYPES,
    VIRTUAL_TOKEN_TYPES,
    PrefixModel,
    VirtualTokenModel,
)
from grasp_lora.base.files import (
    BASE_FACT,
    RESULT,
    RUN_CONFIG_FILE,
    STAGE_FILE,
    read_config,
    read_json,
)
from grasp_lora.base.words import shown, without_home
from grasp_lora.models.backbones import Backbone, ModelSpec, load_backbone
from grasp_lora.models.cache import Notice
from grasp_lora.models.modules import is_encoder_decoder, vocabulary_size
from grasp_lora.models.preserve import quiet_wrapping
from grasp_lora.models.sources import SHORT_NAMES

_ADAPTER = "default"
_SMALL = 1024
"""A size that is allocated whatever the tensors are."""
_OF_PEFT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What PEFT raises, in many places, for settings and tensors that it cannot use."""

_REFUSED_TYPES: dict[PeftType, str] = {
    PeftType.XLORA: "it mixes other adapters that its folder does not hold; evaluate each of them",
    PeftType.POLY: "every example needs a task number",
    PeftType.MULTITASK_PROMPT_TUNING: "every example needs a task number",
    PeftType.CPT: "its virtual tokens are examples that have a loss themselves",
}


@contextmanager
def open_model(
    name: str | Path, spec: ModelSpec | None = None, notice: Notice = lambda _message: None
) -> Iterator[tuple[Backbone, nn.Module]]:
    """Yield (backbone, model with the adapter) for an adapter folder or a model without adapter.

    The tokenizer has the chat template that the adapter was saved with, if there is one.

    Args:
        name: a folder that PEFT's `save_pretrained` wrote, of any adapter type, or a model as in
            `ModelSpec.name`.
        spec: base model of the adapter, with its settings; None means the model that the adapter
            names.
        notice: called with messages for the user.

    Raises:
        FileNotFoundError: there is no such folder, or it holds neither an adapter nor a model.
        ValueError: the adapter names no base model, `name` is a model and `spec` another one, or
            `model_with_adapter` refuses the adapter.
    """
    if not is_adapter(name):
        if spec is not None and spec.name != str(name):
            raise ValueError(
                f"{name} is a model, not an adapter, so it has no base model, but "
                f"{shown(spec.name)} was given as one; leave the base model out"
            )
        backbone = load_backbone(spec or ModelSpec(str(name)), notice)
        yield backbone, backbone.model
        return
    if spec is None:
        spec = ModelSpec(named_base_model(name))
    backbone = load_backbone(spec, notice)
    template = put_template(backbone.tokenizer, given_template([Path(name)]))
    for line in lines_about(name, spec.name, backbone) + template:
        notice(line)
    with model_with_adapter(backbone, name) as model:
        yield backbone, model


def lines_about(name: str | Path, asked_for: str, backbone: Backbone) -> list[str]:
    """Return what the user should know of an adapter before it is used; mostly nothing.

    That is: it lies in a subfolder, it names another base model than the one used, or a newer PEFT
    wrote settings that the installed one leaves out.

    Args:
        name: the adapter folder.
        asked_for: the base model as the user named it.
        backbone: the loaded base model.
    """
    lines: list[str] = []
    folder = adapter_in(name)
    if folder != Path(name).expanduser() and not (folder / NOTES_FILE).is_file():
        lines.append(f"{name} holds one adapter, in the subfolder {folder.name}; it is used")
    config = read_config_file(folder)
    named = _base_of(config)
    if named is not None and not _is_of(named, asked_for, backbone):
        lines.append(f"{name} names {named} as its base model; it is put on {asked_for}")
    unknown = unknown_settings(config)
    if unknown:
        lines.append(
            f"{name} was written by a newer PEFT ({config.get('peft_version') or 'no version'}): "
            f"the installed one does not know {', '.join(unknown)}, which the adapter does not use"
        )
    return lines


def lines_about_all(names: Sequence[str | Path], asked_for: str, backbone: Backbone) -> list[str]:
    """Return `lines_about` each adapter, and one if the adapters name different base models."""
    lines = [line for name in names for line in lines_about(name, asked_for, backbone)]
    named = [_base_of(read_config_file(adapter_in(name))) for name in names]
    known = (base for base in named if base is not None)
    bases = dict.fromkeys(asked_for if _is_of(b, asked_for, backbone) else b for b in known)
    if len(bases) > 1:
        lines.append(
            f"the adapters name different base models ({', '.join(bases)}); merging them is useful "
            "only if those have the same weights"
        )
    return lines


def _is_of(named: str, asked_for: str, backbone: Backbone) -> bool:
    """Return whether an adapter names the backbone; a home folder may be written as `~`."""
    return without_home(named) in (without_home(asked_for), without_home(backbone.public_name))


def is_adapter(name: str | Path) -> bool:
    """Return whether `name` is a folder with a PEFT adapter; False if it may be a model.

    A folder that holds both counts as an adapter. An adapter in a subfolder counts where the folder
    itself holds no model.

    Raises:
        FileNotFoundError: `name` is a path that does not exist, or a folder with neither an adapter
            nor a model.
        ValueError: several subfolders hold an adapter, or the folder holds a prompt instead.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            return True
        if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
            return False
        if adapter_in(folder) != folder:
            return True
        check_no_prompt(folder)
        raise FileNotFoundError(
            f"{folder} holds neither {ADAPTER_CONFIG_FILE} (a PEFT adapter) nor config.json (a "
            "model); give the folder that save_pretrained wrote"
        )
    if (isinstance(name, Path) or is_path(name)) and not folder.is_file():
        raise FileNotFoundError(f"there is no {name}; give an adapter folder or a model")
    return False


def is_path(name: str) -> bool:
    """Return whether a name cannot be one of a hub (owner/name), so that it must be a path."""
    if name.startswith((".", "/", "~")) or "\\" in name:
        return True
    return name.count("/") > 1 and not name.endswith(".gguf")


def named_base_model(name: str | Path) -> str:
    """Return the base model that an adapter folder names, or `name` itself if it is a model.

    A result of a stage says which model the stage loaded; that one is returned while it is on this
    machine. In other folders that this library wrote, the public name of a packaged backbone stands
    for the packaged weights, so its short name is returned. Other adapters were trained on the
    original weights.

    Raises:
        FileNotFoundError: see `is_adapter`.
        ValueError: the adapter names no base model, or a path that is not on this machine.
    """
    if not is_adapter(name):
        return str(name)
    folder = adapter_in(name)
    named = _loaded_by_its_stage(folder) or _base_of(read_config_file(folder))
    if named is None:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_FILE} does not say which base model the adapter belongs to "
            "(base_model_name_or_path is empty); give the base model as well (--model)"
        )
    if is_path(named) and not Path(named).expanduser().exists():
        raise ValueError(
            f"the adapter {name} names {named!r} as its base model, a path that is not on this "
            "machine; pass --model with the folder or the hub id of that model"
        )
    return _short_name(named) if (folder / NOTES_FILE).is_file() else named


def _loaded_by_its_stage(folder: Path) -> str | None:
    """Return the place of the base model that a stage or run loaded; None if it is gone."""
    for marker in (folder / STAGE_FILE, folder.parent / STAGE_FILE):
        if marker.is_file():
            return _there(read_json(marker).get(BASE_FACT))
    if folder.name == RESULT and (folder.parent / RUN_CONFIG_FILE).is_file():
        return _there(read_config(folder.parent)["model"]["name"])
    return None


def _there(place: str | None) -> str | None:
    found = Path(place).expanduser() if place else None
    return str(found) if found is not None and found.exists() else None


def _base_of(config: dict[str, Any]) -> str | None:
    return config.get("base_model_name_or_path") or None


def _short_name(public_name: str) -> str:
    """Return the short name of an installed packaged backbone, else `public_name`."""
    for short_name, source in SHORT_NAMES.items():
        try:
            if source().public_name == public_name:
                return short_name
        except ValueError:
            continue  # the package is not installed
    return public_name


@contextmanager
def model_with_adapter(backbone: Backbone, folder: str | Path) -> Iterator[nn.Module]:
    """Yield the backbone's model with a PEFT adapter of any type, in eval mode; then remove it.

    The model is called and generates like the base model, in left-padded batches too. On exit the
    backbone has its own modules and weights again.

    Raises:
        FileNotFoundError: the folder, its config or its weights are missing.
        ValueError: the adapter was trained for another base model or another type of task, its type
            is not supported, or its files are damaged or do not match.
    """
    folder = adapter_in(folder)
    config = _peft_config(folder)
    tensors = by_model_rules(read_tensors(folder), config, backbone.model)
    _check_values(tensors, folder)
    _check_extent(read_config_file(folder), tensors, folder)
    _check_task(config, backbone.model, folder)
    names = [name for name, _ in backbone.model.named_modules()]
    check_patterns(read_config_file(folder), names, folder / ADAPTER_CONFIG_FILE)
    _check_base(backbone, folder, _base_of(read_config_file(folder)))
    overwritten = _overwritten_weights(backbone.model, tensors)
    _check_sizes(overwritten, tensors, folder)
    with restored_on_exit(backbone.model, list(overwritten.values())):
        model = _build_peft_model(backbone.model, config, folder)
        _load_tensors(model, tensors, folder, overwritten.keys())
        yield model.eval()


def check_openable(folder: str | Path) -> None:
    """Refuse an adapter that `adapted` would refuse on any backbone; loads no model.

    Raises:
        FileNotFoundError, ValueError: as `adapted`.
    """
    folder = adapter_in(folder)
    _peft_config(folder)
    _check_values(read_tensors(folder), folder)


def _peft_config(folder: Path) -> PeftConfig:
    content = read_config_file(folder)
    kind, task = content.get("peft_type"), content.get("task_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_FILE}: the installed PEFT knows no peft_type {shown(kind)}; "
            "upgrade it (pip install -U peft) or correct the file"
        )
    kind = PeftType(kind)
    if kind in _REFUSED_TYPES:
        raise ValueError(
            f"{folder}: a {kind.value} adapter cannot be evaluated here: {_REFUSED_TYPES[kind]}"
        )
    if task not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        raise ValueError(
            f"{folder}: the adapter was made for the task type {shown(task)}; only adapters of "
            "models that write text (CAUSAL_LM or SEQ_2_SEQ_LM) can be used"
        )
    initial = content.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGING_INITS):
        raise ValueError(
            f"{folder}: init_lora_weights={shown(initial)} changes the base weights; save the "
            "adapter again with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    refuse_unknown(content, folder)
    build = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        config = build.from_peft_type(**build.check_kwargs(**known_settings(content)))
    except _OF_PEFT as error:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_FILE} is no valid {kind.value} config ({error}); restore "
            "the file"
        ) from error
    config.inference_mode = True
    return config


def _check_task(config: PeftConfig, model: nn.Module, folder: Path) -> None:
    """Check that an adapter is of the kind of a model.

    Raises:
        ValueError: it was made for the other kind, or it puts something before the text of an
            encoder-decoder.
    """
    wanted = task_type(model)
    if config.task_type not in (None, wanted):
        raise ValueError(
            f"{folder}: the adapter was made for the task type {shown(str(config.task_type))}, but "
            f"this model is of {wanted}; load the base model it was trained on"
        )
    if is_encoder_decoder(model) and config.peft_type in (*VIRTUAL_TOKEN_TYPES, *PREFIX_TYPES):
        raise ValueError(
            f"{folder}: a {PeftType(config.peft_type).value} adapter of an encoder-decoder cannot "
            "be evaluated here: what it puts before the text has no place in padded batches; give "
            "one that changes layers, such as LoRA"
        )


def _check_values(tensors: dict[str, Tensor], folder: Path) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            finite_floats(key, tensor, folder)


def _check_extent(content: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Check that no size in the config is far beyond the tensors, as PEFT would allocate it.

    Raises:
        ValueError: a rank or a number of virtual tokens is larger than any side of any tensor.
    """
    most = max([_SMALL, *(side for tensor in tensors.values() for side in tensor.shape)])
    for name in ("r", "init_r", "target_r", "num_virtual_tokens"):
        size = content.get(name)
        if isinstance(size, int) and size > most:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG_FILE}: {name} is {shown(size)}, but no tensor of the "
                f"adapter has a side over {most}; restore the file that belongs to the weights"
            )


def _check_base(backbone: Backbone, folder: Path, named: str | None) -> None:
    notes = read_notes(folder)
    stored, vocabulary = notes.get("base_fingerprint"), notes.get("vocab_size")
    advice = f"load {its_base(named)}"
    actual = vocabulary_size(backbone.model)
    if vocabulary is not None and vocabulary != actual:
        raise ValueError(
            f"{folder} was trained with a vocabulary of {vocabulary} tokens, but this model has "
            f"{actual}; {advice}"
        )
    present = backbone.fingerprint
    if stored is not None and present is not None and stored != present:
        raise ValueError(
            f"{folder} was trained on other base weights (fingerprint {stored[:12]}, this model "
            f"has {present[:12]}); {advice}"
        )


def _overwritten_weights(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return key in the adapter file -> weight of the base model that PEFT overwrites with it.

    Such keys are trained biases, and embeddings saved with the adapter.
    """
    weights = model.state_dict()
    names = {k: k.removeprefix("base_model.model.").replace(".base_layer.", ".") for k in tensors}
    return {key: weights[name] for key, name in names.items() if name in weights}


def _check_sizes(
    overwritten: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path
) -> None:
    for key, weight in overwritten.items():
        if weight.shape != tensors[key].shape:
            raise ValueError(
                f"{folder}: {key!r} is saved along as {list(tensors[key].shape)}, but this model "
                f"has {list(weight.shape)}; load the base model it was trained on, resized with "
                "model.resize_token_embeddings, or save the adapter again with PEFT's "
                "save_pretrained(..., save_embedding_layers=False) if the layer was not trained"
            )


def _build_peft_model(base: nn.Module, config: PeftConfig, folder: Path) -> PeftModel:
    build: type[PeftModel] = PeftModelForCausalLM
    if is_encoder_decoder(base):
        build = PeftModelForSeq2SeqLM
    elif config.peft_type in VIRTUAL_TOKEN_TYPES:
        build = VirtualTokenModel
    elif config.peft_type in PREFIX_TYPES:
        build = PrefixModel
    try:
        with quiet_wrapping():
            return build(base, config, _ADAPTER)
    except torch.OutOfMemoryError:
        raise
    except _OF_PEFT as error:
        raise ValueError(
            f"{folder} does not fit this model ({error}); load the base model it was trained on"
        ) from error


def _load_tensors(
    model: PeftModel, tensors: dict[str, Tensor], folder: Path, overwritten: Set[str]
) -> None:
    """Load the adapter's tensors; `overwritten` are the keys that belong to the base model."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    present = names_of_today(tensors, model.peft_config[_ADAPTER], model, folder).keys()
    advice = "load the base model it was trained on, or save the adapter again"
    unexpected = sorted(present - expected - overwritten)
    if unexpected:
        raise ValueError(
            f"{folder}: {_counted(unexpected)} no place in this model and adapter type; {advice}"
        )
    missing = sorted(expected - present)
    if missing:
        raise ValueError(f"{folder}: {_counted(missing)} no tensor in {WEIGHTS_FILE}; {advice}")
    try:
        set_peft_model_state_dict(model, dict(tensors), _ADAPTER)
    except _OF_PEFT as error:
        raise ValueError(
            f"{folder}: a tensor has another shape in this model ({str(error).splitlines()[-1]}); "
            f"{advice}"
        ) from error


def _counted(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more have" if len(keys) > 1 else " has"
    return f"{shown(keys[0])}{more}"
