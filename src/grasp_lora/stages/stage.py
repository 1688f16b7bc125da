"""Definition of a stage: its inputs are explicit and frozen, its result is one folder.

A plan lists stages that name each other as inputs (`grasp_lora.plans.plan`). The table
`grasp_lora.stages.table.KINDS` says for each kind of stage which settings it uses, which examples
it reads, what it costs, and which function does its work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from grasp_lora.config.run_config import RunConfig
from grasp_lora.workbench.context import Context

Input = str | Path
"""An input folder: the name of an earlier stage of the plan, or the path of a folder given by the
user."""
Split = tuple[str, str]
"""A set of examples: (role, split), such as ("target", "train")."""


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        name: the folder of its result, relative to the plan's folder; other stages refer to it by
            this name.
        kind: a key of `KINDS`.
        config: settings of the run; the kind says which of them the stage uses.
        inputs: role of the folder (such as "start") -> where it comes from.
        options: choices of the stage that are no settings of the run; JSON values only. An option
            that is None or False counts as absent.
        title: text of the progress bar; it changes no result.
    """

    name: str
    kind: str
    config: RunConfig
    inputs: Mapping[str, Input] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option, or the default if it is not given."""
        value = self.options.get(name)
        return default if value is None else value

    def needs(self) -> tuple[str, ...]:
        """Return the names of the stages whose results this stage needs."""
        return tuple(value for value in self.inputs.values() if isinstance(value, str))


@dataclass(frozen=True)
class Work:
    """What the function that does a stage receives.

    Attributes:
        stage: the stage to do.
        context: examples and backbone; its settings are those of the stage.
        inputs: role -> folder; all of them exist and are complete.
        out: the folder to write. It becomes the result once the function returns.
        checkpoints: a folder that survives a crash, for the Trainer's checkpoints.
        overwrite: whether the user asked to replace what other inputs made; for a stage that does
            a plan of its own.
    """

    stage: Stage
    context: Context
    inputs: Mapping[str, Path]
    out: Path
    checkpoints: Path
    overwrite: bool = False

    @property
    def config(self) -> RunConfig:
        """The settings of the stage."""
        return self.stage.config

    @property
    def title(self) -> str:
        """Text of the progress bar: the title of the stage, or its name."""
        return self.stage.title or self.stage.name


@dataclass(frozen=True)
class Cost:
    """The cost of a stage without early stopping, an upper bound.

    Attributes:
        steps: optimizer steps.
        tokens: tokens read, with or without a gradient.
        forwards: examples read without a gradient.
        answers: examples answered.
        trained: those of the tokens that are read with a gradient.
    """

    steps: int = 0
    tokens: int = 0
    forwards: int = 0
    answers: int = 0
    trained: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.forwards + other.forwards,
            self.answers + other.answers,
            self.trained + other.trained,
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes of all sets of examples; costs are computed from them.

    Attributes:
        count: set -> number of examples.
        tokens: set -> mean tokens of an example.
        lengths: set -> tokens of each example; where it is missing, the mean stands for each.
    """

    count: Mapping[Split, int]
    tokens: Mapping[Split, float]
    lengths: Mapping[Split, Sequence[int]] = field(default_factory=dict)

    def examples(self, *splits: Split) -> int:
        """Return how many examples the sets hold together."""
        return sum(self.count.get(split, 0) for split in splits)

    def length(self, *splits: Split) -> float:
        """Return the mean tokens of an example of the sets; 0 where they are empty."""
        whole = self.examples(*splits)
        total = sum(self.count.get(s, 0) * self.tokens.get(s, 0.0) for s in splits)
        return total / whole if whole else 0.0

    def each(self, *splits: Split) -> list[float]:
        """Return the tokens of every example of the sets, one set after the other."""
        found: list[float] = []
        for split in splits:
            known = self.lengths.get(split)
            found += [self.length(split)] * self.examples(split) if known is None else known
        return found

    def reading(self, times: float, *splits: Split) -> Cost:
        """Return the cost of reading all examples of the sets `times` times."""
        forwards = round(times * self.examples(*splits))
        return Cost(0, round(forwards * self.length(*splits)), forwards)


@dataclass(frozen=True)
class Kind:
    """A row of the table of stages.

    Attributes:
        format: version of the layout of the result's folder. Results of another version are not
            used.
        settings: returns the dotted settings, or whole sections, that can change the result.
        examples: returns the sets that the stage reads; gets the stage and all existing sets.
        run: does the work; returns the facts for the marker of the result.
        cost: returns the cost of the stage, an upper bound.
        loads: whether it needs the backbone and encoded examples. One that does not has no
            `Work.context`.
    """

    format: int
    settings: Callable[[Stage], tuple[str, ...]]
    examples: Callable[[Stage, tuple[Split, ...]], tuple[Split, ...]]
    run: Callable[[Work], Mapping[str, Any]]
    cost: Callable[[Stage, Sizes], Cost]
    loads: bool = True
