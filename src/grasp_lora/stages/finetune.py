"""Stage `finetune`: an adapter and a prune ratio -> the final adapter."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import FinetuneSettings
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.masks import without_dead_components, zero_fraction
from grasp_lora.training.groups import ratio_by_group
from grasp_lora.training.live import (
    Block,
    BlockImportance,
    BlockRatio,
    LiveAdapter,
    Masks,
    block_importance,
)
from grasp_lora.training.trainer import processes, steps_per_epoch
from grasp_lora.workbench.context import Context, open_context, open_data
from grasp_lora.workbench.fit import FitResult, Spent, fit, measured
from grasp_lora.workbench.folders import (
    STAGE_FILE,
    epochs_trained,
    finish_stage,
    read_start,
    save_plain,
    stage_is_done,
    stage_key,
)
from grasp_lora.workbench.processes import is_main, join, wait_for_all


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
    judged: Path | None = None,
    origin: Path | None = None,
) -> Path:
    """Prune an adapter at a fixed ratio, fine-tune it on the target rows, keep the best.

    The best is chosen by dev loss among step 0 (pruned, not trained) and the end of every epoch.
    In mode `continue` the learning rate goes on from the epochs that a search's `adapter/` has had.

    With `finetune.rows: labelled` (our departure: the paper trains on the train rows alone) that
    run is kept beside the result, in `<out>-judged`; the result begins anew and trains on train,
    dev and micro-dev rows for as many epochs as were kept, a search's among them.

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
        judged: result of the same on the train rows alone, for one that all labelled rows train:
            its dev losses stand for it. None makes it where that is asked for.
        origin: what the search began with, if `start` is a search's `adapter/`: all labelled rows
            train from there.

    Returns:
        `out`.

    Raises:
        ValueError: the ratio is outside [0, 1], `start` is no adapter for this backbone, or all
            labelled rows are to be trained on without dev rows to choose the epochs by, or from a
            search of unknown origin.
        Diverged: the training loss became NaN.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"the ratio must be in [0, 1], got {ratio}; it is the fraction removed")
    join(config)
    data = open_data(config, context)
    retrain = train and config.finetune.rows == "labelled"
    if retrain and not data.parts["target"].get("dev"):
        raise ValueError(
            "finetune.rows: labelled has no target dev rows to choose the epochs by: give"
            " data.target.rows.dev, or set finetune.rows: train"
        )
    before = epochs_trained(start) if config.finetune.mode == "continue" else 0.0
    if retrain and before and origin is None:
        raise ValueError(
            f"finetune.rows: labelled trains from where the search began, and '{start}' is where it"
            " ended: give the merged adapter as the start with finetune.mode: restart"
        )
    key = stage_key(config, data=data.digest(), start=start, ratio=ratio)
    if spread is not None:
        key["spread"] = dict(spread)
    if random_masks:
        key["random_masks"] = True
    if not train:
        key["trained"] = False
    if judged is not None:
        key["judged"] = stage_key(config, judged=judged)["judged"]
    if origin is not None and retrain:
        key["origin"] = stage_key(config, origin=origin)["origin"]
    if stage_is_done(out, key, overwrite):
        return out
    context = context or open_context(config, data=data)
    section, begun = config.finetune, start
    if retrain:
        judged = judged or finetune_at(
            on_train_rows(config), start, ratio, judged_beside(out), overwrite,
            context, title, spread, random_masks,
        )  # fmt: skip
        title = f"{title}, all labels"
        section = _for_all_labels(context, section, before, read_json(judged / STAGE_FILE))
        start, before = origin or start, 0.0
    spent = Spent()
    rule = config.importance if section.importance == "same" else section.importance
    wanted = ratio if spread is None else ratio_by_group(config.scope, spread)
    judged_masks: Masks | None = None
    if ratio > 0 and start != begun:
        # What was judged was pruned as the search left it: the same entries go where it began.
        with _loaded(context, begun, config) as live:
            judged_masks = _cutter(context, live, config.seed, rule, wanted, random_masks)()
    with _loaded(context, start, config) as live:
        cut = _cutter(context, live, config.seed, rule, wanted, random_masks)

        def prune(optimizer: Any = None) -> None:
            with context.clock.span("masks"):
                live.commit(cut(), optimizer)

        every = section.mask_schedule if isinstance(section.mask_schedule, int) else 1
        repeat = ratio > 0 and section.mask_schedule != "once"
        if judged_masks is not None:
            live.commit(judged_masks)
        elif ratio > 0:
            prune()
        # The start itself may be what is kept: no step of all labels either, then.
        if train and section.max_steps != 0:
            result = fit(
                context.on_all_labels() if retrain else context,
                live,
                section,
                out,
                key,
                title,
                stateful=[spent],
                choose_best=not retrain,
                patience=None if retrain else section.patience,
                reprune=prune if repeat else None,
                reprune_every=every,
                start_epoch=before,
            )
        elif judged is None:
            result = measured(context, live)
        else:
            result = FitResult((), (), None, (), 0)
        plain = live.plain_factors()
        zeros = zeros_of(live)
        ranks = {"whole": _total_rank(plain)}
        if config.structure == "rank" and ratio > 0:
            plain = {name: without_dead_components(*pair) for name, pair in plain.items()}
        ranks["exported"] = _total_rank(plain)
    if is_main():
        with context.clock.span("write"):
            save_plain(out, plain, context.backbone)
            facts = {"ratio": ratio, "importance": rule, "zeros": zeros, "ranks": ranks}
            facts |= {"seconds": spent.seconds} | result.facts()
            if judged is not None:
                first = read_json(judged / STAGE_FILE)
                facts |= _as_judged(first, result, context)
                facts["seconds"] += first["seconds"]
            finish_stage(out, key, facts)
    wait_for_all()
    return out


def on_train_rows(config: RunConfig) -> RunConfig:
    """Return settings whose fine-tuning leaves the dev rows to judge by."""
    section = config.finetune.model_copy(update={"rows": "train"})
    return config.model_copy(update={"finetune": section})


def judged_beside(out: Path) -> Path:
    """Return where `finetune_at` keeps the run that judged a result trained on all labels."""
    return out.with_name(f"{out.name}-judged")


def _for_all_labels(
    context: Context, section: FinetuneSettings, before: float, judged: Mapping[str, Any]
) -> FinetuneSettings:
    """Return settings that give all labelled rows the epochs that the judged run has kept."""

    def per_epoch(one: Context) -> int:
        rows = len(one.examples("target", "train"))
        return steps_per_epoch(rows, section.batch_size, section.accumulation, processes())

    epochs = before + judged["best"]["step"] / per_epoch(context)
    steps = round(epochs * per_epoch(context.on_all_labels()))
    return section.model_copy(update={"max_steps": steps})


def _as_judged(judged: Mapping[str, Any], result: FitResult, context: Context) -> dict[str, Any]:
    """Return the facts of a result on all labels: dev losses and steps are the judged run's."""
    taken = {name: judged[name] for name in ("evaluations", "best", "best_rows", "log", "steps")}
    rows = len(context.on_all_labels().examples("target", "train"))
    return taken | {"labelled": {"rows": rows, "steps": result.steps, "log": list(result.log)}}


@contextmanager
def _loaded(context: Context, folder: Path, config: RunConfig) -> Iterator[LiveAdapter]:
    with context.clock.span("load"):
        merged = read_start(folder, context.backbone)
    with context.live(merged, config.mask_unit) as live:
        yield live


def _cutter(
    context: Context,
    live: LiveAdapter,
    seed: int,
    rule: str,
    ratio: float | BlockRatio,
    random_masks: bool,
) -> Callable[[], Masks]:
    """Return what cuts masks of a live adapter as it then is; drawn ones are always the same."""
    if random_masks:
        return lambda: live.masks(random_score(seed), [ratio])[0]
    norms = context.norms(live, rule) if ratio != 0 else None
    score = block_importance(IMPORTANCE[rule], norms)
    return lambda: live.masks(score, [ratio])[0]


def random_score(seed: int) -> BlockImportance:
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
    plain = live.plain_factors()
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
