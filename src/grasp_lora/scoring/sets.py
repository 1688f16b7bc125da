"""Score the test sets of a run with intervals, and compare two evaluations of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lora.base.files import read_jsonl
from grasp_lora.base.texts import normal_form
from grasp_lora.config.run_config import RunConfig, section_of
from grasp_lora.metrics import METRICS, Options, Row, compare, missing, score
from grasp_lora.scoring.files import resampling_settings
from grasp_lora.tasks.base import task_named

# Left out of comparisons within a run, because its encoder would have to read all texts again.
_SLOW = ("bertscore_f1",)


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """Return the metrics of a run: those of the settings, else those of the task."""
    if config.evaluate.metrics is not None:
        return config.evaluate.metrics
    asked = ("bertscore_f1",) if config.evaluate.bertscore_model else ()
    return task_named(config.data.task).metrics + asked


def metric_options(
    config: RunConfig, language: str, tokenizer: str | None = None, device: str = "cpu"
) -> Options:
    """Return the scoring options of a test set in `language`."""
    given = config.evaluate
    return Options(
        task=config.data.task,
        language=language,
        rules=given.metric_rules,
        rouge=given.rouge,
        tokenizer=tokenizer,
        bertscore_model=given.bertscore_model,
        device=device,
        resamples=given.resamples,
        seed=config.seed,
    )


def missing_metrics(config: RunConfig) -> list[str]:
    """Return one message per metric and language that cannot be computed here."""
    names = metric_names(config)
    languages = dict.fromkeys(
        [config.data.target.language, *(s.language for s in config.data.tests.values())]
    )
    found: dict[str, None] = {}
    for language in languages:
        reasons = missing(names, metric_options(config, language))
        found |= {f"evaluate.metrics {name}: {reason}": None for name, reason in reasons.items()}
    return list(found)


def score_sets(
    config: RunConfig,
    sets: Mapping[str, tuple[str, str]],
    predictions: Mapping[str, Sequence[Row]],
    tokenizer: str,
    device: str,
) -> tuple[dict[str, Any], dict[str, dict[str, tuple[float, ...]]]]:
    """Return the scores of every test set; with several sets, also their mean and the worst set.

    Args:
        config: the run's settings.
        sets: name -> (role, split), as in `RunData.test_sets`.
        predictions: set name -> rows of predictions.
        tokenizer: name of the tokenizer of the losses.
        device: device for an encoder.

    Returns:
        The content of `scores.json`, and set name -> metric -> score per row.
    """
    names = metric_names(config)
    scored: dict[str, Any] = {}
    per_row: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, (role, split) in sets.items():
        language = section_of(config, role, split).language
        options = metric_options(config, language, tokenizer, device)
        found = score(predictions[name], names, options)
        how = resampling_settings(predictions[name], (), options)
        scored[name] = {
            "language": language,
            "n": len(predictions[name]),
            "empty": empty_answers(predictions[name]),
            "scores": {
                metric: one.to_json() | {"settings": one.settings | how}
                for metric, one in found.items()
            },
        }
        per_row[name] = {metric: one.per_row for metric, one in found.items()}
    return {"sets": scored} | _over_sets(scored, names), per_row


def _over_sets(scored: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if len(scored) < 2:
        return {}
    mean: dict[str, float] = {}
    worst: dict[str, Any] = {}
    for metric in names:
        values = {name: one["scores"][metric]["value"] for name, one in scored.items()}
        best_first = METRICS[metric].higher_is_better
        name = (min if best_first else max)(values, key=lambda key: values[key])
        mean[metric] = sum(values.values()) / len(values)
        worst[metric] = {"set": name, "value": values[name]}
    return {"mean": mean, "worst": worst}


def empty_answers(rows: Sequence[Row]) -> int:
    """Return the number of empty predictions, which every text score counts as 0."""
    return sum(not normal_form(row.prediction) for row in rows)


def rows_by_set(folder: Path) -> dict[str, list[Row]]:
    """Return set name -> rows of the `predictions.jsonl` of an evaluation."""
    found: dict[str, list[Row]] = {}
    for row in read_jsonl(folder / "predictions.jsonl"):
        found.setdefault(row["set"], []).append(
            Row(
                row["id"],
                row["prediction"],
                tuple(row["references"]),
                row["group"],
                row["loss"],
                row["tokens"],
            )
        )
    return found


def compare_evaluations(
    config: RunConfig, one: Path, other: Path, sets: Mapping[str, tuple[str, str]], tokenizer: str
) -> dict[str, Any]:
    """Return set name -> metric -> paired comparison of two evaluations, `one` less `other`."""
    ours, theirs = rows_by_set(one), rows_by_set(other)
    names = [name for name in metric_names(config) if name not in _SLOW]
    compared: dict[str, Any] = {}
    for name, (role, split) in sets.items():
        language = section_of(config, role, split).language
        options = metric_options(config, language, tokenizer)
        pairs = compare(ours[name], theirs[name], names, options)
        compared[name] = {metric: pair.to_json() for metric, pair in pairs.items()}
    return compared
