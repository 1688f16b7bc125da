"""Checks of the adapters of a run and of their merge, made before any other work."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from grasp_lora.adapters.folder import LoadedAdapter, check_fits, read_adapter
from grasp_lora.adapters.opening import lines_about_all, model_with_adapter
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.layer_swap import layer_swap
from grasp_lora.core.lora import Adapter, LoraFactors, merge
from grasp_lora.core.merge_kinds import Kind
from grasp_lora.core.pruning.profile import slopes_of
from grasp_lora.models.backbones import resolve_targets
from grasp_lora.models.modules import linear_shape
from grasp_lora.training.groups import SCOPES, place_of
from grasp_lora.training.live import Block
from grasp_lora.workbench.context import POOLS, Context
from grasp_lora.workbench.merge_probes import check_pool, configured_weights, learns_weights


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


def fresh_adapter(context: Context) -> dict[str, LoraFactors]:
    """Return an adapter of zeros with the modules, ranks and scaling of one that is trained here.

    It takes no memory: its zeros are one number.
    """
    model, lora = context.backbone.model, context.config.lora
    modules = dict(model.named_modules())
    shapes = {n: linear_shape(modules[n]) for n in resolve_targets(model, lora.target_modules)}
    zero = torch.zeros(1, 1)
    return {
        name: LoraFactors(
            zero.expand(lora.r, shape[0]), zero.expand(shape[1], lora.r), lora.alpha / lora.r
        )
        for name, shape in shapes.items()
        if shape is not None
    }


def check_merge(context: Context, given: Mapping[str, Adapter]) -> None:
    """Check that the merge and the search can be done as configured, once all adapters are there.

    Args:
        context: examples, backbone and settings.
        given: role -> adapter that the user gave; the others are trained.

    Raises:
        ValueError: the kind or the weights of the merge do not fit the adapters, there are too few
            examples to choose weights by, or `scope` has no two groups here.
    """
    config = context.config
    fresh = fresh_adapter(context)
    adapters = [given.get(role, fresh) for role in ("source", "target")]
    weights = configured_weights(config.merge.weights, adapters)
    check_kind(config.merge.kind, adapters, weights)
    if learns_weights(config):
        pool = POOLS[config.controller.probe_rows]
        check_pool(sum(len(context.encoded("target", split)) for split in pool))
    apart = config.mask_unit == "source"
    blocks = [
        Block(name, source if apart else None, "", "", slice(0))
        for source, one in enumerate(adapters)
        for name in one
    ]
    _check_groups(config, blocks)


def check_kind(kind: Kind, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Check that adapters can be merged by a kind, by what their factors tell.

    Args:
        kind: a kind of merge.
        adapters: what is merged, the source adapter first.
        weights: a weight for each adapter; not read by kinds without weights.

    Raises:
        ValueError: they cannot be merged in this way; the message names the reason.
    """
    if kind == "layer-swap":
        if len(adapters) != 2:
            raise ValueError(
                f"merge.kind: a layer-swap is of two adapters, source and target, got "
                f"{len(adapters)}; name two, or take another kind"
            )
        layer_swap(*adapters)
    elif kind == "ties-delta":
        merge("cat", adapters, [1.0] * len(adapters))
    else:
        merge("linear" if kind == "linear" else "cat", adapters, weights)  # an svd begins as a cat


def _check_groups(config: RunConfig, blocks: Sequence[Block]) -> None:
    """Check that `scope` tells some of the blocks apart.

    Raises:
        ValueError: they are all of one group, or no tilt of `policy` tells them apart.
    """
    groups = sorted({SCOPES[config.scope](block) for block in blocks})
    if config.scope != "global" and len(groups) < 2:
        raise ValueError(
            f"scope: {config.scope!r} needs at least two groups of modules, but those adapted here "
            f"are all of one, {groups[0]}; set scope: global, or adapt more modules"
        )
    places = {SCOPES["policy"](block): place_of(block) for block in blocks}
    if config.scope == "policy" and not slopes_of(places, dict.fromkeys(places, 1)).names:
        raise ValueError(
            "scope: 'policy' needs modules of several layers, types or adapters, but those adapted "
            f"here ({groups[0]}, ...) are all alike; set scope: global, or adapt more modules"
        )
