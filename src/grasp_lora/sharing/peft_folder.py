"""An adapter as a PEFT folder to share: one rank, alpha = rank, no patterns, nothing private."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grasp_lora.adapters.chat import TEMPLATE_FILE, saved_template
from grasp_lora.adapters.folder import (
    ADAPTER_CONFIG_FILE,
    NOTES_FILE,
    RANKS_NOTE,
    WEIGHTS_FILE,
    LoadedAdapter,
    read_notes,
)
from grasp_lora.base.files import RESULT, write_text
from grasp_lora.report.card import CARD_FILE, CardFacts, facts_of_run, write_card
from grasp_lora.sharing.factors import Ready

_KEPT_NOTES = ("base_fingerprint", "vocab_size", "base_file")


def write_peft(
    out: Path,
    source: Path,
    loaded: LoadedAdapter,
    ready: Ready,
    dtype: torch.dtype,
    base: str | None,
) -> None:
    """Write the folder: PEFT's two files, `grasp_lora.json`, the chat template and a card.

    The card of the source folder is taken along, since it may have been edited, unless base, rank
    or factors have changed. A new one says what the run folder around the source says, if the
    source is its result. A trimmed adapter has no scores: they were measured before.

    Args:
        out: an existing empty folder.
        source: the adapter folder that was read.
        loaded: its content.
        ready: the factors.
        dtype: number format of the factors.
        base: public name of the base model; None leaves it out.
    """
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor.to(dtype).contiguous()
        for name, pair in sorted(ready.pairs.items())
        for side, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    write_text(out / ADAPTER_CONFIG_FILE, _json(_config(loaded.config, ready, base)))
    notes = {name: one for name, one in read_notes(source).items() if name in _KEPT_NOTES}
    notes |= {RANKS_NOTE: ready.own} if ready.own else {}
    write_text(out / NOTES_FILE, _json(notes))
    template = saved_template(source)
    if template is not None:
        write_text(out / TEMPLATE_FILE, template)
    card, before = source / CARD_FILE, loaded.config
    same = (before.get("r"), before.get("base_model_name_or_path")) == (ready.rank, base)
    if same and not ready.lost and card.is_file() and (source / NOTES_FILE).is_file():
        write_text(out / CARD_FILE, card.read_text(encoding="utf-8"))
    else:
        write_card(out, _facts(source.resolve(), ready))


def _facts(source: Path, ready: Ready) -> CardFacts | None:
    found = facts_of_run(source.parent) if source.name == RESULT else None
    if not ready.lost:
        return found
    found = found or CardFacts("A LoRA adapter")
    words = (
        f"to rank {ready.rank}, by singular values; relative error of a module's delta at most "
        f"{max(ready.lost.values()):.2e}; not scored since"
    )
    return replace(found, facts=(*found.facts, ("trimmed", words)), sets={})


def _config(config: Mapping[str, Any], ready: Ready, base: str | None) -> dict[str, Any]:
    changed = {
        "base_model_name_or_path": base,
        "r": ready.rank,
        "lora_alpha": ready.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(ready.pairs),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
    }
    return dict(config) | changed


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
