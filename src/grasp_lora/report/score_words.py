"""What `grasp-lora score` found, for people: a table, sentences, and what to know about them."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from grasp_lora.metrics.table import METRICS
from grasp_lora.scoring.files import UNKNOWN, Result


def score_table(result: Result) -> Table:
    """The result of `score_file` as a table for the terminal."""
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
            ends = _ends(name, entry) or "none"
            table.add_row(name, _shown(name, entry["value"]), ends, str(entry["n"]))
    return table


def result_notes(result: Result) -> list[str]:
    """Return what a reader of the result should know: what is missing, what was resampled."""
    reasons: dict[str, list[str]] = {}
    for name, entry in result.items():
        if "missing" in entry["settings"]:
            reasons.setdefault(entry["settings"]["missing"], []).append(name)
    notes = [f"{', '.join(names)} not computed: {reason}" for reason, names in reasons.items()]
    how = next((e["settings"] for e in result.values() if "resampled_by" in e["settings"]), None)
    if how is None or not how["resamples"]:
        return notes
    if how["scored_as"] == UNKNOWN:
        notes.append("no language was given: scored by the rules of scripts with spaces")
    if how["resampled_by"] == "row":
        notes.append(
            "every row was resampled by itself; where rows share a context or document, "
            'give them the same "group", or the intervals are too narrow'
        )
    elif how["groups"] < 20:
        notes.append(
            f"only {how['groups']} groups: the intervals are too narrow, read them loosely"
        )
    if "sets" in how:
        notes.append(f"the sets {', '.join(how['sets'])} were scored together as one")
    return notes


def comparison_lines(result: Result) -> list[str]:
    """Return one plain sentence for each metric of `compare_files`, then how to read them.

    Two systems count as told apart where the p-value is at most 1 - confidence.
    """
    tested = {name: entry for name, entry in result.items() if entry["a"] is not None}
    lines = [_comparison_line(name, entry) for name, entry in tested.items()]
    if sum(entry["p_value"] is not None for entry in tested.values()) > 1:
        share = 1 - next(iter(tested.values()))["settings"]["confidence"]
        lines.append(
            f"Each metric is tested by itself: of tests between systems that are alike, about "
            f"{100 * share:.3g} in 100 tell them apart."
        )
    return lines


def _comparison_line(name: str, entry: Mapping[str, Any]) -> str:
    said = (
        f"{name}: A {_shown(name, entry['a'])}, B {_shown(name, entry['b'])}, "
        f"difference {_shown(name, entry['difference'])}"
    )
    ends, p, n = _ends(name, entry), entry["p_value"], entry["n"]
    said += f" {ends}" if ends else ""
    if p is None:
        return f"{said}: not tested"
    rows = "this 1 row" if n == 1 else f"these {n} rows"
    if p > 1 - entry["settings"]["confidence"] + 1e-12:
        outcome = f"not told apart on {rows}"
    else:
        a_is_better = (entry["difference"] > 0) == METRICS[name].higher_is_better
        outcome = f"{'A' if a_is_better else 'B'} is better on {rows}"
    return f"{said}, p {p:.{2 if p >= 0.1 else 4 if p < 0.001 else 3}f}: {outcome}"


def _ends(name: str, entry: Mapping[str, Any]) -> str:
    if entry["low"] is None:
        return ""
    return f"[{_shown(name, entry['low'])}, {_shown(name, entry['high'])}]"


def _shown(name: str, number: float) -> str:
    if name == "perplexity":
        return f"{number:.4g}"
    digits = 3 if name == "loss" else 1
    return f"{round(number, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0
