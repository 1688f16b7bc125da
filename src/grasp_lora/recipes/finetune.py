"""Stage `finetune`: an adapter and a prune ratio -> the final adapter."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_lora.config import RunConfig
from grasp_lora.core.importance import IMPORTANCE
from grasp_lora.core.masks import without_dead_components, zero_fraction
from grasp_lora.hf.groups import ratio_by_group
from grasp_lora.hf.live import Block, LiveAdapter, Score, scored
from grasp_lora.recipes.context import Context, open_context, open_data
from grasp_lora.recipes.fit import fit, measured
from grasp_lora.recipes.folders import (
    epochs_trained,
    finish_stage,
    read_start,
    save_plain,
    stage_is_done,
    stage_key,
)
from grasp_lora.recipes.processes import is_main, join, wait_for_all


def finetune_at(
    config: RunConfig,
    start: Path,
    ratio: float,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
    title: str = "final fine-tuning",
    spread: Mapping[str, float] | None = None,
    random_masks: bool = False,
    train: bool = True,
) -> Path:
    """Prune an adapter at a fixed ratio, fine-tune it on the target rows, keep the best.

    The best is chosen by dev loss among step 0 (pruned, not trained) and the end of every epoch.
    In mode `continue` the learning rate goes on from the epochs that a search's `adapter/` has had.

    Args:
        config: the run's settings.
        start: a merged folder, a search's `adapter/`, or any PEFT adapter folder.
        ratio: fraction of entries set to zero in every mask unit's tensors, in [0, 1].
        out: folder of the final adapter, an ordinary PEFT folder.
        overwrite: replace a finished result made with other settings.
        context: of the run this is part of.
        title: what the progress bar says.
        spread: group of `config.scope` -> a ratio of its own, in place of `ratio`.
        random_masks: prune entries drawn at random, a control for the importance rule.
        train: False prunes and measures only, for an adapter that was trained before it was merged.

    Returns:
        `out`.

    Raises:
        ValueError: the ratio is outside [0, 1], or `start` is no adapter for this backbone.
        Diverged: the training loss became NaN.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"the ratio must be in [0, 1], got {ratio}; it is the fraction removed")
    join(config)
    data = open_data(config, context)
    key = stage_key(config, data=data.digest(), start=start, ratio=ratio)
    if spread is not None:
        key["spread"] = dict(spread)
    if random_masks:
        key["random_masks"] = True
    if not train:
        key["trained"] = False
    if stage_is_done(out, key, overwrite):
        return out
    context = context or open_context(config, data=data)
    started = time.perf_counter()
    section = config.finetune
    before = epochs_trained(start) if section.mode == "continue" else 0.0
    rule = config.importance if section.importance == "same" else section.importance
    with context.clock.span("load"):
        pruned = read_start(start, context.backbone)
    with context.live(pruned, config.mask_unit) as live:
        norms = context.norms(live, rule) if ratio > 0 and not random_masks else None
        score = random_score(config.seed) if random_masks else scored(IMPORTANCE[rule], norms)

        def prune(optimizer: Any = None) -> None:
            with context.clock.span("masks"):
                wanted = ratio if spread is None else ratio_by_group(config.scope, spread)
                (masks,) = live.masks(score, [wanted])
                live.commit(masks, optimizer)

        every = section.mask_schedule if isinstance(section.mask_schedule, int) else 1
        repeat = ratio > 0 and section.mask_schedule != "once"
        if ratio > 0:
            prune()
        if train:
            result = fit(
                context,
                live,
                section,
                out,
                key,
                title,
                patience=section.patience,
                reprune=prune if repeat else None,
                reprune_every=every,
                start_epoch=before,
            )
        else:
            result = measured(context, live)
        plain = live.plain()
        zeros = zeros_of(live)
        ranks = {"whole": _total_rank(plain)}
        if config.structure == "rank" and ratio > 0:
            plain = {name: without_dead_components(*pair) for name, pair in plain.items()}
        ranks["exported"] = _total_rank(plain)
    if is_main():
        with context.clock.span("write"):
            save_plain(out, plain, context.backbone)
            facts = {"ratio": ratio, "importance": rule, "zeros": zeros, "ranks": ranks}
            facts |= {"seconds": time.perf_counter() - started} | result.facts()
            finish_stage(out, key, facts)
    wait_for_all()
    return out


def random_score(seed: int) -> Score:
    """Return scores that are drawn, for masks that know nothing of the entries."""
    generator = torch.Generator().manual_seed(seed)

    def score(_block: Block, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        drawn = [torch.rand(factor.shape, generator=generator) for factor in (a, b)]
        return drawn[0].to(a.device), drawn[1].to(b.device)

    return score


def _total_rank(plain: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    return sum(a.shape[0] for a, _ in plain.values())


def zeros_of(live: LiveAdapter) -> dict[str, Any]:
    """Return the zeros of the tensors as exported: all of them, and per source where kept apart.

    Under `mask_unit: source` the sources' own zeros are the ratio; the exported tensors of a
    `linear` merge, their sums, have fewer.
    """
    plain = live.plain()
    per_source: dict[str, list[Any]] = {}
    for block in live.blocks:
        if block.source is not None:
            rows = block.rows
            held = (live.params[block.a].detach()[rows], live.params[block.b].detach()[:, rows])
            per_source.setdefault(str(block.source), []).extend(held)
    return {
        "exported": zero_fraction([t for pair in plain.values() for t in pair]),
        "exported_A": zero_fraction([a for a, _ in plain.values()]),
        "exported_B": zero_fraction([b for _, b in plain.values()]),
        "per_source": {source: zero_fraction(held) for source, held in per_source.items()},
    }
