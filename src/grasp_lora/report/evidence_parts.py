"""Parts of a run's report that show why: the ratio, what was tried, the losses, zeros, answers."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from grasp_lora.base.files import RESULT, RESULT_STAGE, read_json, read_jsonl
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.groups import critical_value, standard_error
from grasp_lora.core.evidence.history import (
    fit_curve,
    grid,
    observations,
    records_of,
    resampled_curves,
)
from grasp_lora.report.charts import COLOURS, Chart, Series
from grasp_lora.report.document import Cell, Lines, Part, Picture, Section, Table
from grasp_lora.report.run import HEADLINES, NATIVE, NO_VALUE, TITLES

_RESAMPLES = 400
_MOST_CURVES = 6
_MOST_EXAMPLES = 12
_LONGEST_ANSWER = 600
_LAYER = re.compile(r"\.(\d+)\.")
_FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.[^.]+)?\.weight$|^(.+)\.lora_(?:embedding_)?([AB])$")


def ratio_section(run: Path, ratio: Mapping[str, Any], outcome: str) -> Section:
    """Return what the prune ratio costs in loss, against the ratio in force.

    Args:
        run: the run folder.
        ratio: its `ratio.json`.
        outcome: the outcome in words; "" where the report begins with it.
    """
    parts: list[Part] = [Lines((outcome,))] if outcome else []
    if ratio.get("losses"):
        parts += _probed_ratios(ratio)
    elif (run / "rounds.jsonl").exists() and (run / "config.json").exists():
        parts += _searched_ratios(run, ratio)
    if (run / "ratio.png").exists():
        parts.append(Picture("ratio, rewards and losses over the search", "ratio.png"))
    return Section("Loss against ratio", tuple(parts))


class _Gap(NamedTuple):
    ratio: float
    loss: float
    apart: float
    low: float
    high: float


def _probed_ratios(ratio: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the losses at the ratios that were judged on the same examples."""
    losses = {float(name): values for name, values in ratio["losses"].items()}
    finite = {r: v for r, v in losses.items() if v and all(x is not None for x in v)}
    if ratio["ratio"] not in finite:
        return
    reference, groups = finite[ratio["ratio"]], ratio.get("groups")
    gaps = [_gap(at, finite[at], reference, groups) for at in sorted(finite)]
    yield _ratio_chart(
        Series(
            "loss less that of the ratio in force",
            tuple((one.ratio, one.apart) for one in gaps),
            tuple((one.ratio, one.low, one.high) for one in gaps),
        ),
        ratio["ratio"],
        f"On {len(reference)} held examples, without further training. Band: 95 % "
        "interval over contexts of the difference on the same examples.",
    )
    yield Table(
        ("ratio", "loss (nats)", "less that of the ratio in force", "95 % interval"),
        tuple(
            (
                Cell(f"{one.ratio:g}", one.ratio),
                Cell(f"{one.loss:.3f}", one.loss),
                Cell(f"{one.apart:+.3f}", one.apart),
                Cell(_interval(one), None if math.isnan(one.low) else one.low),
            )
            for one in gaps
        ),
        whole=True,
        marked=tuple(n for n, one in enumerate(gaps) if one.ratio == ratio["ratio"]),
    )


def _interval(gap: _Gap) -> str:
    return NO_VALUE if math.isnan(gap.low) else f"[{gap.low:+.3f}, {gap.high:+.3f}]"


def _gap(
    ratio: float, losses: Sequence[float], reference: Sequence[float], groups: Sequence[str] | None
) -> _Gap:
    """Return the mean loss and its difference to the reference, with a 95 % t interval."""
    gaps = [one - other for one, other in zip(losses, reference, strict=True)]
    mean, apart = sum(losses) / len(losses), sum(gaps) / len(gaps)
    count = len(set(groups or range(len(gaps))))
    if count < 2:
        return _Gap(ratio, mean, apart, math.nan, math.nan)
    reach = critical_value(count - 1, 0.025) * standard_error(gaps, groups)
    return _Gap(ratio, mean, apart, apart - reach, apart + reach)


def _searched_ratios(run: Path, ratio: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the curve that the search's rounds give, as the choice of the ratio saw it."""
    records, groups = records_of(read_jsonl(run / "rounds.jsonl"))
    seen = observations(records)
    if not seen:
        return
    stored = read_json(run / "config.json")["config"]["controller"]
    known = {field.name for field in fields(ControllerConfig)}  # an earlier version had others
    config = ControllerConfig(**{name: stored[name] for name in stored if name in known})
    at, horizon = grid(config), config.rounds or len(records)
    values = fit_curve(seen, horizon).values(at)
    curves = resampled_curves(seen, horizon, config, _RESAMPLES, groups)
    place = int((at - ratio["ratio"]).abs().argmin())
    apart = curves - curves[:, place : place + 1]
    ends = apart.quantile(apart.new_tensor([0.025, 0.975]), dim=0).tolist()
    xs = at.tolist()
    yield _ratio_chart(
        Series(
            "loss less that of the ratio in force",
            tuple(zip(xs, (values - values[place]).tolist(), strict=True)),
            tuple(zip(xs, *ends, strict=True)),
            dots=False,
        ),
        ratio["ratio"],
        f"The curve over all {len(records)} rounds of the search; steep losses are compressed. "
        "Band: 95 % interval over resampled contexts.",
    )


def _ratio_chart(series: Series, incumbent: float, note: str) -> Chart:
    about = "Loss less that of the ratio in force"
    marker = (incumbent, "in force")
    return Chart(about, "ratio (fraction removed)", "nats", (series,), marker, note)


def tried_section(choice: Mapping[str, Any], told: Sequence[str]) -> Section:
    """Return what a choice tried, against its price.

    Args:
        choice: the content of `recipe.json`.
        told: what else there is to say about it.
    """
    trials = [one for one in choice["tried"] if not one["refused"]]
    measured = [*trials, *choice["simple_systems"]]
    rows = tuple(_tried_row(one) for one in measured)
    marked = tuple(n for n, one in enumerate(measured) if one.get("shipped"))
    titles = ("what", "dev loss", "epochs", "plain runs", "path")
    parts: list[Part] = [*_price_chart(measured), Table(titles, rows, marked=marked)]
    curves = [one for one in trials if one["curve"]]
    if curves:
        parts.append(Picture("loss of the held examples by trial and epoch", "recipe.png"))
    return Section("What was tried", (*parts, Lines(tuple(told), listed=True)))


def _tried_row(one: Mapping[str, Any]) -> tuple[Cell, ...]:
    loss, epochs, price = one["dev_loss"], one.get("epochs"), one.get("plain_runs")
    return (
        Cell(one.get("says") or one["name"]),
        Cell(NO_VALUE if loss is None else f"{loss:.3f}", loss),
        Cell(NO_VALUE if epochs is None else str(epochs), epochs),
        Cell(NO_VALUE if price is None else f"{price:.2f}", price),
        Cell(one["path"]),
    )


def _price_chart(measured: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Yield the loss of all that was tried against its price, where both are known."""
    known = [one for one in measured if None not in (one.get("plain_runs"), one["dev_loss"])]
    series = tuple(
        Series(
            one.get("says") or one["name"],
            ((one["plain_runs"], one["dev_loss"]),),
            line=False,
            colour=number % COLOURS,
        )
        for number, one in enumerate(known)
    )
    if len(series) > 1:
        note = "A plain run fine-tunes one adapter as configured. Lower left is better."
        about = "Dev loss against price"
        yield Chart(about, "price (plain runs)", "dev loss (nats)", series, note=note)


def curves_section(run: Path) -> Section:
    """Return the losses of the trainings: of the train rows by step, and of the dev rows."""
    found = {
        file.parent.relative_to(run).as_posix(): read_json(file)
        for file in sorted([*run.glob("*/stage.json"), *run.glob("*/*/stage.json")])
    }
    trained = {name: one for name, one in found.items() if one.get("log")}
    order = sorted(
        trained,
        key=lambda name: (name not in (RESULT_STAGE, RESULT), name.split("/")[0] == "adapters"),
    )
    shown = order[:_MOST_CURVES]
    parts: list[Part] = []
    for about, key in (("Dev loss of the target", "evaluations"), ("Train loss", "log")):
        curves = {name: _points(trained[name].get(key, ())) for name in shown}
        if key == "evaluations":
            curves.pop("adapters/source", None)  # it was measured on the source's dev rows
        series = tuple(
            Series(name, points, dots=key != "log", colour=shown.index(name))
            for name, points in curves.items()
            if points
        )
        if series:
            parts.append(Chart(about, "optimizer step", "loss (nats)", series))
    if len(order) > len(shown):
        told = f"{len(shown)} of {len(order)} trainings; stage.json of each has its losses."
        parts.append(Lines((told,), whole=True))
    return Section("Loss curves", tuple(parts))


def _points(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
    return tuple((e["step"], e["loss"]) for e in entries if e.get("loss") is not None)


def zeros_section(run: Path) -> Section:
    """Return the share of zeros in the final adapter's factors, by layer and module."""
    counted = _zeros(run / RESULT)
    if not counted:
        return Section("Zeros", ())
    zeros, entries = (sum(one[n] for one in counted.values()) for n in (0, 1))
    if not zeros:
        told = f"The adapter has no zeros among its {entries:,} entries."
        return Section("Zeros", (Lines((told,)),))
    modules = list(dict.fromkeys(module for _, module in counted))
    layers = sorted({layer for layer, _ in counted})
    series = tuple(
        Series(
            module,
            tuple(
                (layer, 100 * counted[layer, module][0] / counted[layer, module][1])
                for layer in layers
                if (layer, module) in counted
            ),
            colour=number % COLOURS,
        )
        for number, module in enumerate(modules)
    )
    told = f"{100 * zeros / entries:.1f} % of the adapter's {entries:,} entries are zero. "
    told += "Zeros alone make no file smaller and no answer faster."
    chart = Chart("Zeros by layer and module", "layer", "zeros (%)", series)
    return Section("Zeros", (Lines((told,)), chart))


def _zeros(folder: Path) -> dict[tuple[int, str], list[int]]:
    """Return (layer, module) -> number of zeros and of all entries of its LoRA factors.

    Zeros that only fill a module up to the rank of the others are not counted.
    """
    file, notes = folder / "adapter_model.safetensors", folder / "grasp_lora.json"
    if not file.exists():
        return {}
    from safetensors import safe_open

    own = read_json(notes).get("ranks", {}) if notes.exists() else {}
    found: dict[tuple[int, str], list[int]] = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            factor = _FACTOR.match(name)
            if factor is None:
                continue
            module = factor[1] or factor[3]
            layer = _LAYER.search(module)
            rank = own.get(module.removeprefix("base_model.model."))
            down = (factor[2] or factor[4]) == "A"
            tensor = tensors.get_tensor(name)
            tensor = tensor[:rank] if down else tensor[:, :rank]
            place = (int(layer[1]) if layer else 0, module.rsplit(".", 1)[-1])
            one = found.setdefault(place, [0, 0])
            one[0] += int((tensor == 0).sum())
            one[1] += tensor.numel()
    return found


class _Apart(NamedTuple):
    row: Mapping[str, Any]
    other: Mapping[str, Any]
    gain: float


def answers_section(run: Path, task: str) -> Section:
    """Return test rows that the shipped adapter and the target adapter answer differently."""
    title = "Where the shipped adapter and the target adapter differ"
    files = [run / "evaluations" / name / "predictions.jsonl" for name in ("final", "target")]
    if not all(file.exists() for file in files):
        return Section(title, ())
    ours, others = ({(r["set"], r["id"]): r for r in read_jsonl(file)} for file in files)
    both = [(ours[key], others[key]) for key in ours if key in others]
    metric = _judge(task, [row for pair in both for row in pair])
    sign = -1 if metric in NATIVE else 1
    apart = [
        _Apart(one, other, sign * (one[metric] - other[metric]) if metric else 0.0)
        for one, other in both
        if one["prediction"].strip() != other["prediction"].strip()
    ]
    better, worse = (sum(s * one.gain > 0 for one in apart) for s in (1, -1))
    told = f"{len(apart)} of {len(both)} answers differ"
    if metric:
        told += f"; by {TITLES.get(metric, metric)} the shipped adapter is better in {better}, "
        told += f"worse in {worse}"
    shown = _some_of_both(apart)
    # Records of an earlier version have no questions.
    known = any("question" in one.row for one in shown)
    asked = (("question" if task == "qa" else "input"),) if known else ()
    titles = ("example", *asked, "accepted", "shipped", "target adapter alone")
    rows = tuple(_answers_row(one, bool(asked)) for one in shown)
    table = Table(titles, rows, texts=True, most=3)
    parts: tuple[Part, ...] = (Lines((f"{told}.",)), table) if both else ()
    return Section(title, parts)


def _judge(task: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first headline metric that all rows have a number of."""
    for metric in HEADLINES.get(task, ()):
        if rows and all(isinstance(row.get(metric), int | float) for row in rows):
            return metric
    return None


def _some_of_both(apart: Sequence[_Apart]) -> list[_Apart]:
    """Return the rows with the largest differences, gains and losses in turn, then equal ones."""
    gains = sorted((one for one in apart if one.gain > 0), key=lambda one: -one.gain)
    losses = sorted((one for one in apart if one.gain < 0), key=lambda one: one.gain)
    longest = max(len(gains), len(losses))
    turns = [one for n in range(longest) for one in (*gains[n : n + 1], *losses[n : n + 1])]
    return [*turns, *(one for one in apart if one.gain == 0)][:_MOST_EXAMPLES]


def _answers_row(one: _Apart, asked: bool) -> tuple[Cell, ...]:
    row = one.row
    where = row["id"] if row["set"] == "test" else f"{row['set']}: {row['id']}"
    accepted = " / ".join(row["references"])
    question = (row.get("question", ""),) if asked else ()
    texts = (where, *question, accepted, row["prediction"], one.other["prediction"])
    return tuple(Cell(_cut(text), outside=True) for text in texts)


def _cut(text: str) -> str:
    left = len(text) - _LONGEST_ANSWER
    return text if left <= 0 else f"{text[:_LONGEST_ANSWER]}… ({left} more characters)"
