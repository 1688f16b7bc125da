"""The precheck: tells before any training whether to merge, by which weights, and to search.

It measures untrained merges, so it does not tell how good a merge would be after training.
"""

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.choice import lowest, not_finite
from grasp_lora.base.files import touch, write_json
from grasp_lora.base.words import shown
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.evidence.crossfit import gain_of_best
from grasp_lora.core.evidence.groups import Gain, mean_gain
from grasp_lora.core.evidence.known import LEAST_GROUPS, known_rows
from grasp_lora.core.merge_kinds import UNWEIGHTED
from grasp_lora.workbench.asked import compare_prompts
from grasp_lora.workbench.beside import beside_target
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.fit import epoch_rows
from grasp_lora.workbench.given import say_other_bases
from grasp_lora.workbench.merge_probes import (
    BARE,
    EXAMPLES,
    MERGE,
    SOURCE,
    TARGET,
    UNTRAINED_MERGES,
    configured_weights,
    mean_losses,
    measure,
    weights_of,
)
from grasp_lora.workbench.processes import decided_by_main, is_main, join

PRECHECK_FILE = "precheck.json"
HELD = ("micro_dev", "dev")
"""Splits of the target that choose."""


def precheck(
    config: RunConfig,
    out: Path | None = None,
    rows: int = EXAMPLES,
    context: Context | None = None,
) -> dict[str, Any]:
    """Measure all untrained merges on the same examples, and return advice.

    Args:
        config: the run's settings; they name both adapters.
        out: receives `precheck.json`; None writes nothing.
        rows: number of micro-dev (and dev) examples to measure on, at least 4.
        context: examples and backbone, if they are open already.

    Returns:
        The content of `precheck.json`: `advice` and `why`, the evidence of each comparison, the
        losses of all variants, `known`, the examples that the target adapter may have been trained
        on (None if nothing shows any), and `prompts`, what each adapter makes of other prompts.

    Raises:
        ValueError: the configuration does not name both adapters, `merge.kind` has no weights, an
            adapter does not fit the backbone, there are fewer than 4 examples, or no variant has a
            finite loss.
        OSError: `out` cannot be written; raised before any work.
    """
    join(config)
    source, target = config.adapters.source, config.adapters.target
    if source is None or target is None:
        raise ValueError(
            f"a precheck compares two trained adapters, got adapters.source={shown(source)} and "
            f"adapters.target={shown(target)}; set both (grasp-lora train makes one)"
        )
    if config.merge.kind in UNWEIGHTED:
        raise ValueError(
            f"a precheck compares weights of the merge, but merge.kind {config.merge.kind!r} has "
            "none; give another kind: --set merge.kind=cat"
        )
    if rows < 4:
        raise ValueError(f"a precheck needs at least 4 examples, got {rows}; raise --rows")
    if out is not None:
        decided_by_main(lambda: touch(out / PRECHECK_FILE))
    adapters = [read_adapter(folder).adapter for folder in (source, target)]
    usual = configured_weights(config.merge.weights, adapters)
    context = context or open_context(config)
    say_other_bases(context, (source, target))
    began = time.perf_counter()
    probed = measure(context, (source, target), UNTRAINED_MERGES, rows)
    forwards = len(UNTRAINED_MERGES) * len(probed.ids)
    found = {"rows": probed.ids, "groups": probed.groups}
    found |= conclusion(probed.losses, usual, probed.groups)
    if config.recipe == "auto" and found["advice"] in ("search", "reweight"):
        found["why"] += " (with recipe: grasp; recipe: auto chooses weights and ratio itself)"
    known, read = _known(context, (source, target))
    prompts = {
        role: compare_prompts(context, role, folder, rows)
        for role, folder in (("source", source), ("target", target))
    }
    forwards += read + sum(one["forwards"] for one in prompts.values())
    found |= {
        "known": known,
        "prompts": prompts,
        "forwards": forwards,
        "share_of_run": _share_of_run(context, forwards),
        "seconds": time.perf_counter() - began,
    }
    if out is not None and is_main():
        write_json(out / PRECHECK_FILE, found)
    return found


def _known(context: Context, folders: tuple[Path, Path]) -> tuple[dict[str, Any] | None, int]:
    """Return what the target adapter may have been trained on, and how many examples were read."""
    held = [e for split in HELD for e in context.examples("target", split)]
    if len({example.group for example in held}) < LEAST_GROUPS:
        return None, 0
    variants = {name: UNTRAINED_MERGES[name] for name in (TARGET, SOURCE, BARE)}
    probed = measure(context, folders, variants, len(held), HELD)
    own, *others = (probed.losses[name] for name in variants)
    known = known_rows(own, others, probed.groups)
    read = len(variants) * len(probed.ids)
    if known is None:
        return None, read
    return asdict(known) | {"rows": [probed.ids[i] for i in known.rows], "all": len(own)}, read


def conclusion(
    losses: Mapping[str, list[float]],
    usual: tuple[float, ...],
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Return advice and evidence from the losses of all variants.

    There are three comparisons, each between the best variants of two sides. The best variants are
    chosen on examples of other contexts than they are compared on. The first comparison that shows
    a gain gives the advice:

    - single adapters against all merges: `do-not-merge`;
    - pruned merges against unpruned merges: `search`;
    - other weights and strengths against the merge as configured: `reweight`.

    Otherwise the advice is `merge`: merge as configured; no gain by a search is in sight. A variant
    whose loss is not finite is in none of the comparisons. If the merge as configured is such a
    one, the first of other weights, pruned merges and single adapters that is finite is advised.

    Args:
        losses: name in `UNTRAINED_MERGES` -> loss of each example, in nats.
        usual: the merge weights of the configuration.
        groups: group of each example; None makes each its own group.

    Raises:
        ValueError: no variant has a finite loss.
    """
    means = mean_losses(losses)
    sides: dict[str, dict[str, list[float]]] = {}
    for name, values in losses.items():
        sides.setdefault(UNTRAINED_MERGES[name].group, {})[name] = values
    whole = sides["merge"] | sides["weights"]
    compared = {
        "do-not-merge": (sides["single"], whole | sides["pruned"]),
        "search": (sides["pruned"], whole),
        "reweight": (sides["weights"], sides["merge"]),
    }
    evidence = {name: gain_of_best(*both, groups) for name, both in compared.items()}
    shown = [name for name, gain in evidence.items() if gain is not None and gain.shown]
    if not math.isfinite(means[MERGE]):
        shown += [name for name in reversed(compared) if _best_of(compared[name][0], means)]
    advice = shown[0] if shown else MERGE
    best = _best_of(compared[advice][0] if advice in compared else losses, means)
    assert best is not None, "what is advised has a finite loss"
    why = _why(advice, best, evidence[advice] if advice in evidence else None, usual)
    out = not_finite(means)
    return {
        "advice": advice,
        "best": best,
        "left_out": out,
        "why": f"{why}; left out, as their loss is not finite: {', '.join(out)}" if out else why,
        "evidence": {
            name: None if gain is None else asdict(gain) | {"z": gain.z, "shown": gain.shown}
            for name, gain in evidence.items()
        },
        "variants": {
            name: {
                "group": UNTRAINED_MERGES[name].group,
                "loss": means[name],
                **_against(values, losses[MERGE], groups),
                "losses": values,
            }
            for name, values in losses.items()
        },
    }


def _best_of(side: Mapping[str, list[float]], means: Mapping[str, float]) -> str | None:
    return lowest({name: means[name] for name in side})


def _against(
    values: list[float], reference: list[float], groups: Sequence[Hashable] | None
) -> dict[str, float]:
    gaps = [value - usual for value, usual in zip(values, reference, strict=True)]
    found = mean_gain(gaps, groups)
    error = math.nan if found is None else found.error
    return {"difference": sum(gaps) / len(gaps), "standard_error": error}


def _why(advice: str, best: str, found: Gain | None, usual: tuple[float, ...]) -> str:
    if advice == MERGE:
        return (
            "nothing measured beats the merge as configured on rows it was not chosen on: take the "
            "merge; a search may still find what training makes of a ratio"
        )
    weights = list(weights_of(best, usual))
    alone = "fine-tune it instead of merging"
    if best == BARE:
        alone = "train a new adapter instead of merging (recipe: auto tries that)"
    if found is None or not found.shown:
        do = {
            "do-not-merge": alone,
            "search": "a search is worth its cost",
            "reweight": f"set merge.weights to {weights}",
        }[advice]
        return f"the merge as configured has no finite loss, and the best that has is {best}: {do}"
    by = f"by {found.gain:.3f} nats (standard error {found.error:.3f})"
    return {
        "do-not-merge": f"{best} is better than every merge {by}: {alone}",
        "search": f"pruned merges are better than all whole ones {by}: a search is worth its cost",
        "reweight": f"{best} is better than the merge as configured {by}: set merge.weights to "
        f"{weights}",
    }[advice]


def _share_of_run(context: Context, forwards: int) -> float:
    """Return the cost as a fraction of that of search and final run.

    A forward pass costs half as much as training on one example.
    """
    config = context.config
    epochs = config.training("search").epochs + config.training("finetune").epochs
    rows = epoch_rows(context, "target", beside_target(config))
    return forwards / 2 / (epochs * max(1, rows))
