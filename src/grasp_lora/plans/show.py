"""What a plan would do, before anything starts: its stages, which are done, and their costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.backbones import load_tokenizer
from grasp_lora.plans.executor import state_of
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.run_plan import run_plan
from grasp_lora.plans.session import Session
from grasp_lora.stages.folder import State
from grasp_lora.stages.stage import Cost, Sizes, Split
from grasp_lora.workbench.context import encode_part, model_spec
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data


@dataclass(frozen=True)
class Planned:
    """A stage of a plan as it is shown.

    Attributes:
        name: of the stage.
        kind: of the stage.
        needs: the inputs it waits for, other stages and given folders.
        state: what is in its place.
        why: for a place that holds another result, the differences.
        cost: what the stage does at most.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    state: State
    why: tuple[str, ...]
    cost: Cost


def planned_run(config: RunConfig, quiet: bool = False) -> list[Planned]:
    """Return the stages of a run with their states and costs; loads no weights, writes nothing.

    Args:
        config: the run's settings.
        quiet: print nothing while the examples are read.

    Raises:
        ValueError, FileNotFoundError: the examples or the tokenizer cannot be read.
    """
    data = load_run_data(config, Reporter(quiet).say)
    plan = run_plan(config, bool(data.test_sets())).plan
    return planned(plan, config.output, Session(config, data), sizes_of(config, data))


def planned(plan: Plan, place: Path, session: Session, sizes: Sizes) -> list[Planned]:
    """Return the stages of a plan with their states and costs.

    Args:
        plan: the stages.
        place: the folder of their results.
        session: the examples.
        sizes: of all sets of examples.
    """
    costs, found = plan.cost(sizes), []
    for name, stage in plan.stages.items():
        there = state_of(stage, place, session)
        needs = tuple(str(one) for one in stage.inputs.values())
        found.append(Planned(name, stage.kind, needs, there.state, there.why, costs[name]))
    return found


def left(stages: list[Planned]) -> Cost:
    """Return what the stages that are not done cost together, at most."""
    return sum((one.cost for one in stages if one.state != "done"), Cost())


def sizes_of(config: RunConfig, data: RunData) -> Sizes:
    """Return how many examples each set has, and their mean length in tokens; reads the tokenizer.

    Raises:
        ValueError, FileNotFoundError: as `load_tokenizer`.
    """
    tokenizer, _ = load_tokenizer(model_spec(config))
    lengths: dict[Split, list[int]] = {}
    for role, parts in data.parts.items():
        for split in parts:
            encoded, _ = encode_part(config, data, tokenizer, role, split)
            lengths[role, split] = [len(one.input_ids) for one in encoded]
    return sizes_from(lengths)


def sizes_from(lengths: Mapping[Split, list[int]]) -> Sizes:
    """Return the sizes of sets of examples from the tokens of each example."""
    return Sizes(
        {split: len(found) for split, found in lengths.items()},
        {split: fmean(found) if found else 0.0 for split, found in lengths.items()},
    )
