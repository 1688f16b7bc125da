"""Present the outcome and the scores of a run to people, in words and tables.

This module reads records only. No number of the run depends on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.base.words import in_markdown
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
    for name, first in sets_of(scores).items():
        shown = [m for m in HEADLINES.get(scores["task"], ()) if m in first["scores"]]
        table = Table(title=cell(set_title(scores, name, first)))
        table.add_column("system", overflow="fold")
        for title in (*(TITLES.get(m, m) for m in shown), *zeros_titles(scores)):
            table.add_column(title, justify="right", no_wrap=True)
        for row in scores["systems"]:
            found = [row["sets"][name]["scores"][metric]["value"] for metric in shown]
            cells = [
                NO_VALUE if value is None else format_value(value, metric)
                for metric, value in zip(shown, found, strict=True)
            ]
            table.add_row(
                cell(row["name"]), *cells, *(zeros_cell(row) for _ in zeros_titles(scores))
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


def difference_lines(scores: Mapping[str, Any], name: str = "test") -> dict[str, str]:
    """Return slug -> the differences of the result to that system on a test set, in words."""
    metrics = HEADLINES.get(scores["task"], ())
    names = {row["slug"]: row["name"] for row in scores["systems"]}
    lines: dict[str, str] = {}
    for slug, tested in scores.get("comparisons", {}).items():
        pairs = tested[name]
        words = [_difference_words(pairs[metric], metric) for metric in metrics if metric in pairs]
        lines[slug] = f"against {names[slug]}: {'; '.join(words)}."
    return lines


def verdict_words(scores: Mapping[str, Any], name: str = "test") -> str:
    """Return whether pruning changed the loss on a test set; empty without the unpruned system."""
    found, unpruned = scores.get("comparisons", {}), unpruned_of(scores)
    if name not in sets_of(scores) or unpruned not in found:
        return ""
    names = {row["slug"]: row["name"] for row in scores["systems"]}
    verdict = _pruning_verdict(found[unpruned][name].get("loss"))
    best = _lowest_loss(scores, name)
    lowest_one = "" if best == "final" else f"The system with the lowest loss is: {names[best]}."
    return f"{verdict} {lowest_one}".strip()


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


def finding_lines(ratio: Mapping[str, Any]) -> list[str]:
    """Return one line per finding about the run."""
    return [f"{one['name']}: {one['says']}" for one in ratio.get("findings", [])]


def outcome_line(ratio: Mapping[str, Any]) -> str:
    """Return the ratio, how sure it is, and what its verdict means."""
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
    told = f": {meaning}" if meaning else ""
    return f"Ratio {ratio['ratio']:.3f}{ends}, verdict {verdict}{told}."


def sets_of(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return test set -> what the first system has for it."""
    return scores["systems"][0]["sets"] if scores["systems"] else {}


def set_title(scores: Mapping[str, Any], name: str, one: Mapping[str, Any]) -> str:
    """Return the title of a test set's scores."""
    where = "" if name == "test" else f", test set {name}"
    return f"{scores['task']}, {one['language']}{where}, {one['n']} examples, seed {scores['seed']}"


def score_cell(score: Mapping[str, Any], metric: str) -> str:
    """Return a score with its interval in brackets, where it has one."""
    if score["value"] is None:
        return NO_VALUE
    if score["low"] is None:
        return format_value(score["value"], metric)
    ends = f"{format_value(score['low'], metric)}, {format_value(score['high'], metric)}"
    return f"{format_value(score['value'], metric)} [{ends}]"


def format_value(value: float, metric: str) -> str:
    """Return a score as tables show it."""
    return f"{value:.2f}" if metric in NATIVE else f"{value:.1f}"


def zeros_titles(scores: Mapping[str, Any]) -> list[str]:
    """Return the title of the column of zeros, if the zeros of any system are known."""
    known = any(row.get("zeros") is not None for row in scores["systems"])
    return ["zeros (%)"] if known else []


def zeros_cell(row: Mapping[str, Any]) -> str:
    """Return the zeros of a system in per cent."""
    return NO_VALUE if row.get("zeros") is None else f"{100 * row['zeros']:.1f}"
