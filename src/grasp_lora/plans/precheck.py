"""The precheck: tells before any training whether to merge, by which weights, and to search.

It measures untrained merges, so it does not tell how good a merge would be after training.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import write_json
from grasp_lora.base.words import shown
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.evidence.crossfit import Gain, gain_of_best, standard_error
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.given import say_other_bases
from grasp_lora.workbench.merge_probes import (
    EXAMPLES,
    MERGE,
    UNTRAINED_MERGES,
    configured_weights,
    measure,
    weights_of,
)
from grasp_lora.workbench.processes import is_main, join


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
        The content of `precheck.json`: `advice` and `why`, the evidence of each comparison, and the
        losses of all variants.

    Raises:
        ValueError: the configuration does not name both adapters, an adapter does not fit the
            backbone, or there are fewer than 4 examples.
    """
    join(config)
    source, target = config.adapters.source, config.adapters.target
    if source is None or target is None:
        raise ValueError(
            f"a precheck compares two trained adapters, got adapters.source={shown(source)} and "
            f"adapters.target={shown(target)}; set both (grasp-lora train makes one)"
        )
    if rows < 4:
        raise ValueError(f"a precheck needs at least 4 examples, got {rows}; raise --rows")
    adapters = [read_adapter(folder).adapter for folder in (source, target)]
    usual = configured_weights(config.merge.weights, adapters)
    context = context or open_context(config)
    say_other_bases(context, (source, target))
    began = time.perf_counter()
    ids, losses = measure(context, (source, target), UNTRAINED_MERGES, rows)
    found = {"rows": ids} | conclusion(losses, usual)
    found |= {
        "forwards": len(UNTRAINED_MERGES) * len(ids),
        "share_of_run": _share_of_run(context, len(UNTRAINED_MERGES) * len(ids)),
        "seconds": time.perf_counter() - began,
    }
    if out is not None and is_main():
        write_json(out / "precheck.json", found)
    return found


def conclusion(losses: Mapping[str, list[float]], usual: tuple[float, ...]) -> dict[str, Any]:
    """Return advice and evidence from the losses of all variants.

    There are three comparisons, each between the best variants of two groups. The best variants are
    chosen on other examples than they are compared on. The first comparison that shows a gain gives
    the advice:

    - single adapters against all merges: `do-not-merge`;
    - pruned merges against unpruned merges: `search`;
    - other weights and strengths against the merge as configured: `reweight`.

    Otherwise the advice is `merge`: merge as configured; no gain by a search is in sight.

    Args:
        losses: name in `UNTRAINED_MERGES` -> loss of each example, in nats.
        usual: the merge weights of the configuration.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for name, values in losses.items():
        groups.setdefault(UNTRAINED_MERGES[name].group, {})[name] = values
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
                "group": UNTRAINED_MERGES[name].group,
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


def _share_of_run(context: Context, forwards: int) -> float:
    """Return the cost as a fraction of that of search and final run.

    A forward pass costs half as much as training on one example.
    """
    config = context.config
    epochs = config.training("search").epochs + config.training("finetune").epochs
    return forwards / 2 / (epochs * max(1, len(context.examples("target", "train"))))
