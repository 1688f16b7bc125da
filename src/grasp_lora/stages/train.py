"""Stage `train`: examples of one role -> a LoRA adapter trained on them.

The folder is an ordinary PEFT adapter. The checkpoint with the best dev loss is kept.

Options:
    role: "source" or "target": whose examples are trained on.
    adalora: train PEFT's AdaLoRA, and keep the result as plain LoRA.
    folds, fold: train on all labelled target examples except those of one fold, and measure that
        fold. Examples of one context are in one fold. `folds` without `fold` trains on all labelled
        target examples, for the number of epochs at which the inputs "fold 0", "fold 1", ... have
        the lowest mean loss.
    labelled: train on all labelled target examples; nothing is measured meanwhile.

Inputs:
    like: an adapter whose modules, ranks and scaling the new one takes; else `lora` says them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import Training
from grasp_lora.core.lora import MergedModule, Part, lora_scaling
from grasp_lora.models.modules import linear_shape, resolve_targets
from grasp_lora.stages.adalora import train_adalora
from grasp_lora.stages.costs import Rows, steps_cost, training_cost
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.tasks.base import Example
from grasp_lora.workbench.beside import NOTHING, Weights, beside_target, settings_of
from grasp_lora.workbench.context import LABELLED, Context
from grasp_lora.workbench.fit import FitOptions, Stopwatch, fit
from grasp_lora.workbench.merged_folder import save_plain
from grasp_lora.workbench.processes import is_main


def run(work: Work) -> Mapping[str, Any]:
    """Train a fresh adapter.

    Raises:
        ValueError: there are no examples of the role, no layer matches `lora.target_modules`, or
            cross-validation has no finite loss.
        NotApplicable: there are fewer contexts than folds need, or AdaLoRA cannot run here.
        Diverged: the training loss became NaN.
    """
    config, role = work.config, work.stage.options["role"]
    context, training, about = _examples_and_training(work)
    if not context.examples(role, "train"):
        raise ValueError(
            f"there are no {role} examples to train on: give data.{role}.files and rows"
        )
    stopwatch = Stopwatch()
    whole = bool(work.stage.option("labelled"))
    title = work.title if whole else f"train {role} adapter"
    options = FitOptions(
        *(training, title),
        role=role,
        choose_best=not whole,
        stateful=(stopwatch,),
        beside=_beside(work.stage),
    )
    if work.stage.option("adalora"):
        result, plain, scaling = train_adalora(context, options, work.checkpoints)
    else:
        fresh, scaling = _fresh(work)
        with context.live(fresh, "merged", config.lora.dropout, scaling) as live:
            result = fit(context, live, options, work.checkpoints)
            plain = live.plain_factors()
    if is_main():
        with context.clock.span("write"):
            save_plain(work.out, plain, context.backbone, scaling)
    return {"seconds": stopwatch.seconds} | result.facts() | about


def _examples_and_training(work: Work) -> tuple[Context, Training, dict[str, Any]]:
    """Return the context to train in, the training's settings, and facts about both."""
    stage, context = work.stage, work.context
    training = work.config.training(stage.options["role"])
    number, count = stage.option("fold"), stage.option("folds")
    if stage.option("labelled"):
        whole = context.on_all_labels()
        return whole, training, {"rows_trained": len(whole.examples("target", "train"))}
    if count is None:
        return context, training, {}
    rows = [e for split in LABELLED for e in context.examples("target", split)]
    folds = folds_of(rows, count)
    if len(folds) < 2:
        raise NotApplicable("cross-validation needs labelled examples from at least 2 contexts")
    training = training.model_copy(update={"patience": None})
    if number is None:
        epochs, judged = _cross_validated(work, folds)
        training = training.model_copy(update={"epochs": epochs})
        whole = context.on_target({"train": tuple(rows)})
        return (
            whole,
            training,
            {"epochs": epochs, "cross_validated": judged, "rows_trained": len(rows)},
        )
    if number >= len(folds):
        raise NotApplicable(f"there are contexts for {len(folds)} folds only, not for {count}")
    kept = [e for fold in folds if fold is not folds[number] for e in fold]
    parts = {"train": tuple(kept), "dev": tuple(folds[number])}
    return context.on_target(parts), training, {"rows_trained": len(kept)}


def _cross_validated(work: Work, folds: Sequence[Sequence[Example]]) -> tuple[int, float]:
    """Return the epochs with the lowest mean loss, and the mean loss of dev and micro-dev then.

    The loss of each example, in nats, is that of the training whose fold holds the example: it was
    not trained on it.
    """
    curves: dict[str, list[float]] = {}
    for number, held in enumerate(folds):
        stored = facts_of(work.inputs[f"fold {number}"])["rows"]
        rows = [[math.nan if loss is None else loss for loss in losses] for losses in stored]
        by_example = zip(*rows, strict=True)
        curves |= {e.id: list(curve) for e, curve in zip(held, by_example, strict=True)}
    means = [statistics.fmean(losses) for losses in zip(*curves.values(), strict=True)]
    after = dict(enumerate(means[1:], start=1))
    epochs, out, context = lowest(after), not_finite(after), work.context
    if epochs is None:
        raise ValueError(
            f"cross-validation has no finite loss after any of {len(after)} epochs: lower "
            f"train.{work.stage.options['role']}.learning_rate"
        )
    if out:
        context.reporter.say(f"cross-validation: the loss is not finite after epochs {out}")
    judges = [e.id for split in ("micro_dev", "dev") for e in context.examples("target", split)]
    return epochs, statistics.fmean(curves[name][epochs] for name in judges)


def folds_of(rows: Sequence[Example], count: int) -> list[list[Example]]:
    """Return the examples in `count` folds of similar size, or one fold per context if fewer.

    All examples of a context are in one fold.
    """
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    folds: list[list[Example]] = [[] for _ in range(min(count, len(groups)))]
    for group in sorted(groups, key=lambda name: (-len(groups[name]), name)):
        min(folds, key=len).extend(groups[group])
    return folds


def _fresh(work: Work) -> tuple[dict[str, MergedModule], float]:
    """Return untrained factors, and the factor on what they add to the backbone."""
    model, config, like = work.context.backbone.model, work.config, work.inputs.get("like")
    if like is None:
        scaling = lora_scaling(config.lora.r, config.lora.alpha, use_rslora=False)
        return fresh_adapter(model, config), scaling
    given = read_adapter(like, model).adapter
    ranks = {name: one.rank for name, one in given.items()}
    # One factor serves all modules; adapters in which it differs from module to module are rare.
    scaling = statistics.mode(one.scaling for one in given.values())
    return untrained_factors(model, ranks, config.seed), scaling


def fresh_adapter(model: torch.nn.Module, config: RunConfig) -> dict[str, MergedModule]:
    """Return untrained factors of the rank and on the modules that `lora` says."""
    names = resolve_targets(model, config.lora.target_modules)
    return untrained_factors(model, dict.fromkeys(names, config.lora.r), config.seed)


def untrained_factors(
    model: torch.nn.Module, ranks: Mapping[str, int], seed: int
) -> dict[str, MergedModule]:
    """Return untrained factors as PEFT initialises them: A Kaiming-uniform, B zero.

    The factors are drawn from a generator of our own, in the order of the module names, so that an
    adapter depends on the seed alone.

    Args:
        model: has the modules, linear layers.
        ranks: module name -> rank.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    fresh: dict[str, MergedModule] = {}
    for name, rank in ranks.items():
        shape = linear_shape(modules[name])
        assert shape is not None, "LoRA is on linear layers only"
        inputs, outputs = shape
        bound = 1 / math.sqrt(inputs)  # Kaiming with a = sqrt(5)
        a = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound
        fresh[name] = MergedModule("cat", (Part(0, a, torch.zeros(outputs, rank)),))
    return fresh


def _settings(stage: Stage) -> tuple[str, ...]:
    role = stage.options["role"]
    encoding = ("data.task", "data.max_length", "data.chat", f"data.{role}.prompt")
    beside = settings_of(_beside(stage))
    if beside and stage.option("fold") is not None:
        beside += ("data.near_duplicates",)  # rows like those of the fold are not trained on
    own = ("seed", "model", "lora", f"train.{role}", "evaluate.batch_size")
    return (*own, *encoding, *beside)


def _beside(stage: Stage) -> Weights:
    return beside_target(stage.config) if stage.options["role"] == "target" else NOTHING


def _examples(stage: Stage, _known: tuple[Split, ...]) -> tuple[Split, ...]:
    whole = stage.option("folds") or stage.option("labelled")
    splits = LABELLED if whole else ("train", "dev")
    return (*((stage.options["role"], split) for split in splits), *_beside(stage))


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    role, count = stage.options["role"], stage.option("folds")
    training, beside, seed = stage.config.training(role), _beside(stage), stage.config.seed
    whole = tuple((role, split) for split in LABELLED)
    if stage.option("labelled"):
        return steps_cost(training, sizes, Rows(whole, beside, seed))
    if count is None:
        rows = Rows(((role, "train"),), beside, seed)
        return training_cost(training, sizes, rows, (role, "dev"))
    if stage.option("fold") is None:
        return steps_cost(training, sizes, Rows(whole, beside, seed))
    # The smallest fold is held back from the training, the largest one is measured.
    examples, length = sizes.examples(*whole), sizes.length(*whole)
    kept, held = examples - examples // count, -(-examples // count)
    fold, others = ("fold", "dev"), ("fold", "train")
    parts = replace(
        sizes,
        count={**sizes.count, others: kept, fold: held},
        tokens={**sizes.tokens, others: length, fold: length},
    )
    return training_cost(training, parts, Rows((others,), beside, seed), fold)


TRAIN = Kind(1, _settings, _examples, run, _cost)
