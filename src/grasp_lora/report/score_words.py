"""Present the result of `grasp-lora score` to people: a table, sentences and notes."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from grasp_lora.metrics.table import METRICS
from grasp_lora.scoring.files import UNKNOWN, Result


def score_table(result: Result) -> Table:
    """Return the result of `score_file` as a terminal table."""
    computed = [entry["settings"] for entry in result.values() if entry["value"] is not None]
    level = f"{100 * computed[0]['confidence']:g} % " if computed else ""
    table = Table()
    table.add_column("metric")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column(f"{level}interval", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    for name, entry in result.items():
        if entry["value"] is None:
            table.add_row(name, "not computed", "", str(entry["n"]))
        else:
            ends = _interval_text(name, entry) or "none"
            table.add_row(name, _format_value(name, entry["value"]), ends, str(entry["n"]))
    return table


def result_notes(result: Result) -> list[str]:
    """Return notes for the reader of a result: missing metrics, resampling, language."""
    reasons: dict[str, list[str]] = {}
    for name, entry in result.items():
        if "missing" in entry["settings"]:
            reasons.setdefault(entry["settings"]["missing"], []).append(name)
    notes = [f"{', '.join(names)} not computed: {reason}" for reason, names in reasons.items()]
    how = next((e["settings"] for e in result.values() if "resampled_by" in e["settings"]), None)
    if how is None or not how["resamples"]:
        return notes
    if how["scored_as"] == UNKNOWN:
        notes.append(
            "no language was given: scored by the rules for scripts with spaces between words"
        )
    if how["resampled_by"] == "row":
        notes.append(
            "every row was resampled separately; if rows share a context or document, "
            'give them the same "group", or the intervals are too narrow'
        )
    elif how["groups"] < 20:
        notes.append(f"only {how['groups']} groups: the intervals are narrower than they claim")
    if "sets" in how:
        notes.append(f"the sets {', '.join(how['sets'])} were scored together as one")
    return notes


def comparison_lines(result: Result) -> list[str]:
    """Return one sentence for each metric of `compare_files`, then a note about several tests.

    The difference is significant if the p-value is at most 1 - confidence.
    """
    tested = {name: entry for name, entry in result.items() if entry["a"] is not None}
    lines = [_comparison_line(name, entry) for name, entry in tested.items()]
    if sum(entry["p_value"] is not None for entry in tested.values()) > 1:
        share = 1 - next(iter(tested.values()))["settings"]["confidence"]
        lines.append(
            f"Each metric is tested separately: about {100 * share:.3g} in 100 tests of equal "
            "systems are significant."
        )
    return lines


def _comparison_line(name: str, entry: Mapping[str, Any]) -> str:
    sentence = (
        f"{name}: A {_format_value(name, entry['a'])}, B {_format_value(name, entry['b'])}, "
        f"difference {_format_value(name, entry['difference'])}"
    )
    ends, p, n = _interval_text(name, entry), entry["p_value"], entry["n"]
    sentence += f" {ends}" if ends else ""
    if p is None:
        return f"{sentence}: not tested"
    rows = "this 1 row" if n == 1 else f"these {n} rows"
    if p > 1 - entry["settings"]["confidence"] + 1e-12:
        outcome = f"no significant difference on {rows}"
    else:
        a_is_better = (entry["difference"] > 0) == METRICS[name].higher_is_better
        outcome = f"{'A' if a_is_better else 'B'} is better on {rows}"
    return f"{sentence}, p {p:.{2 if p >= 0.1 else 4 if p < 0.001 else 3}f}: {outcome}"


def _interval_text(name: str, entry: Mapping[str, Any]) -> str:
    if entry["low"] is None:
        return ""
    return f"[{_format_value(name, entry['low'])}, {_format_value(name, entry['high'])}]"


def _format_value(name: str, number: float) -> str:
    if name == "perplexity":
        return f"{number:.4g}"
    digits = 3 if name == "loss" else 1
    return f"{round(number, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0
