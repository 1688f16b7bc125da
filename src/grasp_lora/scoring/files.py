"""Predictions of any system in a file -> scores with intervals, or two systems compared.

Nothing is block_importance before everything that can be refused was looked at: the rows, the metrics and
the place of the result.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grasp_lora.base.files import write_json
from grasp_lora.metrics.intervals import check_resampling
from grasp_lora.metrics.records import Options, Row
from grasp_lora.metrics.scoring import compare, missing, score
from grasp_lora.metrics.segment import unspaced_language
from grasp_lora.metrics.table import METRICS
from grasp_lora.scoring.predictions import Predictions, matched, read_predictions

Result = dict[str, dict[str, Any]]
"""Name of a metric -> what is written about it."""

UNKNOWN = "und"
"""Language code of answers nobody named a language for."""
_LIKELIHOOD = ("loss", "perplexity")
# Metric -> the options by which a user asks for it.
_CHOOSING = {
    "bertscore_f1": ("bertscore_model", "bertscore_layer", "bertscore_rescale"),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), ("rouge",)),
    **dict.fromkeys(("exact_match", "token_f1"), ("rules",)),
}
_NO_SCORE: dict[str, None] = dict.fromkeys(("value", "low", "high"))
_NO_COMPARISON: dict[str, None] = dict.fromkeys(("a", "b", "difference", "low", "high", "p_value"))


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a prediction file.

    Args:
        path: JSON lines, UTF-8. Each row has `id`, `prediction` and `references` (a list of
            texts, or one text as `reference`); it may have `group` or `context_id` (rows of one
            group are resampled together), `loss` (mean nats per answer token), `tokens` (answer
            tokens behind the loss) and `set` (ids are unique within one). Other keys are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, holds no row, or a row is wrong; names file and line.
    """
    return list(read_predictions(Path(path)).rows)


def score_file(
    path: str | Path,
    options: Options,
    names: Sequence[str] | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Result:
    """Score a prediction file.

    Args:
        path: the predictions, see `read_rows`.
        options: what the scores depend on besides the rows; the language "und" stands for the
            one that the references' script tells.
        names: metrics; None takes all, loss and perplexity only where there is a row with both
            `loss` and `tokens`. A metric that cannot be computed here is then null with the reason
            under settings["missing"], unless `options` choose it; asked for, it is an error.
        out: JSON file to write the result to; None writes nothing.
        overwrite: replace `out`.

    Returns:
        Metric -> value, low, high, n, settings; the settings say what was resampled.

    Raises:
        FileNotFoundError: as `read_rows`.
        ValueError: as `read_rows`; for an unknown metric or one that cannot be computed; if `out`
            exists or cannot be written.
    """
    path = Path(path)
    _check_out(out, overwrite, [path])
    read = read_predictions(path)
    options = _with_language(read.rows, options)
    wanted, reasons = _plan([read], names, options)
    how = resampling(read.rows, read.sets, options)
    computed = {
        name: found.to_json() | {"settings": {**found.settings, **how}}
        for name, found in score(read.rows, _computable(wanted, reasons), options).items()
    }
    absent = _absent(reasons, _NO_SCORE, len(read.rows))
    result = {name: (computed | absent)[name] for name in wanted}
    if out is not None:
        write_json(out, result)
    return result


def compare_files(
    path_a: str | Path,
    path_b: str | Path,
    options: Options,
    names: Sequence[str] | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Result:
    """Compare two systems' predictions for the same rows, matched by id.

    Args:
        path_a: predictions of system A, see `read_rows`.
        path_b: those of system B, in any order; groups may stand in one of the files only.
        options: as `score_file`, also for the other arguments.

    Returns:
        Metric -> a, b, difference (a - b) with low and high, p_value, n, settings.

    Raises:
        FileNotFoundError: as `read_rows`.
        ValueError: as `score_file`; if ids, references or groups of the two files differ.
    """
    path_a, path_b = Path(path_a), Path(path_b)
    _check_out(out, overwrite, [path_a, path_b])
    a, b = read_predictions(path_a), read_predictions(path_b)
    rows_a, rows_b = matched(a, b)
    options = _with_language(rows_a, options)
    wanted, reasons = _plan([a, b], names, options)
    reasons |= _other_tokens(rows_a, rows_b, wanted, names)
    how = resampling(rows_a, a.sets, options)
    computed = {
        name: {key: getattr(found, key) for key in (*_NO_COMPARISON, "n")}
        | {"settings": {**found.settings, **how}}
        for name, found in compare(rows_a, rows_b, _computable(wanted, reasons), options).items()
    }
    absent = _absent(reasons, _NO_COMPARISON, len(rows_a))
    result = {name: (computed | absent)[name] for name in wanted}
    if out is not None:
        write_json(out, result)
    return result


def _plan(
    files: Sequence[Predictions], names: Sequence[str] | None, options: Options
) -> tuple[list[str], dict[str, str]]:
    """Return the metrics of the result, and which of them cannot be computed, with the reason."""
    check_resampling(options.resamples, options.confidence)
    bare = [row for file in files for row in file.rows if row.loss is None or row.tokens is None]
    total = sum(len(file.rows) for file in files)
    if names is None:
        none_has = len(bare) == total
        wanted = [name for name in METRICS if not none_has or name not in _LIKELIHOOD]
    else:
        wanted = list(dict.fromkeys(names))
    if not wanted:
        raise ValueError(f"no metric to compute; choose from: {', '.join(METRICS)}")
    reasons = missing(wanted, options)
    for name, reason in reasons.items():
        if names is not None or _chosen(name, options):
            raise ValueError(f"{name} cannot be computed: {reason}")
    if bare and not set(_LIKELIHOOD).isdisjoint(wanted):
        found = [name for name in _LIKELIHOOD if name in wanted]
        lack = f"{len(bare)} rows lack a loss or its tokens, first {bare[0].id!r}"
        if names is not None:
            raise ValueError(
                f"{' and '.join(found)} cannot be computed: {lack}; add both to every row, or "
                "leave the metric out"
            )
        reasons |= dict.fromkeys(found, lack)
    return wanted, reasons


def _other_tokens(
    rows_a: Sequence[Row], rows_b: Sequence[Row], wanted: Sequence[str], names: Sequence[str] | None
) -> dict[str, str]:
    """Return why losses cannot be compared: the answers are cut into other tokens.

    Raises:
        ValueError: a loss was asked for by name all the same.
    """
    pairs = zip(rows_a, rows_b, strict=True)
    row = next((one for one, other in pairs if one.tokens != other.tokens), None)
    found = [name for name in _LIKELIHOOD if name in wanted]
    if row is None or not found:
        return {}
    reason = (
        f"the two systems cut the answer of row {row.id!r} into different numbers of tokens, and "
        "losses of different tokenizers cannot be compared"
    )
    if names is not None:
        raise ValueError(f"{found[0]} cannot be compared: {reason}; leave it out")
    return dict.fromkeys(found, reason)


def _with_language(rows: Sequence[Row], options: Options) -> Options:
    """Return the options with a language: the one given, or the one the references' script tells.

    Scripts that part words by spaces are block_importance alike in all languages; there it stays unknown.

    Raises:
        ValueError: an option goes by language and none is given, or the scripts tell several.
    """
    if options.language != UNKNOWN:
        return options
    chosen = [key for key in ("rules", "rouge") if getattr(options, key) != getattr(Options(), key)]
    if chosen:
        raise ValueError(f"--{chosen[0]} goes by language; give the answers' with --language")
    found = {unspaced_language(text) for row in rows for text in row.references} - {None}
    if found == {"ja", "zh"}:  # a Japanese answer may be of Han alone
        found = {"ja"}
    if len(found) > 1:
        raise ValueError(
            f"the references are in the scripts of {', '.join(sorted(map(str, found)))}, which are "
            "block_importance by rules of their own; score each language apart, with --language"
        )
    return replace(options, language=found.pop() or UNKNOWN) if found else options


def _chosen(name: str, options: Options) -> bool:
    plain = Options()
    return any(getattr(options, key) != getattr(plain, key) for key in _CHOOSING.get(name, ()))


def resampling(rows: Sequence[Row], sets: Sequence[str], options: Options) -> dict[str, Any]:
    """Return how intervals and tests over these rows come about, for the record."""
    groups = len({row.group for row in rows})
    how: dict[str, Any] = {
        "resampled_by": "group" if groups < len(rows) else "row",
        "groups": groups,
        "resamples": options.resamples,
        "confidence": options.confidence,
        "seed": options.seed,
        "task": options.task,
        "scored_as": options.language,
    }
    return how | ({"sets": list(sets)} if len(sets) > 1 else {})


def _computable(wanted: Sequence[str], reasons: Mapping[str, str]) -> list[str]:
    return [name for name in wanted if name not in reasons]


def _absent(reasons: Mapping[str, str], empty: Mapping[str, None], n: int) -> Result:
    return {
        name: {**empty, "n": n, "settings": {"missing": reason}} for name, reason in reasons.items()
    }


def _check_out(out: Path | None, overwrite: bool, read: Sequence[Path]) -> None:
    if out is None:
        return
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a JSON file to write")
    if out.resolve() in [path.resolve() for path in read]:
        raise ValueError(f"{out} is a file of predictions; name another file to write")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; name another file to write, or pass --overwrite")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{out} cannot be written, {folder} takes no files; name another place")
