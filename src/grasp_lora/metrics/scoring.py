"""Compute scores with intervals, and compare two systems, for metrics named in the table."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from grasp_lora.base.words import shown
from grasp_lora.metrics.records import Measured, Options, Row
from grasp_lora.metrics.table import FAMILIES, METRICS


@dataclass(frozen=True)
class Score:
    """One metric over all rows, with its bootstrap interval."""

    value: float
    low: float | None
    """Lower end of the interval; None without an interval, as with fewer than two groups."""
    high: float | None
    """Upper end of the interval."""
    n: int
    """Number of rows scored."""
    settings: dict[str, Any]
    """Settings that reproduce the score."""
    per_row: tuple[float, ...]
    """Score of each row; the value of a corpus metric such as BLEU is not their mean."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields except the scores per row, as JSON values."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Comparison:
    """One metric of two systems A and B over the same rows."""

    a: float
    b: float
    difference: float
    """Score of A minus score of B."""
    low: float | None
    """Lower end of the interval of the difference; None without an interval."""
    high: float | None
    """Upper end of the interval."""
    p_value: float | None
    """Two-sided: probability that two equal systems differ at least this much; None if untested."""
    n: int
    """Number of rows scored."""
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)


def score(rows: Sequence[Row], names: Iterable[str], options: Options) -> dict[str, Score]:
    """Return metric name -> score with interval, in the order of the names.

    Predictions and references are scored in normal form, see `grasp_lora.base.texts.normal_form`.

    Raises:
        ValueError: there are no rows, two ids are equal, a row has no reference, a name is unknown,
            or a metric cannot be measured here or on these rows.
    """
    names = _known(names)
    rows = _checked_rows(rows)
    found = {}
    for name, measured in _measure(rows, names, options).items():
        low, high = _interval(rows, measured, options) or (None, None)
        found[name] = Score(
            value=float(measured.value(measured.statistics.sum(axis=0))),
            low=low,
            high=high,
            n=len(rows),
            settings=measured.settings,
            per_row=tuple(map(float, measured.per_row)),
        )
    return {name: found[name] for name in names}


def missing(names: Iterable[str], options: Options) -> dict[str, str]:
    """Return metric name -> reason and remedy, for the named metrics that cannot be measured here.

    Raises:
        ValueError: a name is unknown.
    """
    reasons = {name: METRICS[name].missing(options) for name in _known(names)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], names: Iterable[str], options: Options
) -> dict[str, Comparison]:
    """Return metric name -> comparison of system A with system B on the same rows.

    Args:
        rows_a: predictions of A; its groups are resampled.
        rows_b: predictions of B for the same ids, in any order, with the same references.
        names: metrics to compare.
        options: settings of the scores, the same for both systems.

    Raises:
        ValueError: as `score`, or ids or references differ.
    """
    from grasp_lora.metrics.intervals import paired_difference  # scipy takes half a second to load

    names = _known(names)
    rows_a = _checked_rows(rows_a)
    rows_b = _aligned(rows_a, rows_b)
    measured_b = _measure(rows_b, names, options)
    found = {}
    for name, a in _measure(rows_a, names, options).items():
        b = measured_b[name]
        apart = paired_difference(
            a.statistics,
            b.statistics,
            [row.group for row in rows_a],
            a.value,
            resamples=options.resamples,
            confidence=options.confidence,
            seed=options.seed,
        )
        found[name] = Comparison(
            a=float(a.value(a.statistics.sum(axis=0))),
            b=float(b.value(b.statistics.sum(axis=0))),
            difference=apart.difference,
            low=apart.low,
            high=apart.high,
            p_value=apart.p_value,
            n=len(rows_a),
            settings=a.settings,
        )
    return {name: found[name] for name in names}


def compare_means(
    values_a: Sequence[float],
    values_b: Sequence[float],
    groups: Sequence[str],
    options: Options,
) -> dict[str, float | None]:
    """Return the difference of the means of A and B, with the rows of a group drawn together.

    Args:
        values_a: score of each row under A.
        values_b: score of each row under B, in the same order.
        groups: group of each row, such as its context.
        options: resamples, confidence and seed of the interval and of the test.

    Returns:
        `difference` (A - B), the ends `low` and `high` of its bootstrap interval, and `p_value`.

    Raises:
        ValueError: as `intervals.paired_difference`.
    """
    import numpy as np

    from grasp_lora.metrics.intervals import paired_difference  # scipy takes half a second to load

    sums_a, sums_b = (
        np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)
        for values in (values_a, values_b)
    )
    found = paired_difference(
        sums_a,
        sums_b,
        groups,
        lambda sums: sums[..., 0] / sums[..., 1],
        resamples=options.resamples,
        confidence=options.confidence,
        seed=options.seed,
    )
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
    }


def _known(names: Iterable[str]) -> list[str]:
    # A single text is a sequence of letters, and each letter would count as a name.
    listed = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in listed:
        if name not in METRICS:
            close = get_close_matches(name, METRICS, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"unknown metric {shown(name)}; {hint}known: {', '.join(METRICS)}")
    return listed


def _checked_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in normal form."""
    if not rows:
        raise ValueError("there are no rows to score; give at least one")
    for row in rows:
        if isinstance(row.references, str) or not row.references:
            raise ValueError(
                f"row {shown(row.id)} has the references {shown(row.references)}; "
                "give a tuple of at least one text"
            )
    normal = [row.normal() for row in rows]
    seen = set()
    for row in normal:
        if row.id in seen:
            raise ValueError(f"two rows have the id {shown(row.id)}; give each row a different id")
        seen.add(row.id)
    return normal


def _aligned(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[Row]:
    """Return the rows of B in normal form, in the order of A."""
    by_id = {row.id: row for row in _checked_rows(rows_b)}
    ids_a = {row.id for row in rows_a}
    only = [("A", row.id) for row in rows_a if row.id not in by_id]
    only += [("B", name) for name in by_id if name not in ids_a]
    if only:
        system, first = only[0]
        raise ValueError(
            f"row {shown(first)} is only in system {system} ({len(only)} rows are in one system "
            "only); compare two systems on the same rows"
        )
    for row in rows_a:
        if row.references != by_id[row.id].references:
            raise ValueError(
                f"row {shown(row.id)} has different references in systems A and B; "
                "score both systems against the same references"
            )
    return [by_id[row.id] for row in rows_a]


def _measure(rows: Sequence[Row], names: list[str], options: Options) -> dict[str, Measured]:
    """Return metric name -> measured metric; each family is measured once."""
    reasons = missing(names, options)
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"{name} cannot be computed: {reason}")
    found = {}
    for family in FAMILIES:
        wanted = [name for name in family.names if name in names]
        if wanted:
            measured = family.measure(rows, options)
            found |= {name: measured[name] for name in wanted}
    return found


def _interval(
    rows: Sequence[Row], measured: Measured, options: Options
) -> tuple[float, float] | None:
    from grasp_lora.metrics.intervals import interval  # scipy takes half a second to load

    return interval(
        measured.statistics,
        [row.group for row in rows],
        measured.value,
        resamples=options.resamples,
        confidence=options.confidence,
        seed=options.seed,
    )
