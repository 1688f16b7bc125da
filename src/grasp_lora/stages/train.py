"""Stage `train`: rows of one language -> a LoRA adapter for it."""

import math
from pathlib import Path

import torch

from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.lora import MergedModule, Part, lora_scaling
from grasp_lora.models.modules import linear_shape, resolve_targets
from grasp_lora.workbench.context import Context, open_context, open_data
from grasp_lora.workbench.fit import Spent, fit
from grasp_lora.workbench.folders import (
    finish_stage,
    save_plain,
    stage_is_done,
    stage_key,
)
from grasp_lora.workbench.processes import is_main, join, wait_for_all


def train_adapter(
    config: RunConfig,
    role: str,
    out: Path,
    overwrite: bool = False,
    context: Context | None = None,
) -> Path:
    """Train a fresh adapter on the `role` rows; the checkpoint with the best dev loss is kept.

    Args:
        config: the run's settings; `lora` gives the adapter's shape, `train` the training.
        role: "source" or "target".
        out: folder of the adapter, an ordinary PEFT folder.
        overwrite: replace a finished result made with other settings.
        context: of the run this is part of.

    Returns:
        `out`.

    Raises:
        ValueError: there are no rows for the role, or no layer matches `lora.target_modules`.
    """
    join(config)
    data = open_data(config, context)
    key = stage_key(config, data=data.digest(), role=role)
    if stage_is_done(out, key, overwrite):
        return out
    context = context or open_context(config, data=data)
    if not context.examples(role, "train"):
        raise ValueError(f"there are no {role} rows to train on: give data.{role}.files and rows")
    spent = Spent()
    scaling = lora_scaling(config.lora.r, config.lora.alpha, config.lora.use_rslora)
    fresh = fresh_adapter(context.backbone.model, config)
    with context.live(fresh, "merged", config.lora.dropout, scaling) as live:
        result = fit(
            context,
            live,
            config.train,
            out,
            key,
            f"train {role} adapter",
            role=role,
            stateful=[spent],
            patience=config.train.patience,
        )
        plain = live.plain_factors()
    if is_main():
        with context.clock.span("write"):
            save_plain(out, plain, context.backbone, scaling)
            facts = {"seconds": spent.seconds} | result.facts()
            finish_stage(out, key, facts)
    wait_for_all()
    return out


def fresh_adapter(model: torch.nn.Module, config: RunConfig) -> dict[str, MergedModule]:
    """Return untrained factors as PEFT initialises them: A Kaiming-uniform, B zero.

    Drawn from a generator of our own, in the order of the module names, so that an adapter depends
    on the seed alone.
    """
    generator = torch.Generator().manual_seed(config.seed)
    modules = dict(model.named_modules())
    fresh: dict[str, MergedModule] = {}
    for name in resolve_targets(model, config.lora.target_modules):
        shape = linear_shape(modules[name])
        assert shape is not None, "resolve_targets returns linear layers only"
        inputs, outputs = shape
        bound = 1 / math.sqrt(inputs)  # Kaiming with a = sqrt(5)
        a = (torch.rand(config.lora.r, inputs, generator=generator) * 2 - 1) * bound
        b = torch.zeros(outputs, config.lora.r)
        fresh[name] = MergedModule("cat", (Part(0, a, b),))
    return fresh
