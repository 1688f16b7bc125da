"""Adapter folders between stages: a merged adapter with its sources still apart, stage markers."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grasp_lora.adapters.folder import (
    ADAPTER_CONFIG_FILE,
    NOTES_FILE,
    check_fits,
    read_adapter,
    write_adapter,
)
from grasp_lora.base.files import holds_something, read_json, write_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.lora import MergedModule, Part, merge
from grasp_lora.models.backbones import Backbone
from grasp_lora.workbench.processes import decided_by_main, is_main

MERGE_FILE = "merge.json"
PARTS_FILE = "parts.safetensors"
STAGE_FILE = "stage.json"
_END_BYTES = 1 << 20
# What tells a stage's folder, finished or not, from one that is not to be touched.
_OURS = (STAGE_FILE, NOTES_FILE, "rounds.jsonl")


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
    """Return the epochs of the search that wrote an adapter folder; 0 for any other folder."""
    if not (folder / MERGE_FILE).exists():
        return 0.0
    return float(read_json(folder / MERGE_FILE).get("epochs", 0.0))


def read_ratio(file: Path, config: RunConfig) -> tuple[float, dict[str, float] | None]:
    """Return the ratio in a `ratio.json`, and the ratios of groups where it has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no ratio, or those of another `scope` than the settings name.
    """
    stored = read_json(file)
    ratio = stored.get("ratio") if isinstance(stored, dict) else None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise ValueError(f"'{file}' holds no ratio in [0, 1]; give the ratio.json of a search")
    spread = (stored.get("spread") or {}).get("ratios")
    if spread is not None and stored["scope"] != config.scope:
        raise ValueError(
            f"'{file}' holds ratios of scope {stored['scope']}, but scope is {config.scope}; set "
            f"scope: {stored['scope']}"
        )
    return float(ratio), spread


def work_folder(out: Path) -> Path:
    """Return where a stage keeps its checkpoints: beside its result, gone when it is done."""
    return out.with_name(f"{out.name}.work")


def stage_is_done(out: Path, key: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether `out` already holds the result that `key` (of `stage_key`) stands for.

    Every process gets the main process's answer.

    Args:
        out: the stage's result folder.
        key: settings and inputs.
        overwrite: put a result aside (`<out>.old`, gone once the new one is finished), and remove
            the checkpoints of an unfinished one.

    Raises:
        ValueError: `out` holds another result, finished or not, and `overwrite` is not set; or
            something that no stage wrote.
    """
    return decided_by_main(lambda: _look(out, key, overwrite))


def _look(out: Path, key: Mapping[str, Any], overwrite: bool) -> bool:
    work = work_folder(out)
    begun = (work / STAGE_FILE).exists()
    if out.exists() and not begun and not _is_ours(out):
        raise ValueError(
            f"{out} is not empty and no result of grasp-lora; choose another folder, or empty it"
            " yourself"
        )
    if overwrite:
        if (out / STAGE_FILE).exists():  # whole: kept until the new result is there
            shutil.rmtree(_old(out), ignore_errors=True)
            out.rename(_old(out))
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        return False
    done = (out / STAGE_FILE).exists()
    if done or begun:
        found = read_json((out if done else work) / STAGE_FILE)["key"]
        differing = [k for k in key if found.get(k) != key[k]]
        if differing:
            raise ValueError(
                f"{out} holds {'a finished' if done else 'an interrupted'} result made with other"
                f" settings ({', '.join(differing)} differ); choose another folder, or pass"
                " --overwrite to replace it"
            )
    if done:  # a crash may have come between the marker and the clearing
        shutil.rmtree(work, ignore_errors=True)
    return done


def _old(out: Path) -> Path:
    """Where a result that is to be replaced waits for the new one."""
    return out.with_name(f"{out.name}.old")


def _is_ours(out: Path) -> bool:
    if not out.is_dir():
        return False
    return not holds_something(out) or any((out / name).exists() for name in _OURS)


def stage_key(config: RunConfig, **inputs: Any) -> dict[str, Any]:
    """Return what a stage's result depends on, JSON-able.

    Of an adapter folder among the inputs the content counts, not the place: a run may be moved,
    and a folder may be written anew.
    """
    values = {k: _content(v) if isinstance(v, Path) else str(v) for k, v in inputs.items()}
    return {"config": config.config_hash()} | values


def _content(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(ADAPTER_CONFIG_FILE)]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def model_content(name: str) -> str | None:
    """Return what tells a local model's files from others of the same name; None of a hub's name.

    Sizes, and both ends of every file: a header names the tensors, and training changes the last
    of them. The whole of a large model would be minutes to read.
    """
    place = Path(name)
    files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    kept = [f for f in files if f.suffix in (".safetensors", ".gguf", ".bin", ".json")]
    digest = hashlib.sha256()
    for file in kept:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_END_BYTES))
            content.seek(max(0, size - _END_BYTES))
            digest.update(content.read())
    return digest.hexdigest()[:16] if kept else None


def begin_stage(out: Path, key: Mapping[str, Any]) -> None:
    """Mark the stage's checkpoints with what they are made from, before there are any."""
    if is_main():
        write_json(work_folder(out) / STAGE_FILE, {"key": key})


def finish_stage(out: Path, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the stage's marker, last: a folder that has it is complete. Checkpoints go then."""
    write_json(out / STAGE_FILE, {"key": key} | dict(facts))
    shutil.rmtree(work_folder(out), ignore_errors=True)
    shutil.rmtree(_old(out), ignore_errors=True)
