"""Checks of the adapters that the user gives, made before any other work."""

from collections.abc import Sequence
from pathlib import Path

from grasp_lora.adapters.folder import LoadedAdapter, check_fits, read_adapter
from grasp_lora.adapters.opening import lines_about_all, model_with_adapter
from grasp_lora.workbench.context import Context


def check_given(context: Context, folders: Sequence[Path]) -> list[LoadedAdapter]:
    """Return the adapters, once it is sure that they can be merged and evaluated.

    PEFT loads each adapter onto the backbone and removes it again. A merge uses the tensors alone:
    without this check, an `adapter_config.json` that does not fit them would stop the evaluation,
    after all training. Adapters that name another base model are reported to the user.

    Raises:
        FileNotFoundError, ValueError: as in `read_adapter`, `check_fits` and `model_with_adapter`.
    """
    with context.clock.span("load"):
        loaded = [read_adapter(folder, context.backbone.model) for folder in folders]
        for folder, adapter in zip(folders, loaded, strict=True):
            check_fits(adapter, context.backbone.model, str(folder))
            with model_with_adapter(context.backbone, folder):
                pass
    say_other_bases(context, folders)
    return loaded


def say_other_bases(context: Context, folders: Sequence[Path]) -> None:
    """Print which adapters name another base model, and what else the user should know of them."""
    for line in lines_about_all(folders, context.config.model.name, context.backbone):
        context.reporter.say(line)
