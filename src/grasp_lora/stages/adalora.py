"""A baseline: PEFT's AdaLoRA (arXiv 2303.10512), trained like every other adapter here."""

import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from grasp_lora.models.modules import resolve_targets
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.training.adalora import AdaLoraCallback, attach_adalora, plain_lora_of
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.fit import FitOptions, FitResult, fit, run_steps


def train_adalora(
    context: Context, options: FitOptions, checkpoints: Path
) -> tuple[FitResult, dict[str, tuple[Tensor, Tensor]], float]:
    """Train an AdaLoRA adapter; return (training result, module -> (A, B) as plain LoRA, scaling).

    An interrupted training starts again from step 0: checkpoints do not hold PEFT's rank schedule.

    Raises:
        NotApplicable: the backbone is quantized, or the training is too short for the schedule.
    """
    config, model = context.config, context.backbone.model
    if config.model.quantization != "none":
        raise NotApplicable("AdaLoRA is not run on a quantized backbone")
    targets = resolve_targets(model, config.lora.target_modules)
    steps = run_steps(context, options.training, options.role, options.beside)
    lora = config.lora
    try:
        live = attach_adalora(model, targets, lora.r, lora.alpha, lora.dropout, steps, config.seed)
    except ValueError as error:
        raise NotApplicable(f"AdaLoRA: {error}") from None
    try:
        for old in checkpoints.glob("checkpoint-*"):
            shutil.rmtree(old, ignore_errors=True)
        options = replace(options, title="AdaLoRA", extra=(AdaLoraCallback(live),))
        result = fit(context, live, options, checkpoints)
        return result, plain_lora_of(live), 1.0
    finally:
        live.model.unload()  # type: ignore[operator]
