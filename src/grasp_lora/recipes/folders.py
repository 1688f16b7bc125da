"""Adapter folders between stages: a merged adapter with its sources still apart, stage markers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from grasp_lora.config import RunConfig
from grasp_lora.core.lora import MergedModule, Part, merge
from grasp_lora.hf.adapter_io import check_fits, read_adapter, write_adapter
from grasp_lora.hf.backbones import Backbone
from grasp_lora.runs import read_json, write_json

MERGE_FILE = "merge.json"
PARTS_FILE = "parts.safetensors"
STAGE_FILE = "stage.json"


def write_merged(
    folder: Path,
    merged: Mapping[str, MergedModule],
    backbone: Backbone,
    about: Mapping[str, Any],
) -> None:
    """Write a merged adapter: a plain PEFT folder, and beside it what came from which source.

    Args:
        folder: where to.
        merged: module name -> merged factors.
        backbone: the model it belongs to.
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
    """Write module -> (A, B) as an ordinary PEFT adapter folder."""
    write_adapter(
        folder,
        plain,
        model=backbone.model,
        scaling=scaling,
        base_name=backbone.public_name,
        fingerprint=backbone.fingerprint,
    )


def read_start(folder: Path, backbone: Backbone) -> dict[str, MergedModule]:
    """Read a merged folder, or any plain PEFT adapter folder as a merge of one.

    Raises:
        FileNotFoundError, ValueError: it is no adapter, or not one for this backbone.
    """
    loaded = read_adapter(folder)
    check_fits(loaded, backbone.model, str(folder))
    if not (folder / MERGE_FILE).exists():
        return merge("cat", [loaded.adapter], [1.0])
    layout = read_json(folder / MERGE_FILE)["layout"]
    tensors = load_file(folder / PARTS_FILE)
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


def stage_is_done(out: Path, config: RunConfig, overwrite: bool, **inputs: Any) -> bool:
    """Return whether `out` already holds this stage's result for the same settings and inputs.

    Raises:
        ValueError: it holds another result and `overwrite` is not set.
    """
    marker = out / STAGE_FILE
    if overwrite and out.exists():
        shutil.rmtree(out)
    if not marker.exists():
        return False
    found, wanted = read_json(marker)["key"], stage_key(config, inputs)
    if found == wanted:
        return True
    differing = [k for k in wanted if found.get(k) != wanted[k]]
    raise ValueError(
        f"{out} holds a finished result made with other settings ({', '.join(differing)} differ);"
        " choose another folder, or pass --overwrite to replace it"
    )


def stage_key(config: RunConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stage's result depends on, JSON-able."""
    return {"config": config.config_hash()} | {k: str(v) for k, v in inputs.items()}


def finish_stage(
    out: Path, config: RunConfig, facts: Mapping[str, Any], **inputs: Any
) -> None:
    """Write the stage's marker, last: a folder that has it is complete."""
    write_json(out / STAGE_FILE, {"key": stage_key(config, inputs)} | dict(facts))
