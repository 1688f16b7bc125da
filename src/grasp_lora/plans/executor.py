"""The executor: works a plan off, stage by stage.

A stage whose result is there, made from the same inputs, is not done again. A stage that was
interrupted resumes from its checkpoints. Before any work all stages are held against what is in
their places, so a folder of other results is refused at once.
"""

import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grasp_lora.base.files import peak_memory_bytes, write_text
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.session import Session
from grasp_lora.stages.folder import Found, alone, begin, look, publish, refusal, tidy
from grasp_lora.stages.keys import Key, input_content, key_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage, Work
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.processes import decided_by_main, is_main, machine, wait_for_all

REFUSED_FILE = "not-applicable.txt"
"""In the work folder of a stage: why it could not run when it was last tried."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    Attributes:
        folder: its result.
        error: why there is no result; None where there is one.
        refused: the reason why the stage cannot run on these adapters or on this machine.
    """

    folder: Path
    error: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Options:
    """How a plan is worked off.

    Attributes:
        overwrite: replace results that other inputs made. Where there are none, do all stages
            again.
        keep_going: a stage that fails keeps its log, and what does not need it goes on. False lets
            the error out.
        timed: charge each stage to the clock under its own name.
        ended: called with name and outcome of every stage that has ended.
    """

    overwrite: bool = False
    keep_going: bool = False
    timed: bool = False
    ended: Callable[[str, Outcome], Any] = lambda _name, _outcome: None

    def replacing(self) -> "Options":
        """Return the same with results of other inputs replaced."""
        return replace(self, overwrite=True)


PLAIN = Options()


def work_off(
    plan: Plan, place: Path, session: Session, options: Options = PLAIN
) -> dict[str, Outcome]:
    """Do every stage that is not done yet, in this process.

    Args:
        plan: the stages.
        place: the folder that holds the results, each below its stage's name.
        session: examples and backbone.
        options: how.

    Returns:
        Stage name -> outcome, in the order of the plan.

    Raises:
        ValueError: a place holds another result; raised before any work.
    """
    again = decided_by_main(lambda: check(plan, place, session, options.overwrite))
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
    """Return the outcome of a stage that needs a result which will not come; None for others."""
    lost = [need for need in stage.needs() if need in outcomes and outcomes[need].error]
    if not lost:
        return None
    return Outcome(
        place / stage.name, f"not done, {lost[0]} has no result", outcomes[lost[0]].refused
    )


def attempted(work: Callable[[], None], out: Path) -> Outcome:
    """Return the outcome of a piece of work whose error must not stop the others."""
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
    """Hold all stages against what is in their places; changes nothing.

    Returns:
        Whether all stages are to be done again: `overwrite`, and no place holds another result.

    Raises:
        ValueError: a place holds another result and `overwrite` is not set, or holds something that
            no stage wrote.
    """
    found = {name: state_of(stage, place, session) for name, stage in plan.stages.items()}
    differing = [name for name, one in found.items() if one.state == "differs"]
    if differing and not overwrite:
        first = differing[0]
        raise ValueError(refusal(place / first, found[first]))
    return overwrite and not differing


def state_of(stage: Stage, place: Path, session: Session) -> Found:
    """Return what is in the place of a stage; input folders that are still to be made are left out
    of the comparison."""
    folders = _folders(stage, place)
    known = {role: folder for role, folder in folders.items() if _is_there(stage, role, folder)}
    key = _key(stage, session, known)
    return look(place / stage.name, key)


def _is_there(stage: Stage, role: str, folder: Path) -> bool:
    return isinstance(stage.inputs[role], Path) or (folder / "stage.json").exists()


def _folders(stage: Stage, place: Path) -> dict[str, Path]:
    return {
        role: place / one if isinstance(one, str) else one for role, one in stage.inputs.items()
    }


def _key(stage: Stage, session: Session, folders: Mapping[str, Path]) -> Key:
    inputs = {role: input_content(role, folder) for role, folder in folders.items()}
    return key_of(stage, KINDS[stage.kind], session.data, session.base, inputs)


def do(stage: Stage, place: Path, session: Session, options: Options, again: bool) -> None:
    """Do one stage unless it is done; a second process waits for the first."""
    with alone(place / stage.name) if is_main() else nullcontext():
        _do(stage, place, session, options, again)


def _do(stage: Stage, place: Path, session: Session, options: Options, again: bool) -> None:
    out, folders = place / stage.name, _folders(stage, place)

    def prepared() -> tuple[Key, bool]:
        key = _key(stage, session, folders)
        found = look(out, key)
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
    context = session.context_of(stage)
    if options.timed:
        spot = session.clock.stage(stage.name)
    try:
        with spot:
            result, work = decided_by_main(lambda: begin(out, key, again))
            facts = _facts(Work(stage, context, folders, result, work))
            facts |= {"machine": machine(), "peak_memory_bytes": peak_memory_bytes()}
            if is_main():
                with session.clock.span("write"):
                    publish(out, key, facts)
            wait_for_all()
    finally:
        context.on_saved()


def _facts(work: Work) -> dict[str, Any]:
    """Do the work; where that is refused, leave the reason for the tables of later starts."""
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
    """Return the log of a stage: outside the folder that a new start may remove."""
    return out.with_name(f"{out.name}.log.txt")


def _logged(out: Path, error: Exception) -> str:
    """Keep the traceback of a failed stage; return what is said of it."""
    log = log_of(out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return f"failed ({error}), see {log}"
