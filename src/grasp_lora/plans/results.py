"""Results of methods: scores and cost, read from the folders of finished stages."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import weights_files
from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.base.words import without_home
from grasp_lora.plans.executor import Outcome
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.recipes import Built
from grasp_lora.stages.evaluate import chosen_adapter
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.stage import Sizes, Stage

PRICES = ("runs", "seconds", "forwards", "steps", "tokens")


@dataclass(frozen=True)
class MethodOutcome:
    """The outcome of a method's run.

    Attributes:
        result: scores, price (cost) and facts, JSON-able; None if the run failed or was not done.
        peak_memory_bytes: the largest memory of a process that did a stage the method pays for.
        error: why there is no result.
        machines: the machines that did those stages.
    """

    result: Mapping[str, Any] | None
    peak_memory_bytes: int | None = None
    error: str | None = None
    machines: tuple[Mapping[str, Any], ...] = ()


def method_outcomes(
    built: Mapping[str, Built],
    plan: Plan,
    place: Path,
    stages: Mapping[str, Outcome],
    sizes: Sizes,
) -> dict[str, MethodOutcome]:
    """Return job -> outcome of every method whose stages were worked off.

    Args:
        built: job -> the stages of a method.
        plan: the stages.
        place: the folder of their results.
        stages: stage -> outcome; a method with a stage that is not among them is left out.
        sizes: of all sets of examples, for prices in tokens.
    """
    found: dict[str, MethodOutcome] = {}
    for job, one in built.items():
        if one.refusal is not None:
            found[job] = MethodOutcome({"not_applicable": one.refusal})
        elif one.others:
            continue
        elif one.scores in stages:
            found[job] = _outcome(one, plan, place, stages, sizes)
    for job, one in built.items():
        if one.others and all(other in found for other in one.others):
            wanted = one.chooses.get("nearest")
            if wanted is None or wanted in found:
                found[job] = chosen(one, found)
    return {job: found[job] for job in built if job in found}


def _outcome(
    built: Built, plan: Plan, place: Path, stages: Mapping[str, Outcome], sizes: Sizes
) -> MethodOutcome:
    assert built.scores is not None, "a method that runs is scored"
    lost = next((stages[n] for n in _closure(plan, built.scores) if stages[n].error), None)
    if lost is not None:
        if lost.refused:
            return MethodOutcome({"not_applicable": lost.refused})
        return MethodOutcome(None, error=stages[built.scores].error)
    facts = {name: facts_of(place / name) for name in (*built.paid, built.scores)}
    peaks = [one["peak_memory_bytes"] for one in facts.values() if one.get("peak_memory_bytes")]
    machines = tuple(one["machine"] for one in facts.values() if one.get("machine"))
    return MethodOutcome(
        _result(built, plan, place, facts, sizes), max(peaks, default=None), machines=machines
    )


def _closure(plan: Plan, name: str) -> list[str]:
    """Return a stage and all stages that it needs, in the order of the plan."""
    kept = {name}
    for other in reversed(list(plan.stages)):
        if other in kept:
            kept |= set(plan.stages[other].needs())
    return [other for other in plan.stages if other in kept]


def _result(
    built: Built, plan: Plan, place: Path, facts: Mapping[str, Mapping[str, Any]], sizes: Sizes
) -> dict[str, Any]:
    assert built.scores is not None, "a method that runs is scored"
    stage, scores = plan.stages[built.scores], place / built.scores
    inputs = {r: place / one if isinstance(one, str) else one for r, one in stage.inputs.items()}
    adapter = chosen_adapter(inputs)
    about = {} if adapter is None else facts_of(adapter)
    ratio = 0.0  # an adapter that the user gives may have been pruned: that is no ratio of ours
    if built.ratio_from is not None:
        ratio = facts[built.ratio_from]["ratio"]
    elif "trials" in built.chooses:
        ratio = about["ratio"]
    tried = {name: facts[name]["best"]["loss"] for name in built.chooses.get("trials", ())}
    found = _scores(scores) | {"left_out": not_finite(tried)}
    found |= {
        "adapter": None if adapter is None else _place_of(adapter, place),
        "best": about.get("best"),
        "dev": [(one["step"], one["loss"]) for one in about.get("evaluations", [])],
        "zeros": about.get("zeros", {}).get("exported"),
        "bytes": 0 if adapter is None else about.get("bytes") or _bytes_of(adapter),
        "ratio": ratio,
        "price": price_of([(plan.stages[name], facts[name]) for name in built.paid], sizes),
    }
    for name in ("epochs", "cross_validated"):
        if name in about and isinstance(built.final, str):
            found[name] = about[name]
    if built.search is not None:
        found |= _searched(place / built.search)
    if built.probe is not None:
        found["weights"] = read_json(place / built.probe / "weights.json")["weights"]
    return found


def _bytes_of(adapter: Path) -> int:
    return sum(file.stat().st_size for file in weights_files(adapter))


def _place_of(adapter: Path, place: Path) -> str:
    """Return where an adapter is: within the folder of the results, or as the user named it."""
    inside = adapter.is_relative_to(place)
    return adapter.relative_to(place).as_posix() if inside else without_home(adapter)


def _scores(folder: Path) -> dict[str, Any]:
    """Return scores, intervals, empty answers and each example's own scores of an evaluation."""
    sets = read_json(folder / "scores.json")["sets"]
    losses = folder / "losses.json"
    scores = {
        name: {metric: value["value"] for metric, value in one["scores"].items()}
        for name, one in sets.items()
    }
    metrics = next(iter(scores.values()), {})
    return {
        "dtype": read_json(folder / "provenance.json")["dtype"].removeprefix("torch."),
        "losses": read_json(losses) if losses.exists() else None,
        "scores": scores,
        "intervals": {
            name: {m: (value["low"], value["high"]) for m, value in one["scores"].items()}
            for name, one in sets.items()
        },
        "empty": {name: one["empty"] for name, one in sets.items()},
        "rows": rows_of(folder, metrics),
    }


def rows_of(scores: Path, metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return test set -> ids, groups and scores of the examples, from an evaluation's folder."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(scores / "predictions.jsonl"):
        sets.setdefault(row["set"], []).append(row)
    return {
        name: {
            "ids": [row["id"] for row in rows],
            "groups": [row["group"] for row in rows],
            "values": {
                metric: [round(row[metric], 5) for row in rows]
                for metric in metrics
                if all(isinstance(row.get(metric), int | float) for row in rows)
            },
        }
        for name, rows in sets.items()
    }


def _searched(folder: Path) -> dict[str, Any]:
    """Return the facts about a search for the tables."""
    found, log = read_json(folder / "ratio.json"), facts_of(folder)["log"]
    rounds = read_jsonl(folder / "rounds.jsonl")
    committed = [one["step"] for one in rounds if one["committed"]]
    return {
        "spread": (found.get("spread") or {}).get("ratios"),
        "verdict": found["verdict"],
        "findings": [one["name"] for one in found["findings"]],
        "rounds": len(rounds),
        "commits": len(committed),
        "flipped": found["flipped_entries"],
        "entries": found["entries"],
        "forwards": found["probe_forwards"],
        "loss_jump": loss_jump(log, committed),
    }


def loss_jump(log: list[dict[str, Any]], committed: list[int], window: int = 4) -> float | None:
    """Return the mean rise of the training loss over commits, in nats; None without a commit.

    A rise is the mean loss of `window` steps after the commit, minus the mean loss of `window`
    steps up to it. It includes the usual fall of a training loss.

    Args:
        log: entries with `step` and `loss`.
        committed: steps after which a commit was made.
        window: steps on either side; fewer where the run begins or ends.
    """
    losses = {entry["step"]: entry["loss"] for entry in log}
    jumps: list[float] = []
    for step in committed:
        before = [losses[s] for s in range(step - window + 1, step + 1) if s in losses]
        after = [losses[s] for s in range(step + 1, step + window + 1) if s in losses]
        if before and after:
            jumps.append(sum(after) / len(after) - sum(before) / len(before))
    return sum(jumps) / len(jumps) if jumps else None


def price_of(stages: Sequence[tuple[Stage, Mapping[str, Any]]], sizes: Sizes) -> dict[str, float]:
    """Return what stages cost: runs, seconds, examples read without a gradient, steps, tokens.

    Args:
        stages: each stage with the facts of its result.
        sizes: of all sets of examples; tokens are counted by the mean length of the target's train
            and dev examples.
    """
    length = sizes.length(("target", "train"), ("target", "dev"))
    total: dict[str, float] = dict.fromkeys(PRICES, 0)
    for stage, facts in stages:
        retrained = facts.get("labelled")
        steps = (retrained or facts).get("steps", 0)
        read = facts.get("forwards", 0) + facts.get("probe_forwards", 0)
        if retrained is None:
            read += len(facts.get("evaluations", [])) * len(facts.get("best_rows", []))
        trains = stage.kind in ("train", "prune") or (stage.kind == "search" and steps > 0)
        # A search that the final run goes on from is the first stage of one training.
        continued = stage.kind == "search" and stage.config.finetune.mode == "continue"
        total["runs"] += trains and not continued and not stage.option("untrained", False)
        total["seconds"] += facts["seconds"]
        total["forwards"] += read
        total["steps"] += steps
        total["tokens"] += (steps * _batch(stage, facts, sizes) + read) * length
    return total | {"tokens": round(total["tokens"])}


def _batch(stage: Stage, facts: Mapping[str, Any], sizes: Sizes) -> int:
    """Return the examples of an optimizer step of a stage."""
    if stage.kind not in ("train", "search", "prune"):
        return 0
    name = {"train": stage.option("role"), "search": "search", "prune": "finetune"}[stage.kind]
    training = stage.config.training(name)
    whole = facts.get("labelled", {}).get("rows") or facts.get("rows_trained")
    count = whole or sizes.examples(("target", "train"))
    return min(count, training.batch_size * training.accumulation)


def chosen(built: Built, found: Mapping[str, MethodOutcome]) -> MethodOutcome:
    """Return the outcome of a method that chooses among other runs, from their outcomes.

    A run without a result, such as one whose training diverged, and one whose loss is not finite
    are left out and named.
    """
    wanted, nearest = None, built.chooses.get("nearest")
    if nearest is not None:
        other = found[nearest].result
        if other is None or "not_applicable" in other:
            return MethodOutcome(other, error=None if other else f"{nearest} has no result")
        wanted = other["ratio"]
    results = {job: found[job].result for job in built.others}
    whole = {job: one for job, one in results.items() if one and "not_applicable" not in one}
    if not whole:
        refused = [one["not_applicable"] for one in results.values() if one]
        if refused:
            return MethodOutcome({"not_applicable": refused[0]})
        return MethodOutcome(None, error=f"not done, {built.others[0]} has no result")
    if wanted is not None:
        result = nearest_of(whole, wanted)
        paid, left_out = [result["chosen"]], [job for job in results if job not in whole]
    else:
        judged = built.chooses["judged"]
        finite = [job for job, one in whole.items() if math.isfinite(judged_loss(one, judged))]
        if not finite:
            return MethodOutcome(None, error="no run has a finite loss on the labelled examples")
        result = best_of(whole, judged)
        paid, left_out = list(whole), [job for job in results if job not in finite]
    result["left_out"] = left_out
    peaks = [found[job].peak_memory_bytes or 0 for job in paid]
    machines = tuple(machine for job in paid for machine in found[job].machines)
    return MethodOutcome(result, max(peaks) or None, machines=machines)


def best_of(results: Mapping[str, Mapping[str, Any]], judged: Sequence[str]) -> dict[str, Any]:
    """Return the result with the lowest loss on labelled examples, at the price of all of them.

    Args:
        results: job -> result. One with a loss that is not finite is never chosen.
        judged: the splits that choose.

    Raises:
        ValueError: no result has a finite loss.
    """
    chosen = lowest({job: judged_loss(result, judged) for job, result in results.items()})
    if chosen is None:
        raise ValueError(
            f"none of {', '.join(results)} has a finite loss on {', '.join(judged)}: use "
            "model.dtype float32 if the model overflows in half precision, or another adapter"
        )
    prices = [result["price"] for result in results.values()]
    price = {name: sum(one[name] for one in prices) for name in prices[0]}
    return dict(results[chosen]) | {"chosen": chosen, "price": price}


def judged_loss(result: Mapping[str, Any], judged: Sequence[str]) -> float:
    """Return the mean loss of a result on the examples of these splits."""
    return mean_loss([x for split in judged for x in result["losses"][split]])


def mean_loss(losses: Sequence[float | None]) -> float:
    """Return the mean loss in nats; infinity where a loss is not finite (JSON has it as null)."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return statistics.fmean(known) if known and len(known) == len(losses) else math.inf


def nearest_of(results: Mapping[str, Mapping[str, Any]], wanted: float) -> dict[str, Any]:
    """Return the result whose ratio is nearest to another; of two as near the first is taken."""
    chosen = min(results, key=lambda job: abs(results[job]["ratio"] - wanted))
    return dict(results[chosen]) | {"chosen": chosen}
