"""Find the columns of a file that hold the fields of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from grasp_lora.base.words import shortened, shown
from grasp_lora.tasks.prompts import optional_fields, template_fields, template_for
from grasp_lora.tasks.records import Task

ID, GROUP = "id", "group"
UNANSWERABLE: Mapping[str, bool] = MappingProxyType(
    {
        "is_impossible": True,
        "impossible": True,
        "is_unanswerable": True,
        "unanswerable": True,
        "is_answerable": False,
        "answerable": False,
        "has_answer": False,
    }
)
"""Column -> its value in a row whose question has no answer, as in SQuAD v2."""
PLAUSIBLE = "plausible_answers"
"""Column with answers that SQuAD v2 gives to questions without an answer only."""


@dataclass(frozen=True)
class Columns:
    """The columns of one file, by their content."""

    fields: Mapping[str, str]
    """Input of the task -> column; the first input may be shortened."""
    answer: str
    """Column of the accepted answers."""
    id: str | None = None
    """Column of ids; None means that ids are made from the texts."""
    group: str | None = None
    """Column of groups; None means that equal first inputs make a group."""
    optional: tuple[str, ...] = ()
    """Inputs that may be empty, because the template can leave them out."""
    flags: tuple[str, ...] = ()
    """Columns of `UNANSWERABLE`."""
    plausible: bool = False
    """Whether there is a column `PLAUSIBLE`."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that each row must have, each once."""
        inputs = (column for name, column in self.fields.items() if name not in self.optional)
        named = (self.id, *inputs, self.answer, self.group)
        return tuple(dict.fromkeys(name for name in named if name is not None))


def input_names(task: Task, template: str | None, language: str) -> tuple[str, ...]:
    """Return the inputs of an example: the task's fields, or the names in its template.

    Args:
        task: the task.
        template: prompt template, used only by tasks without fields; None means the task's template
            for the language.
        language: language code of the examples.

    Raises:
        ValueError: the template names no column, or one column twice, or the answer, the id or the
            group.
    """
    if task.fields:
        return task.fields
    chosen = template_for(task, language)[0] if template is None else template
    names = template_fields(task, chosen)
    taken = [name for name in names if name in (task.answer, ID, GROUP)]
    if taken:
        raise ValueError(
            f"the prompt template names {{{taken[0]}}}, which is the row's {taken[0]}, not an "
            f"input; use another name in the template, and map it to the column in columns"
        )
    return names


def optional_inputs(task: Task, template: str | None, language: str) -> tuple[str, ...]:
    """Return the inputs that may be empty; see `prompts.optional_fields`.

    Args:
        task, template, language: as in `input_names`.
    """
    chosen = template_for(task, language)[0] if template is None else template
    return optional_fields(task, chosen)


def match_columns(
    available: Sequence[str],
    task: Task,
    inputs: Sequence[str],
    given: Mapping[str, str] | None,
    source: str,
    optional: Sequence[str] = (),
) -> Columns:
    """Return the columns of the inputs and the answer, and those of id and group if there are any.

    A name that `given` does not contain is searched among the columns, then the task's aliases for
    it in their order. There is a group only if `given` names its column.

    Args:
        available: the columns of the file.
        task: the task.
        inputs: names of the inputs, from `input_names`.
        given: name of an input, the answer, "id" or "group" -> column.
        source: name of the file, for messages.
        optional: names of inputs that may be empty.

    Raises:
        ValueError: `given` has an unknown name or an absent column, a column is missing, or one
            column is that of two names.
    """
    if not available:
        raise ValueError(f"{source}: its rows have no columns; give each row its values by name")
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
            f"{source}: no column for {wanted}; its columns are {_listed(available)}; name the "
            f"right one in columns, such as {{{missing[0]}: {available[-1]}}}"
        )
    _check_apart({name: found[name] for name in (*inputs, task.answer)}, task.answer, source)
    fields = {name: found[name] for name in inputs}
    used = {*fields.values(), found[task.answer]}
    return Columns(
        fields,
        found[task.answer],
        found.get(ID),
        found.get(GROUP),
        tuple(optional),
        flags=tuple(name for name in UNANSWERABLE if name in available and name not in used),
        plausible=PLAUSIBLE in available and PLAUSIBLE not in used,
    )


def _check_apart(columns: Mapping[str, str], answer: str, source: str) -> None:
    """Check that no column is that of two names, inputs or the answer."""
    owners: dict[str, str] = {}
    for name, column in columns.items():
        other = owners.setdefault(column, name)
        if other != name:
            why = "the prompt would contain the answer" if name == answer else "each needs its own"
            raise ValueError(
                f"{source}: the column {shown(column)} is both {other} and {name}; {why}; name "
                "another column in columns"
            )


def _check_given(
    given: Mapping[str, str], valid: Sequence[str], available: Sequence[str], source: str
) -> None:
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise ValueError(
            f"columns does not know the name {shown(unknown[0])}; it can map {', '.join(valid)}"
        )
    absent = [(name, column) for name, column in given.items() if column not in available]
    if absent:
        name, column = absent[0]
        raise ValueError(
            f"{source}: there is no column {shown(column)} for {name}; its columns are "
            f"{_listed(available)}; name one of them in columns"
        )


def _listed(columns: Sequence[str]) -> str:
    return shortened(", ".join(repr(name) for name in columns), f"{len(columns)} columns")
