"""Before anything is trained: is a merge worth having, does it overshoot, is a ratio in sight?

Losses of the same few rows under each adapter alone, under merges of several weights and strengths,
and under pruned merges. Nothing is trained, so what training would make of each is not seen.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grasp_lora.adapters.folder import check_fits, read_adapter
from grasp_lora.base.files import write_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.controller.rounds import draw_examples
from grasp_lora.core.evidence.crossfit import Gain, gain_of_best, standard_error
from grasp_lora.core.lora import MergedModule, average_weights, merge
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.row_losses import row_losses
from grasp_lora.stages.search import POOLS
from grasp_lora.training.live import LiveAdapter, scored
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.given import say_other_bases
from grasp_lora.workbench.processes import is_main, join

ROWS = 16
MERGE = "merge"
"""Name of the merge as configured."""


@dataclass(frozen=True)
class Variant:
    """What is measured.

    Attributes:
        group: `single` (one adapter or none), `merge` (as configured), `weights` (other weights or
            strengths), `pruned`.
        weights: of source and target adapter; None for those of the configuration.
        factor: on what the merge adds to the backbone.
        ratio: fraction removed.
    """

    group: str
    weights: tuple[float, float] | None = None
    factor: float = 1.0
    ratio: float = 0.0


VARIANTS: Mapping[str, Variant] = {
    MERGE: Variant("merge"),
    "source alone": Variant("single", (1.0, 0.0)),
    "target alone": Variant("single", (0.0, 1.0)),
    "no adapter": Variant("single", factor=0.0),
    "source alone, x 0.75": Variant("single", (1.0, 0.0), 0.75),
    "source alone, x 0.5": Variant("single", (1.0, 0.0), 0.5),
    "weights 0.75 + 0.25": Variant("weights", (0.75, 0.25)),
    "weights 0.5 + 0.5": Variant("weights", (0.5, 0.5)),
    "weights 0.25 + 0.75": Variant("weights", (0.25, 0.75)),
    "weights 0.75 + 0.25, x 0.75": Variant("weights", (0.75, 0.25), 0.75),
    "weights 0.25 + 0.75, x 0.75": Variant("weights", (0.25, 0.75), 0.75),
    **{f"merge x {factor:g}": Variant("weights", None, factor) for factor in (0.25, 0.5, 0.75)},
    **{f"merge x {factor:g}": Variant("weights", None, factor) for factor in (0.9, 1.25)},
    **{f"ratio {n / 10:g}": Variant("pruned", ratio=n / 10) for n in range(1, 9)},
}
"""Name -> variant; 24 with the merge itself."""


def precheck(
    config: RunConfig,
    out: Path | None = None,
    rows: int = ROWS,
    context: Context | None = None,
) -> dict[str, Any]:
    """Measure every variant on the same rows and say what that advises.

    Args:
        config: the run's settings; names both adapters.
        out: receives `precheck.json`; None writes nothing.
        rows: how many micro-dev (and dev) rows are read, at least 4.
        context: data and backbone, if they are open already.

    Returns:
        What `precheck.json` holds: `advice` and `why`, the evidence of each comparison, and the
        losses of all variants.

    Raises:
        ValueError: the configuration names no two adapters, they do not fit, or there are fewer
            than 4 rows.
    """
    join(config)
    source, target = config.adapters.source, config.adapters.target
    if source is None or target is None:
        raise ValueError(
            f"a precheck compares two trained adapters, got adapters.source={source} and "
            f"adapters.target={target}; set both (grasp-lora train makes one)"
        )
    if rows < 4:
        raise ValueError(f"a precheck needs at least 4 rows, got {rows}; raise --rows")
    for folder in (source, target):
        read_adapter(folder)
    context = context or open_context(config)
    say_other_bases(context, (source, target))
    began = time.perf_counter()
    ids, losses = measure(context, (source, target), VARIANTS, rows)
    found = {"rows": ids} | conclusion(losses, usual_weights(config))
    found |= {
        "forwards": len(VARIANTS) * len(ids),
        "share_of_run": _share_of_run(context, len(VARIANTS) * len(ids)),
        "seconds": time.perf_counter() - began,
    }
    if out is not None and is_main():
        write_json(out / "precheck.json", found)
    return found


def usual_weights(config: RunConfig) -> tuple[float, ...]:
    """Return the weights of the merge as configured; where they are to be learned, the average."""
    given = config.merge.weights
    return average_weights(2) if given is None or given == "auto" else tuple(given)


def measure(
    context: Context, folders: tuple[Path, Path], variants: Mapping[str, Variant], rows: int
) -> tuple[list[str], dict[str, list[float]]]:
    """Return the ids of the rows that were drawn, and each variant's losses on them, in nats.

    Args:
        context: data and backbone.
        folders: of the source and of the target adapter.
        variants: name -> what is measured.
        rows: how many are drawn from what the controller probes, or all if there are fewer.

    Raises:
        ValueError: an adapter does not fit, or there are fewer than 4 rows.
    """
    config = context.config
    loaded = [read_adapter(folder) for folder in folders]
    for folder, adapter in zip(folders, loaded, strict=True):
        check_fits(adapter, context.backbone.model, str(folder))
    pool = context.rows("target", POOLS[config.controller.probe_rows])
    if len(pool.encoded) < 4:
        raise ValueError(
            f"comparing merges needs at least 4 micro-dev or dev rows, got {len(pool.encoded)}; "
            "raise data.target.rows.micro_dev"
        )
    generator = torch.Generator().manual_seed(config.seed)
    drawn = draw_examples([e.group for e in pool.encoded], rows, generator)
    batches = pool.batches(drawn)
    kind, rank = config.merge.kind, config.merge.rank
    losses: dict[str, list[float]] = {}
    with context.narrator.bar("untrained merges", len(variants)) as done:
        for weights, alike in _by_weights(variants, usual_weights(config)).items():
            kept = [i for i, weight in enumerate(weights) if weight != 0]
            both = len(kept) > 1
            merged = merge(
                kind if both else "cat",
                [loaded[i].adapter for i in kept],
                [weights[i] for i in kept],
                rank if both else None,
            )
            losses |= _measure(context, merged, alike, batches, len(drawn))
            done(len(losses))
    return [pool.encoded[i].id for i in drawn], {name: losses[name] for name in variants}


def _by_weights(
    variants: Mapping[str, Variant], usual: tuple[float, ...]
) -> dict[tuple[float, ...], dict[str, Variant]]:
    grouped: dict[tuple[float, ...], dict[str, Variant]] = {}
    for name, variant in variants.items():
        grouped.setdefault(variant.weights or usual, {})[name] = variant
    return grouped


def _measure(
    context: Context,
    merged: Mapping[str, MergedModule],
    variants: Mapping[str, Variant],
    batches: Any,
    count: int,
) -> dict[str, list[float]]:
    """Return name -> loss of each row, for the variants of one merge."""
    found: dict[str, list[float]] = {}
    config = context.config
    unit = config.mask_unit if any(len(m.parts) > 1 for m in merged.values()) else "merged"
    with context.live(merged, unit) as live:
        for name, variant in variants.items():
            if variant.ratio == 0:
                with live.scaled(variant.factor):
                    found[name] = row_losses(live.model, batches, count)
        pruned = {name: one.ratio for name, one in variants.items() if one.ratio > 0}
        if pruned:
            found |= _pruned(context, live, pruned, batches, count)
    return found


def _pruned(
    context: Context, live: LiveAdapter, ratios: Mapping[str, float], batches: Any, count: int
) -> dict[str, list[float]]:
    rule = context.config.importance
    score = scored(IMPORTANCE[rule], context.norms(live, rule))
    found: dict[str, list[float]] = {}
    for name, masks in zip(ratios, live.masks(score, list(ratios.values())), strict=True):
        with live.trial(masks):
            found[name] = row_losses(live.model, batches, count)
    return found


def conclusion(losses: Mapping[str, list[float]], usual: tuple[float, ...]) -> dict[str, Any]:
    """Return advice and evidence from the losses of all variants.

    Three comparisons, each between the best of two groups, chosen on other rows than they are
    compared on; the first that is shown gives the advice:

    - a single adapter against every merge: `do-not-merge`;
    - pruned merges against all that are not pruned: `search`;
    - other weights and strengths against the merge as configured: `reweight`.

    Otherwise `merge`: as configured, and nothing in sight that a search could find.

    Args:
        losses: name in `VARIANTS` -> loss of each row, in nats.
        usual: the weights of the merge as configured.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for name, values in losses.items():
        groups.setdefault(VARIANTS[name].group, {})[name] = values
    whole = groups["merge"] | groups["weights"]
    compared = {
        "do-not-merge": (groups["single"], whole | groups["pruned"]),
        "search": (groups["pruned"], whole),
        "reweight": (groups["weights"], groups["merge"]),
    }
    evidence = {name: gain_of_best(*sides) for name, sides in compared.items()}
    advice = next((name for name, gain in evidence.items() if gain and gain.shown), MERGE)
    best = _lowest(compared[advice][0] if advice in compared else losses)
    return {
        "advice": advice,
        "best": best,
        "why": _why(advice, best, evidence, usual),
        "evidence": {
            name: None if gain is None else asdict(gain) | {"z": gain.z, "shown": gain.shown}
            for name, gain in evidence.items()
        },
        "variants": {
            name: {
                "group": VARIANTS[name].group,
                "loss": sum(values) / len(values),
                **_against(values, losses[MERGE]),
                "losses": values,
            }
            for name, values in losses.items()
        },
    }


def _lowest(group: Mapping[str, list[float]]) -> str:
    return min(group, key=lambda name: sum(group[name]))


def _against(values: list[float], reference: list[float]) -> dict[str, float]:
    gaps = [value - usual for value, usual in zip(values, reference, strict=True)]
    return {"difference": sum(gaps) / len(gaps), "standard_error": standard_error(gaps)}


def _why(
    advice: str, best: str, evidence: Mapping[str, Gain | None], usual: tuple[float, ...]
) -> str:
    found = evidence.get(advice)
    if found is None:
        return (
            "nothing measured beats the merge as configured on rows it was not chosen on: take the "
            "merge; a search may still find what training makes of a ratio"
        )
    by = f"by {found.gain:.3f} nats (standard error {found.error:.3f})"
    weights = list(weights_of(best, usual))
    return {
        "do-not-merge": f"{best} is better than every merge {by}: fine-tune it instead of merging",
        "search": f"pruned merges are better than all whole ones {by}: a search is worth its cost",
        "reweight": f"{best} is better than the merge as configured {by}: set merge.weights to "
        f"{weights}",
    }[advice]


def weights_of(name: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Return the merge weights that a variant without pruning stands for."""
    variant = VARIANTS[name]
    return tuple(round(weight * variant.factor, 4) for weight in variant.weights or usual)


def _share_of_run(context: Context, forwards: int) -> float:
    """Return the cost as a share of search and final run, a forward being half a training row."""
    config = context.config
    epochs = config.search.epochs + config.finetune.epochs
    return forwards / 2 / (epochs * max(1, len(context.examples("target", "train"))))
