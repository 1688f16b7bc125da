"""Adapters that the user gives: checked before any work by all the code that will take them."""

from collections.abc import Sequence
from pathlib import Path

from grasp_lora.adapters.folder import LoadedAdapter, check_fits, read_adapter
from grasp_lora.adapters.opening import base_mismatch_lines, model_with_adapter
from grasp_lora.workbench.context import Context


def check_given(context: Context, folders: Sequence[Path]) -> list[LoadedAdapter]:
    """Return the adapters after merging and evaluation have both been found to take them.

    Each is put on the backbone as PEFT loads it and taken off again: merging goes by the tensors
    alone, so a config that does not belong to them would be found by the evaluation, after all
    training. Says which of them name another base model.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`, `check_fits` and `model_with_adapter`.
    """
    with context.clock.span("load"):
        loaded = [read_adapter(folder) for folder in folders]
        for folder, adapter in zip(folders, loaded, strict=True):
            check_fits(adapter, context.backbone.model, str(folder))
            with model_with_adapter(context.backbone, folder):
                pass
    say_other_bases(context, folders)
    return loaded


def say_other_bases(context: Context, folders: Sequence[Path]) -> None:
    """Say which adapters name another base model than the backbone, or than one another."""
    for line in base_mismatch_lines(folders, context.config.model.name, context.backbone):
        context.reporter.say(line)
