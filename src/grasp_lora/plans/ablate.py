"""Ablation of the search: one run for each part that is left out or changed.

All variants use the same examples and, but for those of the merge, start from one merge. A variant
differs from the configuration in settings of the controller alone, in what is pruned, by which
importance and in which profile, or in the merge. With several seeds, variants are compared with the
configuration seed by seed.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp_lora.base.files import write_json, write_text
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core import IMPORTANCE, ControllerConfig
from grasp_lora.core.merge_kinds import Kind
from grasp_lora.core.pruning.n_of_m import N_OF_M
from grasp_lora.core.recipes.recipe import STARTS
from grasp_lora.plans.compare import checked_data, finished_stages
from grasp_lora.plans.launch import HERE, Pool, plan_folder, work_off_many
from grasp_lora.plans.methods import SHARED_MERGE, searched
from grasp_lora.plans.parts import add_adapters, add_merge
from grasp_lora.plans.plan import Plan, PlanBuilder, part_of
from grasp_lora.plans.recipes import Built, Case, changed, with_split_seed
from grasp_lora.plans.results import MethodOutcome, method_outcomes
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.report.run import ablation_markdown
from grasp_lora.stages.stage import Input
from grasp_lora.workbench.context import POOLS
from grasp_lora.workbench.rows import RunData

AS_CONFIGURED = "as-configured"


@dataclass(frozen=True)
class Change:
    """A change of the search.

    Attributes:
        about: description for the table.
        changes: settings of the controller that differ.
        rounds: factor on the number of rounds.
        settings: dotted settings of the run that differ, of what is pruned or of the merge.
    """

    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rounds: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, config: ControllerConfig) -> ControllerConfig:
        """Return the controller's settings with this change.

        Raises:
            ValueError: the changed settings break a rule.
        """
        changes = dict(self.changes)
        if config.interval is not None:
            changes["interval"] = max(1, round(config.interval / self.rounds))
        elif config.rounds is not None:
            changes["rounds"] = max(1, round(config.rounds * self.rounds))
        return dataclasses.replace(config, **changes)


def _merge_of(kind: Kind) -> dict[str, Any]:
    return {"merge.kind": kind, "merge.weights": None, "merge.rank": None}


CHANGES: Mapping[str, Change] = {
    AS_CONFIGURED: Change("the configuration itself"),
    "entropy-off": Change("no widening", {"entropy": 0.0}),
    "entropy-on": Change("the published widening", {"entropy": 0.01}),
    "anchor-off": Change("no pull to the current ratio", {"anchor": 0.0}),
    "anchor-on": Change("the published pull to the current ratio", {"anchor": 0.05}),
    "anchor-and-entropy-off": Change(
        "no widening and no pull to the current ratio", {"anchor": 0.0, "entropy": 0.0}
    ),
    "rows-4": Change("4 examples a round", {"rows": 4}),
    "rows-8": Change("8 examples a round", {"rows": 8}),
    "rows-16": Change("16 examples a round", {"rows": 16}),
    "rows-32": Change("32 examples a round", {"rows": 32}),
    "fixed-rows": Change("the same micro-dev examples every round", {"probe_rows": "micro-dev"}),
    "fresh-rows": Change("other examples every round", {"probe_rows": "micro-dev+dev"}),
    "half-the-rounds": Change("half as many rounds", rounds=0.5),
    "twice-the-rounds": Change("twice as many rounds", rounds=2.0),
    "candidates-2": Change("2 candidates a round", {"candidates": 2}),
    "candidates-4": Change("4 candidates a round", {"candidates": 4}),
    "candidates-6": Change("6 candidates a round", {"candidates": 6}),
    "step-0.05": Change("smaller steps of the ratio", {"max_step": 0.05}),
    "step-0.2": Change("larger steps of the ratio", {"max_step": 0.2}),
    "moments-kept": Change("first moment of pruned entries kept", {"clear_moments": False}),
    "moments-cleared": Change("first moment of pruned entries cleared", {"clear_moments": True}),
    "baseline-on": Change("commits judged against the model as it is", {"baseline": True}),
    "baseline-off": Change("commits judged against the lowest ratio", {"baseline": False}),
    **{
        f"importance-{rule}": Change(f"importance {rule}", settings={"importance": rule})
        for rule in IMPORTANCE
    },
    "whole-components": Change("whole components pruned", settings={"structure": "rank"}),
    **{
        f"{kept}-of-{size}": Change(
            f"{kept} of every {size} entries, or nothing pruned", settings={"structure": name}
        )
        for name, (kept, size) in N_OF_M.items()
    },
    "scope-policy": Change(
        "ratios that differ by depth, module and adapter", settings={"scope": "policy"}
    ),
    "layer-swap": Change(STARTS["layer-swap"].says, settings=_merge_of("layer-swap")),
    "ties-delta": Change(
        f"{STARTS['ties-delta'].says}, masks of the merged tensors",
        settings=_merge_of("ties-delta") | {"mask_unit": "merged"},
    ),
}
"""Name of the variant -> change, in the order of the table."""


def ablate(
    config: RunConfig,
    out: Path,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (42,),
    pool: Pool = HERE,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every variant that differs from the configuration, with every seed, and compare them.

    Args:
        config: the run's settings. Its own seed divides the examples and trains the adapters.
        out: receives `ablation.json`, `ablation.md` and a folder for each run.
        only: names of the variants to run; empty runs all. The configuration itself is always run.
        seeds: seeds of the searches and final runs.
        pool: the processes that do the stages; by default this process does all of them.
        overwrite: replace results that were made from other inputs.
        quiet: print nothing.

    Returns:
        The content of `ablation.json`; `failed` names the runs without a result.

    Raises:
        ValueError: a name in `only` is unknown, the settings or the examples cannot work, or
            `merge.when` is `after`; as `plan_folder`.
    """
    if config.merge.when == "after":
        raise ValueError(
            "merge.when is after: nothing is trained while the ratio is searched, so there is no "
            "controller in training to take apart; set merge.when: before"
        )
    with plan_folder(out, pool, quiet):
        return _ablated(config, out, only, seeds, (pool, overwrite, quiet))


def _ablated(
    config: RunConfig,
    out: Path,
    only: Sequence[str],
    seeds: Sequence[int],
    how: tuple[Pool, bool, bool],
) -> dict[str, Any]:
    pool, overwrite, quiet = how
    data = checked_data(config, "variant", only, CHANGES, seeds, quiet)
    wanted = [name for name in CHANGES if not only or name in only or name == AS_CONFIGURED]
    chosen, left_out = _chosen(config, data, wanted)
    others, _ = _chosen(config, data, [name for name in CHANGES if name not in wanted])
    plan, built = _plan_of(config, chosen | others, seeds)
    asked = tuple(str(built[f"{name}-s{seed}"].scores) for name in chosen for seed in seeds)
    session, sizes = Session(with_split_seed(config), data, quiet=quiet), sizes_of(config, data)
    done = work_off_many(part_of(plan, asked), out, session, sizes, pool, overwrite)
    # The table also has variants that an earlier start with other names has finished.
    done = finished_stages(plan, out, session) | done
    outcomes = method_outcomes(built, plan, out, done, sizes)
    there = {name for name in others if any(f"{name}-s{seed}" in outcomes for seed in seeds)}
    refused = _refused(outcomes, seeds)
    left_out |= refused
    shown = (there | set(chosen)) - set(refused) | {AS_CONFIGURED}
    outcomes = {job: one for job, one in outcomes.items() if not _why_refused(one)}
    found = _summary([name for name in CHANGES if name in shown], left_out, seeds, outcomes) | {
        "task": config.data.task,
        "language": config.data.target.language,
        "controller_preset": config.controller.label,
    }
    write_json(out / "ablation.json", found)
    write_text(out / "ablation.md", ablation_markdown(found))
    return found


def _refused(outcomes: Mapping[str, MethodOutcome], seeds: Sequence[int]) -> dict[str, str]:
    """Return variant -> why it cannot run on these adapters."""
    whys = {
        name: _why_refused(outcomes[f"{name}-s{seed}"])
        for name in CHANGES
        for seed in seeds
        if f"{name}-s{seed}" in outcomes
    }
    return {name: why for name, why in whys.items() if why is not None}


def _why_refused(outcome: MethodOutcome) -> str | None:
    return None if outcome.result is None else outcome.result.get("not_applicable")


def _chosen(
    config: RunConfig, data: RunData, names: Sequence[str]
) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """Return (variant -> its settings, variant that cannot be run -> reason)."""
    chosen: dict[str, RunConfig] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            controller = CHANGES[name].of(config.controller)
        except ValueError as error:
            left_out[name] = str(error)
            continue
        one = config.model_copy(update={"controller": controller})
        for key, value in CHANGES[name].settings.items():
            one = changed(one, key, value)
        parts = data.parts["target"]
        pool = sum(len(parts.get(split, ())) for split in POOLS[controller.probe_rows])
        faults = one.faults()
        if name != AS_CONFIGURED and one == config:
            left_out[name] = "the configuration has these settings already"
        elif "rows" in CHANGES[name].changes and controller.rows > pool:
            left_out[name] = f"there are only {pool} examples to probe"
        elif faults:
            left_out[name] = faults[0]
        else:
            chosen[name] = one
    return chosen, left_out


def _plan_of(
    config: RunConfig, chosen: Mapping[str, RunConfig], seeds: Sequence[int]
) -> tuple[Plan, dict[str, Built]]:
    """Return a plan with a search and a final run for every variant and seed, and run -> stages."""
    config, plan = with_split_seed(config), PlanBuilder()
    adapters = add_adapters(plan, config)
    merges = {name: _merge(plan, config, adapters, name, one) for name, one in chosen.items()}
    built: dict[str, Built] = {}
    for seed in seeds:
        for name, variant in chosen.items():
            one = with_split_seed(variant).model_copy(update={"seed": seed})
            job, (merged, probe) = f"{name}-s{seed}", merges[name]
            own = adapters | {"merged": merged}
            built[job] = searched(Case(plan, one, job, own, probe, _no_other))
    return plan.build(), built


def _merge(
    plan: PlanBuilder,
    config: RunConfig,
    adapters: Mapping[str, Input],
    name: str,
    variant: RunConfig,
) -> tuple[str, str | None]:
    """Return the merge that a variant starts from, and the probe of its weights."""
    names = SHARED_MERGE
    if variant.merge != config.merge:
        config = config.model_copy(update={"merge": variant.merge})
        names = (f"adapters/{name}", f"adapters/{name}-weights")
    return add_merge(plan, config, adapters, *names)


def _no_other(method: str) -> Built:
    raise AssertionError(f"a variant needs no other method, such as {method}")


def _summary(
    names: Sequence[str],
    left_out: Mapping[str, str],
    seeds: Sequence[int],
    outcomes: Mapping[str, MethodOutcome],
) -> dict[str, Any]:
    variants: dict[str, Any] = {}
    for name in names:
        runs: dict[int, Mapping[str, Any]] = {}
        for seed in seeds:
            outcome = outcomes.get(f"{name}-s{seed}")
            if outcome is not None and outcome.result is not None:
                runs[seed] = outcome.result
        variants[name] = {
            "about": CHANGES[name].about,
            "runs": {str(seed): dict(run) for seed, run in runs.items()},
            "mean": _means(runs.values()),
        }
    reference = variants[AS_CONFIGURED]["runs"]
    for one in variants.values():
        one["against_configured"] = _differences(one["runs"], reference)
    failed = {name: found.error for name, found in outcomes.items() if found.result is None}
    return {
        "seeds": list(seeds),
        "variants": variants,
        "left_out": dict(left_out),
        "failed": failed,
    }


FACTS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "ratio": lambda run: run["ratio"],
    "commits": lambda run: run["commits"],
    "flipped_per_commit": lambda run: (
        sum(run["flipped"]) / run["commits"] / run["entries"] if run["commits"] else None
    ),
    "loss_jump": lambda run: run["loss_jump"],
    "dev_loss": lambda run: run["best"]["loss"],
    "forwards": lambda run: run["forwards"],
}
"""Name -> a number of a run; `flipped_per_commit` is a fraction of the adapter's entries."""


def _numbers(run: Mapping[str, Any]) -> dict[str, float | None]:
    scores = {
        f"{test}/{metric}": value
        for test, values in run["scores"].items()
        for metric, value in values.items()
    }
    return {name: fact(run) for name, fact in FACTS.items()} | scores


def _means(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    numbers = [_numbers(run) for run in runs]
    means: dict[str, dict[str, float | None]] = {}
    for name in numbers[0] if numbers else ():
        known = [value for one in numbers if (value := one[name]) is not None]
        spread = statistics.stdev(known) if len(known) > 1 else None
        means[name] = {"mean": statistics.fmean(known) if known else None, "deviation": spread}
    return means


def _differences(
    runs: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """Return number -> mean difference to the configuration over shared seeds, and its error."""
    pairs = [(_numbers(runs[s]), _numbers(reference[s])) for s in runs if s in reference]
    found: dict[str, dict[str, float | None]] = {}
    for name in pairs[0][0] if pairs else ():
        gaps = [
            mine - theirs
            for one, other in pairs
            if (mine := one[name]) is not None and (theirs := other[name]) is not None
        ]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        mean = statistics.fmean(gaps) if gaps else None
        found[name] = {"mean": mean, "standard_error": error}
    return found
