"""Which column of a file holds what a task needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grasp_lora.tasks.prompts import template_fields, template_for
from grasp_lora.tasks.records import Task

ID, GROUP = "id", "group"


@dataclass(frozen=True)
class Columns:
    """The columns of one file, by what they hold."""

    fields: Mapping[str, str]
    """Input of the task -> column; the input that may be shortened first."""
    answer: str
    id: str | None = None
    """None: ids are made from the rows."""
    group: str | None = None
    """None: rows with the same first input are one group."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        named = (self.id, *self.fields.values(), self.answer, self.group)
        return tuple(dict.fromkeys(name for name in named if name is not None))


def input_names(task: Task, template: str | None, language: str) -> tuple[str, ...]:
    """Return the inputs of a row: the task's own, or those its template names.

    Args:
        task: the row of the task table.
        template: the prompt's template; None takes the task's own of the language. Only a task
            without fields of its own looks at it.
        language: code of the rows' language.

    Raises:
        ValueError: if the template names no column or one twice, or the answer, the id or the
            group.
    """
    if task.fields:
        return task.fields
    chosen = template_for(task, language)[0] if template is None else template
    names = template_fields(task, chosen)
    taken = [name for name in names if name in (task.answer, ID, GROUP)]
    if taken:
        raise ValueError(
            f"the prompt template names {{{taken[0]}}}, which holds the row's {taken[0]}, not an "
            f"input; write another name in the template, and its column in columns"
        )
    return names


def match_columns(
    available: Sequence[str],
    task: Task,
    inputs: Sequence[str],
    given: Mapping[str, str] | None,
    source: str,
) -> Columns:
    """Return the column of each input, of the answer, and of the id and group if there are.

    What `given` does not name is looked for under its own name, then under the task's aliases in
    their order; a group is taken only where `given` names its column.

    Args:
        available: the columns of the file.
        task: the row of the task table.
        inputs: names of the inputs, as `input_names` returns them.
        given: our name -> column.
        source: names the file in messages.

    Raises:
        ValueError: if `given` has an unknown name or an absent column, a column is missing, or
            the answer's column is also an input.
    """
    given = dict(given or {})
    names = (ID, *inputs, task.answer)
    _check_given(given, (*names, GROUP), available, source)
    found: dict[str, str] = dict(given)
    for name in names:
        candidates = [name, *task.aliases.get(name, ())]
        present = [column for column in candidates if column in available]
        if name not in found and present:
            found[name] = present[0]
    missing = [name for name in (*inputs, task.answer) if name not in found]
    if missing:
        wanted = ", ".join(
            " or ".join((name, *task.aliases.get(name, ()))) for name in dict.fromkeys(missing)
        )
        raise ValueError(
            f"{source}: no column for {wanted}; its columns are {_listed(available)}; say which "
            f"one it is in columns, such as {{{missing[0]}: {available[-1]}}}"
        )
    both = [name for name in inputs if found[name] == found[task.answer]]
    if both:
        raise ValueError(
            f"{source}: the column {found[task.answer]!r} is both {both[0]} and {task.answer}; "
            "an answer that stands in the prompt teaches nothing, name another column in columns"
        )
    fields = {name: found[name] for name in inputs}
    return Columns(fields, found[task.answer], found.get(ID), found.get(GROUP))


def _check_given(
    given: Mapping[str, str], valid: Sequence[str], available: Sequence[str], source: str
) -> None:
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise ValueError(
            f"columns has no {unknown[0]!r}; the names to give a column for are {', '.join(valid)}"
        )
    absent = [(name, column) for name, column in given.items() if column not in available]
    if absent:
        name, column = absent[0]
        raise ValueError(
            f"{source}: there is no column {column!r} for {name}; its columns are "
            f"{_listed(available)}; name one of them in columns"
        )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in columns)
