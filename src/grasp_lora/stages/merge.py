"""Stage `merge`: two adapters -> one merged adapter.

The inputs `source` and `target` are PEFT adapter folders; further adapters are called "adapter 2",
"adapter 3", ... The optional input `weights` is the folder of a probe that learned the weights, the
option `weights` gives them as numbers. The result is an ordinary PEFT folder. It also holds the
factors of each source, because later stages mask the sources separately. Option `rule` names a rule
of `grasp_lora.stages.other_merges` to use in place of `config.merge`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from grasp_lora.adapters.folder import LoadedAdapter, check_fits, read_adapter
from grasp_lora.base.files import read_json
from grasp_lora.base.words import without_home
from grasp_lora.core.lora import Adapter, merge
from grasp_lora.core.merge_kinds import UNWEIGHTED
from grasp_lora.stages.other_merges import (
    RULES,
    UNWEIGHTED_RULES,
    Merged,
    NotApplicable,
    lorahub_cost,
)
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.workbench.merge_probes import configured_weights
from grasp_lora.workbench.merged_folder import write_merged
from grasp_lora.workbench.processes import is_main

WEIGHTS_INPUT = "weights"
RANK_INPUT = "rank"
"""The folder of a probe that found the smallest rank that will do, for rule "mean"."""


_NO_ADAPTERS = {WEIGHTS_INPUT, RANK_INPUT}


def run(work: Work) -> Mapping[str, Any]:
    """Merge the adapters as `config.merge` says.

    Raises:
        FileNotFoundError, ValueError: a folder holds no adapter, an adapter does not fit this
            backbone, or the adapters cannot be merged exactly; the message names the reason.
    """
    began = time.perf_counter()
    context = work.context
    folders = [folder for role, folder in work.inputs.items() if role not in _NO_ADAPTERS]
    loaded = [read_adapter(folder, context.backbone.model) for folder in folders]
    for folder, adapter in zip(folders, loaded, strict=True):
        check_fits(adapter, context.backbone.model, str(folder))
    rule = work.stage.option("rule")
    merged, about = _configured(work, loaded) if rule is None else RULES[rule](work, loaded)
    named = {role: without_home(one) for role, one in work.stage.inputs.items()}
    about |= {"sources": [one for role, one in named.items() if role not in _NO_ADAPTERS]}
    if is_main():
        with context.clock.span("write"):
            write_merged(work.out, merged, context.backbone, about)
    return {"seconds": time.perf_counter() - began} | about


def _configured(work: Work, loaded: Sequence[LoadedAdapter]) -> Merged:
    """Merge as `config.merge` says."""
    if not _given_weights(work.stage) and work.config.merge.weights == "auto":
        raise ValueError(
            "merge.weights: auto is learned by a run (or found by grasp-lora precheck); give the "
            "weights to merge by"
        )
    section, adapters = work.config.merge, [one.adapter for one in loaded]
    if section.kind in UNWEIGHTED:
        return UNWEIGHTED_RULES[section.kind](work, loaded)
    try:
        weights = _weights(work, adapters)
        merged = merge(section.kind, adapters, list(weights), section.rank)
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    return merged, {"kind": section.kind, "weights": list(weights)}


def _weights(work: Work, adapters: Sequence[Adapter]) -> tuple[float, ...]:
    if WEIGHTS_INPUT in work.inputs:
        return tuple(read_json(work.inputs[WEIGHTS_INPUT] / "weights.json")["weights"])
    given = work.stage.option("weights")
    if given is not None:
        return tuple(given)
    return configured_weights(work.config.merge.weights, adapters)


def _settings(stage: Stage) -> tuple[str, ...]:
    if stage.option("rule") is not None:
        encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
        return ("model", "seed", *(("evaluate.batch_size", *encoding) if _reads(stage) else ()))
    own = () if _given_weights(stage) else ("merge.weights",)
    return ("model.name", "merge.kind", "merge.rank", *own)


def _given_weights(stage: Stage) -> bool:
    """Return whether an input or an option has the weights in place of the settings."""
    return WEIGHTS_INPUT in stage.inputs or stage.option("weights") is not None


def _reads(stage: Stage) -> bool:
    return stage.option("rule") == "lorahub"


def _examples(stage: Stage, _known: tuple[Split, ...]) -> tuple[Split, ...]:
    return (("target", "train"),) if _reads(stage) else ()


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    return lorahub_cost(stage, sizes) if _reads(stage) else Cost()


MERGE = Kind(1, _settings, _examples, run, _cost)
