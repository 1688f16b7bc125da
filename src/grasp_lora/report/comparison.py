"""Present a comparison of methods to people: scores and prices of every method, over all seeds.

This module reads `comparison.json` and computes only means, standard deviations and quotients.
"""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.base.files import machine_names
from grasp_lora.base.words import in_markdown
from grasp_lora.report.run import HEADLINES, NATIVE, NO_VALUE, TITLES, narrow_table

ORACLE = "grid, chosen by the test rows"
PLAIN_RUN = "average-finetuned"
"""The plain run: one fine-tuning of a merge and nothing else, the unit of all prices."""
FIELDS = (
    *("pair", "task", "method", "seed", "ratio", "test", "metric", "value", "low", "high"),
    *("dev_loss", "runs"),
    *("seconds", "forwards", "steps", "tokens", "peak_memory_bytes", "adapter_bytes"),
)


def comparison_csv(found: Mapping[str, Any]) -> str:
    """Return a CSV text with one line for every run, test set and metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in found["rows"]:
        shared = {name: row[name] for name in FIELDS if name in row}
        shared |= {"pair": found["pair"], "task": found["task"]}
        for test, values in row["scores"].items():
            for metric, value in values.items():
                low, high = row["intervals"][test][metric]
                one = {"test": test, "metric": metric, "value": value, "low": low, "high": high}
                writer.writerow(shared | one)
    return text.getvalue()


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """Return the comparison as a Markdown document: scores and paired tests, then prices."""
    reference = found["reference"]
    lines = [f"# Comparison {in_markdown(found['pair'])}", ""]
    if reference:
        lines += [
            f"The best simple baseline by dev loss is `{reference}`: "
            f"{found['methods'][reference]}. Differences to it are paired, with 95 % bootstrap "
            "intervals over contexts; the examples of all seeds are tested together. They are "
            "differences of means over examples, also for chrF. A loss difference below 0 is "
            "better.",
            "",
        ]
    for test in _test_sets(found):
        lines += [
            f"## Scores, {in_markdown(test)}",
            "",
            *_markdown_lines(*score_rows(found, test)),
            "",
        ]
        lines += empty_answers_note(found, test)
    lines += [*still_falling_note(found), "## Price", "", *_markdown_lines(*price_rows(found)), ""]
    lines += [
        "Seconds are the time of a method from the two adapters to its final adapter, with all "
        "choices (a run at the ratio of another run is charged for itself alone). The grid is "
        "trained by the same code. Forwards are examples read without a gradient; reading the "
        "train examples for the input norms of the importance does not count. A plain "
        f"run is `{PLAIN_RUN}`. With runs of equal length, a method of two runs is at most 4 times "
        "as fast as a grid of 8.",
        "",
        *several_machines_note(found),
        "![score against cost](pareto.png)",
        "",
        "![score against ratio](ratios.png)",
        "",
        "![cost of every method](cost.png)",
        "",
        "Methods:",
        "",
        *(f"- `{name}`: {about}" for name, about in found["methods"].items()),
        "",
    ]
    for title, names in (
        ("Not applicable here", found["not_applicable"]),
        ("Without a result", found["failed"]),
        ("Chosen among fewer runs, without those that have no finite loss", _fewer(found)),
    ):
        if names:
            whys = (f"- `{name}`: {in_markdown(why)}" for name, why in names.items())
            lines += [f"{title}:", "", *whys, ""]
    return "\n".join(lines)


def _fewer(found: Mapping[str, Any]) -> dict[str, str]:
    """Return method and seed -> the runs that its choice had to do without."""
    return {
        f"{row['method']}-s{row['seed']}": ", ".join(row["left_out"])
        for row in found["rows"]
        if row.get("left_out")
    }


def empty_answers_note(found: Mapping[str, Any], test: str) -> list[str]:
    """Return the paragraph about methods that often give empty answers; empty if there are none."""
    shares: Mapping[str, float] = found.get("often_empty", {}).get(test, {})
    shown = [
        f"`{name}` {100 * shares[name]:.0f}" for name in shown_methods(found) if name in shares
    ]
    if not shown:
        return []
    return [
        "Empty answers, in per cent, of methods that often give them. Every text score counts "
        "them as 0, and the loss does not show them (`evaluate.min_new_tokens: 1` requires "
        f"a token): {', '.join(shown)}.",
        "",
    ]


def still_falling_note(found: Mapping[str, Any]) -> list[str]:
    """Return the paragraph about methods whose dev loss was still falling; empty if none was."""
    names: list[str] = []
    for method, runs in shown_methods(found).items():
        falling = sum(bool(run.get("still_falling") and run["steps"]) for run in runs)
        if falling:
            names.append(f"`{method}` ({falling} of {len(runs)})")
    if not names:
        return []
    return [
        "Runs whose dev loss was lowest in their last epoch, per method. More epochs or a larger "
        "learning rate may improve them: "
        f"{', '.join(names)}.",
        "",
    ]


def comparison_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the scores and prices as terminal tables."""
    tables: list[Table] = []
    for test in _test_sets(found):
        titles, rows = score_rows(found, test)
        wanted = dict.fromkeys([titles[0], *titles[2:4], "loss", titles[-1]])
        shown = [title for title in wanted if title in titles]
        tables.append(narrow_table(f"{found['pair']}: {test}", titles, rows, shown))
    titles, rows = price_rows(found)
    shown = [titles[0], "runs", "seconds", "times the grid's speed", "forwards"]
    return [*tables, narrow_table(f"{found['pair']}: price", titles, rows, shown)]


def score_rows(found: Mapping[str, Any], test: str) -> tuple[list[str], list[list[str]]]:
    """Return column titles and rows of a test set's scores: means and deviations over seeds."""
    known = _metrics_of(found, test)
    metrics = [m for m in HEADLINES.get(found["task"], ()) if m in known] or known
    main, reference = metrics[0], found["reference"]
    titles = ["method", "seeds", "ratio", *(TITLES.get(m, m) for m in metrics), "dev loss"]
    if reference:
        titles += [f"{TITLES.get(main, main)} against {reference}", f"loss against {reference}"]
    rows: list[list[str]] = []
    for method, runs in shown_methods(found).items():
        cells = [method, str(len(runs)), mean_and_deviation([run["ratio"] for run in runs], 3)]
        for metric in metrics:
            digits = 3 if metric in NATIVE else 1
            cells.append(mean_and_deviation([run["scores"][test][metric] for run in runs], digits))
        cells.append(mean_and_deviation([run["dev_loss"] for run in runs], 3))
        if reference:
            paired = found["paired"].get(method, {}).get(test, {})
            cells += [
                _difference_cell(paired.get(main), 1),
                _difference_cell(paired.get("loss"), 3),
            ]
        rows.append(cells)
    oracle = _oracle_row(found, test, metrics)
    return titles, rows + ([oracle] if oracle else [])


def _oracle_row(found: Mapping[str, Any], test: str, metrics: Sequence[str]) -> list[str] | None:
    """Return the row of the grid point with the best mean test score, which no method may use."""
    points: dict[str, list[Mapping[str, Any]]] = {}
    for run in found["rows"]:
        if run["method"].startswith("grid-0"):
            points.setdefault(run["method"], []).append(run)
    main = metrics[0]
    sign = 1 if main in NATIVE else -1
    means = {name: _mean_score(runs, test, main) for name, runs in points.items()}
    chosen = lowest({n: None if mean is None else sign * mean for n, mean in means.items()})
    if chosen is None:
        return None
    best = points[chosen]
    cells = [ORACLE, str(len(best)), f"{best[0]['ratio']:.3f}"]
    for metric in metrics:
        digits = 3 if metric in NATIVE else 1
        cells.append(mean_and_deviation([run["scores"][test][metric] for run in best], digits))
    cells.append(mean_and_deviation([run["dev_loss"] for run in best], 3))
    return cells + ([NO_VALUE, NO_VALUE] if found["reference"] else [])


def price_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return column titles and rows of the prices of all methods, means over seeds."""
    methods = shown_methods(found)
    grid = methods.get("grid")
    whole = statistics.fmean(run["seconds"] for run in grid) if grid else None
    mixed = len(machine_names(found["rows"])) > 1
    plain = [run["tokens"] for run in methods.get(PLAIN_RUN, ())]
    titles = ["method", "runs", "seconds", "times the grid's speed", "steps", "forwards", "tokens"]
    titles += ["tokens, in plain runs", "peak memory (GB)", "adapter (MB)", "zeros"]
    titles += ["machine"] * mixed
    rows: list[list[str]] = []
    for method, runs in methods.items():
        seconds = statistics.fmean(run["seconds"] for run in runs)
        alike = len(machine_names([*runs, *(grid or ())])) <= 1
        faster = f"{whole / seconds:.2f}" if whole and seconds > 0 and alike else NO_VALUE
        cells = [method, f"{runs[0]['runs']}", f"{seconds:.0f}", faster]
        for name in ("steps", "forwards", "tokens"):
            cells.append(f"{statistics.fmean(run[name] for run in runs):.0f}")
        tokens = statistics.fmean(run["tokens"] for run in runs)
        cells.append(f"{tokens / statistics.fmean(plain):.2f}" if plain else NO_VALUE)
        peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"]]
        cells.append(f"{max(peaks) / 1e9:.2f}" if peaks else NO_VALUE)
        cells.append(f"{runs[0]['adapter_bytes'] / 1e6:.1f}")
        zeros = [run["zeros"] for run in runs if run["zeros"] is not None]
        cells.append(f"{statistics.fmean(zeros):.2f}" if zeros else NO_VALUE)
        cells += [", ".join(machine_names(runs)) or NO_VALUE] * mixed
        rows.append(cells)
    return titles, rows


def several_machines_note(found: Mapping[str, Any]) -> list[str]:
    """Return a paragraph if the runs were made on more than one machine; else nothing."""
    names = machine_names(found["rows"])
    if len(names) < 2:
        return []
    return [
        f"The runs were made on {len(names)} machines ({', '.join(names)}). Compare seconds only "
        "within one machine. The pictures show tokens instead.",
        "",
    ]


def shown_methods(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return method -> runs, without the runs that another method chooses from."""
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        methods.setdefault(row["method"], []).append(row)
    chosen_from = tuple(f"{name}-0" for name in ("grid", "adaptive") if name in methods)
    return {name: runs for name, runs in methods.items() if not name.startswith(chosen_from)}


def _test_sets(found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(test for row in found["rows"] for test in row["scores"]))


def _metrics_of(found: Mapping[str, Any], test: str) -> list[str]:
    return next((list(row["scores"][test]) for row in found["rows"] if test in row["scores"]), [])


def _mean_score(runs: Sequence[Mapping[str, Any]], test: str, metric: str) -> float | None:
    """Return the mean over runs; None if one of them has no finite score."""
    values = [run["scores"][test][metric] for run in runs]
    return None if not_finite(dict(enumerate(values))) else statistics.fmean(values)


def mean_and_deviation(values: Sequence[float | None], digits: int) -> str:
    """Return the mean of the values that are known, and their deviation if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return NO_VALUE
    shown = f"{statistics.fmean(known):.{digits}f}"
    return f"{shown} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else shown


def _difference_cell(paired: Mapping[str, Any] | None, digits: int) -> str:
    if paired is None:
        return NO_VALUE
    low, high = paired["low"], paired["high"]
    interval = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{paired['difference']:+.{digits}f}{interval}"


def _markdown_lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|---|{'---:|' * (len(titles) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
