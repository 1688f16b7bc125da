"""What adapters cost to keep, load, switch and run, measured with PEFT on one backbone.

Zeros make nothing smaller or faster: PEFT stores and multiplies them like any other number. What
counts is the rank and the number format.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from grasp_lora.adapters.folder import adapter_in, check_fits, read_adapter, weights_files
from grasp_lora.adapters.opening import named_base_model
from grasp_lora.models.backbones import Backbone, ModelSpec, load_backbone
from grasp_lora.models.modules import both_sides
from grasp_lora.models.preserve import quiet_wrapping
from grasp_lora.sharing.energy import Joules, counter

READ = 256
"""Tokens that are read at once for the tokens a second."""
REPEATS = 5
_LONG = 1.0
"""Counters of energy are renewed every few milliseconds, on some GPUs every 0.1 s."""


@dataclass(frozen=True)
class Cost:
    """What one adapter costs; the backbone itself is a row without an adapter.

    Attributes:
        name: the folder, or "no adapter".
        rank: largest rank of a module.
        zeros: share of zeros in the factors, without those that only fill up a rank.
        disk: bytes of the weights files.
        memory: bytes of the factors once PEFT has loaded them.
        load: seconds to put it on the backbone.
        switch: seconds to make it the one in force.
        speed: tokens read a second.
        energy: joules of the device for 1,000 tokens read; None where it is not told.
    """

    name: str
    rank: int = 0
    zeros: float = 0.0
    disk: int = 0
    memory: int = 0
    load: float = 0.0
    switch: float = 0.0
    speed: float = 0.0
    energy: float | None = None


def costs_on(
    model: str | None, folders: Sequence[Path], dtype: str, device: str, say: Callable[[str], None]
) -> tuple[str, list[Cost]]:
    """Load the backbone; return its name with the number format, and `costs`.

    Where the energy is not told, a line says why.

    Args:
        model: the base model; None takes the one that the first adapter names.
        folders: PEFT LoRA folders.
        dtype, device: as in `ModelSpec`.
        say: called with lines for the user.

    Raises:
        FileNotFoundError, ValueError: see `costs` and `load_backbone`.
    """
    name = named_base_model(folders[0]) if model is None else model
    backbone = load_backbone(ModelSpec(name, dtype, device=device), say)
    joules = counter(backbone.device)
    if isinstance(joules, str):
        say(joules)
    known = None if isinstance(joules, str) else joules
    return f"{backbone.public_name}, {backbone.dtype}", costs(folders, backbone, known)


def costs(folders: Sequence[Path], backbone: Backbone, joules: Joules | None = None) -> list[Cost]:
    """Return what adapters cost, that of the bare backbone first.

    Each time is the median of `REPEATS`; the load is measured once.

    Args:
        folders: PEFT LoRA folders.
        backbone: the model they belong to. It must not be used afterwards: PEFT has changed it.
        joules: counter of the device's energy; None measures none.

    Raises:
        FileNotFoundError, ValueError: a folder holds no plain LoRA adapter, or it does not fit.
    """
    for folder in folders:
        check_fits(read_adapter(folder, backbone.model), backbone.model, str(folder))
    ids = (torch.arange(READ) % backbone.vocabulary)[None].to(backbone.device)
    speed, energy = _reading(backbone.model, ids, joules)
    rows = [Cost("no adapter", speed=speed, energy=energy)]
    model: PeftModel | None = None
    for number, given in enumerate(folders):
        folder, name = adapter_in(given), f"adapter{number}"
        start = time.perf_counter()
        with quiet_wrapping():
            if model is None:
                model = PeftModel.from_pretrained(backbone.model, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
        loaded = time.perf_counter() - start
        kept = _kept(given, folder, model, name)
        speed, energy = _reading(model.eval(), ids, joules)
        rows.append(replace(kept, load=loaded, speed=speed, energy=energy))
    return rows


def _kept(given: Path, folder: Path, model: PeftModel, name: str) -> Cost:
    """Return what an adapter costs before anything is read with it."""
    switch = _median(lambda: model.set_adapter(name))
    held = [p for key, p in model.named_parameters() if f".{name}." in key]
    factors = read_adapter(folder).adapter.values()
    own = [side for one in factors for side in (one.A, one.B)]
    return Cost(
        name=str(given),
        rank=max(one.rank for one in factors),
        zeros=sum(int((side == 0).sum()) for side in own) / sum(side.numel() for side in own),
        disk=sum(file.stat().st_size for file in weights_files(folder)),
        memory=sum(p.numel() * p.element_size() for p in held),
        switch=switch,
    )


def _reading(
    model: nn.Module, ids: torch.Tensor, joules: Joules | None
) -> tuple[float, float | None]:
    """Return the tokens a second, and the joules for 1,000 tokens."""

    def read() -> None:
        with torch.no_grad():
            model(**both_sides(model, ids))
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)

    read()  # the first reading pays for what is set up once
    speed = ids.numel() / _median(read)
    return speed, None if joules is None else _energy(read, ids, joules)


def _energy(read: Callable[[], None], ids: torch.Tensor, joules: Joules) -> float:
    """Return the joules for 1,000 tokens, over at least `_LONG` seconds."""
    before, start, count = joules(), time.perf_counter(), 0
    while time.perf_counter() - start < _LONG:
        read()
        count += ids.numel()
    return 1000 * (joules() - before) / count


def _median(work: Callable[[], object]) -> float:
    """Return the median seconds of `REPEATS` calls."""
    gc.collect()
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]
