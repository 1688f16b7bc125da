"""Adapter folders that stages exchange: merged adapters with the factors of each source."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grasp_lora.adapters.chat import TEMPLATE_FILE
from grasp_lora.adapters.folder import (
    ADAPTER_CONFIG_FILE,
    adapter_in,
    check_fits,
    read_adapter,
    read_config_file,
    write_adapter,
)
from grasp_lora.base.files import read_json, write_json, write_text
from grasp_lora.base.words import shown_path, without_home
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.lora import MergedModule, Part, merge
from grasp_lora.models.backbones import Backbone

MERGE_FILE = "merge.json"
PARTS_FILE = "parts.safetensors"


def write_merged(
    folder: Path,
    merged: Mapping[str, MergedModule],
    backbone: Backbone,
    about: Mapping[str, Any],
) -> None:
    """Write a merged adapter: a plain PEFT folder, and beside it the factors of each source.

    Args:
        folder: the folder to write.
        merged: module name -> merged factors.
        backbone: the model that the adapter belongs to.
        about: JSON-able facts about the merge (kind, weights, sources).
    """
    plain = {name: (m.A, m.B) for name, m in merged.items()}
    save_plain(folder, plain, backbone)
    tensors = {
        f"{name}|{i}|{side}": tensor.contiguous()
        for name, module in merged.items()
        for i, part in enumerate(module.parts)
        for side, tensor in (("A", part.A), ("B", part.B))
    }
    save_file(tensors, folder / PARTS_FILE)
    layout = {
        name: {"kind": m.kind, "sources": [p.source for p in m.parts]} for name, m in merged.items()
    }
    write_json(folder / MERGE_FILE, dict(about) | {"layout": layout})


def save_plain(
    folder: Path,
    plain: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    backbone: Backbone,
    scaling: float = 1.0,
) -> None:
    """Write an ordinary PEFT adapter folder.

    A chat template that the backbone was given is written too, so that the adapter is asked in it.
    A backbone dequantised from a GGUF file is told by the name and hash of that file.

    Args:
        folder: the folder to write.
        plain: module name -> (A, B).
        backbone: the model that the adapter belongs to.
        scaling: factor on B A.
    """
    gguf = backbone.gguf
    write_adapter(
        folder,
        plain,
        model=backbone.model,
        scaling=scaling,
        base_name=backbone.base_name,
        fingerprint=backbone.fingerprint,
        extra=None if gguf is None else {"base_file": {"name": gguf.file, "sha256": gguf.sha256()}},
    )
    if backbone.given_template is not None:
        write_text(folder / TEMPLATE_FILE, backbone.given_template)


def say_unnamed(folder: Path, say: Callable[[str], None]) -> None:
    """Say what the user can do, if a folder holds an adapter that names no base model."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return
    if read_config_file(folder).get("base_model_name_or_path"):
        return
    place = shown_path(without_home(folder))
    say(
        f"{place} names no base model: only its path is known, which says nothing elsewhere. Set "
        "model.public_name to its hub id, or name it in a copy: grasp-lora export "
        f"{place} --to peft --public-name owner/name --out FOLDER"
    )


def read_start(folder: Path, backbone: Backbone) -> dict[str, MergedModule]:
    """Return module name -> merged factors of a merged folder, or of any PEFT adapter folder.

    An ordinary PEFT adapter is read as a merge of one source.

    Raises:
        FileNotFoundError, ValueError: the folder holds no adapter, or the adapter does not fit this
            backbone.
    """
    folder = adapter_in(folder)
    loaded = read_adapter(folder, backbone.model)
    check_fits(loaded, backbone.model, str(folder))
    if not (folder / MERGE_FILE).exists():
        return merge("cat", [loaded.adapter], [1.0])
    layout = read_json(folder / MERGE_FILE)["layout"]
    try:
        tensors = load_file(folder / PARTS_FILE)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder / PARTS_FILE} cannot be read ({error}); merge the adapters again"
        ) from None
    return {
        name: MergedModule(
            about["kind"],
            tuple(
                Part(source, tensors[f"{name}|{i}|A"], tensors[f"{name}|{i}|B"])
                for i, source in enumerate(about["sources"])
            ),
        )
        for name, about in layout.items()
    }


def epochs_trained(folder: Path) -> float:
    """Return the epochs trained by the search that wrote an adapter folder; 0 for other folders."""
    file = adapter_in(folder) / MERGE_FILE
    return float(read_json(file).get("epochs", 0.0)) if file.exists() else 0.0


def read_ratio(file: Path, config: RunConfig) -> tuple[float, dict[str, float] | None]:
    """Return the ratio in a `ratio.json`, and group -> ratio (None if the file has none).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no ratio in [0, 1], or its ratios belong to another `scope` than that
            of the settings.
    """
    stored = read_json(file)
    ratio = stored.get("ratio") if isinstance(stored, dict) else None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise ValueError(
            f"{shown_path(file)} holds no ratio in [0, 1]; give the ratio.json of a search"
        )
    spread = (stored.get("spread") or {}).get("ratios")
    if spread is not None and stored["scope"] != config.scope:
        raise ValueError(
            f"{shown_path(file)} holds ratios of scope {stored['scope']}, but scope is "
            f"{config.scope}; set scope: {stored['scope']}"
        )
    return float(ratio), spread
