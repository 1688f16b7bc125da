"""The executor: does the stages of a plan one after the other.

A stage is skipped if its result exists and was made from the same inputs. An interrupted stage
resumes from its checkpoints. A result that was damaged since is put aside and made again. The
places of all stages are checked before any work, so a folder with other results is refused at once.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from grasp_lora.base.files import BASE_FACT, damage, peak_memory_bytes, protect, write_text
from grasp_lora.base.owner import held, lock_beside
from grasp_lora.base.words import without_home
from grasp_lora.config.run_config import RunConfig
from grasp_lora.plans.kinds import KINDS
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.session import Session
from grasp_lora.stages.folder import (
    STAGE_FILE,
    Found,
    begin,
    begun_with,
    check_input,
    look,
    places_of,
    publish,
    refusal,
    tidy,
    without_damage,
)
from grasp_lora.stages.keys import Key, input_content, key_of, splits_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage, Work
from grasp_lora.training.trainer import counted_as, processes
from grasp_lora.workbench.processes import decided_by_main, is_main, machine, wait_for_all
from grasp_lora.workbench.reporter import Reporter

REFUSED_FILE = "not-applicable.txt"
"""File in the work folder of a stage: the reason why its last attempt could not run."""

FAILED = "failed"
"""First word of the last line in the log of a stage that failed. Whoever tries again adds lines."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage.

    Attributes:
        folder: the folder of its result.
        error: why there is no result; None if there is one.
        refused: the reason why the stage cannot run on these adapters or on this machine.
    """

    folder: Path
    error: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Options:
    """How the stages of a plan are done.

    Attributes:
        overwrite: replace results that were made from other inputs. If there are none, do all
            stages again.
        keep_going: after a stage fails, log the error and do the stages that do not need it. False
            raises the error.
        again: whether to do stages again that are done; None decides it as `overwrite` says.
        timed: measure the time of each stage under its own name.
        ended: called with the name and the outcome of every stage that has ended.
    """

    overwrite: bool = False
    keep_going: bool = False
    again: bool | None = None
    timed: bool = False
    ended: Callable[[str, Outcome], Any] = lambda _name, _outcome: None

    def replacing(self) -> "Options":
        """Return the same options with `overwrite` set."""
        return replace(self, overwrite=True)


PLAIN = Options()


def work_off(
    plan: Plan, place: Path, session: Session, options: Options = PLAIN
) -> dict[str, Outcome]:
    """Do every stage that is not done yet, in this process.

    Args:
        plan: the stages.
        place: the folder of the results; each has the name of its stage.
        session: examples and backbone.
        options: how the stages are done.

    Returns:
        Stage name -> outcome, in the order of the plan.

    Raises:
        ValueError: a place holds a result made from other inputs, or a given input folder was
            damaged since a stage wrote it; raised before any work.
    """
    again = decided_by_main(lambda: check(plan, place, session, options.overwrite))
    again = again if options.again is None else options.again
    outcomes: dict[str, Outcome] = {}
    for name, stage in plan.stages.items():
        lost = without_result(stage, place, outcomes)
        if lost is not None:
            outcomes[name] = lost
        elif options.keep_going:
            outcomes[name] = attempted(
                lambda s=stage: do(s, place, session, options, again), place / name
            )
        else:
            do(stage, place, session, options, again)
            outcomes[name] = Outcome(place / name)
        if outcomes[name].error is None:
            log_of(place / name).unlink(missing_ok=True)
        options.ended(name, outcomes[name])
    return outcomes


def without_result(stage: Stage, place: Path, outcomes: Mapping[str, Outcome]) -> Outcome | None:
    """Return the outcome of a stage if a stage that it needs has failed; None otherwise."""
    lost = [need for need in stage.needs() if need in outcomes and outcomes[need].error]
    if not lost:
        return None
    return Outcome(
        place / stage.name, f"not done, {lost[0]} has no result", outcomes[lost[0]].refused
    )


def attempted(work: Callable[[], None], out: Path) -> Outcome:
    """Do the work of a stage and return its outcome; errors are logged, not raised."""
    try:
        work()
    except NotApplicable as error:
        return refused_outcome(out, str(error))
    except Exception as error:
        return Outcome(out, _logged(out, error))
    return Outcome(out)


def refused_outcome(out: Path, why: str) -> Outcome:
    """Return the outcome of a stage that cannot run on these adapters or on this machine."""
    return Outcome(out, f"not applicable ({why})", why)


def check(plan: Plan, place: Path, session: Session, overwrite: bool) -> bool:
    """Compare the places of all stages with what the plan would write; nothing is changed.

    Returns:
        Whether all stages must be done again: if `overwrite` is set and no place holds a result
        made from other inputs.

    Raises:
        ValueError: a place holds a result made from other inputs and `overwrite` is not set, a
            place holds files that no stage wrote, or an input would be removed: by `overwrite`, or
            because it lies in a result that is damaged.
    """
    given = given_to(plan)
    if overwrite:
        outs = [place / name for name in plan.stages]
        replaced = [p for out in outs for p in places_of(out)]
        for config in session.configs():
            protect_inputs(config, given, replaced)
    found = {name: state_of(stage, place, session) for name, stage in plan.stages.items()}
    damaged = [one.place for one in found.values() if one.place]
    for config in session.configs():
        protect_inputs(config, given, damaged)
    differing = [name for name, one in found.items() if one.state == "differs"]
    if differing and not overwrite:
        first = differing[0]
        raise ValueError(refusal(place / first, found[first]))
    return overwrite and not differing


def given_to(plan: Plan) -> list[Path]:
    """Return the folders that the user gives to stages of a plan."""
    stages = plan.stages.values()
    return [one for stage in stages for one in stage.inputs.values() if isinstance(one, Path)]


def protect_inputs(config: RunConfig, folders: Sequence[Path], removed: Sequence[Path]) -> None:
    """Check that no input of a plan would be removed or replaced.

    Args:
        config: names examples, adapters and the base model.
        folders: further adapters that are read.
        removed: the places that would be removed or replaced.

    Raises:
        ValueError: an input is or lies there, or such a place lies in an adapter that is read.
    """
    adapters = [path for path in config.adapters.folders().values() if path is not None]
    protect([*config.named_paths().values(), Path(config.model.name).expanduser()], removed)
    protect([*adapters, *folders], removed, whole=True)


def state_of(stage: Stage, place: Path, session: Session) -> Found:
    """Return what is in the place of a stage.

    Inputs that other stages have not made yet, or will make again, are not compared.
    """
    folders = _folders(stage, place)
    known = {role: folder for role, folder in folders.items() if _is_there(stage, role, folder)}
    key = _key(stage, session, known)
    return look(place / stage.name, key)


def _is_there(stage: Stage, role: str, folder: Path) -> bool:
    return isinstance(stage.inputs[role], Path) or not damage(folder / STAGE_FILE)


def _folders(stage: Stage, place: Path) -> dict[str, Path]:
    return {
        role: place / one if isinstance(one, str) else one for role, one in stage.inputs.items()
    }


def _key(stage: Stage, session: Session, folders: Mapping[str, Path]) -> Key:
    for folder in folders.values():
        check_input(folder)
    inputs = {role: input_content(role, folder) for role, folder in folders.items()}
    own = session.of(stage)
    return key_of(stage, KINDS[stage.kind], own.data, own.base, inputs, own.template)


def do(stage: Stage, place: Path, session: Session, options: Options, again: bool) -> None:
    """Do one stage unless it is done.

    A process of a killed plan may still be at it: its end is waited for.
    """
    out, say = place / stage.name, Reporter(session.quiet).say
    with held(lock_beside(out), out, say, wait=True) if is_main() else nullcontext():
        _do(stage, place, session, options, again)


def _do(stage: Stage, place: Path, session: Session, options: Options, again: bool) -> None:
    out, folders = place / stage.name, _folders(stage, place)

    def prepared() -> tuple[Key, bool]:
        key = _key(stage, session, folders)
        while (found := look(out, key)).state == "damaged":
            Reporter(session.quiet).say(without_damage(found))
        if found.state == "differs" and not options.overwrite:
            raise ValueError(refusal(out, found))
        return key, found.state == "done" and not again

    key, done = decided_by_main(prepared)
    if done:
        if is_main():
            tidy(out)
        if options.timed:
            session.clock.skip(stage.name)
        return
    spot: AbstractContextManager[Any] = nullcontext()
    context = session.context_of(stage) if KINDS[stage.kind].loads else None
    if options.timed:
        spot = session.clock.stage(stage.name)
    try:
        with spot:
            # Examples that cannot be encoded are refused before the folder is begun.
            if context is not None:
                for role, split in KINDS[stage.kind].examples(stage, splits_of(session.data)):
                    context.encoded(role, split)
            begun = decided_by_main(lambda: None if again else begun_with(out, key))
            with counted_as(begun):
                result, work = decided_by_main(lambda: begin(out, key, again, processes()))
                whole = (stage, cast(Any, context), folders, result, work, options.overwrite)
                facts = _facts(Work(*whole))
            facts |= {"machine": machine(), "peak_memory_bytes": peak_memory_bytes()}
            facts |= {BASE_FACT: without_home(stage.config.model.name)}
            if is_main():
                with session.clock.span("write"):
                    publish(out, key, facts)
            wait_for_all()
    finally:
        if context is not None:
            context.on_saved()


def _facts(work: Work) -> dict[str, Any]:
    """Do the work and return its facts; a reason not to run is kept for later tables."""
    refused = work.checkpoints / REFUSED_FILE
    if is_main():
        refused.unlink(missing_ok=True)
    try:
        return dict(KINDS[work.stage.kind].run(work))
    except NotApplicable as error:
        if is_main():
            write_text(refused, str(error))
        raise


def log_of(out: Path) -> Path:
    """Return the log file of a stage; it lies outside the folder that a new start may remove."""
    return out.with_name(f"{out.name}.log.txt")


def _logged(out: Path, error: Exception) -> str:
    """Append the traceback of a failed stage to its log; return the message for the user."""
    log = log_of(out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
        file.write(f"{FAILED}\n")
    return f"failed ({error}), see {log}"
