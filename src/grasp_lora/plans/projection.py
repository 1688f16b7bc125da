"""How long a queue of runs will take, from a measured step, row and answer.

Before anything long begins, one short job times what all runs are made of; what each run does of it
follows from its settings.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import TrainSettings
from grasp_lora.core.controller.rounds import planned_rounds
from grasp_lora.core.lora import lora_scaling
from grasp_lora.core.pruning.importance import NEEDS_NORMS
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans.methods import FOLDS, JUDGED, TRIALS, settings_of, with_split_seed
from grasp_lora.plans.queue import Job, Outcome, check_queue, results_in, run_queue, threads_of
from grasp_lora.plans.starts import BUDGET
from grasp_lora.stages.evaluate import evaluate_adapter
from grasp_lora.stages.precheck import ROWS, VARIANTS
from grasp_lora.stages.search import POOLS
from grasp_lora.stages.train import fresh_adapter
from grasp_lora.stages.weights import SHARE_ROWS, SHARES
from grasp_lora.training.trainer import planned_steps
from grasp_lora.workbench.context import LABELLED, open_context
from grasp_lora.workbench.fit import fit
from grasp_lora.workbench.folders import work_folder
from grasp_lora.workbench.reporter import Narrator, duration
from grasp_lora.workbench.rows import RunData

MEASURE = "measured"
"""Name of the job that measures, and of its folder in the queue's."""
MEASURED_STEPS = 3
MEASURED_ROWS = 16
MEASURED_ANSWERS = 8


@dataclass(frozen=True)
class Amount:
    """What a run does, at most: it may stop early.

    Attributes:
        steps: optimizer steps.
        forwards: rows read without a gradient.
        answers: rows answered, their losses included.
    """

    steps: int = 0
    forwards: int = 0
    answers: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.steps + other.steps,
            self.forwards + other.forwards,
            self.answers + other.answers,
        )

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Return the wall time at measured rates, see `measure`; loading included."""
        return (
            rates["load"]
            + self.steps * rates["step"]
            + self.forwards * rates["forward"]
            + self.answers * rates["answer"]
        )


def run_projected(
    config: RunConfig,
    data: RunData,
    folder: Path,
    jobs: Sequence[Job],
    workers: int,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
) -> dict[str, Outcome]:
    """Say how long the queue will take, measured if it has not been, then run it.

    Args:
        config: settings of the measured step.
        data: its rows.
        folder, jobs, workers, threads, overwrite, quiet: as for `run_queue`.

    Raises:
        ValueError: as `run_queue`.
    """
    narrator, short = Narrator(quiet), measure_job(with_split_seed(config), data)
    # Both together are looked at first, so that a folder of something else is refused before work.
    check_queue(folder, [short, *jobs], workers, threads, overwrite)
    # The measuring job runs alone, on as many threads as each of the others will have.
    threads = threads_of(folder, threads, workers)
    done = results_in(folder, jobs)
    missing = [job for job in jobs if job.name not in done]
    if not any("config" in job.inputs for job in missing):
        return run_queue(folder, jobs, workers, threads, overwrite, quiet)
    found = run_queue(folder, [short], min(workers, 1), threads, overwrite, True)[MEASURE]
    if found.result is None:
        narrator.say(f"how long this takes is not known: {MEASURE} {found.error}")
        return run_queue(folder, jobs, workers, threads, overwrite, quiet)
    rates = found.result
    expected = projected(jobs, data, rates)
    whole = sum(expected[job.name] for job in missing) / max(1, workers)
    measured = ", ".join(
        f"{name} {rates[key]:.3g} s"
        for key, name in (
            ("step", "a step"),
            ("forward", "a row read"),
            ("answer", "a row answered"),
            ("load", "loading"),
        )
    )
    narrator.say(
        f"{len(missing)} runs to do: about {duration(whole)} with {max(1, workers)} at once, "
        f"without early stopping (measured: {measured})"
    )
    return run_queue(folder, jobs, workers, threads, overwrite, quiet, expected)


def measure_job(config: RunConfig, data: RunData) -> Job:
    """Return the job that measures a step, a row and an answer."""
    own = {"data": data.digest(), "config": settings_of(config)}
    return Job(MEASURE, "projection:measure", own)


def measure(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Return seconds of `load` (data and backbone), `step`, `forward` and `answer` (a row each).

    Trains a fresh adapter of the configured shape for a few steps and keeps nothing of it; a merge
    of two takes hardly longer.

    Args:
        inputs: `config`.
        needed: nothing is read from it.
        folder: holds checkpoints meanwhile.
    """
    began = time.perf_counter()
    config = RunConfig(**inputs["config"])
    context = open_context(config)
    rows = context.rows("target", JUDGED if context.encoded("target", "dev") else ("train",))
    context.encoded("target", "train")
    rates = {"load": time.perf_counter() - began, "answer": 0.0}
    timer = _StepTimer()
    section = config.finetune.model_copy(update={"max_steps": MEASURED_STEPS})
    scaling = lora_scaling(config.lora.r, config.lora.alpha, config.lora.use_rslora)
    fresh = fresh_adapter(context.backbone.model, config)
    shutil.rmtree(work_folder(folder / "steps"), ignore_errors=True)
    with context.live(fresh, "merged", config.lora.dropout, scaling) as live:
        fit(
            context, live, section, folder / "steps", {}, "a few steps to measure",
            extra=[timer], choose_best=False,
        )  # fmt: skip
        live.model.eval()
        count = min(MEASURED_ROWS, len(rows.encoded))
        batches = rows.batches(range(count))
        began = time.perf_counter()
        example_losses(live.model, batches, count)
        rates["forward"] = (time.perf_counter() - began) / count
    shutil.rmtree(work_folder(folder / "steps"), ignore_errors=True)
    rates["step"] = statistics.median(timer.seconds)
    if context.data.test_sets():
        few = config.evaluate.model_copy(update={"limit": MEASURED_ANSWERS, "metrics": None})
        short = replace(context, config=config.model_copy(update={"evaluate": few}))
        began = time.perf_counter()
        evaluate_adapter(short.config, None, folder / "answers", context=short)
        answered = sum(
            min(MEASURED_ANSWERS, len(context.examples(role, split)))
            for role, split in context.data.test_sets().values()
        )
        rates["answer"] = (time.perf_counter() - began) / answered
    return rates


class _StepTimer(TrainerCallback):
    """Takes the seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the count."""
        self.seconds.append(time.perf_counter() - self._began)


def projected(jobs: Sequence[Job], data: RunData, rates: Mapping[str, float]) -> dict[str, float]:
    """Return job name -> seconds it takes at measured rates, without early stopping."""
    amounts = {job.name: amount_of(job, data) for job in jobs}
    return {
        name: amount.seconds(rates) if amount != Amount() else 0.0
        for name, amount in amounts.items()
    }


def amount_of(job: Job, data: RunData) -> Amount:
    """Return what a job of the comparison does; nothing for one that only reads results."""
    if "config" not in job.inputs:
        return Amount()
    config = RunConfig(**job.inputs["config"])
    return AMOUNTS[job.work](config, job.inputs, data)


def _count(data: RunData, splits: Sequence[str], role: str = "target") -> int:
    return sum(len(data.parts.get(role, {}).get(split, ())) for split in splits)


def _training(
    data: RunData, section: TrainSettings, role: str = "target", rows: int | None = None,
    dev: int | None = None,
) -> Amount:  # fmt: skip
    """Return a training run with its dev losses, step 0 among them."""
    rows = _count(data, ["train"], role) if rows is None else rows
    dev = _count(data, ["dev"], role) if dev is None else dev
    steps = planned_steps(
        rows, section.epochs, section.batch_size, section.accumulation, section.max_steps
    )
    return Amount(steps, dev * (1 + round(section.epochs)))


def _anew(config: RunConfig, data: RunData) -> Amount:
    """Return training on all labelled rows, for as many epochs as could be kept."""
    if config.finetune.rows == "train":
        return Amount()
    section = config.finetune
    if section.mode == "continue":
        section = section.model_copy(update={"epochs": config.search.epochs + section.epochs})
    return Amount(_training(data, section, rows=_count(data, LABELLED), dev=0).steps)


def _outcome(data: RunData, judged: bool = True) -> Amount:
    answers = sum(_count(data, [split], role) for role, split in data.test_sets().values())
    return Amount(0, _count(data, JUDGED) if judged else 0, answers)


def _start(inputs: Mapping[str, Any], data: RunData) -> Amount:
    start = inputs.get("start", {})
    if start.get("lorahub"):
        return Amount(0, BUDGET * _count(data, ["train"]))
    if start.get("merge", {}).get("weights") == "auto":
        tried = sum(variant.group in ("merge", "weights") for variant in VARIANTS.values())
        return Amount(0, tried * min(ROWS, _count(data, JUDGED)))
    return Amount()


def _final(config: RunConfig, data: RunData, ratio: Any) -> Amount:
    rule = config.importance if config.finetune.importance == "same" else config.finetune.importance
    reads = _count(data, ["train"]) if rule in NEEDS_NORMS and ratio != 0.0 else 0
    return _training(data, config.finetune) + Amount(0, reads)


def _prepared(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    missing = [role for role, folder in config.adapters if folder is None]
    total = Amount()
    for role in missing:
        total += _training(data, config.train, role)
    return total


def _fixed(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    return _start(inputs, data) + _outcome(data)


def _finetuned(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    # Masks that are drawn need no norms, as an adapter that is not pruned.
    ratio = 0.0 if inputs.get("random_masks") else inputs["ratio"]
    whole = config.finetune.rows == "labelled"
    first = Amount() if inputs.get("judged") else _final(config, data, ratio)
    return _start(inputs, data) + first + _anew(config, data) + _outcome(data, judged=not whole)


def _probes(config: RunConfig, data: RunData) -> int:
    """Return the rows that a search reads in its rounds."""
    controller = config.controller
    tried = controller.candidates + (1 if controller.baseline else 0)
    rows = min(controller.rows, _count(data, POOLS[controller.probe_rows]))
    return planned_rounds(_training(data, config.search).steps, controller) * tried * rows


def _grasp(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    trained = _training(data, config.search)
    steps = trained.steps
    dev = trained.forwards if config.finetune.mode == "continue" else 0
    probes = _probes(config, data)
    reads = _count(data, ["train"]) if config.importance in NEEDS_NORMS else 0
    return (
        _start(inputs, data)
        + Amount(steps, probes + reads + dev)
        + _final(config, data, None)
        + _anew(config, data)
        + _outcome(data, judged=config.finetune.rows == "train")
    )


def _late(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    labelled = _count(data, JUDGED)
    probes = len(SHARES) * min(SHARE_ROWS, labelled)
    if inputs["prune"]:
        norms = 2 * _count(data, ["train"]) if config.importance in NEEDS_NORMS else 0
        probes += _probes(config, data) + norms + _count(data, ["dev"])
    return Amount(0, probes) + _outcome(data, judged=config.finetune.rows == "train")


def _optuna(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    total = _outcome(data)
    for _ in range(TRIALS):
        total += _final(config, data, None)
    return total


def _all_labels(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    rows = _count(data, ("train", *JUDGED))
    held = rows // FOLDS
    total = _training(data, config.train, rows=rows, dev=0) + _outcome(data, judged=False)
    for _ in range(FOLDS):
        total += _training(data, config.train, rows=rows - held, dev=held)
    return total


def _trained(config: RunConfig, inputs: Mapping[str, Any], data: RunData) -> Amount:
    return _training(data, config.train) + _outcome(data)


AMOUNTS: Mapping[str, Callable[[RunConfig, Mapping[str, Any], RunData], Amount]] = {
    "methods:prepare": _prepared,
    "methods:fixed": _fixed,
    "methods:finetuned": _finetuned,
    "methods:grasp": _grasp,
    "methods:late": _late,
    "methods:optuna_search": _optuna,
    "methods:all_labels": _all_labels,
    "methods:trained": _trained,
    "methods:adalora": _trained,
}
"""Work of a job -> what it does."""
