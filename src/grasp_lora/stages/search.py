"""Stage `search`: merged adapter -> the prune ratio learned while fine-tuning it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lora.base.files import write_json, write_jsonl
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.core.controller.rounds import (
    ControllerState,
    RatioChoice,
    RoundRecord,
    choose_ratio,
    planned_rounds,
)
from grasp_lora.core.lora import MergedModule, Part
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.stages.findings import search_findings
from grasp_lora.stages.spread import spread_ratio
from grasp_lora.training.checkpoint import (
    complete_checkpoints,
    read_state,
    remove_incomplete,
    write_state,
)
from grasp_lora.training.live import LiveAdapter
from grasp_lora.training.search_callback import ProbePool, SearchCallback, SearchSettings
from grasp_lora.training.trainer import processes, steps_per_epoch
from grasp_lora.workbench.context import Context, open_context, open_data
from grasp_lora.workbench.fit import FitResult, Spent, fit, run_steps
from grasp_lora.workbench.folders import (
    begin_stage,
    finish_stage,
    read_start,
    stage_is_done,
    stage_key,
    work_folder,
    write_merged,
)
from grasp_lora.workbench.objective import cost_of, reward_faults
from grasp_lora.workbench.processes import is_main, join, wait_for_all

POOLS: dict[str, tuple[str, ...]] = {
    "micro-dev": ("micro_dev",),
    "micro-dev+dev": ("micro_dev", "dev"),
}


def check_search(context: Context) -> int:
    """Return how many rounds the planned search has.

    Raises:
        ValueError: it is too short for one round.
    """
    config = context.config
    steps = run_steps(context, config.search, "target")
    count = planned_rounds(steps, config.controller)
    if count == 0:
        wanted = config.controller.interval or (config.controller.rounds or 0) + 1
        raise ValueError(
            f"the search has {steps} optimizer steps, fewer than the {wanted} that one round"
            " needs: raise search.epochs, lower search.batch_size or search.accumulation, or lower"
            " controller.interval (controller.rounds)"
        )
    return count


def search_ratio(
    config: RunConfig,
    merged: Path,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
) -> Path:
    """Fine-tune the merged adapter while the controller learns the prune ratio.

    With `merge.when: after` nothing is trained: the same rounds probe the adapter as it is, which
    is then what will be pruned and used.

    Args:
        config: the run's settings.
        merged: folder of the merged adapter (any PEFT adapter folder will do).
        out: receives `ratio.json`, `rounds.jsonl` and `adapter/`, the adapter with nothing pruned
            as the search left it. With `finetune.mode: continue`, which goes on from there, it is
            that of the best dev loss with nothing pruned, step 0 and the end of every epoch taking
            part: few rows are soon overfitted, and a final run could not undo that.
        overwrite: replace a finished result made with other settings.
        context: of the run this is part of.

    Returns:
        `out`.

    Raises:
        ValueError: the run is too short for one round; the micro-dev set is empty or overlaps.
        Diverged: the training loss became NaN.
    """
    join(config)
    faults = reward_faults(config)
    if faults:
        raise ConfigError(faults)
    data = open_data(config, context)
    key = stage_key(config, data=data.digest(), merged=merged)
    if stage_is_done(out, key, overwrite):
        return out
    context = context or open_context(config, data=data)
    planned = check_search(context)
    spent = Spent()
    clock = context.clock
    with clock.span("load"):
        start = read_start(merged, context.backbone)
    out.mkdir(parents=True, exist_ok=True)

    def record(state: ControllerState, _last: RoundRecord) -> None:
        if is_main():
            with clock.span("write"):
                write_rounds(out, state, ids)

    splits = POOLS[config.controller.probe_rows]
    with context.live(start, config.mask_unit) as live:
        rows, norms = context.rows("target", splits), context.norms(live, config.importance)
        ids = [e.id for e in rows.encoded]
        searcher = SearchCallback(
            live,
            ProbePool(rows, fresh=config.controller.probe_rows != "micro-dev"),
            SearchSettings(
                config.controller,
                IMPORTANCE[config.importance],
                norms,
                seed=config.seed,
                total_steps=run_steps(context, config.search, "target"),
                planned_rounds=planned,
            ),
            on_round=record,
            clock=clock,
            objective=cost_of(context, splits),
        )
        if config.merge.when == "after":
            begin_stage(out, key)
            _rounds_alone(searcher, spent, planned, work_folder(out))
            result = FitResult((), (), None, (), 0)
        else:
            result = fit(
                context,
                live,
                config.search,
                out,
                key,
                "search",
                extra=[searcher],
                stateful=[searcher, spent],
                choose_best=config.finetune.mode == "continue",
                measure_whole=True,
                on_resume=lambda: (
                    write_rounds(out, searcher.controller, ids) if is_main() else None
                ),
            )
        ended = _as_merged(live, start)
        entries = sum(param.numel() for param in live.params.values())
        choice = choose_ratio(searcher.controller, config.controller)
        spread = None
        if config.scope != "global":
            spread = spread_ratio(context, live, norms, choice.ratio, splits)
    if is_main():
        with clock.span("write"):
            kept = result.steps if result.best is None else result.best.step
            about = {"kind": "search", "epochs": _epochs(context, kept)}
            write_merged(out / "adapter", ended, context.backbone, about)
            write_rounds(out, searcher.controller, ids)
            shown = search_findings(
                config.controller,
                choice,
                searcher.controller.records,
                searcher.flipped,
                entries,
                len(context.encoded("target", "micro_dev")),
                len(ids),
            )
            facts = ratio_facts(config, choice, searcher) | {"entries": entries, "findings": shown}
            if spread is not None:
                facts["probe_forwards"] += spread["forwards"]
                facts |= {"scope": config.scope, "spread": spread}
            write_json(out / "ratio.json", facts)
            facts = {"seconds": spent.seconds} | result.facts()
            finish_stage(out, key, facts)
    wait_for_all()
    return out


def _rounds_alone(searcher: SearchCallback, spent: Spent, planned: int, work: Path) -> None:
    """Run rounds on an adapter that nothing trains, from the last one that was kept."""
    if is_main():
        remove_incomplete(work)
    wait_for_all()
    for last in complete_checkpoints(work)[:1]:
        read_state(last, [searcher, spent])
    for number in range(len(searcher.controller.records) + 1, planned + 1):
        searcher.run_untrained_round(number)
        if is_main():
            write_state(work / f"checkpoint-{number}", [searcher, spent])


def _epochs(context: Context, steps: int) -> float:
    section, rows = context.config.search, len(context.examples("target", "train"))
    return steps / steps_per_epoch(rows, section.batch_size, section.accumulation, processes())


def write_rounds(out: Path, state: ControllerState, ids: list[str]) -> None:
    """Write all rounds so far: a resumed run's file holds no round newer than its checkpoint."""
    write_jsonl(
        out / "rounds.jsonl",
        [asdict(r) | {"rows": [ids[i] for i in r.rows]} for r in state.records],
    )


def ratio_facts(config: RunConfig, choice: RatioChoice, searcher: SearchCallback) -> dict[str, Any]:
    """Return what `ratio.json` says of a search."""
    state = searcher.controller
    return {
        "ratio": choice.ratio,
        "verdict": choice.verdict,
        "how": choice.rule,
        "evidence": {
            "gain_over_lowest_ratio": choice.gain,
            "standard_error": choice.gain_error,
            "z": choice.z,
            "ratio_interval": choice.interval,
            "history_minimum": choice.history_minimum,
            "late_mu": choice.late_mu,
        },
        "policy": {"mu": state.mu, "sigma": state.sigma},
        "rounds": len(state.records),
        "commits": sum(r.committed for r in state.records),
        "flipped_entries": searcher.flipped,
        "probe_forwards": searcher.forwards,
        "preset": config.controller.preset,
        "reward": config.controller.reward,
        "importance": config.importance,
        "mask_unit": config.mask_unit,
        "structure": config.structure,
        "seed": config.seed,
    }


def _as_merged(live: LiveAdapter, start: Mapping[str, MergedModule]) -> dict[str, MergedModule]:
    """Return the live factors as a merge of the same layout, stashed values in place."""
    ended: dict[str, list[Part]] = {name: [] for name in start}
    for block, a, b in live.effective_blocks():
        ended[block.module].append(Part(block.source, a.cpu().clone(), b.cpu().clone()))
    return {
        name: MergedModule(start[name].kind if len(parts) > 1 else "cat", tuple(parts))
        for name, parts in ended.items()
    }
