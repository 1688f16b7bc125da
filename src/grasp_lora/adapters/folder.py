"""Read and check PEFT LoRA folders, and write folders that PEFT can load.

PEFT loads an adapter of another model, of another vocabulary or with missing tensors without an
error. Here modules and ranks are read from the tensors and checked against the model. Folders that
are written here also hold a fingerprint of the base weights.

The weights may be one file, or several with an index, as transformers writes them.

Folders are written with one rank for all modules and no patterns, because most readers know no
others: llama.cpp ignores the patterns, SGLang and vLLM refuse them. Modules of a lower rank are
filled up with zeros, which add nothing. Their own ranks are in `grasp_lora.json`, and here the
zeros are left out again when a folder is read, so that none of them is trained or pruned.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from grasp_lora.adapters.attach import (
    FactorPair,
    adapter_modules,
    attach_adapter,
    check_modules,
    lora_config,
)
from grasp_lora.adapters.config_content import check_patterns, check_types
from grasp_lora.adapters.names import by_model_rules, names_of_today
from grasp_lora.adapters.rules import (
    EMBEDDINGS,
    refuse_output_layer,
    refuse_settings,
    refuse_tensor,
    refuse_unknown,
)
from grasp_lora.base.files import PROMPT_FILE, files_below, follow_umask, sync, sync_folder
from grasp_lora.base.words import shown, shown_path
from grasp_lora.core.lora import LoraFactors, lora_scaling
from grasp_lora.models.modules import bare_model, base_fingerprint, vocabulary_size

__all__ = [
    "LoadedAdapter",
    "adapter_in",
    "adapter_modules",
    "attach_adapter",
    "check_fits",
    "read_adapter",
    "write_adapter",
]

ADAPTER_CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
NOTES_FILE = "grasp_lora.json"
RANKS_NOTE = "ranks"
"""In `grasp_lora.json`: module -> its own rank, where zeros fill it up to that of the others."""

_FACTOR_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING_KEY = re.compile(
    rf"base_model\.model\.(?P<name>(.+\.)?({'|'.join(EMBEDDINGS)})\.(weight|bias))"
)


@dataclass(frozen=True)
class LoadedAdapter:
    """The content of an adapter folder.

    Attributes:
        adapter: full module name in the base model -> factors in float32, on the CPU.
        base_name: base model name in the config; it is not verified.
        fingerprint: `base_fingerprint` of the base weights. None if another tool wrote the folder
            or the base model has no fingerprint.
        config: content of `adapter_config.json`.
        vocab_size: rows of the base's input embedding; None if another tool wrote the folder.
        extra: the other values in `grasp_lora.json`, given to `write_adapter` as `extra`.
        embeddings: name in the base model -> input or output embedding that was saved along. It is
            no part of the adapter: `check_fits` compares it with that of the base model.
    """

    adapter: dict[str, LoraFactors]
    base_name: str | None
    fingerprint: str | None
    config: dict[str, Any]
    vocab_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)


def adapter_in(folder: str | Path) -> Path:
    """Return the folder that holds the adapter: `folder` itself, or its only subfolder with one.

    PEFT saves an adapter that has a name of its own in a subfolder of that name, and a search
    leaves its adapter in `adapter/`. A folder without any adapter is returned as it is.

    Raises:
        ValueError: several subfolders hold an adapter; their names are listed.
    """
    folder = Path(folder).expanduser()
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return folder
    found = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} adapters in subfolders "
            f"({', '.join(one.name for one in found)}); give one of them, like {found[0]}"
        )
    return found[0] if found else folder


def check_no_prompt(folder: Path) -> None:
    """Check that a folder is not the result of a run that ships no adapter.

    Raises:
        ValueError: it is.
    """
    if (folder / PROMPT_FILE).is_file():
        raise ValueError(
            f"{folder} holds no adapter: its run found none better than the bare model with the "
            f"text in {PROMPT_FILE} ahead of each question. Use that, or an adapter of the same "
            "run: its scores.json has their paths"
        )


def read_adapter(folder: str | Path, model: nn.Module | None = None) -> LoadedAdapter:
    """Read a PEFT LoRA folder, or the one in its only subfolder.

    A module's scaling is alpha / rank, or alpha / sqrt(rank) with rsLoRA. Alpha comes from the
    config and its `alpha_pattern`. The rank of the tensors and of the config must agree. Zeros that
    `write_adapter` filled a module up with are left out.

    Args:
        folder: the folder.
        model: the base model. Names of modules that were changed in later versions of transformers
            are turned into the model's own. None keeps the names of the file.

    Raises:
        FileNotFoundError: the folder, its config or its weights are missing.
        ValueError: the adapter is not plain LoRA on linear modules, its files are damaged, a tensor
            holds NaN, infinite values or values beyond float32, a factor is missing, shapes or
            ranks do not agree, a setting that the installed PEFT does not know is in use, or one
            has another type or a regular expression that takes too long.
    """
    folder = adapter_in(folder)
    config = read_config_file(folder)
    refuse_settings(config, folder)
    refuse_unknown(config, folder)
    tensors = read_tensors(folder)
    if model is not None:
        bare, lora = bare_model(model), LoraConfig()
        tensors = names_of_today(by_model_rules(tensors, lora, bare), lora, bare, folder)
    embeddings = {
        match["name"]: tensor
        for key, tensor in tensors.items()
        if (match := _EMBEDDING_KEY.fullmatch(key)) is not None
    }
    factors = {key: t for key, t in tensors.items() if not _EMBEDDING_KEY.fullmatch(key)}
    pairs = _pair_factors(factors, folder)
    check_patterns(config, pairs, folder / ADAPTER_CONFIG_FILE)
    notes = read_notes(folder)
    fingerprint, vocab_size = notes.pop("base_fingerprint", None), notes.pop("vocab_size", None)
    ranks = notes.pop(RANKS_NOTE, {})
    return LoadedAdapter(
        adapter={
            module: _own_part(_factors(config, module, pair, folder), ranks.get(module))
            for module, pair in pairs.items()
        },
        base_name=config.get("base_model_name_or_path") or None,
        fingerprint=fingerprint,
        config=config,
        vocab_size=vocab_size,
        extra=notes,
        embeddings=embeddings,
    )


def read_config_file(folder: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is not a JSON object, or a setting has another type than PEFT's.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give the folder of a PEFT adapter (download it first if it "
            "is on a hub)"
        )
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        check_no_prompt(folder)
        raise FileNotFoundError(
            f"{folder} holds no {ADAPTER_CONFIG_FILE}, so it is no PEFT adapter; give the folder "
            "that save_pretrained wrote"
        )
    content = read_json_file(folder / ADAPTER_CONFIG_FILE)
    check_types(content, folder / ADAPTER_CONFIG_FILE)
    return content


def read_notes(folder: Path) -> dict[str, Any]:
    """Return the content of `grasp_lora.json`; nothing if another tool wrote the folder.

    Raises:
        ValueError: the file is not a JSON object, or fingerprint, vocabulary or ranks are of
            another type.
    """
    file = folder / NOTES_FILE
    if not file.is_file():
        return {}
    notes = read_json_file(file)
    for name, kind in (("base_fingerprint", str), ("vocab_size", int), (RANKS_NOTE, dict)):
        if not isinstance(notes.get(name), kind | None):
            raise ValueError(
                f"{shown_path(file)}: {name} is {shown(notes[name])}, which grasp-lora does not "
                "write; restore the file"
            )
    return notes


def read_json_file(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        ValueError: the file is not JSON, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; restore the file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; restore the file")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by their names in the file, or in all its shards.

    Raises:
        FileNotFoundError: the safetensors file, or a shard, is missing.
        ValueError: a file is damaged or empty, or the folder holds only a pickle.
    """
    tensors: dict[str, Tensor] = {}
    for path in weights_files(folder):
        try:
            tensors |= load_file(path)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is damaged or cut short, or has an unknown number format ({error}); copy "
                "it again"
            ) from error
    if not tensors:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds no tensors; save the adapter again")
    return tensors


def weights_files(folder: Path) -> list[Path]:
    """Return the weights file of an adapter folder, or its shards.

    Raises:
        FileNotFoundError: the file, or a shard that the index names, is missing.
        ValueError: the index is damaged, or the folder holds only a pickle.
    """
    path, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if path.is_file():
        return [path]
    if index.is_file():
        return _shards(index)
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds only adapter_model.bin, a pickle that can run code when loaded; if "
            "you trust it, load it with PEFT and save it with safe_serialization=True"
        )
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; save the adapter again")


def _shards(index: Path) -> list[Path]:
    places = read_json_file(index).get("weight_map")
    names = sorted(set(places.values()), key=str) if isinstance(places, dict) else []
    if not names or any(Path(str(name)).name != name for name in names):
        raise ValueError(
            f"{index} must name a file of its own folder for every tensor (weight_map); save the "
            "adapter again"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {missing[0]}, which {index.name} names; copy it again"
        )
    return [index.parent / name for name in names]


def _pair_factors(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, FactorPair]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR_KEY.fullmatch(key)
        if match is None or ".base_layer" in key:
            refuse_tensor(key, folder)
        else:
            refuse_output_layer(match["module"], folder)
            sides.setdefault(match["module"], {})[match["side"]] = _checked(key, tensor, folder)
    return {module: _checked_pair(module, sides[module], folder) for module in sorted(sides)}


def _checked(key: str, tensor: Tensor, folder: Path) -> Tensor:
    if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        raise ValueError(
            f"{folder}: tensor {key!r} is {tensor.dtype} {list(tensor.shape)}, but a LoRA factor "
            "is a non-empty floating-point matrix; save the adapter again, with all shards gathered"
        )
    return finite_floats(key, tensor, folder)


def finite_floats(key: str, tensor: Tensor, folder: Path) -> Tensor:
    """Return a tensor of a file in float32.

    Raises:
        ValueError: it holds NaN, infinite values, or values beyond float32.
    """
    plain = tensor.float()
    if torch.isfinite(plain).all():
        return plain
    if torch.isfinite(tensor.double()).all():
        raise ValueError(
            f"{folder}: tensor {shown(key)} holds values up to "
            f"{tensor.double().abs().max():.3g}, which float32 cannot hold; use an earlier "
            "checkpoint or save the adapter again"
        )
    raise ValueError(
        f"{folder}: tensor {shown(key)} holds NaN or infinite values, so the training diverged; use"
        " an earlier checkpoint or another adapter"
    )


def _checked_pair(module: str, sides: Mapping[str, Tensor], folder: Path) -> FactorPair:
    for side in ("A", "B"):
        if side not in sides:
            raise ValueError(
                f"{folder}: lora_{side} of {module!r} is missing, but its other factor is present; "
                "save the adapter again"
            )
    A, B = sides["A"], sides["B"]
    if A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{folder}: the ranks of {module!r} differ, lora_A is {list(A.shape)} and lora_B is "
            f"{list(B.shape)} (expected [r, in] and [out, r]); save the adapter again"
        )
    return A, B


def _scaling(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(alphas), module)
    ranks: Mapping[str, int] = config.get("rank_pattern") or {}
    config_rank = ranks.get(get_pattern_key(list(ranks), module), config.get("r"))
    if config_rank != rank:
        raise ValueError(
            f"{folder}: {ADAPTER_CONFIG_FILE} gives {module!r} the rank {config_rank}, but its "
            f"tensors have rank {rank}, so its scaling is unknown; restore the config file that "
            "belongs to the weights"
        )
    alpha = alphas.get(key, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise ValueError(
            f"{folder}: lora_alpha of {module!r} is {shown(alpha)}, but must be a number; "
            f"correct {ADAPTER_CONFIG_FILE}"
        )
    return lora_scaling(rank, alpha, bool(config.get("use_rslora")))


def _factors(config: Mapping[str, Any], module: str, pair: FactorPair, folder: Path) -> LoraFactors:
    """Return the factors of a module with their scaling.

    Raises:
        ValueError: as in `_scaling`, or what they may add to a weight is beyond float32, so that
            nothing could be computed with them.
    """
    A, B = pair
    scaling = _scaling(config, module, A.shape[0], folder)
    largest = [float(factor.abs().max()) for factor in pair]
    if A.shape[0] * largest[0] * largest[1] * abs(scaling) > torch.finfo(torch.float32).max:
        raise ValueError(
            f"{folder}: the factors of {shown(module)}, up to {largest[0]:.3g} and "
            f"{largest[1]:.3g}, with a scaling of {scaling:.3g} (of alpha and rank) add values "
            "that float32 cannot hold; restore the weights, or lora_alpha and alpha_pattern in "
            f"{ADAPTER_CONFIG_FILE}"
        )
    return LoraFactors(A, B, scaling)


def _own_part(factors: LoraFactors, rank: object) -> LoraFactors:
    """Return factors without the zeros that fill them up; all of them if others are there."""
    whole = factors.A.shape[0]
    if not isinstance(rank, int) or not 0 < rank < whole:
        return factors
    if factors.A[rank:].any() or factors.B[:, rank:].any():
        return factors  # the folder was trained further by a tool that does not know of the zeros
    return LoraFactors(factors.A[:rank], factors.B[:, :rank], factors.scaling)


def one_rank(modules: Mapping[str, FactorPair]) -> dict[str, FactorPair]:
    """Return the same factors with the largest rank among them; zeros fill up the others.

    Args:
        modules: full module name -> (A [rank, in], B [out, rank]).
    """
    rank = max(A.shape[0] for A, _ in modules.values())
    return {
        module: (pad(A, (0, 0, 0, rank - A.shape[0])), pad(B, (0, rank - B.shape[1])))
        for module, (A, B) in modules.items()
    }


def own_ranks(modules: Mapping[str, FactorPair]) -> dict[str, int]:
    """Return module -> its rank, of the modules that `one_rank` fills up.

    Args:
        modules: full module name -> (A [rank, in], B [out, rank]).
    """
    ranks = {module: A.shape[0] for module, (A, _) in sorted(modules.items())}
    return {module: rank for module, rank in ranks.items() if rank < max(ranks.values())}


def its_base(named: str | None) -> str:
    """Return the base model of an adapter in words, with the name that the adapter gives it."""
    return "the base model it was trained on" + (f" ({named})" if named else "")


def check_fits(loaded: LoadedAdapter, model: nn.Module, name: str) -> None:
    """Check that an adapter belongs to a base model.

    Args:
        loaded: the adapter.
        model: the base model.
        name: name of the adapter; error messages begin with it.

    Raises:
        ValueError: a module is missing or has another shape, LoRA is on the output layer, the
            folder records another vocabulary size or other base weights, or an embedding saved
            along differs from that of the model.
    """
    vocabulary = vocabulary_size(model)
    if loaded.vocab_size is not None and loaded.vocab_size != vocabulary:
        raise ValueError(
            f"{name} was trained with a vocabulary of {loaded.vocab_size} tokens, but this model "
            f"has {vocabulary}; load {its_base(loaded.base_name)}"
        )
    factors = loaded.adapter
    check_modules({module: (f.A, f.B) for module, f in factors.items()}, model, name)
    actual = base_fingerprint(model) if loaded.fingerprint is not None else None
    if actual is not None and actual != loaded.fingerprint:
        raise ValueError(
            f"{name} was trained on other base weights (fingerprint "
            f"{loaded.fingerprint[:12]}, this "  # type: ignore[index]
            f"model has {actual[:12]}); load {its_base(loaded.base_name)}"
        )
    for weight, saved in loaded.embeddings.items():
        _check_embedding(weight, saved, bare_model(model).state_dict().get(weight), name)


def _check_embedding(weight: str, saved: Tensor, own: Tensor | None, name: str) -> None:
    if own is not None and own.shape == saved.shape and _equal(saved, own.cpu()):
        return
    why = "does not have" if own is None else f"has as {list(own.shape)} with other values"
    if own is not None and own.shape != saved.shape:
        why = f"has as {list(own.shape)}"
    raise ValueError(
        f"{name} holds the embedding {weight!r} {list(saved.shape)}, which this model {why}; an "
        "embedding cannot be merged or pruned. Load the base model it was trained on; if it was "
        "not trained, save the adapter again with PEFT's "
        "save_pretrained(..., save_embedding_layers=False)"
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors agree in the coarser one of their number formats."""
    coarser = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(first.to(coarser), second.to(coarser))


def write_adapter(
    folder: str | Path,
    modules: Mapping[str, FactorPair],
    *,
    model: nn.Module,
    base_name: str | None,
    fingerprint: str | None,
    extra: Mapping[str, Any] | None = None,
    scaling: float = 1.0,
) -> Path:
    """Write LoRA factors as a plain PEFT folder; return the folder.

    All modules get the largest rank among them, see `one_rank`. Besides PEFT's two files the folder
    has `grasp_lora.json`, with the fingerprint and vocabulary size of the base model, the modules'
    own ranks and the values of `extra`. A new folder is created atomically. In an
    existing folder each file is replaced atomically, the config last.

    Args:
        folder: folder to write.
        modules: full module name -> (A, B).
        model: the base model.
        base_name: public name of the base model for the PEFT config; None leaves it out.
        fingerprint: `base_fingerprint` of the base model, or None.
        extra: further JSON values for `grasp_lora.json`.
        scaling: LoRA scaling of every module.

    Raises:
        ValueError: `modules` is empty, does not fit `model`, or holds NaN or infinite values.
    """
    folder = Path(folder)
    check_modules(modules, model, str(folder))
    own = own_ranks(modules)
    modules = one_rank(modules)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": _finite(module, side, tensor)
        for module, pair in sorted(modules.items())
        for side, tensor in zip("AB", pair, strict=True)
    }
    config = lora_config(modules, model, scaling=scaling)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.target_modules = sorted(modules)  # PEFT stores a set, whose order differs between runs
    notes = {**(extra or {}), "base_fingerprint": fingerprint, "vocab_size": vocabulary_size(model)}
    notes |= {RANKS_NOTE: own} if own else {}

    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)  # a killed process with the same id may have left it
    staging.mkdir(parents=True)
    try:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(notes, indent=2, sort_keys=True, ensure_ascii=False)
        (staging / NOTES_FILE).write_text(text + "\n", encoding="utf-8")
        config.save_pretrained(str(staging))
        follow_umask(staging, staging / NOTES_FILE)
        sync(staging, files_below(staging))
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _finite(module: str, side: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"lora_{side} of {module!r} holds NaN or infinite values, so nothing was written; use "
            "an earlier checkpoint or lower the learning rate"
        )
    # safetensors refuses tensors that share memory, as slices of one merge do, so copy them.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _publish(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        sync_folder(folder.parent)
        return
    for name in (WEIGHTS_FILE, NOTES_FILE, ADAPTER_CONFIG_FILE):
        os.replace(staging / name, folder / name)
    sync_folder(folder)
