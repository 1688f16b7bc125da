"""Find problems in a run from its own numbers; each finding has its evidence and a remedy.

Our departure from arXiv 2601.06702, which reports the ratio alone. Every finding is computed from
what a run measures anyway. If the measurements are too few, there is no finding.
"""

import math
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.groups import LEVEL, Gain, critical_value, group_of, mean_gain
from grasp_lora.core.evidence.history import RoundRecord, finite_trials
from grasp_lora.core.evidence.verdict import Verdict

FindingName: TypeAlias = Literal[
    "at-bound",
    "thrashing",
    "over-pruned",
    "overfitting",
    "undertrained",
    "unrepresentative",
    "coarse-reward",
    "never-fired",
    "not-worth-merging",
    "empty-answers",
]

NEAR_BOUND = 0.02
"""A ratio this close to a bound counts as at the bound."""
THRASHING = 0.1
"""Mean fraction of entries that commits may exchange beyond the change of the ratio."""
COARSE = 1 / 3
"""Fraction of tied pairs of trials above which a reward is too coarse to rank ratios."""
MANY_EMPTY = 0.05
"""Fraction of empty answers from which a system is named."""
_POWER = 0.84  # 80 % quantile of a standard normal
_LEAST_GROUPS = 4  # of examples of a kind, for a test between kinds


@dataclass(frozen=True)
class Finding:
    """A problem of a run that the user should know.

    Attributes:
        name: name of the problem.
        says: message with the problem and what to do.
        evidence: name -> number behind the message.
    """

    name: FindingName
    says: str
    evidence: Mapping[str, float | int | str]


def never_fired(verdict: Verdict) -> Finding | None:
    """Return a finding if the search had no round."""
    if verdict != "never-fired":
        return None
    return Finding(
        "never-fired",
        "the search was too short for one round, so no ratio was learned: raise "
        "train.search.epochs or lower controller.rounds",
        {"rounds": 0},
    )


def at_bound(ratio: float, verdict: Verdict, config: ControllerConfig) -> Finding | None:
    """Return a finding if a learned ratio lies at an end of the range; a `low` of 0 is no end."""
    if verdict != "learned":
        return None
    evidence = {"ratio": ratio, "low": config.low, "high": config.high}
    if ratio >= config.high - NEAR_BOUND:
        return Finding(
            "at-bound",
            f"the ratio {ratio:.3f} is at the upper end of the range, so a larger one may be "
            f"better: raise controller.high (now {config.high:g})",
            evidence,
        )
    if config.low > 0 and ratio <= config.low + NEAR_BOUND:
        return Finding(
            "at-bound",
            f"the ratio {ratio:.3f} is at the lower end of the range, so a smaller one may be "
            f"better: lower controller.low (now {config.low:g})",
            evidence,
        )
    return None


def thrashing(
    records: Sequence[RoundRecord], flipped: Sequence[int], entries: int
) -> Finding | None:
    """Return a finding if commits exchange more entries than the change of the ratio requires.

    Args:
        records: all rounds, in order.
        flipped: number of entries that each round changed between kept and pruned, in order.
        entries: number of entries of the adapter.
    """
    before = 0.0
    excess: list[float] = []
    for record, count in zip(records, flipped, strict=True):
        if record.committed:
            excess.append(count / entries - abs(record.mask_ratio - before))
        before = record.mask_ratio
    later = excess[1:]  # the first mask exchanges no entries
    if len(later) < 2 or statistics.fmean(later) <= THRASHING:
        return None
    mean = statistics.fmean(later)
    return Finding(
        "thrashing",
        f"each commit exchanged {mean:.0%} of the entries beyond the change of the ratio, so the "
        "ratio was learned under masks that do not last: set importance: magnitude, or lower "
        "train.search.learning_rate",
        {"mean_excess_share": mean, "largest_excess_share": max(later), "commits": len(excess)},
    )


def coarse_reward(records: Sequence[RoundRecord]) -> Finding | None:
    """Return a finding if many trials of a round have exactly equal losses.

    A task score of few examples often takes few distinct values.

    Args:
        records: all rounds.
    """
    pairs = tied = 0
    for record in records:
        # Two trials of one ratio in a round have equal losses, so a ratio counts once.
        tilts = record.tilts or ((),) * len(record.candidates)
        tried = zip(record.candidates, tilts, strict=True)
        means = dict(zip(tried, record.losses, strict=True))
        known = [mean for mean in means.values() if mean is not None]
        for one, other in combinations(known, 2):
            pairs += 1
            tied += one == other
    if not pairs or tied / pairs <= COARSE:
        return None
    return Finding(
        "coarse-reward",
        f"{tied} of {pairs} pairs of ratios had exactly the same reward, so their order is random: "
        "use controller.reward: loss, a finer score (chrf), or more controller.rows",
        {"tied_pairs": tied, "pairs": pairs},
    )


def overfitting(best_step: int, steps: int) -> Finding | None:
    """Return a finding if no training step improved on the pruned merge.

    Args:
        best_step: optimizer step that was kept, counted over the final run and the search that it
            continues.
        steps: number of optimizer steps of both together.
    """
    if best_step != 0 or steps == 0:
        return None
    return Finding(
        "overfitting",
        "the dev loss was lowest before the first training step, so training only raised it and "
        "the pruned merge was kept untrained: lower "
        "train.finetune.learning_rate, or add target examples",
        {"best_step": best_step, "steps": steps},
    )


def undertrained(
    runs: Mapping[str, Sequence[Sequence[float]]],
    groups: Mapping[str, Sequence[Hashable]] | None = None,
    sections: Mapping[str, str] | None = None,
) -> Finding | None:
    """Return a finding if the dev loss of a fine-tuning run was still falling at its last epoch.

    More epochs may improve such a run, so comparisons with it are not final. The one-sided 5 %
    level holds for all runs together (Bonferroni).

    Args:
        runs: name -> loss of each dev example at every evaluation of the run, in nats, in order.
        groups: name -> group of each dev example; without groups each example is its own.
        sections: name -> settings of its training, if they are not those of `train.finetune`.
    """
    trained = {name: rows for name, rows in runs.items() if len(rows) > 1}
    falling: dict[str, Gain] = {}
    for name, rows in trained.items():
        means = [statistics.fmean(losses) for losses in rows]
        earlier = [mean for mean in means[:-1] if math.isfinite(mean)]
        if not earlier or min(earlier) <= means[-1]:
            continue
        found = _significant_gap(rows[-2], rows[-1], (groups or {}).get(name), len(trained))
        if found is not None:
            falling[name] = found
    if not falling:
        return None
    names = sorted(falling, key=lambda each: -falling[each].gain)
    fell = falling[names[0]]
    listed = "; ".join(names)
    settings = sorted({(sections or {}).get(name, "train.finetune") for name in names})
    return Finding(
        "undertrained",
        f"the dev loss was still falling in the last epoch: {listed} (that of the {names[0]} fell "
        f"by {fell.gain:.3f} nats in the last epoch, standard error {fell.error:.3f}), so longer "
        "training may improve it: set more epochs or a larger learning_rate in "
        f"{' and '.join(settings)}",
        {
            "runs": listed,
            "loss_less": fell.gain,
            "standard_error": fell.error,
            "rows": len(runs[names[0]][-1]),
            "groups": fell.groups,
        },
    )


def empty_answers(systems: Mapping[str, tuple[int, int]]) -> Finding | None:
    """Return a finding if a system often gives an empty answer.

    The empty answer is often the single most likely answer of a weak model, although all longer
    answers together are far more likely. The loss does not show this, because it is given the first
    token of the answer.

    Args:
        systems: name -> (number of empty answers, number of answers), over all test sets.
    """
    many = {name: n for name, n in systems.items() if n[0] and n[0] >= MANY_EMPTY * n[1]}
    if not many:
        return None
    names = sorted(many, key=lambda name: -many[name][0] / many[name][1])
    listed = "; ".join(f"{name} {many[name][0]} of {many[name][1]}" for name in names)
    return Finding(
        "empty-answers",
        f"empty answers: {listed}. Every text score counts them as 0, and the loss does not show "
        "them, so the systems differ in how often they answer at all: set "
        "evaluate.min_new_tokens: 1 to require a token of every answer, here and in later use",
        {"systems": listed},
    )


def over_pruned(
    pruned: Sequence[float], whole: Sequence[float], groups: Sequence[Hashable] | None = None
) -> Finding | None:
    """Return a finding if the final adapter is worse on dev than the same run unpruned.

    Args:
        pruned: loss of each dev example under the final adapter, in nats.
        whole: loss of each dev example under the merge fine-tuned unpruned, in nats. Both adapters
            are taken at their best epoch.
        groups: group of each dev example; None makes each its own group.
    """
    found = _significant_gap(pruned, whole, groups)
    if found is None:
        return None
    return Finding(
        "over-pruned",
        f"on dev the pruned adapter loses {found.gain:.3f} nats (standard error {found.error:.3f}) "
        "against the same fine-tuning unpruned: use the unpruned one",
        _more(found, len(pruned)),
    )


def not_worth_merging(
    final: Sequence[float],
    alone: Mapping[str, Sequence[float]],
    groups: Sequence[Hashable] | None = None,
) -> Finding | None:
    """Return a finding if an unmerged adapter is better on dev than the final adapter.

    The one-sided 5 % level holds for all of them together (Bonferroni).

    Args:
        final: loss of each dev example under the final adapter, in nats.
        alone: name -> loss of each dev example under a single adapter, fine-tuned on the target
            examples, in nats.
        groups: group of each dev example; None makes each its own group.
    """
    worse = {
        name: found
        for name, losses in alone.items()
        if (found := _significant_gap(final, losses, groups, len(alone))) is not None
    }
    if not worse:
        return None
    name = max(worse, key=lambda each: worse[each].gain)
    found = worse[name]
    return Finding(
        "not-worth-merging",
        f"on dev the {name} is better than the result by {found.gain:.3f} nats (standard error "
        f"{found.error:.3f}): use the {name}, because the merge does not pay",
        {"better": name} | _more(found, len(final)),
    )


def _more(found: Gain, rows: int) -> dict[str, float | int | str]:
    return {
        "loss_more": found.gain,
        "standard_error": found.error,
        "rows": rows,
        "groups": found.groups,
    }


def unrepresentative(
    records: Sequence[RoundRecord],
    ratio: float,
    micro_dev: Collection[int],
    groups: Sequence[Hashable] | None = None,
    window: float = 0.15,
) -> Finding | None:
    """Return a finding if micro-dev examples and dev examples gain differently near the ratio.

    The gain of an example is the loss of the lowest ratio of a round less the loss near the chosen
    ratio. Welch's test, over groups of examples, compares the mean gains at the two-sided 5 %
    level. The finding is rare: with 16 and 50 examples the test has a power of 80 % only from a
    difference of 0.8 standard deviations of the examples' gains. The evidence names the smallest
    difference that it would find with a power of 80 %.

    Args:
        records: all rounds, on examples of both kinds.
        ratio: the chosen ratio.
        micro_dev: ids of the micro-dev examples; all others are dev examples.
        groups: group of each example, by its id; None makes each its own group.
        window: trials at most this far from the ratio count as trials of it.
    """
    gains: dict[int, list[float]] = {}
    for record in records:
        trials = finite_trials(record)
        if not trials:
            continue
        low, reference = min(trials, key=lambda trial: trial[0])
        for tried, losses in trials:
            if abs(tried - ratio) > window or tried - low < 0.05:
                continue
            for example, a, b in zip(record.rows, reference, losses, strict=True):
                gains.setdefault(example, []).append(a - b)
    micro, dev = (_mean_of_kind(gains, micro_dev, micro, groups) for micro in (True, False))
    if micro is None or dev is None:
        return None
    error = math.hypot(micro.error, dev.error)
    difference = micro.gain - dev.gain
    critical = _welch_critical_value(micro, dev) if error > 0 else math.inf
    if abs(difference) <= critical * error or error == 0:
        return None
    return Finding(
        "unrepresentative",
        f"near the ratio the micro-dev examples gain {difference:+.3f} nats more than the dev "
        f"examples (standard error {error:.3f}): draw another micro-dev set, or probe on both "
        "(controller.probe_rows: micro-dev+dev)",
        {
            "difference": difference,
            "standard_error": error,
            "micro_dev_groups": micro.groups,
            "dev_groups": dev.groups,
            "seen_four_times_in_five_from": (critical + _POWER) * error,
        },
    )


def _mean_of_kind(
    gains: Mapping[int, Sequence[float]],
    micro_dev: Collection[int],
    micro: bool,
    groups: Sequence[Hashable] | None,
) -> Gain | None:
    """Return the mean gain of micro-dev or dev examples; None with fewer than four groups."""
    own = {e: statistics.fmean(values) for e, values in gains.items() if (e in micro_dev) is micro}
    found = mean_gain(list(own.values()), [group_of(example, groups) for example in own])
    return found if found is not None and found.groups >= _LEAST_GROUPS else None


def _welch_critical_value(one: Gain, other: Gain) -> float:
    """Return the two-sided 5 % critical value of Welch's test."""
    total = (one.error**2 + other.error**2) ** 2
    freedom = total / sum(each.error**4 / (each.groups - 1) for each in (one, other))
    return critical_value(freedom, LEVEL / 2)


def _significant_gap(
    losses: Sequence[float],
    reference: Sequence[float],
    groups: Sequence[Hashable] | None,
    tests: int = 1,
) -> Gain | None:
    """Return the mean of the losses less the reference, if significantly above 0.

    The test is one-sided over groups of examples, at the 5 % level divided by the number of tests.
    Returns None if it fails, with fewer than two groups, or if a difference is not finite.
    """
    if len(losses) != len(reference):
        raise ValueError(
            f"losses are compared example by example, got {len(losses)} and {len(reference)}; "
            "measure both on the same examples"
        )
    found = mean_gain([a - b for a, b in zip(losses, reference, strict=True)], groups)
    return found if found is not None and found.above_zero(LEVEL / tests) else None
