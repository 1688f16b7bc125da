"""How far a stored plan is, from files alone: no driver has to run, and nothing is changed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from grasp_lora.base.files import FOLDER_LOCK, damage
from grasp_lora.base.owner import holder_of, lock_beside
from grasp_lora.plans.executor import FAILED, REFUSED_FILE, log_of
from grasp_lora.plans.stored import read_plan_file
from grasp_lora.stages.folder import STAGE_FILE, work_folder


@dataclass(frozen=True)
class Standing:
    """How a stage stands.

    Attributes:
        stage: its name, which is its folder relative to the plan's.
        kind: its kind.
        state: "done"; "running"; "waiting" (not begun, interrupted, or the result was damaged);
            "failed"; or "refused" (it cannot run on these adapters or on this machine). What needs
            a stage that failed or was refused is so too.
        since: for "running", when it began: UTC, as ISO 8601.
        where: for "running", the process and its host.
        why: for "failed" and "refused" the reason; for "waiting" what is there already.
    """

    stage: str
    kind: str
    state: Literal["done", "running", "waiting", "failed", "refused"]
    since: str | None = None
    where: str | None = None
    why: str | None = None


def folder_status(place: Path) -> dict[str, Any]:
    """Return how the plan in a folder stands.

    Whether a result was made with the settings of the plan is not looked at: the next start does.

    Args:
        place: the folder of a comparison, an ablation or a sweep.

    Returns:
        "driver": `since` and `where` of the command that works in the folder, or None; "count":
        state -> stages; "stages": a mapping for each, see `Standing`.

    Raises:
        FileNotFoundError: the folder holds no plan.
        ValueError: the plan is damaged, or not of grasp-lora.
    """
    found: dict[str, Standing] = {}
    for one in read_plan_file(place)["stages"]:
        found[one["name"]] = _standing(place, one, found)
    driver, states = holder_of(place / FOLDER_LOCK), [one.state for one in found.values()]
    return {
        "driver": None if driver is None else _held(driver),
        "count": {state: states.count(state) for state in dict.fromkeys(states)},
        "stages": [asdict(one) for one in found.values()],
    }


def _standing(place: Path, stored: Mapping[str, Any], found: Mapping[str, Standing]) -> Standing:
    name, kind = stored["name"], stored["kind"]
    out, marker = place / name, place / name / STAGE_FILE
    holder = holder_of(lock_beside(out))
    if holder is not None:
        return Standing(name, kind, "running", **_held(holder))
    wrong = marker.exists() and damage(marker)
    if marker.exists() and not wrong:
        return Standing(name, kind, "done")
    needs = [one["stage"] for one in stored["inputs"].values() if "stage" in one]
    for need in needs:
        if found[need].state in ("failed", "refused"):
            return Standing(name, kind, found[need].state, why=f"{need} has no result")
    refused = work_folder(out) / REFUSED_FILE
    if refused.exists():
        return Standing(name, kind, "refused", why=refused.read_text(encoding="utf-8"))
    lines = _lines(log_of(out))
    if lines and lines[-1].startswith(FAILED):
        return Standing(name, kind, "failed", why=(lines[:-1] or lines)[-1])
    begun = "interrupted" if work_folder(out).exists() else None
    return Standing(name, kind, "waiting", why="damaged" if wrong else begun)


def _held(holder: tuple[str, float]) -> dict[str, str]:
    where, since = holder
    began = datetime.fromtimestamp(since, timezone.utc)
    return {"since": began.isoformat(timespec="seconds"), "where": where}


def _lines(log: Path) -> list[str]:
    if not log.exists():
        return []
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
