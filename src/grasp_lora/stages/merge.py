"""Stage `merge`: adapter folders -> one merged adapter folder."""

import time
from collections.abc import Sequence
from pathlib import Path

from grasp_lora.adapters.folder import check_fits, read_adapter
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.lora import average_weights, merge
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.folders import finish_stage, stage_is_done, stage_key, write_merged
from grasp_lora.workbench.given import say_other_bases
from grasp_lora.workbench.processes import is_main, join, wait_for_all


def merge_adapters(
    config: RunConfig,
    folders: Sequence[Path],
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
) -> Path:
    """Merge PEFT adapters of one backbone, as `config.merge` says.

    Args:
        config: the run's settings.
        folders: adapter folders; the order is that of `merge.weights` and of the sources.
        out: folder of the merged adapter: an ordinary PEFT folder, and beside it the factors of
            each source, which `search` and `finetune` mask apart.
        overwrite: replace a finished result made with other settings.
        context: of the run this is part of.

    Returns:
        `out`.

    Raises:
        FileNotFoundError, ValueError: a folder is no adapter, or none for this backbone, or the
            adapters cannot be merged exactly; names the reason.
    """
    join(config)
    key = stage_key(config, **{f"adapter {i}": folder for i, folder in enumerate(folders)})
    if stage_is_done(out, key, overwrite):
        return out
    began = time.perf_counter()
    loaded = [read_adapter(folder) for folder in folders]
    if context is None:
        context = open_context(config)
        say_other_bases(context, folders)
    for folder, adapter in zip(folders, loaded, strict=True):
        check_fits(adapter, context.backbone.model, str(folder))
    given = config.merge.weights
    if given == "auto":
        raise ValueError(
            "merge.weights: auto is learned by a run (or found by grasp-lora precheck); give the "
            "weights to merge by"
        )
    weights = given or average_weights(len(folders))
    merged = merge(
        config.merge.kind, [one.adapter for one in loaded], list(weights), config.merge.rank
    )
    if is_main():
        about = {"kind": config.merge.kind, "weights": list(weights)}
        about |= {"sources": [str(folder) for folder in folders]}
        with context.clock.span("write"):
            write_merged(out, merged, context.backbone, about)
            finish_stage(out, key, {"seconds": time.perf_counter() - began} | about)
    wait_for_all()
    return out
