"""Where the time of a run went, in tables and words; reads records, measures nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

NO_VALUE = "\N{EN DASH}"
_LOST = (
    "The run was resumed {times}: the times of its earlier processes are in it, but not what an "
    "interrupted one did after it had last kept them (at a checkpoint, at a stage's end)."
)
_UNTIMED = "{stages}: done by an earlier process whose times were not kept."
_WAITED = "The device was waited for at the edges of every part."
_NOT_WAITED = (
    "The device was not waited for: what it did on its own is charged to the part that needed the "
    "result. `--profile` waits."
)


def times_section(time: Mapping[str, Any], device: str) -> Iterator[str]:
    """Yield the lines of a report about its run's time: shares, stages, and what is not in them.

    Args:
        time: the short form, as in `provenance.json`.
        device: where the model ran.
    """
    shares: Mapping[str, float] = time["shares"]
    stages: Mapping[str, float | None] = time["stages"]
    yield "## Where the time went"
    yield ""
    yield f"| wall time | {' | '.join(shares)} |"
    yield f"|{'---:|' * (len(shares) + 1)}"
    cells = [f"{100 * share:.1f} %" for share in shares.values()]
    yield f"| {_seconds(time['wall_seconds'])} s | {' | '.join(cells)} |"
    yield ""
    timed = [f"{name} {_seconds(s)}" for name, s in stages.items() if s is not None]
    yield f"Seconds of each stage: {', '.join(timed)}."
    yield ""
    yield " ".join(_notes(time, [n for n, s in stages.items() if s is None], device))
    yield ""


def profile_markdown(profile: Mapping[str, Any]) -> str:
    """Return a `profile.json` as Markdown: the whole run by part, then every stage by part."""
    stages: Mapping[str, Mapping[str, Any]] = profile["stages"]
    parts: Mapping[str, str] = profile["parts"]
    wall = profile["wall_seconds"]
    untimed = [name for name, found in stages.items() if not found]
    lines = ["# Where the time went", "", " ".join(_notes(profile, untimed, None)), ""]
    lines += ["| part | seconds | share | calls | mean (ms) | what it is |"]
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
    """Return (part, seconds, calls) over some stages, in the order of the table of parts."""
    rows: list[tuple[str, float, int]] = []
    for part in order:
        spent = [found[part] for found in stages if part in found]
        if spent:
            rows.append((part, sum(s["seconds"] for s in spent), sum(s["calls"] for s in spent)))
    return rows


def _notes(time: Mapping[str, Any], untimed: list[str], device: str | None) -> Iterator[str]:
    yield "Wall time of the main process, from the start of the run to the writing of this file;"
    yield "a part within another is charged on its own, so that all add up."
    if time["resumed"]:
        count = time["resumed"]
        yield _LOST.format(times="once" if count == 1 else f"{count} times")
    if untimed:
        yield _UNTIMED.format(stages=", ".join(untimed))
    if time["synchronized"]:
        yield _WAITED
    elif device is not None and device != "cpu":
        yield _NOT_WAITED


def _cells(seconds: float, wall: float, calls: int) -> str:
    mean = f"{1000 * seconds / calls:.1f}" if calls else NO_VALUE
    return f"{_seconds(seconds)} | {100 * seconds / wall:.1f} % | {calls or NO_VALUE} | {mean}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"
