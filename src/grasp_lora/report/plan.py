"""A plan for people: one row a stage, and what is left to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from grasp_lora.base.words import printable
from grasp_lora.scoring.cells import cell

STATES = {
    "absent": "to do",
    "begun": "resumes",
    "done": "done",
    "differs": "other result",
    "damaged": "damaged",
}


def plan_table(stages: Sequence[Any]) -> Table:
    """Return a table of planned stages (`grasp_lora.plans.show.Planned`) for the terminal."""
    table = Table(title="plan")
    for title in ("stage", "kind", "from", "state"):
        table.add_column(title, overflow="fold")
    for title in ("steps", "tokens", "forwards", "answers"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in stages:
        cost = one.cost
        numbers = (cost.steps, cost.tokens, cost.forwards, cost.answers)
        needs = ", ".join(one.needs)
        table.add_row(
            cell(one.name), one.kind, cell(needs), STATES[one.state], *map(_number, numbers)
        )
    return table


def forecast_table(found: Any) -> Table:
    """Return a table of what stages are predicted to take (`plans.forecast.Forecast`)."""
    place = found.place
    table = Table(title=f"predicted for {place.gpus} x {place.gpu}, {printable(place.size)}")
    table.add_column("stage", overflow="fold")
    for title in ("on one GPU", f"on all {place.gpus}", "memory of each", "price"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found.stages:
        price = "\N{EN DASH}" if one.dollars is None else dollars(one.dollars)
        times = (_predicted(one.alone), _predicted(one.shared))
        table.add_row(cell(one.name), *times, f"{one.memory / 1e9:.1f} GB", price)
    return table


def forecast_lines(found: Any) -> list[str]:
    """Return what a whole plan is predicted to take, one sentence a line."""
    ways = {
        "one stage after the other on all GPUs": found.one_by_one,
        "stages side by side, each on one GPU": found.side_by_side,
    }
    lines = [
        f"{way}: does not fit"
        if seconds is None
        else f"{way}: {_time(seconds)}, {dollars(found.dollars(seconds))}"
        for way, seconds in ways.items()
    ]
    start = f"Each process begins with about {_time(found.loading)} of imports and loading."
    return [*lines, start, "Predicted from published rates of GPUs, not measured."]


def dollars(amount: float) -> str:
    """Return an amount of money; less than a cent is told as such."""
    return "< $0.01" if 0 < amount < 0.01 else f"${amount:,.2f}"


def _time(seconds: float) -> str:
    """Return a predicted time with about two digits."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 90 else f"{minutes / 60:.3g} h"


def _predicted(seconds: float | None) -> str:
    return "does not fit" if seconds is None else _time(seconds)


def status_table(found: Mapping[str, Any]) -> Table:
    """Return a table of how the stages of a folder stand (`plans.status.folder_status`)."""
    count = ", ".join(f"{number} {state}" for state, number in found["count"].items())
    driver = found["driver"]
    at_work = "no command works here" if driver is None else f"{driver['where']} works here"
    table = Table(title=f"{count or 'no stages'}; {at_work}")
    for title in ("stage", "kind", "state", "since", "where, or why"):
        table.add_column(title, overflow="fold")
    for one in found["stages"]:
        told = one["where"] or one["why"] or ""
        table.add_row(
            *map(cell, (one["stage"], one["kind"], one["state"], one["since"] or "", told))
        )
    return table


def cost_line(count: int, cost: Any) -> str:
    """Return one sentence on what is left: stages, and their cost at most (`stages.stage.Cost`)."""
    return (
        f"{count} stages to do: at most {cost.steps:,} optimizer steps, {cost.tokens:,} tokens, "
        f"{cost.forwards:,} forwards without a gradient, {cost.answers:,} answers"
    )


def _number(value: int) -> str:
    return f"{value:,}" if value else "\N{EN DASH}"
