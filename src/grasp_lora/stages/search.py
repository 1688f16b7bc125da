"""Stage `search`: a merged adapter -> the prune ratio, learned while the adapter is fine-tuned.

The input `merged` is a merged adapter (any PEFT adapter folder will do). Option `untrained` is for
a post-hoc merge: nothing is trained, and the same rounds probe the adapter as it is.

The folder holds `ratio.json`, `rounds.jsonl` and `adapter/`, the unpruned adapter at the end of the
search. With `finetune.mode: continue` the final run starts from `adapter/`. It then holds the state
with the lowest dev loss, measured unpruned at step 0 and at the end of every epoch: a few examples
are soon overfitted, and the final run could not undo that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lora.base.files import write_json, write_jsonl
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.controller.policy import final_confirmation_rounds
from grasp_lora.core.controller.rounds import (
    ControllerState,
    RatioChoice,
    RoundRecord,
    planned_rounds,
)
from grasp_lora.core.lora import MergedModule, Part
from grasp_lora.core.pruning.importance import IMPORTANCE, NEEDS_GRADIENTS, READS_ROWS
from grasp_lora.core.pruning.masks import NotANumber
from grasp_lora.stages.costs import Rows, steps_cost, training_cost
from grasp_lora.stages.findings import search_findings
from grasp_lora.stages.probe import pool_of
from grasp_lora.stages.spread import spread_of_profile, spread_ratio
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.training.checkpoint import read_state, write_state
from grasp_lora.training.gradients import GradientAverages
from grasp_lora.training.groups import slopes
from grasp_lora.training.live import LiveAdapter, block_fit
from grasp_lora.training.search_callback import ProbePool, SearchCallback, SearchSettings
from grasp_lora.training.trainer import Diverged
from grasp_lora.workbench.beside import NOTHING, Weights, beside_target, settings_of
from grasp_lora.workbench.context import POOLS, Context
from grasp_lora.workbench.fit import (
    NOTHING_TRAINED,
    FitOptions,
    FitResult,
    Stopwatch,
    checkpoint_to_resume,
    epoch_steps,
    fit,
    run_steps,
)
from grasp_lora.workbench.merged_folder import read_start, write_merged
from grasp_lora.workbench.objective import objective_of
from grasp_lora.workbench.processes import is_main


def check_search(context: Context) -> int:
    """Return the number of rounds planned for the search.

    Raises:
        ValueError: the search is too short for one round, or with `scope: policy` for a round that
            tests a profile.
    """
    config = context.config
    steps = _steps(context, config.merge.when == "after")
    count = planned_rounds(steps, config.controller)
    if count == 0:
        wanted = config.controller.interval or (config.controller.rounds or 0) + 1
        raise ValueError(
            f"the search has {steps} optimizer steps, fewer than the {wanted} that one round"
            " needs: raise train.search.epochs, lower train.search.batch_size or"
            " train.search.accumulation, or lower controller.interval (controller.rounds)"
        )
    if config.scope == "policy" and final_confirmation_rounds(count) == 0:
        raise ValueError(
            f"scope: 'policy' tests its ratios in the rounds after the first three, but the search "
            f"has {count}: raise controller.rounds or train.search.epochs, or set scope: global"
        )
    return count


def _steps(context: Context, untrained: bool) -> int:
    """Return the optimizer steps of a search; those of an untrained one space its rounds alone."""
    return run_steps(
        context, context.config.training("search"), "target", _beside(context.config, untrained)
    )


def _beside(config: RunConfig, untrained: bool) -> Weights:
    return NOTHING if untrained else beside_target(config)


def run(work: Work) -> Mapping[str, Any]:
    """Search the ratio and write the result.

    Raises:
        ValueError: the run is too short for one round.
        Diverged: the training loss became NaN.
    """
    config, context = work.config, work.context
    planned, stopwatch = check_search(context), Stopwatch()
    with context.clock.span("load"):
        start = read_start(work.inputs["merged"], context.backbone)
    splits = POOLS[config.controller.probe_rows]
    with context.live(start, config.mask_unit) as live:
        gathered = GradientAverages(live, config.importance) if _gathers(work.stage) else None
        norms = context.norms(live, config.importance) if gathered is None else gathered.averages
        searcher, write = _searcher(work, live, norms, planned)
        if not _untrained(work.stage):
            result = _fit(work, live, (searcher, gathered), stopwatch, write)
        else:
            try:
                _untrained_rounds(work, searcher, stopwatch, planned)
            except NotANumber as error:
                raise Diverged(
                    f"{work.title}: {error}: nothing is trained here, so the merge is too large "
                    "for this backbone: check the adapters, or use model.dtype float32"
                ) from None
            result = NOTHING_TRAINED
        ended = _as_merged(live, start)
        entries = sum(param.numel() for param in live.params.values())
        groups = [example.group for example in context.rows("target", splits).encoded]
        choice = searcher.choose()
        spread, forwards = None, searcher.forwards
        if config.scope == "policy":
            spread = spread_of_profile(context, searcher.choose_profile(), slopes(live))
        elif config.scope != "global":
            spread = spread_ratio(context, live, norms, choice.ratio, splits)
            forwards += spread["forwards"]
    if is_main():
        with context.clock.span("write"):
            kept = result.steps if result.best is None else result.best.step
            about = {"kind": "search", "epochs": _epochs(work, kept)}
            write_merged(work.out / "adapter", ended, context.backbone, about)
            write()
            facts = ratio_facts(config, choice, searcher) | {"entries": entries}
            facts["findings"] = _findings(work, choice, searcher, entries, groups)
            facts["probe_forwards"] = forwards
            if spread is not None:
                facts |= {"scope": config.scope, "spread": spread}
            write_json(work.out / "ratio.json", facts)
    return {"seconds": stopwatch.seconds, "probe_forwards": forwards} | result.facts()


def _searcher(
    work: Work, live: LiveAdapter, norms: Mapping[str, Any] | None, planned: int
) -> tuple[SearchCallback, Callable[[], None]]:
    """Return the callback that runs the search, and a function that writes its rounds so far."""
    config, context = work.config, work.context
    splits = POOLS[config.controller.probe_rows]
    pool = context.rows("target", splits)
    examples = pool.encoded

    def record(state: ControllerState, _last: RoundRecord | None = None) -> None:
        if is_main():
            with context.clock.span("write"):
                write_rounds(work.out, state, examples)

    searcher = SearchCallback(
        live,
        ProbePool(pool, fresh=config.controller.probe_rows != "micro-dev"),
        SearchSettings(
            config.controller,
            IMPORTANCE[config.importance],
            norms,
            seed=config.seed,
            total_steps=_steps(context, _untrained(work.stage)),
            planned_rounds=planned,
            fit=block_fit(config.importance, norms),
            slopes=slopes(live) if config.scope == "policy" else None,
        ),
        on_round=record,
        clock=context.clock,
        objective=objective_of(context, splits),
    )
    return searcher, lambda: write_rounds(work.out, searcher.controller, examples)


def _fit(
    work: Work,
    live: LiveAdapter,
    watching: tuple[SearchCallback, GradientAverages | None],
    stopwatch: Stopwatch,
    write: Callable[[], None],
) -> FitResult:
    searcher, gathered = watching
    also = () if gathered is None else (gathered,)
    options = FitOptions(
        work.config.training("search"),
        "search",
        extra=(*also, searcher),
        stateful=(searcher, stopwatch, *also),
        choose_best=work.config.finetune.mode == "continue",
        measure_whole=True,
        on_resume=lambda: write() if is_main() else None,
        beside=_beside(work.config, untrained=False),
    )
    return fit(work.context, live, options, work.checkpoints)


def _findings(
    work: Work,
    choice: RatioChoice,
    searcher: SearchCallback,
    entries: int,
    groups: Sequence[str],
) -> list[dict[str, Any]]:
    return search_findings(
        work.config.controller,
        choice,
        searcher.controller.records,
        searcher.flipped,
        entries,
        len(work.context.encoded("target", "micro_dev")),
        groups,
    )


def _untrained_rounds(
    work: Work, searcher: SearchCallback, stopwatch: Stopwatch, planned: int
) -> None:
    """Run the rounds on an adapter that is not trained; resume after the last checkpoint."""
    last = checkpoint_to_resume(work.context, work.checkpoints, "search")
    if last is not None:
        read_state(last, [searcher, stopwatch])
    for number in range(len(searcher.controller.records) + 1, planned + 1):
        searcher.run_untrained_round(number)
        if is_main():
            write_state(work.checkpoints / f"checkpoint-{number}", [searcher, stopwatch])


def _epochs(work: Work, steps: int) -> float:
    training, beside = work.config.training("search"), _beside(work.config, _untrained(work.stage))
    return steps / epoch_steps(work.context, training, "target", beside)


def _gathers(stage: Stage) -> bool:
    """Return whether the training of the search gathers what the importance needs."""
    return stage.config.importance in NEEDS_GRADIENTS and not _untrained(stage)


def _untrained(stage: Stage) -> bool:
    return bool(stage.option("untrained", False))


def write_rounds(out: Path, state: ControllerState, examples: Sequence[EncodedExample]) -> None:
    """Write all rounds so far to `rounds.jsonl`, with ids and groups of the probed examples.

    The whole file is written each time, so after a resume no round is newer than the checkpoint.

    Args:
        out: The stage's folder.
        state: The state after the last round.
        examples: All that could be probed; the rounds name them by their places.
    """
    named = [[examples[place] for place in record.rows] for record in state.records]
    write_jsonl(
        out / "rounds.jsonl",
        [
            asdict(r) | {"rows": [e.id for e in probed], "groups": [e.group for e in probed]}
            for r, probed in zip(state.records, named, strict=True)
        ],
    )


def ratio_facts(config: RunConfig, choice: RatioChoice, searcher: SearchCallback) -> dict[str, Any]:
    """Return the facts about a search for `ratio.json`."""
    state = searcher.controller
    return {
        "ratio": choice.ratio,
        "verdict": choice.verdict,
        "how": choice.rule,
        "evidence": {
            "gain_over_lowest_ratio": choice.gain,
            "standard_error": choice.gain_error,
            "z": choice.z,
            "p_value": choice.p_value,
            "ratio_interval": choice.interval,
            "history_minimum": choice.history_minimum,
            "late_mu": choice.late_mu,
        },
        "policy": {"mu": state.mu, "sigma": state.sigma},
        "rounds": len(state.records),
        "commits": sum(r.committed for r in state.records),
        "flipped_entries": searcher.flipped,
        "probe_forwards": searcher.forwards,
        "controller_preset": config.controller.label,
        "reward": config.controller.reward,
        "importance": config.importance,
        "mask_unit": config.mask_unit,
        "structure": config.structure,
        "seed": config.seed,
    }


def _as_merged(live: LiveAdapter, start: Mapping[str, MergedModule]) -> dict[str, MergedModule]:
    """Return the live factors as a merge of the same layout, with nothing pruned."""
    ended: dict[str, list[Part]] = {name: [] for name in start}
    for block, a, b in live.effective_blocks():
        ended[block.module].append(Part(block.source, a.cpu().clone(), b.cpu().clone()))
    return {
        name: MergedModule(start[name].kind if len(parts) > 1 else "cat", tuple(parts))
        for name, parts in ended.items()
    }


_ANSWERING = ("max_new_tokens", "min_new_tokens", "metric_rules", "rouge", "bertscore_model")


def _settings(stage: Stage) -> tuple[str, ...]:
    encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
    own = ("importance", "mask_unit", "structure", "scope", "controller", "evaluate.batch_size")
    trained = ("train.search", "finetune.mode") if not _untrained(stage) else ()
    beside = settings_of(_beside(stage.config, _untrained(stage)))
    answers: tuple[str, ...] = ()
    if stage.config.controller.reward != "loss":
        answers = tuple(f"evaluate.{name}" for name in _ANSWERING)
    # Without training, the number of rounds still depends on the steps a search would have.
    return ("seed", "model", *own, *encoding, *(trained or ("train.search",)), *answers, *beside)


def _examples(stage: Stage, _known: tuple[Split, ...]) -> tuple[Split, ...]:
    # The target train examples determine the input norms and the number of steps.
    dev = [("target", "dev")] if stage.config.finetune.mode == "continue" else []
    beside = _beside(stage.config, _untrained(stage))
    return tuple(dict.fromkeys([("target", "train"), *pool_of(stage), *dev, *beside]))


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    config, train, pool = stage.config, ("target", "train"), pool_of(stage)
    training, controller = config.training("search"), config.controller
    rows = Rows((train,), _beside(config, _untrained(stage)), config.seed)
    steps = steps_cost(training, sizes, rows)
    trained = Cost()
    if not _untrained(stage):
        continues = config.finetune.mode == "continue"
        trained = training_cost(training, sizes, rows, ("target", "dev")) if continues else steps
    tried = controller.candidates + (1 if controller.baseline else 0)
    probes = min(controller.rows, sizes.examples(*pool))
    forwards = planned_rounds(steps.steps, controller) * tried * probes
    probing = Cost(0, round(forwards * sizes.length(*pool)), forwards)
    read = config.importance in READS_ROWS and not _gathers(stage)
    norms = sizes.reading(1 if read else 0, train)
    return trained + probing + norms


SEARCH = Kind(1, _settings, _examples, run, _cost)
