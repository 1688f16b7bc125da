"""Score the prediction file of any system, or compare the files of two systems.

The rows, the metrics and the output path are all checked before anything is scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grasp_lora.base.files import protect, touch, write_json
from grasp_lora.base.texts import NORMAL_FORM
from grasp_lora.base.words import shown
from grasp_lora.metrics.answers import OF_MLQA
from grasp_lora.metrics.records import Options, Row, check_resampling
from grasp_lora.metrics.scoring import compare, missing, score
from grasp_lora.metrics.segment import unspaced_language
from grasp_lora.metrics.table import METRICS
from grasp_lora.scoring.predictions import Predictions, matched_rows, read_predictions

Result = dict[str, dict[str, Any]]
"""Name of a metric -> its entry in the result file."""

UNKNOWN = "und"
"""Language code of answers whose language is not given."""
_LIKELIHOOD = ("loss", "perplexity")
# Metric -> options that ask for the metric when a user changes them.
_CHOOSING = {
    "bertscore_f1": ("bertscore_model", "bertscore_layer", "bertscore_rescale"),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), ("rouge",)),
    **dict.fromkeys(("exact_match", "token_f1"), ("rules",)),
}
_NO_SCORE: dict[str, None] = dict.fromkeys(("value", "low", "high"))
_NO_COMPARISON: dict[str, None] = dict.fromkeys(("a", "b", "difference", "low", "high", "p_value"))


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a prediction file, in the normal form in which they are compared.

    Args:
        path: JSON lines, UTF-8. Each row has `id`, `prediction` and `references` (a list of
            texts, or one text, which may also be called `reference`). It may have `group` or
            `context_id` (rows of one group are resampled together), `loss` (mean nats per answer
            token), `tokens` (number of answer tokens of the loss) and `set` (ids are unique within
            a set). Other keys are ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, has no row, or a row is wrong; the message has file and
            line.
    """
    return list(read_predictions(Path(path)).rows)


def score_file(
    path: str | Path,
    options: Options,
    names: Sequence[str] | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Result:
    """Return the scores of a prediction file, and write them if `out` is given.

    Args:
        path: prediction file, see `read_rows`.
        options: settings of the scores; with the language "und", the script of the references
            decides the language.
        names: metrics to compute. None takes all metrics; loss and perplexity only if a row has
            both `loss` and `tokens`. With None, a metric that cannot be computed here is null, with
            the reason under settings["missing"], unless `options` ask for it. A named metric that
            cannot be computed is an error.
        out: JSON file for the result; None writes nothing.
        overwrite: whether to replace an existing `out`.

    Returns:
        Metric -> value, low, high, n, settings; the settings include the resampling.

    Raises:
        FileNotFoundError: as `read_rows`.
        ValueError: as `read_rows`; a metric is unknown or cannot be computed; `out` exists or
            cannot be written.
    """
    path = Path(path)
    _check_out(out, overwrite, [path])
    read = read_predictions(path)
    options = _with_language(read.rows, options)
    wanted, reasons = _choose_metrics([read], names, options)
    how = resampling_settings(read.rows, read.sets, options)
    computed = {
        name: found.to_json() | {"settings": {**found.settings, **how}}
        for name, found in score(read.rows, _computable(wanted, reasons), options).items()
    }
    absent = _null_entries(reasons, _NO_SCORE, len(read.rows))
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
    """Return the comparison of two prediction files with the same ids, and write it to `out`.

    Args:
        path_a: predictions of system A, see `read_rows`.
        path_b: predictions of system B, in any order; only one of the files needs groups.
        options: as in `score_file`, like all other arguments.

    Returns:
        Metric -> a, b, difference (a - b) with low and high, p_value, n, settings.

    Raises:
        FileNotFoundError: as `read_rows`.
        ValueError: as `score_file`; ids, references or groups of the two files differ.
    """
    path_a, path_b = Path(path_a), Path(path_b)
    _check_out(out, overwrite, [path_a, path_b])
    a, b = read_predictions(path_a), read_predictions(path_b)
    rows_a, rows_b = matched_rows(a, b)
    options = _with_language(rows_a, options)
    wanted, reasons = _choose_metrics([a, b], names, options)
    reasons |= _tokenizer_mismatch(rows_a, rows_b, wanted, names)
    how = resampling_settings(rows_a, a.sets, options)
    computed = {
        name: {key: getattr(found, key) for key in (*_NO_COMPARISON, "n")}
        | {"settings": {**found.settings, **how}}
        for name, found in compare(rows_a, rows_b, _computable(wanted, reasons), options).items()
    }
    absent = _null_entries(reasons, _NO_COMPARISON, len(rows_a))
    result = {name: (computed | absent)[name] for name in wanted}
    if out is not None:
        write_json(out, result)
    return result


def _choose_metrics(
    files: Sequence[Predictions], names: Sequence[str] | None, options: Options
) -> tuple[list[str], dict[str, str]]:
    """Return the metrics of the result, and metric -> reason for those that cannot be computed."""
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
        if names is not None or _chosen_by_options(name, options):
            raise ValueError(f"{name} cannot be computed: {reason}")
    if bare and not set(_LIKELIHOOD).isdisjoint(wanted):
        found = [name for name in _LIKELIHOOD if name in wanted]
        lack = f"{len(bare)} rows lack a loss or its tokens, first {shown(bare[0].id)}"
        if names is not None:
            raise ValueError(
                f"{' and '.join(found)} cannot be computed: {lack}; add both to every row, or "
                "leave out the metric"
            )
        reasons |= dict.fromkeys(found, lack)
    return wanted, reasons


def _tokenizer_mismatch(
    rows_a: Sequence[Row], rows_b: Sequence[Row], wanted: Sequence[str], names: Sequence[str] | None
) -> dict[str, str]:
    """Return metric -> reason for losses of different tokenizers, which cannot be compared.

    Raises:
        ValueError: `names` asks for such a metric.
    """
    pairs = zip(rows_a, rows_b, strict=True)
    row = next((one for one, other in pairs if one.tokens != other.tokens), None)
    found = [name for name in _LIKELIHOOD if name in wanted]
    if row is None or not found:
        return {}
    reason = (
        f"the two systems split the answer of row {shown(row.id)} into different numbers of "
        "tokens, and losses of different tokenizers cannot be compared"
    )
    if names is not None:
        raise ValueError(f"{found[0]} cannot be compared: {reason}; leave out the metric")
    return dict.fromkeys(found, reason)


def _with_language(rows: Sequence[Row], options: Options) -> Options:
    """Return the options with the given language, or the language of the references' script.

    Scripts with spaces between words are scored alike in all languages, so the language stays
    "und".

    Raises:
        ValueError: an option depends on the language but none is given, or the references are in
            several scripts without spaces.
    """
    if options.language != UNKNOWN:
        return options
    dependent = {"rules": options.rules in OF_MLQA, "rouge": options.rouge != Options().rouge}
    chosen = [name for name, depends in dependent.items() if depends]
    if chosen:
        raise ValueError(f"--{chosen[0]} depends on the language; give it with --language")
    found = {unspaced_language(text) for row in rows for text in row.references} - {None}
    if found == {"ja", "zh"}:  # a Japanese answer may consist of Han alone
        found = {"ja"}
    if len(found) > 1:
        raise ValueError(
            f"the references are in the scripts of {', '.join(sorted(map(str, found)))}, which "
            "have different scoring rules; score each language in its own file, with --language"
        )
    return replace(options, language=found.pop() or UNKNOWN) if found else options


def _chosen_by_options(name: str, options: Options) -> bool:
    plain = Options()
    return any(getattr(options, key) != getattr(plain, key) for key in _CHOOSING.get(name, ()))


def resampling_settings(
    rows: Sequence[Row], sets: Sequence[str], options: Options
) -> dict[str, Any]:
    """Return the settings of intervals and tests over these rows, for the record."""
    groups = len({row.group for row in rows})
    how: dict[str, Any] = {
        "resampled_by": "group" if groups < len(rows) else "row",
        "groups": groups,
        "resamples": options.resamples,
        "confidence": options.confidence,
        "seed": options.seed,
        "task": options.task,
        "scored_as": options.language,
        "texts": NORMAL_FORM,
    }
    return how | ({"sets": list(sets)} if len(sets) > 1 else {})


def _computable(wanted: Sequence[str], reasons: Mapping[str, str]) -> list[str]:
    return [name for name in wanted if name not in reasons]


def _null_entries(reasons: Mapping[str, str], empty: Mapping[str, None], n: int) -> Result:
    return {
        name: {**empty, "n": n, "settings": {"missing": reason}} for name, reason in reasons.items()
    }


def _check_out(out: Path | None, overwrite: bool, read: Sequence[Path]) -> None:
    if out is None:
        return
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a JSON file to write")
    protect(read, [out])
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; name another file to write, or pass --overwrite")
    touch(out)
