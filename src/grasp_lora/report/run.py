"""Present a finished run to people: its outcome in words, its scores as tables.

This module reads records only. No number of the run depends on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.base.files import read_json, write_text
from grasp_lora.base.words import in_markdown
from grasp_lora.report.choice import choice_markdown, systems_with_paths
from grasp_lora.report.time_words import times_section
from grasp_lora.scoring.cells import cell

# Metrics in the terminal, most informative first; the report has all metrics.
HEADLINES: Mapping[str, tuple[str, ...]] = {
    "qa": ("exact_match", "token_f1", "chrf", "loss"),
    "summarization": ("rougeLsum", "bleu", "chrf", "loss"),
    "text-to-text": ("chrf", "bleu", "exact_match", "loss"),
}
TITLES: Mapping[str, str] = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bertscore_f1": "BERTScore F1",
}
NATIVE = ("loss", "perplexity")
"""Metrics in their own units, where lower is better; all other scores are in [0, 100]."""
NO_VALUE = "\N{EN DASH}"


def score_tables(scores: Mapping[str, Any]) -> list[Table]:
    """Return the scores of all systems in a `scores.json` as terminal tables, one per test set."""
    tables: list[Table] = []
    for name, first in _sets(scores).items():
        shown = [m for m in HEADLINES.get(scores["task"], ()) if m in first["scores"]]
        table = Table(title=cell(_set_title(scores, name, first)))
        table.add_column("system", overflow="fold")
        for title in (*(TITLES.get(m, m) for m in shown), *_zeros_titles(scores)):
            table.add_column(title, justify="right", no_wrap=True)
        for row in scores["systems"]:
            found = [row["sets"][name]["scores"][metric]["value"] for metric in shown]
            cells = [
                NO_VALUE if value is None else _format_value(value, metric)
                for metric, value in zip(shown, found, strict=True)
            ]
            table.add_row(
                cell(row["name"]), *cells, *(_zeros_cell(row) for _ in _zeros_titles(scores))
            )
        tables.append(table)
    return tables


def precheck_table(found: Mapping[str, Any]) -> Table:
    """Return the variants of a precheck as a terminal table, lowest loss first, no loss last."""
    table = Table(title=f"before training, {len(found['rows'])} examples")
    table.add_column("variant", overflow="fold")
    for title in ("loss", "against the merge", "standard error"):
        table.add_column(title, justify="right", no_wrap=True)
    variants = found["variants"]
    out = not_finite({name: one["loss"] for name, one in variants.items()})
    for name in sorted(variants, key=lambda name: (name in out, variants[name]["loss"])):
        one = variants[name]
        gap, error = one["difference"], one["standard_error"]
        table.add_row(name, f"{one['loss']:.3f}", f"{gap:+.3f}", f"{error:.3f}")
    return table


def ablation_table(found: Mapping[str, Any]) -> Table:
    """Return the variants of an `ablation.json` as a terminal table."""
    titles, rows = _ablation_cells(found)
    seeds = _comma_list(found["seeds"])
    title = f"ablation, controller preset {found['controller_preset']}, seeds {seeds}"
    shown = ("variant", "ratio", "commits", "flipped", "dev loss", "against configured")
    return narrow_table(title, titles, rows, shown)


def narrow_table(
    title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[str]
) -> Table:
    """Return a terminal table with the columns in `shown`; the first column holds names."""
    places = [titles.index(name) for name in shown]
    table = Table(title=cell(title))
    table.add_column(shown[0], no_wrap=True)
    for name in shown[1:]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(row[place] for place in places))
    return table


def ablation_markdown(found: Mapping[str, Any]) -> str:
    """Return an `ablation.json` as a Markdown document."""
    titles, rows = _ablation_cells(found)
    lines = [
        "# Ablation",
        "",
        f"Controller preset `{found['controller_preset']}`, seeds {_comma_list(found['seeds'])}; "
        "means over seeds. Every run starts from the same merge. *Flipped* is the share of the "
        "adapter's entries that a commit changes between kept and pruned. *Jump* is the mean "
        "training loss of the four steps after a commit less that of the four steps before. "
        "*Against configured* is the mean difference of the dev loss to the configured variant, "
        "seed by seed, with its standard error: lower is better.",
        "",
        f"| {' | '.join(titles)} |",
        f"|---|{'---:|' * (len(titles) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    abouts = [f"- `{name}`: {one['about']}" for name, one in found["variants"].items()]
    lines += ["Variants:", "", *abouts, ""]
    for title, names in (("Left out", found["left_out"]), ("Without a result", found["failed"])):
        if names:
            whys = (f"- `{name}`: {in_markdown(why)}" for name, why in names.items())
            lines += [f"{title}:", "", *whys, ""]
    return "\n".join(lines)


def _ablation_cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    first = next((one["mean"] for one in found["variants"].values() if one["mean"]), {})
    headlines = HEADLINES.get(found["task"], ())
    scores = [name for name in first if "/" in name and name.split("/", 1)[1] in headlines]
    titles = ["variant", "ratio", "verdicts", "commits", "flipped", "jump", "forwards", "dev loss"]
    titles += ["against configured"]
    titles += [f"{TITLES.get(m, m)} ({test})" for test, m in (n.split("/", 1) for n in scores)]
    rows: list[list[str]] = []
    for name, one in found["variants"].items():
        mean, apart = one["mean"], one["against_configured"]
        if not mean:
            rows.append([name, *[NO_VALUE] * (len(titles) - 1)])
            continue
        verdicts = [run["verdict"] for run in one["runs"].values()]
        counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        cells = [name, _mean_cell(mean["ratio"], ".3f"), counted]
        forms_of = {"commits": ".1f", "flipped_per_commit": ".1%", "loss_jump": "+.3f"}
        forms_of |= {"forwards": ".0f", "dev_loss": ".4f"}
        cells += [_mean_cell(mean[key], form) for key, form in forms_of.items()]
        cells.append(_difference_cell(apart.get("dev_loss")))
        forms = [".3f" if score.split("/", 1)[1] in NATIVE else ".1f" for score in scores]
        rows.append(
            cells + [_mean_cell(mean[s], form) for s, form in zip(scores, forms, strict=True)]
        )
    return titles, rows


def _mean_cell(value: Mapping[str, Any], form: str) -> str:
    if value["mean"] is None:
        return NO_VALUE
    deviation = value["deviation"]
    shown = f" ± {deviation:{form.removeprefix('+')}}" if deviation else ""
    return f"{value['mean']:{form}}{shown}"


def _difference_cell(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return NO_VALUE
    error = value["standard_error"]
    return f"{value['mean']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _comma_list(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def scores_markdown(scores: Mapping[str, Any], name: str) -> str:
    """Return all scores of the test set `name` as a Markdown table, each with its interval."""
    shown = list(_sets(scores)[name]["scores"])
    titles = ["system", *(TITLES.get(m, m) for m in shown), *_zeros_titles(scores)]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for row in scores["systems"]:
        cells = [_score_cell(row["sets"][name]["scores"][metric], metric) for metric in shown]
        system = in_markdown(row["name"])
        cells += [_zeros_cell(row) for _ in _zeros_titles(scores)]
        lines.append(f"| {' | '.join([system, *cells])} |")
    return "\n".join(lines) + "\n"


def write_report(run: Path) -> Path:
    """Write `report.md` into a finished run folder and return its path.

    The report has the outcome, the picture, the scores with their settings, and the times.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    ratio, scores = read_json(run / "ratio.json"), read_json(run / "scores.json")
    if (run / "recipe.json").exists():
        choice = read_json(run / "recipe.json")
        lines = ["# The adapter to ship, and scores", "", choice_markdown(choice, ratio)]
    else:
        lines = ["# Prune ratio and scores", "", _outcome_line(ratio), ""]
    if "labelled_rows" in scores:
        lines += [
            f"Every fine-tuned system was retrained on all {scores['labelled_rows']} labelled "
            "target examples, for the number of epochs that the dev examples had chosen in a first "
            "run on the train examples alone. Dev losses are those of the first run.",
            "",
        ]
    lines += [f"- {in_markdown(line)}" for line in finding_lines(ratio)]
    lines += [""] if finding_lines(ratio) else []
    if (run / "ratio.png").exists():
        lines += ["![ratio, rewards and losses over the search](ratio.png)", ""]
    lines += list(_score_section(scores))
    if (run / "data.json").exists():
        lines += list(_leak_section(read_json(run / "data.json")))
    if (run / "provenance.json").exists():
        made = read_json(run / "provenance.json")
        lines += list(times_section(made["time"], made["device"]))
    write_text(run / "report.md", "\n".join(lines))
    return run / "report.md"


def _score_section(scores: Mapping[str, Any]) -> Iterator[str]:
    for name, first in _sets(scores).items():
        yield f"## {in_markdown(_set_title(scores, name, first))}"
        yield ""
        yield (
            "In brackets: 95 % bootstrap interval over contexts. Scores are 0 to 100. The loss is "
            "in nats per answer token, a mean over examples."
        )
        yield ""
        yield scores_markdown(scores, name)
        yield from _mixed_settings(scores, name)
        yield comparison_words(scores, name)
    paths = systems_with_paths(scores["systems"])
    if paths:
        yield "Where each system is:"
        yield ""
        yield from paths
        yield ""
    if len(_sets(scores)) > 1:
        yield from _over_sets_section(scores)
    yield from _settings_section(scores)


def comparison_words(scores: Mapping[str, Any], name: str = "test") -> str:
    """Return in words whether pruning paid on a test set; empty without the unpruned baseline."""
    metrics = HEADLINES.get(scores["task"], ())
    found = scores.get("comparisons", {})
    unpruned = unpruned_of(scores)
    if name not in _sets(scores) or unpruned not in found:
        return ""
    names = {row["slug"]: row["name"] for row in scores["systems"]}
    lines: list[str] = []
    for slug, sets in found.items():
        shown = [metric for metric in metrics if metric in sets[name]]
        words = [_difference_words(sets[name][metric], metric) for metric in shown]
        lines.append(f"- against {names[slug]}: {'; '.join(words)}.")
    verdict = _pruning_verdict(found[unpruned][name].get("loss"))
    best = _lowest_loss(scores, name)
    if best != "final":
        verdict += f" The system with the lowest loss is: {names[best]}."
    heading = f"{verdict} Differences of the result to each system on the same examples:".strip()
    return "\n".join([heading, "", *lines, ""])


def _pruning_verdict(loss: Mapping[str, Any] | None) -> str:
    """Return whether pruning changed the test loss, in words; empty without a loss."""
    if loss is None:
        return ""
    if loss["p_value"] is None:
        return (
            "The test examples are of one context, so no test can say whether pruning changed "
            "their loss."
        )
    if not _significant(loss) or loss["difference"] == 0:
        return "Pruning did not change the test loss significantly over these test examples."
    direction = "lower" if loss["difference"] < 0 else "higher"
    return (
        f"The pruned adapter's test loss is {direction} than the unpruned one's, and the "
        "difference is significant over these test examples. Each was trained once, so the test "
        "does not include the effect of another seed or stopping epoch."
    )


def _lowest_loss(scores: Mapping[str, Any], name: str) -> str:
    """Return the slug of the system with the lowest loss on a test set; "final" without losses."""
    values = {r["slug"]: r["sets"][name]["scores"].get("loss", {}) for r in scores["systems"]}
    losses = {slug: score["value"] for slug, score in values.items() if score}
    return lowest(losses) or "final"


def unpruned_of(scores: Mapping[str, Any]) -> str:
    """Return the slug of the unpruned baseline, which differs from the result only in pruning."""
    return scores.get("unpruned", "merged-finetuned")


def _difference_words(pair: Mapping[str, Any], metric: str) -> str:
    digits = 3 if metric in NATIVE else 1
    difference = f"{TITLES.get(metric, metric)} {pair['difference']:+.{digits}f}"
    if pair["low"] is None:
        return f"{difference} (one context: no test)"
    interval = f"[{pair['low']:+.{digits}f}, {pair['high']:+.{digits}f}]"
    note = "" if _significant(pair) else ", not significant"
    return f"{difference} {interval}, {_p_value_text(pair['p_value'])}{note}"


def _p_value_text(p_value: float) -> str:
    return "p < 0.01" if p_value < 0.01 else f"p {p_value:.2f}"


def _significant(pair: Mapping[str, Any]) -> bool:
    return pair["p_value"] is not None and pair["p_value"] < 0.05


def _mixed_settings(scores: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield a warning for every metric that was scored with different settings across systems."""
    for metric in _sets(scores)[name]["scores"]:
        kinds = {str(row["sets"][name]["scores"][metric]["settings"]) for row in scores["systems"]}
        if len(kinds) > 1:
            yield (
                f"The column {TITLES.get(metric, metric)} holds scores of different settings "
                "(tokenizer, model or rescaling), so do not compare them.\n"
            )


def _over_sets_section(scores: Mapping[str, Any]) -> Iterator[str]:
    shown = [m for m in HEADLINES.get(scores["task"], ()) if m in scores["systems"][0]["mean"]]
    yield "## Over the test sets: mean and worst"
    yield ""
    yield f"| system | {' | '.join(TITLES.get(m, m) for m in shown)} |"
    yield f"|---|{'---:|' * len(shown)}"
    for row in scores["systems"]:
        cells = [
            f"{_format_value(row['mean'][m], m)}, {_format_value(row['worst'][m]['value'], m)} "
            f"({in_markdown(row['worst'][m]['set'])})"
            for m in shown
        ]
        yield f"| {in_markdown(row['name'])} | {' | '.join(cells)} |"
    yield ""


def _settings_section(scores: Mapping[str, Any]) -> Iterator[str]:
    sets = _sets(scores)
    if not sets:
        return
    yield "## Settings of the scores"
    yield ""
    for name, first in sets.items():
        for metric, score in first["scores"].items():
            settings = ", ".join(f"{k}: {v}" for k, v in score["settings"].items())
            yield in_markdown(f"- {name}, {TITLES.get(metric, metric)}: {settings}")
    yield ""


def _leak_section(data: Mapping[str, Any]) -> Iterator[str]:
    leaks: Sequence[Mapping[str, Any]] = data.get("leaks", [])
    if leaks:
        yield "## Leakage"
        yield ""
        yield f"{len(leaks)} pairs of examples are in two splits, and the settings allow it:"
        yield ""
        for leak in leaks[:20]:
            first, second = (" ".join(leak[side]) for side in ("first", "second"))
            yield in_markdown(
                f"- {leak['kind']}: {first} and {second}, similarity {leak['similarity']:.2f}"
            )
        yield "" if len(leaks) <= 20 else "- ... (all in data.json)\n"


def finding_lines(ratio: Mapping[str, Any]) -> list[str]:
    """Return one line per finding about the run."""
    return [f"{one['name']}: {one['says']}" for one in ratio.get("findings", [])]


def _outcome_line(ratio: Mapping[str, Any]) -> str:
    verdicts = {
        "learned": "in the search, the ratio gained over the lowest ratio on examples that it was "
        "not chosen on; the scores show the effect after training",
        "flat": "no gain over the lowest ratio could be shown; the ratio is a guess",
        "never-fired": "the search was too short for one round, so no ratio was learned",
    }
    verdict = ratio["verdict"]
    interval = ratio.get("evidence", {}).get("ratio_interval")
    ends = (
        ""
        if interval is None
        else f" (over resampled examples: {interval[0]:.2f} to {interval[1]:.2f})"
    )
    meaning = verdicts.get(verdict, "")
    return f"Ratio **{ratio['ratio']:.3f}**{ends}, verdict **{verdict}**: {meaning}."


def _sets(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    return scores["systems"][0]["sets"] if scores["systems"] else {}


def _set_title(scores: Mapping[str, Any], name: str, one: Mapping[str, Any]) -> str:
    where = "" if name == "test" else f", test set {name}"
    return f"{scores['task']}, {one['language']}{where}, {one['n']} examples, seed {scores['seed']}"


def _score_cell(score: Mapping[str, Any], metric: str) -> str:
    if score["value"] is None:
        return NO_VALUE
    if score["low"] is None:
        return _format_value(score["value"], metric)
    ends = f"{_format_value(score['low'], metric)}, {_format_value(score['high'], metric)}"
    return f"{_format_value(score['value'], metric)} [{ends}]"


def _format_value(value: float, metric: str) -> str:
    return f"{value:.2f}" if metric in NATIVE else f"{value:.1f}"


def _zeros_titles(scores: Mapping[str, Any]) -> list[str]:
    """Return the title of the column of zeros, if the zeros of any system are known."""
    known = any(row.get("zeros") is not None for row in scores["systems"])
    return ["zeros (%)"] if known else []


def _zeros_cell(row: Mapping[str, Any]) -> str:
    return NO_VALUE if row.get("zeros") is None else f"{100 * row['zeros']:.1f}"
