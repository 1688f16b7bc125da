"""The records of a run that chose its recipe: recipe.json and ratio.json."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.base.files import jsonable, read_json, write_json
from grasp_lora.core.evidence.known import known_rows
from grasp_lora.core.recipes.chooser import Finalist, Told
from grasp_lora.plans.auto import Chosen
from grasp_lora.plans.auto_plan import RATIO_PROBE, SIMPLE, recipe_words, slug_of, whole_name
from grasp_lora.report.choice import measured_trials, not_applicable
from grasp_lora.report.data_words import known_line
from grasp_lora.report.pictures import plot_choice

NOT_PROBED = "not-probed"
"""Verdict on the prune ratio where no ratio was tried."""
_OF_SEARCH = ("rounds.jsonl", "ratio.png")


def publish_choice(out: Path, result: Chosen) -> None:
    """Write recipe.json and ratio.json into the run folder."""
    config = result.config
    choice = jsonable(about_choice(result))
    write_json(out / "recipe.json", choice)
    if measured_trials(choice):
        plot_choice(choice, out / "recipe.png")
    ratio: dict[str, Any] = {"ratio": 0.0, "verdict": NOT_PROBED, "trained": False, "evidence": {}}
    if result.probed:
        ratio = read_json(out / RATIO_PROBE / "ratio.json")
    changed = config.changed_from_preset()
    preset = f"{config.preset}, changed" if changed else config.preset
    write_json(out / "ratio.json", ratio | {"preset": preset, "changed_from_preset": changed})
    for name in _OF_SEARCH:  # an earlier run in this folder may have searched
        (out / name).unlink(missing_ok=True)


def about_choice(result: Chosen) -> dict[str, Any]:
    """Return the content of recipe.json."""
    task, decision = result.task, result.decision
    gain = decision.gain
    named = None
    if decision.simple is not None:
        loss = fmean(result.simple[decision.simple].losses)
        named = {"name": SIMPLE[decision.simple], "dev_loss": loss}
    return {
        "ships": result.ships,
        "trained": any(one.epochs for one in decision.finalists),
        "why": decision.why,
        "notes": _notes(result),
        "finalists": [_about_finalist(one) for one in decision.finalists],
        "dev_loss": _mean([x for one in decision.finalists for x in one.judged]),
        "simple": named,
        "gain": None if gain is None else {"gain": gain.gain, "interval": (gain.low, gain.high)},
        "measured": None if decision.measured is None else asdict(decision.measured),
        "tried": [_about_trial(one, result) for one in result.told],
        "simple_systems": [_about_simple(name, result) for name in result.simple],
        "not_applicable": {name: not_applicable(why) for name, why in result.refused.items()},
        "price": {
            "tokens": round(result.spent),
            "plain_runs": result.spent / task.prices.plain,
            "budget": result.config.budget,
        },
    }


def _mean(losses: Sequence[float]) -> float | None:
    return fmean(losses) if losses else None


def _notes(result: Chosen) -> list[str]:
    """Return what this run could not do with the examples it had, a line each."""
    notes: list[str] = []
    if not result.task.groups:
        notes.append(result.decision.why)
    if not result.systems:
        notes.append("no test rows, so nothing was scored")
    elif not result.config.evaluate.baselines:
        notes.append("only the shipped adapter was scored (evaluate.baselines: false)")
    return notes + _known(result)


def _known(result: Chosen) -> list[str]:
    """Return a warning if a given target adapter may have been trained on held examples."""
    wanted = ("target", "source", "backbone")
    measured = [result.simple[name].losses for name in wanted if name in result.simple]
    if result.config.adapters.target is None or len(measured) < len(wanted) or not measured[0]:
        return []
    own, *others = measured
    known = known_rows(own, others, result.task.groups)
    return [] if known is None else [known_line(asdict(known) | {"all": len(own)})]


def _about_simple(name: str, result: Chosen) -> dict[str, Any]:
    measured = result.simple[name]
    scored = name in [system.slug for system in result.systems]
    path = f"evaluations/{name}" if scored else measured.path
    return {
        "name": SIMPLE[name],
        "dev_loss": _mean(measured.losses),
        "path": path,
        "plain_runs": measured.tokens / result.task.prices.plain,
    }


def _about_finalist(one: Finalist) -> dict[str, Any]:
    return {
        "recipe": slug_of(one.recipe),
        "epochs": one.epochs,
        "dev_loss": _mean(one.judged),
        "path": whole_name(one),
    }


def _about_trial(told: Told, result: Chosen) -> dict[str, Any]:
    recipe, means = told.trial.recipe, [fmean(one) for one in told.losses]
    lost = told.refused is not None
    steps = {one.recipe.start: one.recipe.step for one in result.decision.finalists}
    return {
        "recipe": slug_of(recipe),
        "says": recipe_words(recipe, result.config),
        "path": None if lost else result.trials[recipe],
        "epochs": None if lost else told.best,
        "dev_loss": None if lost else means[told.best],
        "curve": means,
        "plain_runs": told.tokens(result.task.prices) / result.task.prices.plain,
        "refused": None if told.refused is None else not_applicable(told.refused),
        "shipped": not lost and steps.get(recipe.start, 0) == recipe.step,
    }
