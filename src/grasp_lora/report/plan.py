"""A plan for people: one row a stage, and what is left to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

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
