"""Stage `prune`: an adapter and a prune ratio -> the final adapter.

The adapter is pruned at a fixed ratio and fine-tuned on the target examples. The best state is
chosen by dev loss among step 0 (pruned, not trained) and the end of every epoch. In mode `continue`
the learning-rate schedule resumes after the epochs that the search has trained its `adapter/`.
With `importance: obs` the kept entries make up for the pruned ones when the masks are first cut;
masks that are cut anew in training change no values.

Inputs:
    start: a merged folder, the folder of a search, or any PEFT adapter folder.
    ratio: the folder of a search whose ratio is taken; without it option `ratio` is the fraction of
        entries set to zero in every mask unit's tensors, in [0, 1].
    judged: the same stage on the train examples alone. If it is given, the result is retrained on
        train, dev and micro-dev examples, for as many epochs as the best state of `judged` had,
        epochs of a search included (our departure: the paper trains on the train examples alone).
    cut_from: the adapter that `judged` started from, if it is not `start`; the same entries are
        pruned.
    trial 0, trial 1, ...: earlier trials of an Optuna search (option `sampler`).

Options:
    ratio: fraction removed, if no search gives it.
    shift: added to the ratio of a search; the sum is held in [0, 0.95].
    spread: group of `config.scope` -> a ratio of its own.
    random_masks: prune entries drawn at random.
    untrained: prune and measure only, for an adapter that was trained before it was merged.
    joint: train on as many source rows as target rows, in the same batches (our departure).
    micro_dev: the micro-dev examples judge beside the dev examples.
    labelled: train on train, dev and micro-dev examples at once, for `epochs` epochs that were
        chosen before; nothing judges (our departure).
    epochs: passes over the examples, in place of `train.finetune.epochs`.
    sampler: "tpe", "gp" or "random"; Optuna chooses the ratio from the best dev losses of the
        earlier trials, after `drawn` trials at random.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_lora.adapters.folder import adapter_in
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import Training
from grasp_lora.core.pruning.importance import IMPORTANCE, READS_ROWS
from grasp_lora.core.pruning.masks import without_dead_components, zero_fraction
from grasp_lora.core.pruning.n_of_m import known_ratio
from grasp_lora.stages.costs import Rows, lasting, passes_of, steps_cost, training_cost
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.optuna_ratio import next_ratio
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.training.groups import ratio_by_group
from grasp_lora.training.live import (
    Block,
    BlockImportance,
    BlockRatio,
    LiveAdapter,
    Masks,
    block_fit,
    block_importance,
)
from grasp_lora.workbench.beside import NOTHING, SOURCE, Weights, beside_target, settings_of
from grasp_lora.workbench.context import LABELLED, Context
from grasp_lora.workbench.fit import (
    NOTHING_TRAINED,
    FitOptions,
    FitResult,
    Stopwatch,
    epoch_steps,
    fit,
    measured,
)
from grasp_lora.workbench.merged_folder import (
    epochs_trained,
    read_ratio,
    read_start,
    save_plain,
)
from grasp_lora.workbench.processes import is_main

LARGEST_SHIFTED = 0.95


@dataclass(frozen=True)
class _Cut:
    """How masks are computed.

    Attributes:
        ratio: fraction removed, the same for all mask units or one for each.
        rule: name of the importance rule.
        drawn: draw the masks at random instead.
        seed: seed of the random masks.
    """

    ratio: float | BlockRatio
    rule: str
    drawn: bool
    seed: int

    @property
    def some(self) -> bool:
        """Whether anything is pruned."""
        return self.ratio != 0


def run(work: Work) -> Mapping[str, Any]:
    """Prune and fine-tune the adapter.

    Raises:
        ValueError: the start is no adapter, or does not fit this backbone.
        NotApplicable: option `joint` is given, and there are no source rows.
        Diverged: the training loss became NaN.
    """
    if SOURCE in _beside(work.stage) and not work.context.data.parts.get("source", {}).get("train"):
        raise NotApplicable(
            "a joint fine-tuning needs source rows: give data.source, with rows to train on"
        )
    config, context = work.config, _judging(work)
    asked, spread = ratio_of(work)
    ratio = known_ratio(config.structure, asked)
    wanted = ratio if spread is None else ratio_by_group(config.scope, spread)
    cut = _Cut(wanted if ratio > 0 else 0.0, config.importance, _drawn(work), config.seed)
    stopwatch, start = Stopwatch(), adapter_in(work.inputs["start"])
    judged_masks = _judged_masks(work, cut)
    with _loaded(context, start, config) as live:
        result = _trained(work, context, live, (cut, judged_masks), stopwatch)
        plain = live.plain_factors()
        zeros, ranks = zeros_of(live), {"whole": _total_rank(plain)}
    if config.structure == "rank" and ratio > 0:
        plain = {name: without_dead_components(*pair) for name, pair in plain.items()}
    ranks["exported"] = _total_rank(plain)
    if is_main():
        with context.clock.span("write"):
            save_plain(work.out, plain, context.backbone)
    facts = {"ratio": ratio, "importance": config.importance, "zeros": zeros, "ranks": ranks}
    facts |= {"seconds": stopwatch.seconds} | result.facts()
    if "judged" in work.inputs:
        facts |= _judged_facts(facts_of(work.inputs["judged"]), result, context)
    return facts


def ratio_of(work: Work) -> tuple[float, Mapping[str, float] | None]:
    """Return the ratio, and group -> ratio if a search or an option gives ratios of groups."""
    stage = work.stage
    if stage.option("sampler") is not None:
        trials = [one for role, one in work.inputs.items() if role.startswith("trial")]
        return next_ratio(stage, [facts_of(folder) for folder in trials]), None
    if "ratio" not in work.inputs:
        return float(stage.option("ratio", 0.0)), stage.option("spread")
    ratio, spread = read_ratio(work.inputs["ratio"] / "ratio.json", work.config)
    shift = stage.option("shift")
    if shift is None:
        return ratio, spread
    return min(LARGEST_SHIFTED, max(0.0, ratio + shift)), None


def _drawn(work: Work) -> bool:
    return bool(work.stage.option("random_masks", False))


def _judged_masks(work: Work, cut: _Cut) -> Masks | None:
    """Return the masks of the judged run if it started from another adapter; None otherwise."""
    if "cut_from" not in work.inputs or not cut.some:
        return None
    folder = adapter_in(work.inputs["cut_from"])
    with _loaded(work.context, folder, work.config) as live:
        read = None if cut.drawn else work.context.norms(live, cut.rule)
        return _cutter(live, cut, read)()


def _judging(work: Work) -> Context:
    """Return the context; its dev examples are all that judge."""
    if not work.stage.option("micro_dev", False):
        return work.context
    return work.context.judged_by(("dev", "micro_dev"))


def _trained(
    work: Work,
    context: Context,
    live: LiveAdapter,
    masks: tuple[_Cut, Masks | None],
    stopwatch: Stopwatch,
) -> FitResult:
    """Prune the live adapter and train it; afterwards it has its best state."""
    (cut, judged_masks), finetune = masks, work.config.finetune
    training, before = _training(work)
    read = context.norms(live, cut.rule) if cut.some and not cut.drawn else None
    cutter, compensation = _cutter(live, cut, read), block_fit(cut.rule, read)

    def prune(optimizer: Any = None) -> None:
        with context.clock.span("masks"):
            live.commit(cutter(), optimizer, work.config.controller.clear_moments)

    if judged_masks is not None:
        live.commit(judged_masks)
    elif cut.some:
        prune()
    if compensation is not None:
        live.refit(compensation)
    labelled = _on_all_labels(work.stage)
    # The judged run may have kept step 0: then the training on all labels has no steps either.
    if work.stage.option("untrained", False) or training.max_steps == 0:
        return NOTHING_TRAINED if labelled else measured(context, live)
    schedule = finetune.mask_schedule
    options = FitOptions(
        training,
        f"{work.title}, all labels" if labelled else work.title,
        stateful=(stopwatch,),
        choose_best=not labelled,
        reprune=prune if cut.some and schedule != "once" else None,
        reprune_every=schedule if isinstance(schedule, int) else 1,
        start_epoch=before,
        beside=_beside(work.stage),
    )
    examples = context.on_all_labels() if labelled else context
    return fit(examples, live, options, work.checkpoints)


def _training(work: Work) -> tuple[Training, float]:
    """Return the settings of the training, and the epochs that the start was trained before."""
    training = training_of(work.stage)
    first = work.inputs.get("cut_from", work.inputs["start"])
    continues = work.config.finetune.mode == "continue"
    before = epochs_trained(first) if continues else 0.0
    if "judged" not in work.inputs:
        return training, before
    judged = facts_of(work.inputs["judged"])
    return _for_all_labels(work, training, before, judged), 0.0


def _for_all_labels(
    work: Work, training: Training, before: float, judged: Mapping[str, Any]
) -> Training:
    """Return settings that train on all labelled examples for as long as the judged best."""

    def per_epoch(one: Context) -> int:
        return epoch_steps(one, training, "target", _beside(work.stage))

    epochs = before + judged["best"]["step"] / per_epoch(work.context)
    steps = round(epochs * per_epoch(work.context.on_all_labels()))
    return training.model_copy(update={"max_steps": steps, "patience": None})


def _judged_facts(judged: Mapping[str, Any], result: FitResult, context: Context) -> dict[str, Any]:
    """Return facts of a result on all labels; losses, log and steps are the judged run's."""
    names = ("evaluations", "best", "best_rows", "groups", "log", "steps")
    taken = {name: judged[name] for name in names if name in judged}
    count = len(context.on_all_labels().examples("target", "train"))
    return taken | {"labelled": {"rows": count, "steps": result.steps, "log": list(result.log)}}


@contextmanager
def _loaded(context: Context, folder: Path, config: RunConfig) -> Iterator[LiveAdapter]:
    with context.clock.span("load"):
        merged = read_start(folder, context.backbone)
    with context.live(merged, config.mask_unit) as live:
        yield live


def _cutter(live: LiveAdapter, cut: _Cut, read: Mapping[str, Any] | None) -> Callable[[], Masks]:
    """Return a function that computes masks for the live adapter's present weights.

    Random masks are the same at every call.

    Args:
        live: the adapter.
        cut: how masks are computed.
        read: what the importance rule needs, see `Context.norms`.
    """
    if cut.drawn:
        return lambda: live.masks(random_score(cut.seed), [cut.ratio])[0]
    score = block_importance(IMPORTANCE[cut.rule], read)
    return lambda: live.masks(score, [cut.ratio])[0]


def random_score(seed: int) -> BlockImportance:
    """Return a function that gives random scores in [0, 1), for masks at random."""
    generator = torch.Generator().manual_seed(seed)

    def score(_block: Block, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        drawn = [torch.rand(factor.shape, generator=generator) for factor in (a, b)]
        return drawn[0].to(a.device), drawn[1].to(b.device)

    return score


def _total_rank(plain: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    return sum(a.shape[0] for a, _ in plain.values())


def zeros_of(live: LiveAdapter) -> dict[str, Any]:
    """Return the fraction of zeros in the exported tensors, and per source where they are separate.

    Under `mask_unit: source` the fraction per source is the ratio. A `linear` merge exports sums of
    the sources' tensors, which have fewer zeros.
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


def _on_all_labels(stage: Stage) -> bool:
    return "judged" in stage.inputs or bool(stage.option("labelled", False))


def training_of(stage: Stage) -> Training:
    """Return the settings of the stage's training, before a judged run gives its length."""
    training, epochs = stage.config.training("finetune"), stage.option("epochs")
    changed = {} if epochs is None else {"epochs": epochs, "max_steps": None}
    return training.model_copy(update=changed)


def _settings(stage: Stage) -> tuple[str, ...]:
    encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
    own = ["mask_unit", "finetune.mode", "evaluate.batch_size"]
    if not stage.option("untrained", False):
        own.append("train.finetune")
    if _may_prune(stage):
        own += ["importance", "structure", "finetune.mask_schedule", "scope"]
        if stage.config.finetune.mask_schedule != "once":
            own.append("controller.clear_moments")
    if stage.option("sampler"):
        own.append("controller.high")
    return ("seed", "model", *own, *encoding, *settings_of(_beside(stage)))


def _beside(stage: Stage) -> Weights:
    if stage.option("untrained", False):
        return NOTHING
    return beside_target(stage.config, bool(stage.option("joint", False)))


def _may_prune(stage: Stage) -> bool:
    told = stage.option("ratio", 0.0) or stage.option("sampler")
    return "ratio" in stage.inputs or bool(told)


def _of_target(stage: Stage) -> tuple[Split, ...]:
    """Return the sets of target examples that are read, those trained on first."""
    judges = ("dev", "micro_dev") if stage.option("micro_dev", False) else ("dev",)
    whole = LABELLED if _on_all_labels(stage) else ("train", *judges)
    return tuple(("target", split) for split in whole)


def _examples(stage: Stage, known: tuple[Split, ...]) -> tuple[Split, ...]:
    return (*_of_target(stage), *(one for one in _beside(stage) if one in known))


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    config, train = stage.config, ("target", "train")
    training, judges = training_of(stage), _of_target(stage)[1:]
    rows = Rows((train,), _beside(stage), config.seed)
    labelled = replace(rows, labelled=_of_target(stage))
    pruned = _may_prune(stage) and config.importance in READS_ROWS
    norms = sizes.reading(1 if pruned and not stage.option("random_masks", False) else 0, train)
    if stage.option("untrained", False):
        return norms + sizes.reading(1, *judges)
    if not _on_all_labels(stage):
        return norms + training_cost(training, sizes, rows, *judges)
    if "judged" not in stage.inputs:
        return norms + steps_cost(training, sizes, labelled)
    # The judged run may keep its last epoch, and the passes of a search count as well.
    count = rows.epoch(sizes)
    passes = passes_of(training, count)
    if config.finetune.mode == "continue" and "cut_from" in stage.inputs:
        passes += passes_of(config.training("search"), count)
    whole = lasting(training, passes, labelled.epoch(sizes))
    return norms + steps_cost(whole, sizes, labelled)


PRUNE = Kind(1, _settings, _examples, run, _cost)
