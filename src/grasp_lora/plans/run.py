"""The whole run: from two adapters to the one to ship, and a report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.clock import time_summary
from grasp_lora.base.files import (
    DATA_FILE,
    PROMPT_FILE,
    RESULT,
    RESULT_STAGE,
    SMALL,
    STAGE_FILE,
    check_disk,
    check_run,
    jsonable,
    marks_of,
    open_run,
    peak_memory_bytes,
    processes_of,
    provenance,
    put_aside,
    put_back,
    read_config,
    read_json,
    read_jsonl,
    threads_of,
    write_json,
    write_jsonl,
    written_in,
)
from grasp_lora.base.owner import owned
from grasp_lora.base.words import shown_path, without_home
from grasp_lora.config.run_config import ConfigError, RunConfig, deciding
from grasp_lora.plans.auto import (
    Chosen,
    FinalDiffers,
    chosen,
    first_asked,
    first_plan,
    tidy_choice,
)
from grasp_lora.plans.auto_plan import HELD, task_of
from grasp_lora.plans.auto_record import publish_choice
from grasp_lora.plans.executor import Options, check, given_to, protect_inputs, work_off
from grasp_lora.plans.finished import damage_in_run, mark_finished, put_files_aside
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.published import add_card, check_layout, publish_result
from grasp_lora.plans.run_plan import TUNED, UNPRUNED, RunPlan, run_plan
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import budget_words, held_groups, sizes_of
from grasp_lora.report.pictures import plot_search
from grasp_lora.report.run_report import write_report
from grasp_lora.scoring.sets import compare_evaluations, missing_metrics
from grasp_lora.stages.findings import add_run_findings
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.search import check_search
from grasp_lora.stages.stage import Input
from grasp_lora.training.trainer import counted_as, processes, tracker_faults
from grasp_lora.workbench.asked import prompts_in_force
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.fit import checkpoint_bytes
from grasp_lora.workbench.given import check_given, check_merge, fresh_adapter
from grasp_lora.workbench.merged_folder import say_unnamed
from grasp_lora.workbench.objective import objective_faults, say_code
from grasp_lora.workbench.processes import (
    check_share,
    decided_by_main,
    is_main,
    join,
    kept_by_main,
    threads_restored,
    use_threads,
    wait_for_all,
)
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import Given, load_run_data
from grasp_lora.workbench.sizes import check_least, drawn_for_sizes
from grasp_lora.workbench.times import carry_times, keep_times, open_clock, write_profile

Standing = Literal["open", "again", "finished"]
"""How a run's folder stands: there is something to do, all is done again, nothing is to be done."""

NO_DEV_EXAMPLES = (
    "finetune.rows: labelled has no target dev rows to choose the epochs by: give"
    " data.target.rows.dev, or set finetune.rows: train"
)


@dataclass(frozen=True)
class _Run:
    """A run that is under way."""

    config: RunConfig
    session: Session
    plan: Plan

    @property
    def out(self) -> Path:
        return self.config.output

    def folder(self, adapter: Input) -> Path:
        return self.out / adapter if isinstance(adapter, str) else adapter


def run(
    config: RunConfig,
    overwrite: bool = False,
    quiet: bool = False,
    rows: Given | None = None,
    profile: bool = False,
) -> Path:
    """Do all stages of a run that are not done yet, and write its report.

    An interrupted run resumes where it stopped.

    Args:
        config: the run's settings; `config.output` is the run folder.
        overwrite: replace results in the folder that were made with other settings. If there are
            none, do everything again. A run that chooses its recipe keeps the trials that are done
            if it is not finished, or any setting is another one.
        quiet: print nothing.
        rows: examples from Python, role -> split -> rows (a list of mappings, or a
            `datasets.Dataset`). They replace `data.<role>.files`; the languages are still those of
            the configuration.
        profile: write how long each part of each stage took. On a GPU the clock then waits for the
            device at the start and the end of every part. Without it, the time of the device is
            counted in the part that waits for it.

    Returns:
        The run folder, with `final/` (a PEFT adapter), `ratio.json`, `scores.json`, `data.json`,
        `provenance.json`, `report.md`, `report.html` and the stages' own folders; `recipe.json`
        of a run that chooses its recipe, `rounds.jsonl` and `ratio.png` of one that searches the
        ratio; for a profile `profile.json`, `profile.md` and `profile.png`.

    Raises:
        ValueError, FileNotFoundError: a setting, a file, an adapter or the machine does not allow
            the run; raised before any work.
        Diverged: a training loss became NaN: that of an adapter, or with `recipe: grasp` any.
    """
    clock = open_clock(config, profile)
    join(config)
    out, say = config.output, Reporter(quiet or not is_main()).say
    say_code(config, say)
    check_settings(config)
    decided_by_main(lambda: check_run(out))
    with kept_by_main(owned(out, say)), threads_restored():
        with clock.span("load"):
            for folder in config.adapters.folders().values():
                if folder is not None:
                    read_adapter(folder)
            data = load_run_data(config, say, given=rows)
        session = Session(config, data, clock=clock, quiet=quiet)
        options = Options(overwrite=overwrite, timed=True)
        work = _fixed if config.recipe == "grasp" else _choosing
        begun = decided_by_main(lambda: None if overwrite else processes_of(out))
        with counted_as(begun):
            done = work(session, options)
            if done is not None and is_main():
                _finish(*done, profile)
            wait_for_all()
    return out


def check_settings(config: RunConfig) -> None:
    """Check the settings of a run, what they name and what they need to be installed.

    Raises:
        ConfigError: with every fault found.
    """
    faults = (
        config.faults() + config.recipe_faults() + config.missing_files()
        + missing_metrics(config) + objective_faults(config) + tracker_faults(config.report_to)
    )  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _fixed(session: Session, options: Options) -> tuple[_Run, RunPlan] | None:
    """Do the stages of the published recipe; return None if they are done."""
    config, data = session.config, session.data
    result = run_plan(config, data)
    current = _Run(config, session, result.plan)
    state: Standing = decided_by_main(lambda: _check_folder(current, options.overwrite))
    if state == "finished":
        return None
    _check_before_work(current)
    _open_folder(current, state)
    carry_times(session.context)
    work_off(result.plan, current.out, session, options)
    return current, result


def _choosing(session: Session, options: Options) -> tuple[_Run, Chosen] | None:
    """Do the stages of a run that chooses its recipe; return None if they are done.

    Where the result in the folder may not be replaced, the folder still is that of the earlier run.
    """
    config, data = session.config, session.data
    with session.clock.span("load"):
        sizes = sizes_of(config, data)
    asked = first_asked(task_of(config, sizes, held_groups(data)))
    current = _Run(config, session, first_plan(config, data, asked))
    state: Standing = decided_by_main(lambda: _check_folder(current, options.overwrite))
    if state == "finished":
        return None
    _check_before_work(current)
    held = [one.group for split in HELD for one in session.context.encoded("target", split)]
    task = task_of(config, sizes, held)
    session.context.reporter.say(budget_words(config, task, first_asked(task), sizes))
    before = decided_by_main(lambda: marks_of(current.out))
    _open_folder(current, state)
    carry_times(session.context)
    try:
        # A plan that grows is worked off several times: what one round did, the next one keeps.
        return current, chosen(task, session, sizes, replace(options, again=False))
    except FinalDiffers:
        decided_by_main(lambda: put_back(current.out, before))
        decided_by_main(lambda: tidy_choice(current.out))
        raise


def publish_search(out: Path, search: Path, final: Path, config: RunConfig) -> None:
    """Write ratio.json, rounds.jsonl and ratio.png into the run folder.

    The run's ratio.json also has the fraction of zeros in the exported tensors, and the run's
    preset with the settings of the method that are not the preset's.
    """
    ratio, stage, finetuned = read_json(search / "ratio.json"), facts_of(search), facts_of(final)
    changed = config.changed_from_preset()
    preset = f"{config.preset}, changed" if changed else config.preset
    whole = {"zeros": finetuned["zeros"], "preset": preset, "changed_from_preset": changed}
    write_json(out / "ratio.json", ratio | whole)
    rounds = read_jsonl(search / "rounds.jsonl")
    write_jsonl(out / "rounds.jsonl", rounds)
    plot_search(rounds, stage["log"], finetuned["evaluations"], ratio, out / "ratio.png")


def _check_folder(current: _Run, overwrite: bool) -> Standing:
    """Check before any work that the run can be written to its folder; return how it stands.

    What is damaged is made again in any case.

    Raises:
        ValueError: the folder holds results of other inputs and `overwrite` is not set, or an input
            lies where results are removed or replaced.
    """
    finished = check_run(current.out)
    check_layout(current.out)
    protect_inputs(current.config, given_to(current.plan), _replaced(current, overwrite))
    again = check(current.plan, current.out, current.session, overwrite)
    chooses = current.config.recipe == "auto"
    if finished and not overwrite and damage_in_run(current.out):
        return "open"
    if chooses and (not finished or _chooses_anew(current)):
        return "open"
    # Later stages of a choice are not planned yet, and of the planned ones some may not work here.
    needed = [*current.plan.stages]
    if chooses:
        needed = [*_trained_adapters(current), RESULT_STAGE]
        adapts = not (current.out / RESULT / PROMPT_FILE).exists()
        needed += [SMALL] if current.config.budget_mb is not None and adapts else []
    done = all((current.out / name / STAGE_FILE).exists() for name in needed)
    done = done and (current.out / RESULT).is_dir()
    if finished and done and not overwrite:
        return "finished"
    return "again" if again else "open"


def _replaced(current: _Run, overwrite: bool) -> list[Path]:
    """Return the places in the folder that the run may remove or replace, beside its stages."""
    places = written_in(current.out)
    if overwrite:
        return places
    # A choice that went another way replaces the result; files are written anew at every end.
    chooses = current.config.recipe == "auto"
    result = (RESULT, *((RESULT_STAGE, SMALL, "retrained") if chooses else ()))
    return [one for one in places if one.name in result or one.is_file()]


def _trained_adapters(current: _Run) -> list[str]:
    return [name for name, stage in current.plan.stages.items() if stage.kind == "train"]


def _chooses_anew(current: _Run) -> bool:
    """Return whether a finished run is asked to choose with other settings, such as a budget."""
    try:
        stored = deciding(read_config(current.out))
    except (ValueError, FileNotFoundError):
        return False
    asked = deciding(current.config.to_record())
    return any(stored.get(name) != value for name, value in asked.items())


def _check_before_work(current: _Run) -> None:
    """Check adapters, examples, disk space and the length of the search, before a stage needs them.

    Raises:
        ValueError: one of them does not allow the run.
    """
    config, context = current.config, current.session.context
    check_share(config, current.out, context.reporter.say)
    given = {
        role: folder for role, folder in config.adapters.folders().items() if folder is not None
    }
    loaded = check_given(context, list(given.values()))
    entries = sum(f.A.numel() + f.B.numel() for one in loaded for f in one.adapter.values())
    adapters = [one.adapter for one in loaded]
    fresh = sum(folder is None for folder in config.adapters.folders().values())
    if fresh:
        own = fresh_adapter(context)
        entries += fresh * sum(f.A.numel() + f.B.numel() for f in own.values())
        adapters.append(own)
    for role, parts in context.data.parts.items():
        for split in parts:
            context.encoded(role, split)
    check_disk(config.output, checkpoint_bytes(entries))
    if config.finetune.rows == "labelled" and not context.examples("target", "dev"):
        raise ValueError(NO_DEV_EXAMPLES)
    if config.budget_mb is not None:
        drawn_for_sizes(context)
        check_least(config.budget_mb, adapters)
    if not context.data.test_sets():
        context.reporter.say("no test rows (data.target.rows.test): nothing will be scored")
    planned = ""
    if config.recipe == "grasp":
        roles = zip(given, loaded, strict=True)
        check_merge(context, {role: one.adapter for role, one in roles})
        rounds = check_search(context)
        planned = f"; {rounds} rounds of {config.controller.candidates} candidates planned"
    backbone = context.backbone
    context.reporter.say(f"backbone {backbone.public_name}, {backbone.dtype}{planned}")


def _open_folder(current: _Run, state: Standing) -> None:
    """Mark the folder as that of this run, and compute with its number of threads from now on."""
    again, out = state == "again", current.out
    say = current.session.context.reporter.say

    def cleared() -> int | None:
        if again:
            return None
        for line in put_files_aside(out):
            say(line)
        return threads_of(out)

    threads = use_threads(decided_by_main(cleared), out, say)

    def write() -> None:
        open_run(out, current.config.to_record(), again, threads, processes())
        data, tokenizer = current.session.data, current.session.context.backbone.tokenizer
        asked = {"prompts": prompts_in_force(current.config, data, tokenizer)}
        write_json(out / DATA_FILE, jsonable(data.manifest() | asked))

    decided_by_main(write)


def _finish(current: _Run, result: RunPlan | Chosen, profile: bool) -> None:
    """Write the files of a run that are made from its finished stages."""
    out, context = current.out, current.session.context
    scores = _scores(current, result)
    with context.clock.span("write"):
        if isinstance(result, Chosen):
            publish_choice(out, result)
        else:
            (out / "recipe.json").unlink(missing_ok=True)
            publish_search(out, out / result.search, out / result.final, current.config)
            _add_findings(current, result, scores["systems"])
    write_json(out / "scores.json", scores)
    times = keep_times(context)
    write_json(out / "provenance.json", _provenance(context, time_summary(times)))
    publish_result(out)
    write_report(out)
    add_card(out)
    if profile:
        write_profile(out, times)
    if SMALL not in result.plan.stages and (out / SMALL).is_dir():
        kept = put_aside(out / SMALL, f"{SMALL}.old").name
        context.reporter.say(
            f"{shown_path(out / SMALL)} is not asked for any more (budget_mb); it is kept as {kept}"
        )
    tidy_choice(out)
    mark_finished(out, result.plan.stages)
    say_unnamed(out / RESULT, context.reporter.say)


def _add_findings(current: _Run, result: RunPlan, systems: Sequence[Mapping[str, Any]]) -> None:
    out = current.out
    baseline = {"source adapter, fine-tuned on target": out / TUNED}
    # An adapter that the user gives was not chosen on the dev examples of this run.
    target = result.adapters["target"]
    trained = {"target adapter": out / target} if isinstance(target, str) else {}
    sections = dict.fromkeys(trained, "train.target")
    add_run_findings(out, out / result.final, baseline | trained, systems, sections)


def _scores(current: _Run, result: RunPlan | Chosen) -> dict[str, Any]:
    """Return the content of `scores.json`: the evaluated systems and their comparison."""
    config, out = current.config, current.out
    table: dict[str, Any] = {
        "task": config.data.task,
        "language": config.data.target.language,
        "seed": config.seed,
    }
    if isinstance(result, Chosen):
        title = f"final: {result.ships}"
        table["ships"] = title
    else:
        about, title = _about_pruned(current, result)
        table |= about
    rows: list[dict[str, Any]] = []
    for system in result.systems:
        facts = {} if system.adapter is None else facts_of(current.folder(system.adapter))
        # A stage is named by its folder within the run's, an adapter of the user by its path.
        place = "" if system.adapter is None else without_home(system.adapter)
        shipped = system.slug == RESULT
        rows.append(
            {"name": title if shipped else system.name, "slug": system.slug}
            | read_json(out / "evaluations" / system.slug / "scores.json")
            | {"zeros": facts.get("zeros", {}).get("exported"), "best": facts.get("best")}
            | {"path": RESULT if shipped and place else place}
        )
    if not rows:
        return table | {"systems": []}
    with current.session.clock.span("score"):
        compared = _against_final(current, result)
    return table | {"systems": rows, "comparisons": compared}


def _about_pruned(current: _Run, result: RunPlan) -> tuple[dict[str, Any], str]:
    """Return what the tables say about a pruned result, and its name there."""
    post_hoc = current.config.merge.when == "after"
    about: dict[str, Any] = {"unpruned": "merged" if post_hoc else Path(UNPRUNED).name}
    final = facts_of(current.out / result.final)
    if "labelled" in final:
        about["labelled_rows"] = final["labelled"]["rows"]
    after = ", not trained further" if post_hoc else ", fine-tuned"
    return about, f"final: merged, pruned at {final['ratio']:.3f}{after}"


def _against_final(current: _Run, result: RunPlan | Chosen) -> Mapping[str, Any]:
    """Return slug -> test set -> metric -> paired test of the result against that system."""
    folder, sets = current.out / "evaluations", current.session.data.test_sets()
    name = current.session.context.backbone.public_name
    return {
        system.slug: compare_evaluations(
            current.config, folder / RESULT, folder / system.slug, sets, name
        )
        for system in result.systems
        if system.slug != RESULT
    }


def _provenance(context: Context, times: dict[str, Any]) -> dict[str, Any]:
    return provenance() | {
        "backbone": context.backbone.public_name,
        "base_fingerprint": context.backbone.fingerprint,
        "dtype": str(context.backbone.dtype),
        "device": str(context.backbone.device),
        # With another number of threads, bfloat16 products are summed in another order.
        "threads": torch.get_num_threads(),
        "seed": context.config.seed,
        "config_hash": context.config.config_hash(),
        "time": times,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
