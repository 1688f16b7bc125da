"""A frozen backbone cut into shards, one for each process (FSDP2), around which LoRA stays whole.

The layers are cut when the backbone is loaded, before any adapter is attached. So FSDP never sees
a LoRA factor: every process holds all of them, and masks, importance and checkpoints are those of
one process. Each forward pass gathers the weights layer by layer. That is an exchange between all
processes, so all must do the same number of forward passes.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_VARIABLE = "GRASP_LORA_SHARDS"
"""Is 1 in a process whose launcher asked for FSDP2."""


def take_over_fsdp() -> None:
    """Take over what a launcher asked for by `ACCELERATE_USE_FSDP`, so that nothing else does it.

    accelerate would cut the model when training begins, with the LoRA factors in it, and leave it
    so for all that follows.

    Raises:
        ValueError: FSDP of version 1, or with shards kept on the CPU.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP of version 1 is not supported: it would flatten LoRA factors with the frozen "
            "weights; launch with --fsdp_version 2, or with plain DDP (torchrun)"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() in ("1", "true"):
        raise ValueError(
            "FSDP with shards on the CPU is not supported: launch without --fsdp_offload_params"
        )
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    os.environ[_VARIABLE] = "1"


def shards_wanted() -> bool:
    """Return whether backbones are to be cut into shards: FSDP2 was asked for several processes."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and os.environ.get(_VARIABLE) == "1"


def shard(model: nn.Module, device: torch.device) -> None:
    """Cut a frozen model into shards, in place; this process keeps its own on `device`.

    One layer at a time is moved to the device, so a model that no device could hold may be on the
    CPU before.

    Args:
        model: the model, on the CPU or on `device`.
        device: where the shards are kept and gathered.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    # By default what is outside the layers stays gathered after a forward pass, until someone asks
    # for the model's state, as the process does that saves: the others would not gather it again.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the layers of a model are cut into shards."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _layers(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that transformers never splits between devices: the layers of a model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            yield module
