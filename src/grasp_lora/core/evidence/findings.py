"""What a run's own numbers say against it: each finding with its evidence and what to do.

Departure from arXiv 2601.06702, which reports the ratio alone. Everything here is computed from
what a run has measured anyway; where it did not measure enough there is no finding.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.crossfit import critical, standard_error
from grasp_lora.core.evidence.history import RoundRecord, winsorised
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
"""Ratios this close to a bound are at it."""
THRASHING = 0.1
"""Share of entries that a commit may exchange beyond what the change of the ratio needs."""
COARSE = 1 / 3
"""Share of tied pairs of trials from which a reward is too coarse to rank ratios by."""
MANY_EMPTY = 0.05
"""Share of empty answers from which they are spoken of."""
_POWER = 0.84  # 80 % of a standard normal lie below
_TWO_SIDED = 1.96


@dataclass(frozen=True)
class Finding:
    """Something the user should know.

    Attributes:
        name: one word for it.
        says: what was seen, and what to do.
        evidence: the numbers behind it.
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
    """Return a finding if a learned ratio lies at an end of the range; 0 is no end to widen."""
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
    """Return a finding if commits exchange more entries than the change of ratio asks for.

    Args:
        records: all rounds.
        flipped: entries that changed side at each round, in the same order.
        entries: of the adapter.
    """
    before = 0.0
    excess: list[float] = []
    for record, count in zip(records, flipped, strict=True):
        if record.committed:
            excess.append(count / entries - abs(record.mask_ratio - before))
        before = record.mask_ratio
    later = excess[1:]  # the first mask exchanges nothing
    if len(later) < 2 or statistics.fmean(later) <= THRASHING:
        return None
    mean = statistics.fmean(later)
    return Finding(
        "thrashing",
        f"each commit exchanged {mean:.0%} of the entries beyond the change of the ratio, so the "
        "ratio was learned under masks that do not last: try importance: magnitude, or a lower "
        "train.search.learning_rate",
        {"mean_excess_share": mean, "largest_excess_share": max(later), "commits": len(excess)},
    )


def coarse_reward(records: Sequence[RoundRecord]) -> Finding | None:
    """Return a finding if many trials of a round cost exactly the same, as a score of few rows may.

    Args:
        records: all rounds.
    """
    pairs = tied = 0
    for record in records:
        # Of a ratio tried twice in a round the losses are equal by right.
        means = dict(zip(record.candidates, record.losses, strict=True))
        known = [mean for mean in means.values() if mean is not None]
        for one, other in combinations(known, 2):
            pairs += 1
            tied += one == other
    if not pairs or tied / pairs <= COARSE:
        return None
    return Finding(
        "coarse-reward",
        f"{tied} of {pairs} pairs of ratios had exactly the same reward, so their order was luck: "
        "use controller.reward: loss, a finer score (chrf), or more controller.rows",
        {"tied_pairs": tied, "pairs": pairs},
    )


def overfitting(best_step: int, steps: int) -> Finding | None:
    """Return a finding if no step of training improved on the pruned merge.

    Args:
        best_step: optimizer step that was kept, of the final run and the search it went on from.
        steps: steps of both.
    """
    if best_step != 0 or steps == 0:
        return None
    return Finding(
        "overfitting",
        "the dev loss was lowest before the first step of training, so training only harmed "
        "and the pruned merge was kept untrained: lower train.finetune.learning_rate, or "
        "add target rows",
        {"best_step": best_step, "steps": steps},
    )


def undertrained(runs: Mapping[str, Sequence[Sequence[float]]]) -> Finding | None:
    """Return a finding if a fine-tuning was still getting better when its epochs were over.

    What such a run could have become is not known, so neither is what is better than it.

    Args:
        runs: name -> loss of each dev row at every evaluation of the run, in nats, in their order.
    """
    falling: dict[str, tuple[float, float]] = {}
    for name, rows in runs.items():
        means = [statistics.fmean(losses) for losses in rows]
        earlier = [mean for mean in means[:-1] if math.isfinite(mean)]
        if not earlier or min(earlier) <= means[-1]:
            continue
        if (found := _worse(rows[-2], rows[-1])) is not None:
            falling[name] = found
    if not falling:
        return None
    names = sorted(falling, key=lambda each: -falling[each][0])
    mean, error = falling[names[0]]
    listed = "; ".join(names)
    return Finding(
        "undertrained",
        f"still getting better when its epochs were over: {listed} (dev loss of the "
        f"{names[0]} down by {mean:.3f} nats in the last, standard error {error:.3f}), so it may "
        "be better than it looks here: give it more epochs or a larger learning_rate (section "
        "train of a target adapter, finetune of all else)",
        {
            "runs": listed,
            "loss_less": mean,
            "standard_error": error,
            "rows": len(runs[names[0]][-1]),
        },
    )


def empty_answers(systems: Mapping[str, tuple[int, int]]) -> Finding | None:
    """Return a finding if a system often ends its answer before it has begun.

    Nothing is often the single most likely answer of a weak model, though each longer one together
    is far more likely; the loss, which is told the answer's first token, does not see it.

    Args:
        systems: name -> (answers that are empty, answers), over all test sets.
    """
    many = {name: n for name, n in systems.items() if n[0] and n[0] >= MANY_EMPTY * n[1]}
    if not many:
        return None
    names = sorted(many, key=lambda name: -many[name][0] / many[name][1])
    listed = "; ".join(f"{name} {many[name][0]} of {many[name][1]}" for name in names)
    return Finding(
        "empty-answers",
        f"answered with nothing: {listed}. Every score of text counts these as 0, and the loss "
        "does not see them, so the systems differ in how often they answer at all: set "
        "evaluate.min_new_tokens: 1 to ask every one for a token, here and where it is used",
        {"systems": listed},
    )


def over_pruned(pruned: Sequence[float], whole: Sequence[float]) -> Finding | None:
    """Return a finding if the final adapter is worse on dev than the same run unpruned.

    Args:
        pruned: loss of each dev row under the final adapter, in nats.
        whole: likewise under the merge fine-tuned unpruned, both at their best epoch.
    """
    found = _worse(pruned, whole)
    if found is None:
        return None
    mean, error = found
    return Finding(
        "over-pruned",
        f"on dev the pruned adapter loses {mean:.3f} nats (standard error {error:.3f}) against the "
        "same fine-tuning unpruned: use the unpruned one",
        {"loss_more": mean, "standard_error": error, "rows": len(pruned)},
    )


def not_worth_merging(
    final: Sequence[float], alone: Mapping[str, Sequence[float]]
) -> Finding | None:
    """Return a finding if an adapter that was not merged is better on dev than the final one.

    Args:
        final: loss of each dev row under the final adapter, in nats.
        alone: name -> likewise under a single adapter, fine-tuned on the target rows.
    """
    worse = {
        name: found
        for name, losses in alone.items()
        if (found := _worse(final, losses)) is not None
    }
    if not worse:
        return None
    name = max(worse, key=lambda each: worse[each][0])
    mean, error = worse[name]
    return Finding(
        "not-worth-merging",
        f"on dev the {name} is better than the result by {mean:.3f} nats (standard error "
        f"{error:.3f}): use it, the merge is not worth having",
        {"better": name, "loss_more": mean, "standard_error": error, "rows": len(final)},
    )


def unrepresentative(
    records: Sequence[RoundRecord],
    ratio: float,
    micro_dev: Collection[int],
    config: ControllerConfig,
    window: float = 0.15,
) -> Finding | None:
    """Return a finding if micro-dev rows and dev rows see the ratio differently.

    What is compared is what each row gains near the ratio against the lowest trial of its round, by
    Welch's test at the two-sided 5 % level. It rarely fires: with 16 and 50 rows it sees four in
    five differences only from 0.8 of the rows' standard deviation on, and its evidence names the
    smallest difference that it would have seen so often.

    Args:
        records: all rounds, on rows of both kinds.
        ratio: the ratio found.
        micro_dev: ids of the micro-dev rows; all others are dev rows.
        config: settings of the controller.
        window: trials this near to the ratio stand for it.
    """
    gains: dict[int, list[float]] = {}
    for record in records:
        trials = list(zip(record.candidates, record.per_row, strict=True))
        low, reference = min(trials, key=lambda trial: trial[0])
        for tried, losses in trials:
            if abs(tried - ratio) > window or tried - low < 0.05:
                continue
            pairs = zip(record.rows, reference, losses, strict=True)
            kept = [(row, a - b) for row, a, b in pairs if a is not None and b is not None]
            values = winsorised([gap for _, gap in kept]) if kept else []
            for (row, _), gap in zip(kept, values, strict=True):
                gains.setdefault(row, []).append(gap)
    kinds = [
        [statistics.fmean(gaps) for row, gaps in gains.items() if (row in micro_dev) is micro]
        for micro in (True, False)
    ]
    if any(len(kind) < 4 for kind in kinds):
        return None
    errors = [standard_error(kind) for kind in kinds]
    error = math.hypot(*errors)
    difference = statistics.fmean(kinds[0]) - statistics.fmean(kinds[1])
    if error == 0 or abs(difference) <= _welch(errors, [len(kind) for kind in kinds]) * error:
        return None
    return Finding(
        "unrepresentative",
        f"near the ratio the micro-dev rows gain {difference:+.3f} nats more than the dev rows "
        f"(standard error {error:.3f}): draw another micro-dev set, or probe on both "
        "(controller.probe_rows)",
        {
            "difference": difference,
            "standard_error": error,
            "micro_dev_rows": len(kinds[0]),
            "dev_rows": len(kinds[1]),
            "seen_four_times_in_five_from": (_TWO_SIDED + _POWER) * error,
        },
    )


def _welch(errors: Sequence[float], counts: Sequence[int]) -> float:
    """Return the two-sided 5 % level of Welch's test."""
    total = sum(error**2 for error in errors)
    freedom = total**2 / sum(e**4 / (n - 1) for e, n in zip(errors, counts, strict=True))
    return critical(math.floor(freedom) + 1, _TWO_SIDED)


def _worse(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float] | None:
    """Return (mean, standard error) of how much worse the losses are, if that is beyond chance."""
    if len(losses) != len(reference):
        raise ValueError(
            f"losses are compared row by row, got {len(losses)} and {len(reference)}; measure both "
            "on the same rows"
        )
    gaps = [a - b for a, b in zip(losses, reference, strict=True)]
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return None
    mean, error = statistics.fmean(gaps), standard_error(gaps)
    return (mean, error) if mean > max(1e-9, critical(len(gaps)) * error) else None
