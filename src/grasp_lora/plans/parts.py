"""Parts of plans: functions that add stages to a plan and return the names of their results."""

from collections.abc import Mapping
from fractions import Fraction

from grasp_lora.base.files import RESULT_STAGE, SMALL
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import TrainingName
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.stages.costs import lasting, passes_of
from grasp_lora.stages.stage import Input, Stage
from grasp_lora.workbench.merge_probes import learns_weights

ROLES = ("source", "target")


def add_adapters(plan: PlanBuilder, config: RunConfig, below: str = "adapters") -> dict[str, Input]:
    """Add a training for each adapter that the user does not give; return role -> adapter."""
    found: dict[str, Input] = {}
    for role in ROLES:
        given = getattr(config.adapters, role)
        trained = Stage(f"{below}/{role}", "train", config, options={"role": role})
        found[role] = given if given is not None else plan.add(trained)
    return found


def add_merge(
    plan: PlanBuilder,
    config: RunConfig,
    pair: Mapping[str, Input],
    name: str = "merged",
    weights: str = "weights",
) -> tuple[str, str | None]:
    """Add a merge, and before it a probe if the settings want the weights to be learned.

    Args:
        plan: receives the stages.
        config: the settings; `config.merge` defines the merge.
        pair: "source" and "target" -> adapter.
        name: name of the merge.
        weights: name of the probe.

    Returns:
        The names of the merge and of its probe; None instead of a probe that is not needed.
    """
    probe = None
    if learns_weights(config):
        choice = {"choice": "shares" if config.merge.when == "after" else "weights"}
        probe = plan.add(Stage(weights, "probe", config, pair, choice))
    learned = {} if probe is None else {"weights": probe}
    return plan.add(Stage(name, "merge", config, dict(pair) | learned)), probe


def add_search(plan: PlanBuilder, config: RunConfig, merged: Input, name: str = "search") -> str:
    """Add the search of the ratio; for a post-hoc merge the search trains nothing."""
    options = {"untrained": config.merge.when == "after"}
    return plan.add(Stage(name, "search", config, {"merged": merged}, options))


def add_final(
    plan: PlanBuilder,
    config: RunConfig,
    merged: Input,
    search: str,
    name: str = RESULT_STAGE,
    retrained: Input | None = None,
) -> str:
    """Add the final run of a search: pruned at its ratio, fine-tuned as the settings say.

    With `finetune.rows: labelled` the run on the train examples is added first, as `<name>-judged`.

    Args:
        plan: receives the stages.
        config: the settings.
        merged: the adapter that the search started from.
        search: name of the search.
        name: name of the result.
        retrained: for a post-hoc merge, the same merge with its source adapter trained on all
            labelled examples.
    """
    post_hoc, labelled = config.merge.when == "after", config.finetune.rows == "labelled"
    start = search if config.finetune.mode == "continue" and not post_hoc else merged
    options, title = {"untrained": post_hoc}, "final fine-tuning"
    inputs: dict[str, Input] = {"start": start, "ratio": search}
    first = name if not labelled else f"{name}-judged"
    judged = plan.add(Stage(first, "prune", config, inputs, options, title))
    if not labelled:
        return judged
    inputs = {"start": merged if retrained is None else retrained, "ratio": search}
    inputs["judged"] = judged
    if start != merged:
        inputs["cut_from"] = start
    return plan.add(Stage(name, "prune", config, inputs, options, title))


def small_stage(config: RunConfig, final: Input, name: str = SMALL) -> Stage:
    """Return the stage that fits a result into `config.budget_mb` megabytes.

    Args:
        config: the settings.
        final: the result.
        name: of the stage.
    """
    assert config.budget_mb is not None, "a size is given"
    title = f"fit into {config.budget_mb:g} MB"
    return Stage(name, "shrink", config, {"adapter": final}, {"budget_mb": config.budget_mb}, title)


def small_words(config: RunConfig) -> str:
    """Return the name of that result in tables."""
    return f"final, in {config.budget_mb:g} MB"


def add_unpruned(
    plan: PlanBuilder,
    config: RunConfig,
    start: Input,
    name: str,
    title: str,
    joint: bool = False,
) -> tuple[str, str]:
    """Add the fine-tuning of an adapter without pruning, with source rows beside if `joint`.

    Returns:
        The name of the result and the name of the run that judges it. With `finetune.rows:
        labelled` the latter is the run on the train examples alone, otherwise the result itself.
    """
    options, inputs = {"joint": joint}, {"start": start}
    if config.finetune.rows == "train":
        only = plan.add(Stage(name, "prune", config, inputs, options, title))
        return only, only
    judged = plan.add(Stage(f"{name}-judged", "prune", config, inputs, options, title))
    inputs = {"start": start, "judged": judged}
    return plan.add(Stage(name, "prune", config, inputs, options, title)), judged


def passes_of_result(config: RunConfig, examples: int) -> Fraction:
    """Return how often the runs that make the result pass over the target train examples.

    With `finetune.mode: continue` these are the search and the final run. Where both have the same
    batches, equal passes are equal optimizer steps.

    Args:
        config: the settings.
        examples: rows of an epoch, see `workbench.beside.target_epoch`.
    """
    passes = passes_of(config.training("finetune"), examples)
    if config.finetune.mode == "continue":
        passes += passes_of(config.training("search"), examples)
    return passes


def as_long_alone(config: RunConfig, examples: int) -> RunConfig:
    """Return settings that make one fine-tuning run as long as all runs that make the result.

    Args:
        config: the settings.
        examples: rows of an epoch, see `workbench.beside.target_epoch`.
    """
    if config.finetune.mode == "restart":
        return config
    return with_length(config, "finetune", passes_of_result(config, examples), examples)


def with_length(
    config: RunConfig, name: TrainingName, passes: Fraction, examples: int
) -> RunConfig:
    """Return settings in which a training passes so often over the target train examples."""
    training = lasting(config.training(name), passes, examples)
    return config.with_training(name, epochs=training.epochs, max_steps=training.max_steps)
