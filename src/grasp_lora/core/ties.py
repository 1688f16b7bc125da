"""TIES-Merging (arXiv 2306.01708) on the deltas of adapters."""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_lora.core.lora import Adapter, MergedModule, Part, merge
from grasp_lora.core.pruning.masks import keep_masks

DENSITY = 0.2
"""Fraction of a delta's entries that is kept, as published."""


def ties_delta(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Return the TIES merge of the deltas of one module, [out, in].

    Each delta keeps its largest entries (trim). The sign of an entry is that of the sum of what is
    kept (elect). The entry is the mean of the kept ones of that sign (disjoint mean).

    Args:
        deltas: At least one, [out, in] each.
        density: Fraction of a delta's entries that is kept, in (0, 1].

    Raises:
        ValueError: If the density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"a density is the fraction of entries kept, in (0, 1], got {density}; write 20 % as "
            "0.2"
        )
    kept = torch.stack([one * keep_masks(one.abs(), [1 - density])[0] for one in deltas])
    elected = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = torch.where(kept * elected > 0, kept, 0.0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp_min(1)


def ties(
    adapters: Sequence[Adapter], density: float = DENSITY
) -> tuple[dict[str, MergedModule], float]:
    """Return (module name -> TIES merge of the adapters' deltas, relative error of its factors).

    The merge of the deltas has full rank, so a LoRA holds its best approximation whose rank is the
    sum of the adapters' ranks. The error is the Frobenius norm of what is lost, of all modules
    together, divided by that of the merge.

    Args:
        adapters: As in `core.lora.merge`. A module is merged from the adapters that have it.
        density: As in `ties_delta`.

    Raises:
        ValueError: As in `ties_delta` and `core.lora.merge`.
    """
    merged: dict[str, MergedModule] = {}
    lost = whole = 0.0
    exact = merge("cat", adapters, [1.0] * len(adapters))  # checks, and has the scaling in B and A
    for name, module in exact.items():
        deltas = [(part.B @ part.A).double() for part in module.parts]
        delta = ties_delta(deltas, density)
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        rank = min(module.A.shape[0], len(s))
        root = s[:rank].sqrt()
        part = Part(None, (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float())
        merged[name] = MergedModule("cat", (part,))
        lost += float(s[rank:].square().sum())
        whole += float(s.square().sum())
    return merged, math.sqrt(lost / whole) if whole else 0.0
