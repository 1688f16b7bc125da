"""Present the times of a run to people, in tables and words."""

from collections.abc import Iterator, Mapping
from typing import Any

NO_VALUE = "\N{EN DASH}"
_RESUMED_NOTE = (
    "The run was resumed {times}. The times of its earlier processes are included, except the time "
    "between the last checkpoint or stage end of a process and its interruption."
)
_UNTIMED_NOTE = "{stages}: done by an earlier process whose times were not kept."
_SYNCHRONIZED_NOTE = "The clock waited for the device at both ends of every part."
_ASYNCHRONOUS_NOTE = (
    "The clock did not wait for the device: asynchronous work is charged to the part that needed "
    "its result. With `--profile` the clock waits."
)


def share_cells(time: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return titles and cells of a row on the wall time and the share of each kind of work."""
    shares: Mapping[str, float] = time["shares"]
    cells = [f"{100 * share:.1f} %" for share in shares.values()]
    return ["wall time", *shares], [f"{_seconds(time['wall_seconds'])} s", *cells]


def stage_times(time: Mapping[str, Any]) -> dict[str, str]:
    """Return stage -> seconds, of the stages whose times are known."""
    return {name: _seconds(s) for name, s in time["stages"].items() if s is not None}


def time_notes(time: Mapping[str, Any], device: str) -> str:
    """Return what the times of a run mean.

    Args:
        time: the time summary, as in `provenance.json`.
        device: device that the model ran on.
    """
    return " ".join(_notes(time, [n for n, s in time["stages"].items() if s is None], device))


def profile_markdown(profile: Mapping[str, Any]) -> str:
    """Return a `profile.json` as Markdown: times per part, of the run and of every stage."""
    stages: Mapping[str, Mapping[str, Any]] = profile["stages"]
    parts: Mapping[str, str] = profile["parts"]
    wall = profile["wall_seconds"]
    untimed = [name for name, found in stages.items() if not found]
    lines = ["# Where the time went", "", " ".join(_notes(profile, untimed, None)), ""]
    lines += ["| part | seconds | share | calls | mean (ms) | description |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for part, seconds, calls in _by_part(stages.values(), parts):
        lines.append(f"| {part} | {_cells(seconds, wall, calls)} | {parts[part]} |")
    lines += [f"| **all** | {_cells(wall, wall, 0)} | |", "", "## Stage by stage", ""]
    lines += ["| stage | part | seconds | share | calls | mean (ms) |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for name, found in stages.items():
        if found:
            rows = _by_part([found], parts)
            lines.append(f"| {name} | **all** | {_cells(sum(s for _, s, _ in rows), wall, 0)} |")
            lines += [f"| | {part} | {_cells(s, wall, calls)} |" for part, s, calls in rows]
    return "\n".join([*lines, ""])


def _by_part(stages: Any, order: Mapping[str, str]) -> list[tuple[str, float, int]]:
    """Return (part, seconds, calls) summed over stages, in the order of `order`."""
    rows: list[tuple[str, float, int]] = []
    for part in order:
        times = [found[part] for found in stages if part in found]
        if times:
            rows.append((part, sum(t["seconds"] for t in times), sum(t["calls"] for t in times)))
    return rows


def _notes(time: Mapping[str, Any], untimed: list[str], device: str | None) -> Iterator[str]:
    yield "Wall time of the main process, from the start of the run to the writing of this file."
    yield "A part inside another part is charged separately, so all parts add up to the wall time."
    if time["resumed"]:
        count = time["resumed"]
        yield _RESUMED_NOTE.format(times="once" if count == 1 else f"{count} times")
    if untimed:
        yield _UNTIMED_NOTE.format(stages=", ".join(untimed))
    if time["synchronized"]:
        yield _SYNCHRONIZED_NOTE
    elif device is not None and device != "cpu":
        yield _ASYNCHRONOUS_NOTE


def _cells(seconds: float, wall: float, calls: int) -> str:
    mean = f"{1000 * seconds / calls:.1f}" if calls else NO_VALUE
    return f"{_seconds(seconds)} | {100 * seconds / wall:.1f} % | {calls or NO_VALUE} | {mean}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"
