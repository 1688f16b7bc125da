"""Merge adapter folders into one trainable adapter of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from grasp_lora.adapters.attach import attach_adapter
from grasp_lora.adapters.folder import check_fits, read_adapter
from grasp_lora.base.words import shown, shown_path
from grasp_lora.core.lora import MergeKind, average_weights, merge

_SOURCE_RANKS = "grasp_lora_source_ranks"


def merge_adapters(
    model: nn.Module,
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    kind: MergeKind = "cat",
    dropout: float = 0.0,
) -> PeftModel:
    """Merge LoRA adapters into one, and put it on a model as a trainable adapter.

    The adapters may have different ranks, alphas and target modules. The result is an ordinary
    PeftModel with one adapter, `default`, whose scaling is 1; its factors are in float32.

    Args:
        model: the base model without LoRA, changed in place and frozen.
        adapters: two or more PEFT adapter folders.
        weights: weight of each adapter; None gives each the same, with a sum of 1.
        kind: `cat`, the exact sum of the adapters, whose rank is the sum of the ranks; `linear`,
            the published merge; or `svd`, of the largest rank. See docs/method.md.
        dropout: LoRA dropout of the result, in [0, 1).

    Raises:
        FileNotFoundError: a folder holds no adapter.
        ValueError: an adapter is not plain LoRA on linear layers or does not fit the model, or the
            adapters cannot be merged in this way or with these weights.
    """
    if not adapters or isinstance(adapters, (str, Path)):
        raise ValueError(f"adapters must be a list of adapter folders, got {shown(adapters)}")
    weights = average_weights(len(adapters)) if weights is None else weights
    loaded = [read_adapter(folder, model) for folder in adapters]
    for folder, one in zip(adapters, loaded, strict=True):
        check_fits(one, model, shown_path(folder))
    merged = merge(kind, [one.adapter for one in loaded], weights)
    result = attach_adapter(model, {name: (m.A, m.B) for name, m in merged.items()}, dropout)
    if kind == "cat":
        ranks = {n: {part.source: len(part.A) for part in m.parts} for n, m in merged.items()}
        setattr(result, _SOURCE_RANKS, ranks)
    return result


def source_ranks(model: PeftModel, adapter: str) -> Mapping[str, Mapping[int, int]] | None:
    """Return module -> source -> its rows of A, in their order, in a model of `merge_adapters`.

    None if the adapter was made in another way, or its sources do not lie side by side.
    """
    ranks: Any = getattr(model, _SOURCE_RANKS, None)
    return ranks if adapter == "default" else None
