"""What queued runs do: from adapters to a final adapter with its scores and its price.

Each function is the work of a `job`: it reads its settings and earlier results, writes stages into
its folder and returns what tables are made of. A job that was killed goes on within its stages.
"""

import functools
import math
import shutil
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.config.run_config import ConfigError, RunConfig
from grasp_lora.models.example_losses import example_losses
from grasp_lora.models.modules import resolve_targets
from grasp_lora.plans.job import Work
from grasp_lora.plans.queue import Job
from grasp_lora.plans.starts import CONFIGURED, NotApplicable, Start, merging, started
from grasp_lora.scoring.sets import missing_metrics
from grasp_lora.stages.evaluate import evaluate_adapter
from grasp_lora.stages.finetune import finetune_at, on_train_rows
from grasp_lora.stages.merge import merge_adapters
from grasp_lora.stages.search import search_ratio
from grasp_lora.stages.train import train_adapter
from grasp_lora.stages.weights import with_learned_weights
from grasp_lora.tasks.base import Example
from grasp_lora.training.adalora import AdaLoraCallback, attach_adalora, plain_lora_of
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.fit import Spent, fit, run_steps
from grasp_lora.workbench.folders import (
    STAGE_FILE,
    finish_stage,
    model_content,
    read_ratio,
    read_start,
    save_plain,
    stage_is_done,
    stage_key,
    work_folder,
)
from grasp_lora.workbench.given import check_given
from grasp_lora.workbench.reporter import Narrator
from grasp_lora.workbench.rows import RunData, load_run_data

ADAPTERS = "adapters"
"""Name of the job that all others need."""
JUDGED = ("micro_dev", "dev")
"""Labelled rows that choices are made on; a result holds its loss on each."""
FOLDS = 5
RATIO_STEP = 0.1
TRIALS = 8


def checked_data(
    config: RunConfig,
    kind: str,
    only: Sequence[str],
    known: Collection[str],
    seeds: Sequence[int],
    quiet: bool,
) -> RunData:
    """Return the rows of a queue of runs, once all that can be checked before any work is right.

    Raises:
        ValueError: a name is unknown, seeds are none or twice the same, or the settings or the
            data cannot work.
    """
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no {kind} {unknown[0]!r}; choose from {', '.join(known)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    faults = config.faults() + config.missing_files() + missing_metrics(config)
    if faults:
        raise ConfigError(faults)
    return load_run_data(config, Narrator(quiet).say)


def with_split_seed(config: RunConfig) -> RunConfig:
    """Return settings whose rows are divided by the seed they have now, whatever seed they get."""
    if config.data.split_seed is not None:
        return config
    data = config.data.model_copy(update={"split_seed": config.seed})
    return config.model_copy(update={"data": data})


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return settings without the place of the results, which must not change a run's key."""
    return {key: value for key, value in config.to_dict().items() if key != "output"}


def adapters_job(config: RunConfig, data: RunData) -> Job:
    """Return the job that all others of a queue need: the adapters and their merge."""
    given: dict[str, Any] = {f"adapters.{r}": p for r, p in config.adapters if p is not None}
    base = model_content(config.model.name)
    if base is not None:
        given["base"] = base
    key = stage_key(config, data=data.digest(), **given)
    return Job(ADAPTERS, "methods:prepare", key | {"config": settings_of(config)})


def _or_not_applicable(work: Work) -> Work:
    @functools.wraps(work)
    def tried(
        inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path
    ) -> Mapping[str, Any]:
        for name, result in needed.items():
            if "not_applicable" in result:
                return dict(result) | {"not_applicable": f"{name}: {result['not_applicable']}"}
        try:
            return work(inputs, needed, folder)
        except NotApplicable as error:
            return {"not_applicable": str(error), "package": error.package}

    return tried


def prepare(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the adapters that are not given and merge the two; return their folders.

    `merging` is what the merge took, as `starts.Start` has it: every method that begins there pays.
    """
    config = RunConfig(**inputs["config"])
    context = open_context(config)
    given = {"source": config.adapters.source, "target": config.adapters.target}
    check_given(context, [path for path in given.values() if path is not None])
    adapters = {
        role: path or train_adapter(config, role, folder / role, context=context)
        for role, path in given.items()
    }
    weighted = with_learned_weights(context, adapters, folder / "weights")
    merged = merge_adapters(weighted, list(adapters.values()), folder / "merged", context=context)
    took = merging(folder / "weights", merged)
    seconds = {role: _seconds(path) for role, path in adapters.items() if given[role] is None}
    return {role: str(path) for role, path in adapters.items()} | {
        "merged": str(merged),
        "merging": took,
        "seconds": seconds,
    }


def refused(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return that a method cannot run; `inputs` hold `why`."""
    return {"not_applicable": inputs["why"]}


@_or_not_applicable
def fixed(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Score an adapter, a merge, or the bare backbone, without training.

    Args:
        inputs: `config`, and `start` as `starts.started` takes it.
        needed: `adapters`, the result of `prepare`.
        folder: receives `start/` and `scores/`.
    """
    context = open_context(RunConfig(**inputs["config"]))
    start = started(context, inputs["start"], needed[ADAPTERS], folder)
    price = _price(context, [], start)
    return outcome(context, start.adapter, folder) | {"ratio": 0.0, "price": price}


@_or_not_applicable
def finetuned(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fine-tune a start at a ratio and score the best of it.

    Args:
        inputs: `config`; `start`; `ratio`, a number or `{"of": METHOD, "shift": s}`;
            `random_masks`, true for masks that are drawn; and `judged`, true where the other needed
            run is the same on the train rows alone, for one that all labelled rows train.
        needed: `adapters`, and the run whose ratio is taken or that judges.
        folder: receives `start/`, `final/` and `scores/`.
    """
    context = open_context(RunConfig(**inputs["config"]))
    start = started(context, inputs["start"], needed[ADAPTERS], folder)
    assert start.adapter is not None, "the bare backbone has nothing to fine-tune"
    ratio = ratio_in(inputs["ratio"], needed)
    final = finetune_at(
        context.config, start.adapter, ratio, folder / "final", context=context,
        random_masks=bool(inputs.get("random_masks", False)),
        judged=_at_hand(_others(needed)[0]) if inputs.get("judged") else None,
    )  # fmt: skip
    price = _price(context, [final], start)
    found = outcome(context, final, folder, judged=_judges(context))
    return found | {"ratio": ratio, "price": price}


@_or_not_applicable
def grasp(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Search the ratio, fine-tune at it, score; return what happened in rounds and what came out.

    Args:
        inputs: `config`, a run's settings; `start` where it is not the configured merge.
        needed: `adapters`, the result of `prepare`.
        folder: receives `search/`, `final/` and `scores/`.
    """
    config = RunConfig(**inputs["config"])
    context = open_context(config)
    begun = started(context, inputs.get("start", CONFIGURED), needed[ADAPTERS], folder)
    merged = begun.adapter
    assert merged is not None, "a search starts from an adapter"
    search = search_ratio(config, merged, folder / "search", context=context)
    found, log = read_json(search / "ratio.json"), read_json(search / STAGE_FILE)["log"]
    start = search / "adapter" if config.finetune.mode == "continue" else merged
    ratio, spread = read_ratio(search / "ratio.json", config)
    final = finetune_at(
        config, start, ratio, folder / "final", context=context, spread=spread, origin=merged
    )
    rounds = read_jsonl(search / "rounds.jsonl")
    committed = [r["step"] for r in rounds if r["committed"]]
    price = _price(context, [search, final], begun, forwards=found["probe_forwards"])
    if config.finetune.mode == "continue":
        price["runs"] -= 1  # one training in two stages
    return outcome(context, final, folder, judged=_judges(context)) | {
        "ratio": ratio,
        "spread": spread,
        "verdict": found["verdict"],
        "findings": [one["name"] for one in found["findings"]],
        "rounds": len(rounds),
        "commits": len(committed),
        "flipped": found["flipped_entries"],
        "entries": found["entries"],
        "forwards": found["probe_forwards"],
        "loss_jump": loss_jump(log, committed),
        "price": price,
    }


@_or_not_applicable
def late(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Merge the source adapter, fine-tuned alone, with the target adapter; prune it if asked.

    Args:
        inputs: `config`, with `merge.when: after`; and `prune`, whether a ratio is searched.
        needed: `adapters`, the run that fine-tuned the source adapter, and where all labelled rows
            are trained on the run that did so, which takes its place once weights are chosen.
        folder: receives `weights/`, `merged/`, `search/`, `final/` and `scores/`; and `tuned/`
            where that run's adapter is not at hand.
    """
    config = RunConfig(**inputs["config"])
    context = open_context(config)
    runs, source = _others(needed), Path(needed[ADAPTERS]["source"])
    tuned = _at_hand(runs[0]) or finetune_at(
        on_train_rows(config), source, 0.0, folder / "tuned", context=context
    )
    pair = {"source": tuned, "target": Path(needed[ADAPTERS]["target"])}
    weighted = with_learned_weights(context, pair, folder / "weights")
    weights = list(weighted.merge.weights or ())
    final = merge_adapters(weighted, list(pair.values()), folder / "merged", context=context)
    took = merging(folder / "weights", final)
    forwards, stages, ratio, about = took["forwards"], [], 0.0, {}
    if inputs["prune"]:
        search = search_ratio(config, final, folder / "search", context=context)
        ratio, spread = read_ratio(search / "ratio.json", config)
        final = finetune_at(
            config, final, ratio, folder / "final", context=context, spread=spread, train=False
        )
        chosen = read_json(search / "ratio.json")
        forwards += chosen["probe_forwards"] + len(context.encoded("target", "dev"))
        stages += [search, final]
        about = {"verdict": chosen["verdict"], "findings": [f["name"] for f in chosen["findings"]]}
        about |= {"spread": spread, "rounds": chosen["rounds"], "entries": chosen["entries"]}
    elif config.finetune.rows == "labelled":
        whole = _at_hand(runs[1]) or finetune_at(
            config, source, 0.0, folder / "whole", context=context, judged=tuned
        )
        pair["source"] = whole
        final = merge_adapters(
            weighted, list(pair.values()), folder / "merged-labelled", context=context
        )
    seconds = took["seconds"] + sum(map(_seconds, stages))
    own = {"runs": 0, "steps": 0, "forwards": forwards, "seconds": seconds}
    own["tokens"] = round(forwards * _length(context))
    price = {name: own[name] + value for name, value in runs[-1]["price"].items()}
    facts = {"ratio": ratio, "weights": weights, "forwards": forwards, "price": price}
    return outcome(context, final, folder, judged=_judges(context)) | about | facts


def _others(needed: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the results of needed runs, but for the adapters, in the order they are asked for."""
    return [result for name, result in needed.items() if name != ADAPTERS]


def _at_hand(run: Mapping[str, Any]) -> Path | None:
    """Return the folder of a run's adapter, unless it is on another machine or gone."""
    folder = run.get("adapter")
    return Path(folder) if folder is not None and Path(folder).exists() else None


def _judges(context: Context) -> bool:
    """Return whether the labelled rows can tell how good a fine-tuned adapter is."""
    return context.config.finetune.rows == "train"


@_or_not_applicable
def best_of(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the run with the lowest loss on labelled rows, at the price of all of them.

    Args:
        inputs: `judged`, the splits that choose.
        needed: results of the runs.
        folder: not written to.
    """
    losses = {
        name: statistics.fmean(x for split in inputs["judged"] for x in result["losses"][split])
        for name, result in needed.items()
    }
    chosen = min(losses, key=lambda name: losses[name])
    prices = [result["price"] for result in needed.values()]
    price = {name: sum(one[name] for one in prices) for name in prices[0]}
    return dict(needed[chosen]) | {"chosen": chosen, "price": price}


@_or_not_applicable
def nearest_of(
    inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Return the run whose ratio is nearest to another run's, at its own price.

    Args:
        inputs: `to`, the method of that other run.
        needed: results of it and of the runs to choose from; of two as near the first is taken.
        folder: not written to.
    """
    other = next(name for name in needed if name.startswith(inputs["to"]))
    points = {name: result for name, result in needed.items() if name != other}
    wanted = needed[other]["ratio"]
    chosen = min(points, key=lambda name: abs(points[name]["ratio"] - wanted))
    return dict(points[chosen]) | {"chosen": chosen}


@_or_not_applicable
def optuna_search(
    inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Let Optuna choose the ratio by full fine-tuning runs, each judged by its best dev loss.

    Args:
        inputs: `config`; `sampler`, "tpe", "gp" or "random"; and for the first two `drawn`, how
            many runs are at ratios drawn at random before the sampler has a model.
        needed: `adapters`.
        folder: receives a folder for every trial.
    """
    try:
        import optuna
    except ImportError:
        why = "Optuna is not installed; run: pip install optuna"
        raise NotApplicable(why, package="optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    context = open_context(RunConfig(**inputs["config"]))
    config, start = context.config, started(context, CONFIGURED, needed[ADAPTERS], folder)
    merged = start.adapter
    assert merged is not None, "the configured merge is an adapter"
    samplers = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "random": optuna.samplers.RandomSampler,
    }
    # Both samplers would draw ten trials before they model any, which is more than all there are.
    own = {"n_startup_trials": inputs["drawn"]} if "drawn" in inputs else {}
    try:
        sampler = samplers[inputs["sampler"]](seed=config.seed, **own)
    except ImportError as error:
        raise NotApplicable(f"Optuna's {inputs['sampler']} sampler: {error}", error.name) from None
    study = optuna.create_study(sampler=sampler)
    finals: list[tuple[float, float, Path]] = []
    for number in range(TRIALS):
        trial = study.ask()
        ratio = trial.suggest_float("ratio", RATIO_STEP, config.controller.high)
        out = folder / f"trial-{number}"
        final = finetune_at(config, merged, ratio, out, context=context, title=out.name)
        loss = read_json(final / STAGE_FILE)["best"]["loss"]
        study.tell(trial, loss if math.isfinite(loss) else None)
        finals.append((loss, ratio, final))
    _, ratio, best = min(finals, key=lambda one: one[0])
    price = _price(context, [final for _, _, final in finals], start)
    return outcome(context, best, folder) | {"ratio": ratio, "price": price}


@_or_not_applicable
def trained(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train a target adapter as a run without one does, whether or not one is given, and score it.

    Args:
        inputs: `config`.
        needed: nothing is read from it.
        folder: receives `final/` and `scores/`.
    """
    context = open_context(RunConfig(**inputs["config"]))
    final = train_adapter(context.config, "target", folder / "final", context=context)
    price = _price(context, [final], Start(None), section="train")
    return outcome(context, final, folder) | {"ratio": 0.0, "price": price}


@_or_not_applicable
def all_labels(
    inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Train a target adapter on train, dev and micro-dev rows, epochs chosen by cross-validation.

    Args:
        inputs: `config`.
        needed: nothing is read from it.
        folder: receives the folds, `final/` and `scores/`.
    """
    context = open_context(RunConfig(**inputs["config"]))
    parts = context.data.parts["target"]
    rows = [e for split in ("train", *JUDGED) for e in parts.get(split, ())]
    folds = folds_of(rows, FOLDS)
    if len(folds) < 2:
        raise NotApplicable("cross-validation needs labelled rows from at least 2 contexts")
    curves: dict[str, list[float]] = {}
    trained: list[Path] = []
    for number, held in enumerate(folds):
        kept = [e for fold in folds if fold is not held for e in fold]
        one = _on_rows(context, {"train": tuple(kept), "dev": tuple(held)}, patience=None)
        trained.append(train_adapter(one.config, "target", folder / f"fold-{number}", context=one))
        by_row = zip(*read_json(trained[-1] / STAGE_FILE)["rows"], strict=True)
        curves |= {row.id: list(curve) for row, curve in zip(held, by_row, strict=True)}
    means = [statistics.fmean(losses) for losses in zip(*curves.values(), strict=True)]
    epochs = min(range(1, len(means)), key=lambda epoch: means[epoch])
    judges = [row.id for split in JUDGED for row in parts.get(split, ())]
    judged = statistics.fmean(curves[name][epochs] for name in judges)
    whole = _on_rows(context, {"train": tuple(rows)}, patience=None, epochs=epochs)
    final = train_adapter(whole.config, "target", folder / "final", context=whole)
    price = _price(context, [*trained, final], Start(None), section="train", rows=len(rows))
    # Its labelled rows are all train rows: none is left that the adapter itself has not seen.
    found = outcome(context, final, folder, judged=False)
    return found | {"ratio": 0.0, "epochs": epochs, "cross_validated": judged, "price": price}


@_or_not_applicable
def adalora(inputs: Mapping[str, Any], needed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train an AdaLoRA adapter on the target rows; it is kept as a plain LoRA adapter.

    Args:
        inputs: `config`.
        needed: nothing is read from it.
        folder: receives `final/` and `scores/`. A run that was killed begins anew: PEFT's schedule
            of ranks is not part of a checkpoint.
    """
    config = RunConfig(**inputs["config"])
    if config.model.quantization != "none":
        raise NotApplicable("AdaLoRA is not run on a quantized backbone")
    context = open_context(config)
    final, key = folder / "final", stage_key(config, data=context.data.digest())
    if not stage_is_done(final, key, overwrite=False):
        _train_adalora(context, final, key)
    price = _price(context, [final], Start(None), section="train")
    return outcome(context, final, folder) | {"ratio": 0.0, "price": price}


def _train_adalora(context: Context, final: Path, key: Mapping[str, Any]) -> None:
    config, model = context.config, context.backbone.model
    spent = Spent()
    targets = resolve_targets(model, config.lora.target_modules)
    steps = run_steps(context, config.train, "target")
    try:
        live = attach_adalora(
            model,
            targets,
            config.lora.r,
            config.lora.alpha,
            config.lora.dropout,
            steps,
            config.seed,
        )
    except ValueError as error:
        raise NotApplicable(f"AdaLoRA: {error}") from None
    try:
        shutil.rmtree(work_folder(final), ignore_errors=True)
        result = fit(
            context,
            live,
            config.train,
            final,
            key,
            "AdaLoRA",
            extra=[AdaLoraCallback(live)],
            patience=config.train.patience,
        )
        plain = plain_lora_of(live)
    finally:
        live.model.unload()  # type: ignore[operator]
    save_plain(final, plain, context.backbone)
    finish_stage(final, key, {"seconds": spent.seconds} | result.facts())


def folds_of(rows: Sequence[Example], count: int) -> list[list[Example]]:
    """Return rows in folds of like size, whole groups only; at most a fold for each group."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    folds: list[list[Example]] = [[] for _ in range(min(count, len(groups)))]
    for group in sorted(groups, key=lambda name: (-len(groups[name]), name)):
        min(folds, key=len).extend(groups[group])
    return folds


def ratio_in(asked: Any, needed: Mapping[str, Any]) -> float:
    """Return a ratio: the number itself, or that of a needed run, shifted and cut to [0, 0.95]."""
    if isinstance(asked, Mapping):
        (found,) = _others(needed)
        return min(0.95, max(0.0, found["ratio"] + asked["shift"]))
    return float(asked)


def outcome(
    context: Context, adapter: Path | None, folder: Path, judged: bool = True
) -> dict[str, Any]:
    """Return how good an adapter is, on labelled rows and on the test sets; writes `scores/`.

    Args:
        context: data, backbone and settings.
        adapter: its folder, None for the bare backbone.
        folder: of the job.
        judged: False where its labelled rows were trained on.
    """
    sets: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    empty: dict[str, int] = {}
    if context.data.test_sets():
        scores = evaluate_adapter(context.config, adapter, folder / "scores", context=context)
        for name, one in read_json(scores / "scores.json")["sets"].items():
            values = one["scores"]
            empty[name] = one["empty"]
            sets[name] = {metric: value["value"] for metric, value in values.items()}
            intervals[name] = {m: (value["low"], value["high"]) for m, value in values.items()}
        rows = rows_of(scores, next(iter(sets.values())))
    about: Mapping[str, Any] = {}
    if adapter is not None and (adapter / STAGE_FILE).exists():
        about = read_json(adapter / STAGE_FILE)
    size = (adapter / "adapter_model.safetensors").stat().st_size if adapter is not None else 0
    return {
        "adapter": None if adapter is None else str(adapter),
        "best": about.get("best"),
        "dev": [(one["step"], one["loss"]) for one in about.get("evaluations", [])],
        "zeros": about.get("zeros", {}).get("exported"),
        "bytes": size,
        "dtype": str(context.backbone.dtype).removeprefix("torch."),
        "losses": _losses(context, adapter) if judged else None,
        "scores": sets,
        "intervals": intervals,
        "empty": empty,
        "rows": rows,
    }


def rows_of(scores: Path, metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return test set -> ids, groups and each row's own scores, from an evaluation's folder."""
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


def _losses(context: Context, adapter: Path | None) -> dict[str, list[float]]:
    def read(model: Any) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for split in JUDGED:
            rows = context.rows("target", [split])
            count = len(rows.encoded)
            found[split] = example_losses(model, rows.batches(range(count)), count) if count else []
        return found

    if adapter is None:
        return read(context.backbone.model)
    with context.live(read_start(adapter, context.backbone), "merged") as live:
        live.model.eval()
        return read(live.model)


def loss_jump(log: list[dict[str, Any]], committed: list[int], window: int = 4) -> float | None:
    """Return the mean rise of the training loss over commits, in nats; None without a commit.

    Each is the mean loss of `window` steps after the commit less that of as many up to it, so the
    usual fall of a training loss is part of it.

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


def _price(
    context: Context,
    stages: Sequence[Path],
    start: Start,
    forwards: int = 0,
    section: str = "finetune",
    rows: int | None = None,
) -> dict[str, float]:
    """Return what stages cost: runs, seconds, rows read without a gradient, steps, and tokens.

    Args:
        context: data and settings.
        stages: folders of training stages.
        start: where they began.
        forwards: rows read beside them.
        section: settings of the stages' batches.
        rows: training rows of a stage; None is the target train rows.
    """
    train = context.encoded("target", "train")
    settings = getattr(context.config, section)
    found = [read_json(stage / STAGE_FILE) for stage in stages]
    steps = sum(one["steps"] for one in found)
    measured = sum(len(one["evaluations"]) * len(one["best_rows"]) for one in found)
    count = len(train) if rows is None else rows
    batch = min(count, settings.batch_size * settings.accumulation)
    read = start.forwards + forwards + measured
    # A run that was begun anew on all labelled rows is two.
    again = [one["labelled"] for one in found if "labelled" in one]
    steps += sum(one["steps"] for one in again)
    return {
        "runs": len(found) + len(again),
        "seconds": start.seconds + sum(one["seconds"] for one in found),
        "forwards": read,
        "steps": steps,
        "tokens": round((steps * batch + read) * _length(context)),
    }


def _length(context: Context) -> float:
    """Return the mean length of the target train and dev rows, in tokens."""
    rows = [*context.encoded("target", "train"), *context.encoded("target", "dev")]
    return statistics.fmean(len(row.input_ids) for row in rows)


def _on_rows(
    context: Context,
    parts: dict[str, tuple[Example, ...]],
    patience: int | None,
    epochs: int | None = None,
) -> Context:
    """Return a context with other target rows; the test rows stay."""
    test = context.data.parts["target"].get("test", ())
    target = parts | ({"test": test} if test else {})
    data = replace(context.data, parts=context.data.parts | {"target": target})
    changes: dict[str, Any] = {"patience": patience} | ({"epochs": epochs} if epochs else {})
    section = context.config.train.model_copy(update=changes)
    config = context.config.model_copy(update={"train": section})
    return Context(config, data, context.backbone, context.task, context.narrator, context.clock)


def _seconds(stage: Path) -> float:
    return read_json(stage / STAGE_FILE)["seconds"]
