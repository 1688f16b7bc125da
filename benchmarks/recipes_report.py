"""What `benchmarks.recipes` recorded, as rows, tables, goals and pictures.

Recipes are compared on the same runs: those of the same pair, adapters and seed. A mean over pairs
gives every pair the same weight. Losses are means over the test examples, in nats; a difference is
that of `recipe: auto` minus another recipe, so below 0 the choice is better. Prices are in plain
fine-tuning runs (`plans.auto_plan.prices_of`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks import recorded, records
from grasp_lora.base.files import write_json, write_text
from grasp_lora.plans.methods import METHODS, method_of
from grasp_lora.plans.results import mean_loss
from grasp_lora.report.pictures import BLUE, GREEN, GRID, INK, ORANGE

AUTO = "auto"
"""The name of `recipe: auto` among recipes."""
FOLDER = records.FOLDER / "recipes"
NEW_PAIRS = ("en-hi", "en-vi", "en-ha")
"""Pairs that no run was made of while the chooser was made."""
BELOW = "<!-- below: python -m benchmarks.recipes tables -->"
METRICS = {"loss": 3, "exact_match": 1, "token_f1": 1, "rougeL": 1}
"""Score of the test set -> digits that tables show."""
BESIDE = (
    "average-finetuned",
    "source-finetuned-3x",
    "grid",
    "optuna-random",
    "optuna-tpe",
    "optuna-gp",
    "grasp-paper",
    "grasp-paper-scaled",
)
"""Methods of the main comparison that are shown beside, in tables of their own."""
NO_VALUE = "\N{EN DASH}"
_ADAPTERS = "adapters-"
_TITLES = {"loss": "loss", "exact_match": "exact match", "token_f1": "F1", "rougeL": "ROUGE-L"}
_EXACT = 9
"""Digits to which a number is held against its goal; what lies beyond is rounding."""

Row = dict[str, Any]
Value = Callable[[Row], float | None]


def collection_of(adapters_seed: int) -> str:
    """Return the collection of what begins from adapters of a seed."""
    return f"{_ADAPTERS}{adapters_seed}"


def rows_of(folder: Path) -> list[Row]:
    """Return the content of recipes.json: a row for each recorded run.

    `recipe` is "auto" for a run that chose. Then `ships` is what it took in words, and `covered`
    says whether the interval of its gain holds the gain on the test examples; None without an
    interval. A recipe that draws nothing has one row, with the seed of its adapters.
    """
    rows: list[Row] = []
    for table in sorted(folder.glob("*.parquet")):
        for collection in records.collections(table):
            seed = int(collection.removeprefix(_ADAPTERS))
            for job, record in records.read_runs(table, collection).items():
                if "not_applicable" not in record:
                    rows.append(_row(table.stem, seed, job, record))
    if not rows:
        raise ValueError(f"{folder} holds no recorded run: make some with benchmarks.recipes run")
    order = {name: place for place, name in enumerate((AUTO, *METHODS))}
    names = ("pair", "adapters_seed", "recipe", "seed")
    return sorted(
        rows,
        key=lambda row: (row["new_pair"], *(order.get(row[n], row[n]) for n in names)),
    )


def _row(pair: str, adapters_seed: int, job: str, record: Mapping[str, Any]) -> Row:
    chose = job.startswith(f"{AUTO}-s")
    name = AUTO if chose else method_of(job)
    seed = adapters_seed if job == name else int(job.rpartition("-s")[2])
    scores = record["scores"]["test"]
    plain = record["plain_runs"] if chose else record["price"]["tokens"] / record["plain_tokens"]
    return {
        "pair": pair,
        "new_pair": pair in NEW_PAIRS,
        "seed": seed,
        "adapters_seed": adapters_seed,
        "recipe": name,
        "ships": record["recipe"]["ships"] if chose else None,
        "dev_loss": record["recipe"]["dev_loss"] if chose else _dev_loss(record),
        "scores": {"test": {metric: scores.get(metric) for metric in METRICS}},
        "plain_runs": plain,
        "covered": covered(record) if chose else None,
    }


def _dev_loss(record: Mapping[str, Any]) -> float | None:
    """Return the mean loss of the labelled examples that did not train the result."""
    judged = [loss for split in (record["losses"] or {}).values() for loss in split]
    return mean_loss(judged) if judged else record.get("cross_validated")


def covered(record: Mapping[str, Any]) -> bool | None:
    """Return whether the interval of a run's gain holds its gain on the test examples.

    The gain is the mean loss of the best system that needs no choice, minus that of what is
    shipped. None where there is no interval.
    """
    gain, simple = record["recipe"]["gain"], record["simple_losses"]
    if gain is None or simple is None or None in gain["interval"]:
        return None
    low, high = gain["interval"]
    return low <= fmean(simple) - fmean(record["rows"]["test"]["values"]["loss"]) <= high


def score(metric: str) -> Value:
    """Return what gives a row's score on the test set."""
    return lambda row: row["scores"]["test"][metric]


def of_pairs(rows: Sequence[Row], recipe: str, value: Value) -> dict[str, list[float]]:
    """Return pair -> a recipe's values of all runs, those without a value left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        one = value(row) if row["recipe"] == recipe else None
        if one is not None:
            found.setdefault(row["pair"], []).append(one)
    return found


def differences(rows: Sequence[Row], to: str, value: Value) -> dict[str, float]:
    """Return pair -> mean difference of `recipe: auto` minus a recipe, over the runs of both.

    A recipe that draws nothing is held against every seed.
    """
    drawn = METHODS[to].seeds != "none"

    def key(row: Row) -> tuple[Any, ...]:
        return row["pair"], row["adapters_seed"], *([row["seed"]] if drawn else [])

    theirs = {key(row): value(row) for row in rows if row["recipe"] == to}
    found: dict[str, list[float]] = {}
    for row in rows:
        ours, other = value(row), theirs.get(key(row))
        if row["recipe"] == AUTO and ours is not None and other is not None:
            found.setdefault(row["pair"], []).append(ours - other)
    return {pair: fmean(ones) for pair, ones in found.items()}


def whole_differences(rows: Sequence[Row], to: str) -> dict[str, float] | None:
    """Return `differences` in loss; None unless it has every pair on which a run chose."""
    found = differences(rows, to, score("loss"))
    pairs = of_pairs(rows, AUTO, score("loss")).keys()
    return found if pairs and pairs == found.keys() else None


def recipes_of(rows: Sequence[Row]) -> list[str]:
    """Return the fixed recipes of rows, in their order."""
    return [name for name in METHODS if any(row["recipe"] == name for row in rows)]


def best_fixed(rows: Sequence[Row]) -> str | None:
    """Return the fixed recipe with the lowest mean over pairs, of those that ran on all of them."""
    found = {name: whole_differences(rows, name) for name in recipes_of(rows)}
    means = {name: fmean(ones.values()) for name, ones in found.items() if ones is not None}
    return max(means, key=means.__getitem__, default=None)


class Goal(NamedTuple):
    """A goal.

    Attributes:
        about: what is measured.
        asked: the bound, in words.
        measured: the number, in words; None where it was not measured.
        met: whether it is met; None where it was not measured.
    """

    about: str
    asked: str
    measured: str | None
    met: bool | None


def _at_most(about: str, bound: float, value: float | None, form: str = "{:+.3f}") -> Goal:
    shown = None if value is None else form.format(value)
    met = None if value is None else round(value - bound, _EXACT) <= 0
    return Goal(about, f"at most {bound:g}", shown, met)


def _at_least(about: str, bound: float, value: float | None, form: str = "{:+.3f}") -> Goal:
    shown = None if value is None else form.format(value)
    met = None if value is None else round(value - bound, _EXACT) >= 0
    return Goal(about, f"at least {bound:g}", shown, met)


Beside = Mapping[str, Mapping[str, Sequence[float]]]
"""Pair -> method -> test losses of the main comparison."""


def goals(rows: Sequence[Row], others: Beside = MappingProxyType({})) -> list[Goal]:
    """Return the goals of the choice and what was measured.

    Those that are no other's are of the pairs that are not new.

    Args:
        rows: see `rows_of`.
        others: what stands for a published recipe that no row has, see `beside`.
    """
    known = [row for row in rows if not row["new_pair"]]
    new = [row for row in rows if row["new_pair"]]
    best = best_fixed(known)
    gaps = whole_differences(known, best) if best else None
    prices = [one for ones in of_pairs(rows, AUTO, _price).values() for one in ones]
    held = [row["covered"] for row in rows if row["covered"] is not None]
    share = fmean(held) if held else None
    name = best or "the best fixed recipe"
    return [
        _at_most(f"loss minus that of {name}, mean", 0, fmean(gaps.values()) if gaps else None),
        _at_most(
            f"the same, worst pair{_worst(gaps)}", 0.015, max((gaps or {}).values(), default=None)
        ),
        _below(known, "average-finetuned", 0.08),
        _better_on(known, "average-finetuned"),
        _below(known, "grasp-paper", 0.08, others),
        _below(known, "grasp-paper-scaled", 0.15, others),
        _at_most("price of the dearest run, in plain runs", 5, max(prices, default=None), "{:.2f}"),
        _new_pairs(new),
        _at_least(f"intervals that hold the test gain, of {len(held)}", 0.9, share, "{:.2f}"),
    ]


def _price(row: Row) -> float:
    return row["plain_runs"]


def _worst(gaps: Mapping[str, float] | None) -> str:
    return f" ({max(gaps, key=gaps.__getitem__)})" if gaps else ""


def _below(
    rows: Sequence[Row], to: str, bound: float, others: Beside = MappingProxyType({})
) -> Goal:
    """Return the goal of the loss saved against a recipe, or its runs in the main comparison."""
    about, found = f"loss below {to}", whole_differences(rows, to)
    if found is None:
        ours = of_pairs(rows, AUTO, score("loss"))
        theirs = {pair: one[to] for pair, one in others.items() if to in one}
        if ours and ours.keys() <= theirs.keys():
            found = {pair: fmean(ones) - fmean(theirs[pair]) for pair, ones in ours.items()}
            about += " in the main comparison"
    return _at_least(about, bound, -fmean(found.values()) if found else None)


def _better_on(rows: Sequence[Row], to: str) -> Goal:
    """Return the goal of the answers: F1 of questions, ROUGE-L where a pair has no F1."""
    found = differences(rows, to, score("rougeL")) | differences(rows, to, score("token_f1"))
    better = sum(one > 0 for one in found.values())
    shown = f"{better} of {len(found)}" if found else None
    about = f"pairs with F1 (headlines: ROUGE-L) above {to}"
    return Goal(about, "at least 3 of 4", shown, better >= 3 if found else None)


def _new_pairs(rows: Sequence[Row]) -> Goal:
    """Return the goal of the new pairs: the best fixed recipe is that of each pair."""
    gaps: dict[str, float] = {}
    for name in recipes_of(rows):
        for pair, gap in differences(rows, name, score("loss")).items():
            gaps[pair] = max(gap, gaps.get(pair, gap))
    about = f"new pairs: loss minus that of the best fixed recipe there, worst pair{_worst(gaps)}"
    return _at_most(about, 0.02, max(gaps.values(), default=None))


def beside(folder: Path, pairs: Sequence[str]) -> Beside:
    """Return pair -> method -> test losses of the main comparison's runs, where there are any."""
    found: dict[str, dict[str, list[float]]] = {}
    for pair in pairs:
        table = folder / f"{pair}.parquet"
        outcomes = recorded.outcomes_in(table) if table.exists() else {}
        for name in BESIDE:
            results = [one.result for job, one in outcomes.items() if method_of(job) == name]
            losses = [one["scores"]["test"]["loss"] for one in results if one and "scores" in one]
            if losses:
                found.setdefault(pair, {})[name] = losses
    return found


def markdown(rows: Sequence[Row], others: Beside) -> str:
    """Return the tables of recipes.md."""
    parts = _section("Goals", _goals_table(rows, others))
    groups = {"": [row for row in rows if not row["new_pair"]]}
    groups[", new pairs"] = [row for row in rows if row["new_pair"]]
    for words, part in groups.items():
        if part:
            parts += _section(f"Test loss{words}", _means_table(part, score("loss"), 3))
            parts += _section(f"Auto minus each fixed recipe{words}", _differences_table(part))
    parts += ["![loss against price](recipes/prices.png)", ""]
    parts += _section("Scores", _scores_table(rows))
    parts += _section("Prices, in plain fine-tuning runs", _means_table(rows, _price, 2))
    parts += _section("What auto shipped", _shipped_table(rows))
    if others:
        parts += _section("Beside: records of the main comparison", _beside_table(others))
    parts += ["![beside grid, Optuna and fixed recipes](recipes/beside.png)", ""]
    return "\n".join(parts)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Return a table; its first `words` columns hold words, the others numbers."""
    below = "---|" * words + "---:|" * (len(titles) - words)
    head, *lines = (f"| {' | '.join(line)} |" for line in (titles, *cells))
    return [head, f"|{below}", *lines]


def _goals_table(rows: Sequence[Row], others: Beside) -> list[str]:
    words = {True: "met", False: "not met", None: "not measured"}
    cells = [
        [one.about, one.asked, words[one.met], one.measured or NO_VALUE]
        for one in goals(rows, others)
    ]
    return _table(["what", "asked", "met?", "measured"], cells, words=3)


def _pairs_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["pair"] for row in rows))


def _means_table(rows: Sequence[Row], value: Value, digits: int) -> list[str]:
    """Return a table of means over a pair's runs, how many in brackets, and the mean over pairs."""
    pairs, cells = _pairs_of(rows), []
    for name in (AUTO, *recipes_of(rows)):
        found = of_pairs(rows, name, value)
        means = {pair: fmean(ones) for pair, ones in found.items()}
        shown = [
            f"{means[p]:.{digits}f} ({len(found[p])})" if p in means else NO_VALUE for p in pairs
        ]
        whole = f"{fmean(means.values()):.{digits}f}" if len(means) == len(pairs) else NO_VALUE
        cells.append([_emphasised(name), *shown, whole])
    return _table(["recipe", *pairs, "mean over pairs"], cells)


def _emphasised(name: str) -> str:
    return f"**{name}**" if name == AUTO else f"`{name}`"


def _differences_table(rows: Sequence[Row]) -> list[str]:
    pairs, best, cells = _pairs_of(rows), best_fixed(rows), []
    for name in recipes_of(rows):
        found = differences(rows, name, score("loss"))
        shown = [f"{found[pair]:+.3f}" if pair in found else NO_VALUE for pair in pairs]
        whole = whole_differences(rows, name)
        mean = f"{fmean(whole.values()):+.3f}" if whole else NO_VALUE
        cells.append([f"`{name}`" + " (best in hindsight)" * (name == best), *shown, mean])
    return _table(["auto minus", *pairs, "mean over pairs"], cells)


def _scores_table(rows: Sequence[Row]) -> list[str]:
    metrics, cells = [name for name in METRICS if name != "loss"], []
    for pair in _pairs_of(rows):
        ones = [row for row in rows if row["pair"] == pair]
        for name in (AUTO, *recipes_of(ones)):
            found = [of_pairs(ones, name, score(metric)).get(pair) for metric in metrics]
            shown = [f"{fmean(one):.1f} ({len(one)})" if one else NO_VALUE for one in found]
            cells.append([pair, _emphasised(name), *shown])
    return _table(["pair", "recipe", *(_TITLES[name] for name in metrics)], cells, words=2)


def _shipped_table(rows: Sequence[Row]) -> list[str]:
    words, cells = {True: "yes", False: "no", None: NO_VALUE}, []
    for row in rows:
        if row["recipe"] == AUTO:
            numbers = [f"{row['dev_loss']:.3f}", f"{score('loss')(row):.3f}"]
            numbers += [f"{row['plain_runs']:.2f}", words[row["covered"]]]
            seeds = [str(row["adapters_seed"]), str(row["seed"])]
            cells.append([row["pair"], row["ships"], *seeds, *numbers])
    titles = [
        "pair",
        "ships",
        "seed of the adapters",
        "seed",
        "dev loss",
        "test loss",
        "plain runs",
    ]
    return _table([*titles, "the interval held"], cells, words=2)


def _beside_table(others: Beside) -> list[str]:
    cells = [
        [
            f"`{name}`",
            *(
                f"{fmean(one[name]):.3f} ({len(one[name])})" if name in one else NO_VALUE
                for one in others.values()
            ),
        ]
        for name in BESIDE
        if any(name in one for one in others.values())
    ]
    about = "Test losses of [the main comparison](comparison.md), from other adapters and in part"
    about += " from other machines: they are in no mean above."
    return [about, "", *_table(["method", *others], cells)]


def write(folder: Path, main: Path, out: Path) -> None:
    """Write recipes.json, the tables of recipes.md, and its pictures.

    What stands in recipes.md above `BELOW` is kept.

    Args:
        folder: holds a table of records for every pair.
        main: holds the tables of the main comparison.
        out: the folder of the page.

    Raises:
        ValueError: nothing is recorded.
    """
    rows = rows_of(folder)
    others = beside(main, _pairs_of(rows))
    write_json(out / "recipes.json", rows)
    file = out / "recipes.md"
    above = file.read_text().split(BELOW)[0] if file.exists() else "# The choice of a recipe\n\n"
    write_text(file, above + BELOW + "\n\n" + markdown(rows, others))
    plot_prices(rows, out / "recipes" / "prices.png")
    plot_beside(rows, others, out / "recipes" / "beside.png")


_MARKS = "osD^v<>Phd8X"
_MAIN = "main comparison"


def plot_prices(rows: Sequence[Row], path: Path) -> None:
    """Draw test loss against price, a panel a pair and a point a recipe, as a PNG."""
    from matplotlib import colormaps  # noqa: PLC0415

    pairs, names = _pairs_of(rows), recipes_of(rows)
    figure, panels = _panels(pairs, 3.4)
    drawn = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    colours = (*drawn[:2], *drawn[4:])  # orange is that of auto
    for pair, axes in zip(pairs, panels, strict=True):
        ones = [row for row in rows if row["pair"] == pair]
        for place, name in enumerate((AUTO, *names)):
            prices, losses = (
                of_pairs(ones, name, one).get(pair) for one in (_price, score("loss"))
            )
            if not prices or not losses:
                continue
            look = {"color": colours[place % len(colours)], "marker": _MARKS[place % len(_MARKS)]}
            if name == AUTO:
                look = {"color": ORANGE, "marker": "*", "markersize": 15, "zorder": 3}
            axes.plot(fmean(prices), fmean(losses), linestyle="", label=name, **look)
        axes.set_xlim(left=-0.2)
        axes.set_ylabel("test loss (nats)", color=INK)
        axes.set_xlabel("price (plain fine-tuning runs)", color=INK)
    _finish(figure, panels, path)


def plot_beside(rows: Sequence[Row], others: Beside, path: Path) -> None:
    """Draw the test losses of every recipe and of the main comparison's methods as a PNG.

    A panel is a pair, a line a recipe: its mean, and a small point for each run.
    """
    pairs = _pairs_of(rows)
    figure, panels = _panels(pairs, 4.8)
    for pair, axes in zip(pairs, panels, strict=True):
        found = {
            (name, BLUE): of_pairs(rows, name, score("loss")).get(pair) for name in recipes_of(rows)
        }
        found[AUTO, ORANGE] = of_pairs(rows, AUTO, score("loss")).get(pair)
        found |= {(f"{n} ({_MAIN})", GREEN): ones for n, ones in others.get(pair, {}).items()}
        kept = {key: ones for key, ones in found.items() if ones}
        lines = sorted(kept.items(), key=lambda one: -fmean(one[1]))
        for place, ((_, colour), ones) in enumerate(lines):
            axes.plot(ones, [place] * len(ones), ".", color=colour, alpha=0.4)
            mark = {"marker": "*", "markersize": 12} if colour == ORANGE else {"marker": "o"}
            axes.plot(fmean(ones), place, color=colour, **mark)
        axes.set_yticks(range(len(lines)), [name for (name, _), _ in lines], fontsize=8)
        axes.set_xlabel("test loss (nats)", color=INK)
    _finish(figure, panels, path, legend=False)


def _panels(pairs: Sequence[str], height: float) -> tuple[Any, list[Any]]:
    """Return a figure and a panel for each pair, two beside each other."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(2, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(6 * columns, height * lines + 0.8), layout="constrained")
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    panels = [axes for _, axes in zip(pairs, places, strict=False)]
    for axes in places[len(pairs) :]:
        axes.remove()
    for pair, axes in zip(pairs, panels, strict=True):
        axes.set_title(pair, color=INK, fontsize=11)
    return figure, panels


def _finish(figure: Any, panels: Sequence[Any], path: Path, legend: bool = True) -> None:
    named: dict[str, Any] = {}
    for axes in panels:
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        lines, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, lines, strict=True))
    if legend:
        place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}
        figure.legend(named.values(), named.keys(), **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
