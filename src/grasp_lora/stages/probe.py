"""Stage `probe`: two adapters -> the weights to merge them by, from losses of untrained merges.

This is our departure from arXiv 2601.06702, which adds the adapters up. A sum is too large, and
pruning then seems to help only because it makes the merge smaller.

Option `choice` is "weights" (the weights and the strength of a merge that is trained afterwards) or
"shares" (the target adapter's share in a post-hoc merge, which is not trained). The folder holds
`weights.json`: the weights, the losses they were chosen by, what was left out as its loss is not
finite, and the evidence.

With choice "ratio" the only input is a finished `adapter`. It is pruned at the ratios of `RATIOS`
and measured, without any training, and `ratio.json` says whether one of them gains. With choice
"rank" the `adapter` is measured as its best fit of lower ranks, and `rank.json` holds the smallest
rank that is not worse by one standard error.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.base.files import write_json
from grasp_lora.core.evidence.crossfit import gain_of_best, within_one_error_of_best
from grasp_lora.core.evidence.groups import Gain
from grasp_lora.core.lora import average_weights
from grasp_lora.core.pruning.importance import READS_ROWS
from grasp_lora.core.pruning.n_of_m import known_ratio
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.workbench.context import POOLS, Context
from grasp_lora.workbench.merge_probes import (
    EXAMPLES,
    MERGE,
    UNTRAINED_MERGES,
    WHOLE,
    Probed,
    UntrainedMerge,
    mean_losses,
    measure,
    measure_ranks,
    measure_ratios,
    weights_of,
)
from grasp_lora.workbench.processes import is_main

SHARES: Mapping[float, UntrainedMerge] = {
    share: UntrainedMerge("weights", (1 - share, share))
    for share in (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
}
"""Share of the target adapter in a post-hoc merge -> the merge; its weights sum to 1."""
SHARE_EXAMPLES = 48
_WEIGHTED = {n: one for n, one in UNTRAINED_MERGES.items() if one.group in ("merge", "weights")}


RATIOS = (0.2, 0.4, 0.6, 0.8)
RATIO_EXAMPLES = 16
RANKS = (1, 2, 4, 8, 16, 32)
RANK_EXAMPLES = 48


def run(work: Work) -> Mapping[str, Any]:
    """Choose the weights, or judge ratios, and write what was found.

    Raises:
        ValueError: an adapter does not fit the backbone, there are fewer than 4 examples, or no
            merge has a finite loss.
    """
    began = time.perf_counter()
    choice = work.stage.options["choice"]
    if choice in _OF_ONE:
        found = _OF_ONE[choice](work)
        if is_main():
            write_json(work.out / f"{choice}.json", found)
        forwards = len(found["rows"]) * len(found["losses"])
        return {"seconds": time.perf_counter() - began, "forwards": forwards}
    choose = {"weights": _chosen_weights, "shares": _chosen_share}[choice]
    found, gain = choose(work)
    evidence = None
    if gain is not None:
        evidence = {"gain": gain.gain, "standard_error": gain.error, "shown": gain.shown}
    if is_main():
        write_json(work.out / "weights.json", found | {"evidence": evidence})
    forwards = len(found["rows"]) * len(found["losses"])
    return {"seconds": time.perf_counter() - began, "forwards": forwards}


def _chosen_weights(work: Work) -> tuple[dict[str, Any], Gain | None]:
    """Return the average, unless other weights are better on examples they were not chosen on.

    Eleven merges that differ in weights and strength are measured untrained on 16 examples. The one
    with the lowest loss is taken if such choices gain on examples of other contexts, or if the
    average has no finite loss.
    """
    context = work.context
    with context.clock.span("probe"):
        found = measure(context, (work.inputs["source"], work.inputs["target"]), _WEIGHTED,
                        EXAMPLES)  # fmt: skip
    means = mean_losses(found.losses)
    others = {name: values for name, values in found.losses.items() if name != MERGE}
    gain = gain_of_best(others, {MERGE: found.losses[MERGE]}, found.groups)
    shown = not math.isfinite(means[MERGE]) or (gain is not None and gain.shown)
    best = lowest({name: means[name] for name in others}) if shown else MERGE
    assert best is not None, "another merge has a finite loss"
    weights = weights_of(best, average_weights(2))
    context.reporter.say(f"merge weights {list(weights)}: {best if shown else 'the average'}")
    return _chosen(context, found, best, weights), gain


def _chosen_share(work: Work) -> tuple[dict[str, Any], Gain | None]:
    """Return the weights of a post-hoc merge, chosen by the losses of `SHARES`.

    The input `source` is the source adapter fine-tuned on the target examples. The candidates are
    all shares that are at most one standard error worse than the best. The candidate nearest to one
    half is taken, so the result is the plain average unless the losses speak against it. The
    evidence is the gain of the best share over share 0, on examples it was not chosen on.
    """
    context = work.context
    variants = {f"share {share:g}": variant for share, variant in SHARES.items()}
    with context.clock.span("probe"):
        found = measure(context, (work.inputs["source"], work.inputs["target"]), variants,
                        SHARE_EXAMPLES)  # fmt: skip
    mean_losses(found.losses)  # at least one is finite
    losses = found.losses
    alone, *others = variants
    gain = gain_of_best(
        {name: losses[name] for name in others}, {alone: losses[alone]}, found.groups
    )
    good = within_one_error_of_best(losses, found.groups)
    distance = {name: abs(share - 0.5) for name, share in zip(variants, SHARES, strict=True)}
    best = min(good, key=lambda name: distance[name])
    weights = variants[best].weights
    assert weights is not None, "every share has weights"
    context.reporter.say(f"merge weights {list(weights)}: {best} of the target adapter")
    return _chosen(context, found, best, weights), gain


def _judged_ratios(work: Work) -> dict[str, Any]:
    """Return the losses of the adapter at each ratio, and whether the best ratio gains over none.

    The verdict is "learned" if the best ratio gains on examples of contexts that it was not chosen
    on, and "flat" otherwise.
    """
    context = work.context
    known = {known_ratio(context.config.structure, ratio) for ratio in RATIOS}
    ratios = sorted(known - {0.0})
    with context.clock.span("probe"):
        found = measure_ratios(context, work.inputs["adapter"], ratios, RATIO_EXAMPLES)
    whole = {0.0: found.losses[str(0.0)]}
    pruned = {ratio: found.losses[str(ratio)] for ratio in ratios}
    gain = gain_of_best({str(r): one for r, one in pruned.items()}, {"0": whole[0.0]}, found.groups)
    shown = gain is not None and gain.shown
    best = lowest({ratio: sum(one) / len(one) for ratio, one in (whole | pruned).items()})
    evidence = None if gain is None else {"gain": gain.gain, "standard_error": gain.error}
    return {
        "ratio": best if shown and best is not None else 0.0,
        "verdict": "learned" if shown else "flat",
        "trained": False,
        "evidence": evidence or {},
        "rows": found.ids,
        "groups": found.groups,
        "losses": found.losses,
    }


def _smallest_rank(work: Work) -> dict[str, Any]:
    """Return the losses of the adapter at lower ranks, and the smallest rank that will do.

    A rank will do if its losses are at most one standard error above the lowest. None keeps the
    adapter as it is.
    """
    context = work.context
    with context.clock.span("probe"):
        found = measure_ranks(context, work.inputs["adapter"], RANKS, RANK_EXAMPLES)
    within = within_one_error_of_best(found.losses, found.groups)
    ranks = [int(name) for name in within if name != WHOLE]
    return {"rank": min(ranks, default=None), "rows": found.ids, "groups": found.groups} | {
        "losses": found.losses
    }


_OF_ONE: Mapping[str, Callable[[Work], dict[str, Any]]] = {
    "ratio": _judged_ratios,
    "rank": _smallest_rank,
}
"""Choice -> what judges one adapter."""


def _chosen(
    context: Context, found: Probed, best: str, weights: tuple[float, ...]
) -> dict[str, Any]:
    """Return the content of `weights.json` but for the evidence, and say which merges are out."""
    out = not_finite(mean_losses(found.losses))
    if out:
        context.reporter.say(f"left out, as their loss is not finite: {', '.join(out)}")
    return {
        "weights": weights,
        "variant": best,
        "left_out": out,
        "rows": found.ids,
        "groups": found.groups,
        "losses": found.losses,
    }


def _settings(stage: Stage) -> tuple[str, ...]:
    encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
    own = ("merge.kind", "merge.rank", "mask_unit", "controller.probe_rows")
    if stage.options["choice"] in _OF_ONE:
        own = ("importance", "structure", "controller.probe_rows")
    return ("seed", "model", *own, "evaluate.batch_size", *encoding)


def pool_of(stage: Stage) -> tuple[Split, ...]:
    """Return the sets of examples that probes are drawn from."""
    return tuple(("target", split) for split in POOLS[stage.config.controller.probe_rows])


def _examples(stage: Stage, _known: tuple[Split, ...]) -> tuple[Split, ...]:
    # The input norms of the activation rule are those of the train examples.
    train = (("target", "train"),) if stage.options["choice"] == "ratio" else ()
    return (*train, *pool_of(stage))


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    pool = pool_of(stage)
    tried, most = (len(_WEIGHTED), EXAMPLES)
    if stage.options["choice"] == "shares":
        tried, most = len(SHARES), SHARE_EXAMPLES
    if stage.options["choice"] == "ratio":
        tried, most = 1 + len(RATIOS), RATIO_EXAMPLES
    if stage.options["choice"] == "rank":
        tried, most = 1 + len(RANKS), RANK_EXAMPLES
    count = tried * min(most, sizes.examples(*pool))
    return Cost(0, round(count * sizes.length(*pool)), count) + _norms(stage, sizes)


def _norms(stage: Stage, sizes: Sizes) -> Cost:
    """Return the cost of what masks are cut by and the train examples are read for."""
    needed = stage.options["choice"] == "ratio" and stage.config.importance in READS_ROWS
    return sizes.reading(1 if needed else 0, ("target", "train"))


PROBE = Kind(1, _settings, _examples, run, _cost)
