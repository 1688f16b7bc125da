"""Stage `cell`: one configuration, language and seed of a sweep -> its scores.

A run that chooses its recipe asks for trials in rounds, so it is no list of stages that is known
before. A cell is therefore one stage that does a whole run, or a comparison of some methods. Their
folder is `run`, beside the cell's own, where they resume as they do by themselves. The cell's own
folder has `cell.json`, the rows of the sweep's table.

Options:
    seed: of all that follows the adapters.
    methods: names of methods of a comparison; none is a run by its recipe.

Inputs:
    source, target: the adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from grasp_lora.base.files import read_json, write_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.stages.keys import TRAININGS
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work

CELL_FILE = "cell.json"
RUN_FOLDER = "run"
ROLES = ("source", "target")


def _run(work: Work) -> Mapping[str, Any]:
    out, seed = work.checkpoints.with_name(RUN_FOLDER), work.stage.options["seed"]
    adapters = {role: work.inputs[role] for role in ROLES}
    given = work.config.adapters.model_copy(update=adapters)
    config = work.config.model_copy(update={"adapters": given, "output": out})
    methods = tuple(work.stage.option("methods", ()))
    if methods:
        found = _of_methods(config, (methods, seed), work.overwrite)
    else:
        found = _of_run(config.model_copy(update={"seed": seed}), work.overwrite)
    write_json(work.out / CELL_FILE, found)
    return {}


def _of_run(config: RunConfig, overwrite: bool) -> dict[str, Any]:
    from grasp_lora.plans.run import run  # it does stages itself, by the table that has this one

    out = run(config, overwrite)
    scores, ratio = read_json(out / "scores.json"), read_json(out / "ratio.json")
    final = [row for row in scores["systems"] if row["slug"] == "final"]
    chosen = read_json(out / "recipe.json") if (out / "recipe.json").exists() else {}
    row = {
        "system": config.recipe,
        "ships": chosen.get("ships"),
        "scores": _values(final[0]) if final else {},
        "before": {one["name"]: _values(one) for one in scores["systems"] if one not in final},
        "dev_loss": chosen.get("dev_loss"),
        "gain": chosen.get("gain"),
        "ratio": ratio["ratio"],
        "verdict": ratio["verdict"],
    }
    return {"rows": [row], "not_applicable": {}}


def _values(system: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        test: {metric: found["value"] for metric, found in one["scores"].items()}
        for test, one in system["sets"].items()
    }


def _of_methods(
    config: RunConfig, asked: tuple[Sequence[str], int], overwrite: bool
) -> dict[str, Any]:
    from grasp_lora.plans.compare import compare_methods  # as above

    methods, seed = asked
    found = compare_methods(config, config.output, methods, (seed,), overwrite=overwrite)
    if found["failed"]:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in found["failed"].items()))
    kept = ("scores", "dev_loss", "ratio", "verdict")
    rows = [row for row in found["rows"] if row["method"] in methods]
    systems = [{"system": row["method"]} | {name: row[name] for name in kept} for row in rows]
    return {"rows": systems, "not_applicable": found["not_applicable"]}


def _settings(stage: Stage) -> tuple[str, ...]:
    """Return all settings but the places of results, of examples and of adapters."""
    whole = ("preset", "recipe", "budget", "prefer", "model", "lora", "merge", "importance")
    whole += ("mask_unit", "structure", "scope", "controller", "finetune", "evaluate", "seed")
    data = ["task", "max_length", "chat", "near_duplicates", "extra.weight", "target.language"]
    data += [f"{role}.prompt" for role in ROLES]
    data += [f"tests.{n}.{key}" for n in stage.config.data.tests for key in ("prompt", "language")]
    trainings = (f"train.{name}" for name in TRAININGS)
    return (*whole, *trainings, *(f"data.{name}" for name in data))


def _examples(stage: Stage, known: tuple[Split, ...]) -> tuple[Split, ...]:
    del stage
    return known


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    del stage, sizes
    return Cost()


CELL = Kind(1, _settings, _examples, _run, _cost, loads=False)
