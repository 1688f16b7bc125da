"""A sweep: configurations x languages x seeds as one plan, and one table of them.

Adapters that nothing tells apart (`stages.keys`) are trained once. All else of a run or a
comparison is a stage `cell`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import check_openable
from grasp_lora.base.files import jsonable, read_json, write_sealed, write_text
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sweep import Part, Sweep, variant_words
from grasp_lora.plans.auto import first_asked
from grasp_lora.plans.auto_plan import task_of
from grasp_lora.plans.cell import CELL_FILE, ROLES
from grasp_lora.plans.compare import checked_data
from grasp_lora.plans.executor import Outcome
from grasp_lora.plans.launch import plan_folder, work_off_many
from grasp_lora.plans.methods import METHODS
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.pool import Pool
from grasp_lora.plans.recipes import with_split_seed
from grasp_lora.plans.run import check_settings
from grasp_lora.plans.session import Session, Sessions
from grasp_lora.plans.show import held_groups, sizes_of
from grasp_lora.report.sweep import sweep_markdown
from grasp_lora.stages.keys import hash_of, key_of
from grasp_lora.stages.stage import Input, Sizes, Stage
from grasp_lora.stages.train import TRAIN
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import load_run_data

SWEEP_FILE = "sweep.json"


def sweep(
    asked: tuple[Sweep, list[Part]],
    out: Path,
    pool: Pool,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do every cell of a sweep that is not done, and write the table.

    Args:
        asked: the sweep and its parts, of `config.sweep.load_sweep`.
        out: receives `sweep.md`, `sweep.json`, the adapters, and a folder for each cell.
        pool: the processes that do the stages, at least one.
        overwrite: replace results that were made from other inputs.
        quiet: print nothing.

    Returns:
        The content of `sweep.json`.

    Raises:
        ValueError: a configuration, its examples or the pool cannot work; raised before any work.
    """
    if pool.jobs == 0:
        raise ValueError("a sweep does each stage in a process: --jobs must be at least 1")
    whole, parts = asked
    with plan_folder(out, pool, quiet):
        plan, sessions = sweep_plan(parts, whole.seeds, quiet)
        outcomes = work_off_many(plan, out, sessions, Sizes({}, {}), pool, overwrite)
        found = _found(whole, parts, out, outcomes)
        write_sealed(out / SWEEP_FILE, jsonable(found), ())
        write_text(out / "sweep.md", sweep_markdown(found))
    return found


def cell_name(part: Part, seed: int) -> str:
    """Return the name of a cell's stage."""
    return f"{part.language}-{part.configuration}-s{seed}/cell"


def sweep_plan(
    parts: list[Part], seeds: tuple[int, ...], quiet: bool = True
) -> tuple[Plan, Sessions]:
    """Return the plan of a sweep, and the sessions of its stages.

    Args:
        parts: languages and configurations.
        seeds: of each.
        quiet: print nothing while the examples are read.

    Raises:
        ValueError: as `sweep`.
    """
    stages: dict[str, Stage] = {}
    sessions: dict[str, Session] = {}
    for part in parts:
        session = _session(part, seeds, quiet)
        adapters: dict[str, Input] = {}
        for role in ROLES:
            given = getattr(part.config.adapters, role)
            adapters[role] = given
            if given is None:
                stage = _training(role, session)
                adapters[role] = stage.name
                sessions.setdefault(stage.name, session)
                stages.setdefault(stage.name, stage)
        for seed in seeds:
            options = {"seed": seed, "methods": list(part.methods) or None}
            name = cell_name(part, seed)
            stages[name] = Stage(name, "cell", session.config, adapters, options)
            sessions[name] = session
    return Plan(stages), Sessions(sessions, quiet)


def _session(part: Part, seeds: tuple[int, ...], quiet: bool) -> Session:
    """Return the session of a part, with all checked that can be before any work."""
    config = part.config
    try:
        if part.methods:
            data = checked_data(config, "method", part.methods, METHODS, seeds, quiet)
        else:
            check_settings(config)
            for folder in config.adapters.folders().values():
                if folder is not None:
                    read_adapter(folder)
                    check_openable(folder)
            data = load_run_data(config, Reporter(quiet).say)
        if not data.test_sets():
            raise ValueError(
                "there are no test rows to fill the table with: give data.target.rows.test, "
                "data.target.files.test or data.tests"
            )
        sizes = sizes_of(config, data)
        if config.recipe == "auto" and not part.methods:
            first_asked(task_of(config, sizes, held_groups(data)))
    except ValueError as error:
        raise ValueError(f"{part.language}, {part.configuration}: {error}") from None
    return Session(with_split_seed(config), data, quiet=quiet)


def _training(role: str, session: Session) -> Stage:
    """Return the training of an adapter, named by all that it depends on."""
    config: RunConfig = session.config
    stage = Stage("", "train", config, options={"role": role})
    key = hash_of(key_of(stage, TRAIN, session.data, session.base, {}, session.template))
    section = getattr(config.data, role)
    name = f"adapters/{role}-{section.language}-{key}"
    return Stage(name, "train", config, options={"role": role})


def _found(
    whole: Sweep, parts: list[Part], out: Path, outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    refused: dict[str, str] = {}
    for part in parts:
        for seed in whole.seeds:
            name = cell_name(part, seed)
            error, cell = outcomes[name].error, name.partition("/")[0]
            if error is not None:
                failed[cell] = error
                continue
            about = {"cell": cell, "language": part.language, "configuration": part.configuration}
            stored = read_json(out / name / CELL_FILE)
            cells += [about | {"seed": seed} | row for row in stored["rows"]]
            refused |= {f"{cell}, {one}": why for one, why in stored["not_applicable"].items()}
    return {
        "tasks": list(dict.fromkeys(part.config.data.task for part in parts)),
        "configurations": variant_words(whole.configurations),
        "seeds": list(whole.seeds),
        "cells": cells,
        "not_applicable": refused,
        "failed": failed,
    }
