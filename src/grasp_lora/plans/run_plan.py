"""The plan of a run: from two adapters, given or trained here, to the scores of the result.

The published order is: adapters, merge, search, final run, evaluation. With `merge.when: after` the
source adapter is fine-tuned first and merged afterwards (a post-hoc merge).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from grasp_lora.base.files import RESULT, SMALL
from grasp_lora.config.run_config import RunConfig
from grasp_lora.plans.parts import (
    add_adapters,
    add_final,
    add_merge,
    add_search,
    add_unpruned,
    as_long_alone,
    small_stage,
    small_words,
)
from grasp_lora.plans.plan import Plan, PlanBuilder
from grasp_lora.stages.stage import Input, Stage
from grasp_lora.workbench.beside import target_epoch
from grasp_lora.workbench.rows import RunData

TUNED = "baselines/source-finetuned"
UNPRUNED = "baselines/merged-finetuned"
_TITLES = {TUNED: "source fine-tuned on target", UNPRUNED: "merged fine-tuned unpruned"}


@dataclass(frozen=True)
class System:
    """One row of the result table.

    Attributes:
        name: name in the table.
        slug: name of the folder of its evaluation.
        adapter: its adapter; None for the bare backbone.
    """

    name: str
    slug: str
    adapter: Input | None


@dataclass(frozen=True)
class RunPlan:
    """The stages of a run, and where the parts of its result are.

    Attributes:
        plan: the stages.
        adapters: "source" and "target" -> adapter.
        search: the stage that learned the ratio.
        final: the stage that made the result.
        systems: rows of the result table, the result last; empty where there is nothing to test on.
    """

    plan: Plan
    adapters: Mapping[str, Input]
    search: str
    final: str
    systems: tuple[System, ...]


def run_plan(config: RunConfig, data: RunData) -> RunPlan:
    """Return the plan of a run; it depends on the number of examples, not on their content.

    Args:
        config: the run's settings.
        data: the examples; without test examples nothing is scored.
    """
    scored, examples = bool(data.test_sets()), target_epoch(config, data)
    plan, post_hoc = PlanBuilder(), config.merge.when == "after"
    adapters = add_adapters(plan, config)
    pair, tuned = dict(adapters), None
    if post_hoc:
        # Dev examples must not judge an adapter trained on them, so the judged run is merged.
        tuned, pair["source"] = _tuned(plan, config, adapters, examples)
    merged, probe = add_merge(plan, config, pair)
    search = add_search(plan, config, merged)
    retrained = None
    if post_hoc and config.finetune.rows == "labelled" and tuned is not None:
        inputs: dict[str, Input] = {"source": tuned, "target": pair["target"]}
        inputs |= {} if probe is None else {"weights": probe}
        retrained = plan.add(Stage("merged-labelled", "merge", config, inputs))
    final = add_final(plan, config, merged, search, retrained=retrained)
    small = None if config.budget_mb is None else plan.add(small_stage(config, final))
    systems: list[System] = []
    if scored and config.evaluate.baselines:
        systems = _baselines(plan, config, adapters, merged, examples)
    if scored and small is not None:
        systems.append(System(small_words(config), SMALL, small))
    if scored:
        systems.append(System(RESULT, RESULT, final))
    for system in systems:
        inputs = {} if system.adapter is None else {"adapter": system.adapter}
        name, title = f"evaluations/{system.slug}", f"evaluate {system.name}"
        plan.add(Stage(name, "evaluate", config, inputs, title=title))
    return RunPlan(plan.build(), adapters, search, final, tuple(systems))


def _tuned(
    plan: PlanBuilder, config: RunConfig, adapters: Mapping[str, Input], examples: int
) -> tuple[str, str]:
    """Add the fine-tuning of the source adapter: a baseline, and one side of a post-hoc merge."""
    alone = as_long_alone(config, examples)
    return add_unpruned(plan, alone, adapters["source"], TUNED, _TITLES[TUNED])


def _baselines(
    plan: PlanBuilder,
    config: RunConfig,
    adapters: Mapping[str, Input],
    merged: str,
    examples: int,
) -> list[System]:
    """Add the runs that the result is compared with; return their rows of the table."""
    post_hoc = config.merge.when == "after"
    tuned, _ = _tuned(plan, config, adapters, examples)
    first = _merged_first(plan, config, adapters) if post_hoc else merged
    alone = as_long_alone(config, examples)
    unpruned, _ = add_unpruned(plan, alone, first, UNPRUNED, _TITLES[UNPRUNED])
    whole = "fine-tuned source merged with target" if post_hoc else "merged, untrained"
    return [
        System("zero-shot", "zero-shot", None),
        System("source adapter", "source", adapters["source"]),
        System("source adapter, fine-tuned on target", "source-finetuned", tuned),
        System("target adapter", "target", adapters["target"]),
        System(whole, "merged", merged),
        System("merged, fine-tuned unpruned", "merged-finetuned", unpruned),
    ]


def _merged_first(plan: PlanBuilder, config: RunConfig, adapters: Mapping[str, Input]) -> str:
    """Add a merge of the adapters before fine-tuning, by the configured weights or the average."""
    given = None if config.merge.weights == "auto" else config.merge.weights
    first = config.merge.model_copy(update={"when": "before", "weights": given})
    config = config.model_copy(update={"merge": first})
    return plan.add(Stage("baselines/merged-first", "merge", config, adapters))
