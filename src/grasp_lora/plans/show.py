"""Shows a plan before anything starts: its stages, their states and their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from grasp_lora.adapters.chat import put_template
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.core.recipes.chooser import EPOCHS_UNHELD, Task, Trial
from grasp_lora.models.backbones import load_tokenizer
from grasp_lora.plans.auto import first_asked, first_plan
from grasp_lora.plans.auto_plan import HELD, task_of
from grasp_lora.plans.executor import state_of
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.run_plan import run_plan
from grasp_lora.plans.session import Session
from grasp_lora.report.choice import budget_line
from grasp_lora.stages.folder import State
from grasp_lora.stages.stage import Cost, Sizes, Split
from grasp_lora.workbench.context import model_spec, part_encoding, part_rows, template_given
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data


@dataclass(frozen=True)
class Planned:
    """A stage of a plan as it is shown.

    Attributes:
        name: name of the stage.
        kind: kind of the stage.
        needs: its inputs, names of other stages and given folders.
        state: what is in the place of its result.
        why: for state "differs", one line for each difference; for "damaged", one about the files.
        cost: the cost of the stage, an upper bound.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    state: State
    why: tuple[str, ...]
    cost: Cost


def planned_run(config: RunConfig, quiet: bool = False) -> tuple[list[Planned], str | None]:
    """Return the stages of a run with their states and costs. No weights are loaded.

    Nothing is written. Of a run that chooses its recipe these are the stages up to the first
    trials, and one line on what else it may spend.

    Args:
        config: the run's settings.
        quiet: print nothing while the examples are read.

    Raises:
        ValueError, FileNotFoundError: the examples or the tokenizer cannot be read, or the budget
            is too small.
    """
    faults = config.recipe_faults()
    if faults:
        raise ConfigError(faults)
    data = load_run_data(config, Reporter(quiet).say)
    sizes, rest = sizes_of(config, data), None
    if config.recipe == "grasp":
        plan = run_plan(config, data).plan
    else:
        task = task_of(config, sizes, held_groups(data))
        asked = first_asked(task)
        plan, rest = first_plan(config, data, asked), budget_words(config, task, asked, sizes)
    return planned(plan, config.output, Session(config, data), sizes), rest


def held_groups(data: RunData) -> list[str]:
    """Return the group of each held example, in the order in which trials measure them."""
    target = data.parts["target"]
    return [example.group for split in HELD for example in target.get(split, ())]


def budget_words(config: RunConfig, task: Task, asked: Sequence[Trial], sizes: Sizes) -> str:
    """Return one line on what a choice may spend."""
    training = config.training("finetune")
    plain = (training.epochs, sizes.examples(("target", "train")), task.prices.plain)
    longest = max((one.epochs for one in asked), default=EPOCHS_UNHELD)
    return budget_line(config.budget, plain, (task.spent, longest * task.prices.labelled))


def planned(plan: Plan, place: Path, session: Session, sizes: Sizes) -> list[Planned]:
    """Return the stages of a plan with their states and costs.

    Args:
        plan: the stages.
        place: the folder of their results.
        session: the session with the examples.
        sizes: the sizes of all sets of examples.
    """
    costs, found = plan.cost(sizes), []
    for name, stage in plan.stages.items():
        there = state_of(stage, place, session)
        needs = tuple(str(one) for one in stage.inputs.values())
        found.append(Planned(name, stage.kind, needs, there.state, there.why, costs[name]))
    return found


def left(stages: list[Planned]) -> Cost:
    """Return the total cost of the stages that are not done, an upper bound."""
    return sum((one.cost for one in stages if one.state != "done"), Cost())


def sizes_of(config: RunConfig, data: RunData) -> Sizes:
    """Return the number of examples of each set and their mean length in tokens.

    The tokenizer is loaded, the weights are not.

    Raises:
        ValueError, FileNotFoundError: as in `load_tokenizer` and `part_rows`.
    """
    tokenizer, _, vocabulary, start = load_tokenizer(model_spec(config))
    put_template(tokenizer, template_given(config))
    lengths: dict[Split, list[int]] = {}
    for role, parts in data.parts.items():
        for split in parts:
            encoding = part_encoding(config, tokenizer, role, split, None, start)
            encoded = part_rows(config, data, encoding, role, split, vocabulary)
            lengths[role, split] = [len(one.input_ids) for one in encoded]
    return sizes_from(lengths)


def sizes_from(lengths: Mapping[Split, list[int]]) -> Sizes:
    """Return the sizes of sets of examples from set -> number of tokens of each example."""
    return Sizes(
        {split: len(found) for split, found in lengths.items()},
        {split: fmean(found) if found else 0.0 for split, found in lengths.items()},
        lengths,
    )
