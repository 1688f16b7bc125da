"""Any PEFT adapter on its base model, ready to answer; PEFT's silences are turned into errors.

Merging and pruning need plain LoRA (see `adapter_rules`); being scored does not. Here PEFT builds
and loads the adapter, whatever its type, and what it would pass over without a word is checked:
tensors that find no place, tensors that are missing, NaN, another base model.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, TaskType
from torch import Tensor, nn

from grasp_lora.adapters.folder import (
    ADAPTER_CONFIG_FILE,
    NOTES_FILE,
    WEIGHTS_FILE,
    read_config_file,
    read_json_file,
    read_tensors,
)
from grasp_lora.adapters.restore import restored_on_exit
from grasp_lora.adapters.rules import BASE_CHANGING_INITS
from grasp_lora.adapters.virtual_tokens import VIRTUAL_TOKEN_TYPES, VirtualTokenModel
from grasp_lora.models.backbones import Backbone, ModelSpec, load_backbone
from grasp_lora.models.cache import SHORT_NAMES, Notice
from grasp_lora.models.modules import vocabulary_size
from grasp_lora.models.preserve import quiet_wrapping

_ADAPTER = "default"

_REFUSED_TYPES: dict[PeftType, str] = {
    PeftType.XLORA: "it mixes other adapters and does not hold them; evaluate each by itself",
    PeftType.POLY: "every row needs a task number",
    PeftType.MULTITASK_PROMPT_TUNING: "every row needs a task number",
    PeftType.CPT: "its virtual tokens are examples with a loss of their own",
}


@contextmanager
def open_model(
    name: str | Path, spec: ModelSpec | None = None, notice: Notice = lambda _message: None
) -> Iterator[tuple[Backbone, nn.Module]]:
    """Give (backbone, model) for an adapter folder, or for a model without an adapter.

    Args:
        name: a folder that PEFT's `save_pretrained` wrote, of any adapter type; or a model as
            `ModelSpec.name` takes it.
        spec: the base model of the adapter and how to load it; None takes the model that the
            adapter names.
        notice: takes lines for the user.

    Raises:
        FileNotFoundError: there is no such folder, or it holds neither an adapter nor a model.
        ValueError: as `model_with_adapter`; the adapter names no base model; or `spec` is another model than
            the model `name`.
    """
    if not is_adapter(name):
        if spec is not None and spec.name != str(name):
            raise ValueError(
                f"{name} is a model and no adapter, so it has no base model, but {spec.name!r} was "
                "given as one; leave that out"
            )
        backbone = load_backbone(spec or ModelSpec(str(name)), notice)
        yield backbone, backbone.model
        return
    if spec is None:
        spec = ModelSpec(named_base_model(name))
    backbone = load_backbone(spec, notice)
    other = base_mismatch_line(name, spec.name, backbone)
    if other is not None:
        notice(other)
    with model_with_adapter(backbone, name) as model:
        yield backbone, model


def base_mismatch_line(name: str | Path, asked_for: str, backbone: Backbone) -> str | None:
    """Return a line to show if an adapter names another base model than the one it is put on."""
    named = _base_of(read_config_file(Path(name).expanduser()))
    if named in (None, asked_for, backbone.public_name):
        return None
    return f"{name} names {named} as its base model; it is put on {asked_for}"


def base_mismatch_lines(
    names: Sequence[str | Path], asked_for: str, backbone: Backbone
) -> list[str]:
    """Return the lines of `base_mismatch_line` for several adapters, and one if they differ in the base."""
    lines = [line for name in names if (line := base_mismatch_line(name, asked_for, backbone))]
    named = [_base_of(read_config_file(Path(name).expanduser())) for name in names]
    own = (asked_for, backbone.public_name)
    bases = dict.fromkeys(asked_for if base in own else base for base in named if base is not None)
    if len(bases) > 1:
        lines.append(
            f"the adapters name different base models ({', '.join(bases)}); a merge of them is of "
            "use only where those have the same weights"
        )
    return lines


def is_adapter(name: str | Path) -> bool:
    """Return whether `name` is a folder with a PEFT adapter; False for all that may be a model.

    Raises:
        FileNotFoundError: a folder with neither an adapter nor a model, or a path to nothing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            return True
        if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
            return False
        raise FileNotFoundError(
            f"{folder} holds neither {ADAPTER_CONFIG_FILE} (a PEFT adapter) nor config.json (a model); "
            "give the folder that save_pretrained wrote"
        )
    is_path = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not folder.is_file():
        raise FileNotFoundError(f"there is no {name}; give an adapter folder or a model")
    return False


def named_base_model(name: str | Path) -> str:
    """Return the base model that an adapter folder names; a model is its own base.

    Where this library wrote the folder, the public name of a packaged backbone means the packaged
    weights. Other adapters were trained on the original ones.

    Raises:
        FileNotFoundError: as `is_adapter`.
        ValueError: the adapter names none.
    """
    if not is_adapter(name):
        return str(name)
    folder = Path(name).expanduser()
    named = _base_of(read_config_file(folder))
    if named is None:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_FILE} does not say which base model the adapter belongs to "
            "(base_model_name_or_path is empty); give the base model as well"
        )
    return _packaged(named) if (folder / NOTES_FILE).is_file() else named


def _base_of(config: dict[str, Any]) -> str | None:
    return config.get("base_model_name_or_path") or None


def _packaged(public_name: str) -> str:
    """Return the short name of the packaged backbone of this name, or the name as it is."""
    for short_name, source in SHORT_NAMES.items():
        try:
            if source().public_name == public_name:
                return short_name
        except ValueError:
            continue  # not installed
    return public_name


@contextmanager
def model_with_adapter(backbone: Backbone, folder: str | Path) -> Iterator[nn.Module]:
    """Give the backbone's model with a PEFT adapter of any type, in eval mode; then take it off.

    The returned model is called and generates as the bare model does, in left-padded batches too.
    After the block the backbone is bare and has its own weights again.

    Raises:
        FileNotFoundError: the folder, its config or its weights are missing.
        ValueError: the adapter was made for another base model or another kind of task, its type
            cannot be used here, or its files are damaged or do not fit each other.
    """
    folder = Path(folder).expanduser()
    config = _peft_config(folder)
    tensors = read_tensors(folder)
    _check_values(tensors, folder)
    _check_base(backbone, folder, _base_of(read_config_file(folder)))
    own = _own_weights(backbone.model, tensors)
    with restored_on_exit(backbone.model, list(own.values())):
        model = _built(backbone.model, config, folder)
        _load(model, tensors, folder, own.keys())
        yield model.eval()


def check_openable(folder: str | Path) -> None:
    """Refuse an adapter that `adapted` would refuse on any backbone; loads no model.

    Raises:
        FileNotFoundError, ValueError: as `adapted`.
    """
    folder = Path(folder).expanduser()
    _peft_config(folder)
    _check_values(read_tensors(folder), folder)


def _peft_config(folder: Path) -> PeftConfig:
    content = read_config_file(folder)
    kind, task = content.get("peft_type"), content.get("task_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_FILE}: the installed PEFT knows no peft_type {kind!r}; upgrade it "
            "(pip install -U peft) or correct the file"
        )
    kind = PeftType(kind)
    if kind in _REFUSED_TYPES:
        raise ValueError(
            f"{folder}: a {kind.value} adapter cannot be evaluated here: {_REFUSED_TYPES[kind]}"
        )
    if task not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"{folder}: the adapter was made for the task type {task!r}; only adapters of causal "
            "language models (CAUSAL_LM) can generate text here"
        )
    initial = content.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGING_INITS):
        raise ValueError(
            f"{folder}: init_lora_weights={initial!r} changes the base weights; save the adapter "
            "again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_FILE} is no valid {kind.value} config ({error}); restore the file"
        ) from error
    config.inference_mode = True
    return config


def _check_values(tensors: dict[str, Tensor], folder: Path) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{folder}: tensor {key!r} holds NaN or infinite values, the training diverged; "
                "use an earlier checkpoint or train again with a lower learning rate"
            )


def _check_base(backbone: Backbone, folder: Path, named: str | None) -> None:
    notes = read_json_file(folder / NOTES_FILE) if (folder / NOTES_FILE).is_file() else {}
    stored, rows = notes.get("base_fingerprint"), notes.get("vocab_size")
    advice = f"load the base model it was trained on ({named})"
    actual = vocabulary_size(backbone.model)
    if rows is not None and rows != actual:
        raise ValueError(
            f"{folder} was made for a vocabulary of {rows} tokens, this model has {actual}; "
            f"{advice}"
        )
    present = backbone.fingerprint
    if stored is not None and present is not None and stored != present:
        raise ValueError(
            f"{folder} was made on other base weights (fingerprint {stored[:12]}, this model has "
            f"{present[:12]}); {advice}"
        )


def _own_weights(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return key -> weight for the base's own weights that an adapter brings along.

    Trained biases, or embeddings saved beside the adapter: PEFT writes them into the base model.
    """
    weights = model.state_dict()
    names = {k: k.removeprefix("base_model.model.").replace(".base_layer.", ".") for k in tensors}
    return {key: weights[name] for key, name in names.items() if name in weights}


def _built(base: nn.Module, config: PeftConfig, folder: Path) -> PeftModel:
    build = VirtualTokenModel if config.peft_type in VIRTUAL_TOKEN_TYPES else PeftModelForCausalLM
    try:
        with quiet_wrapping():
            return build(base, config, _ADAPTER)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} does not fit this model ({error}); load the base model it was trained on"
        ) from error


def _load(model: PeftModel, tensors: dict[str, Tensor], folder: Path, own: Set[str]) -> None:
    """Load the tensors; `own` are the keys of weights of the base model."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    advice = "load the base model it was trained on, or save the adapter again"
    unexpected = sorted(tensors.keys() - expected - own)
    if unexpected:
        raise ValueError(
            f"{folder}: {_counted(unexpected)} no place in this model and adapter type; {advice}"
        )
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(f"{folder}: {_counted(missing)} no tensor in {WEIGHTS_FILE}; {advice}")
    try:
        set_peft_model_state_dict(model, dict(tensors), _ADAPTER)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: a tensor has another shape in this model ({str(error).splitlines()[-1]}); "
            f"{advice}"
        ) from error


def _counted(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more have" if len(keys) > 1 else " has"
    return f"{keys[0]!r}{more}"
