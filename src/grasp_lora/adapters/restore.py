"""Take any PEFT adapter off a model again, whatever its type did to the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored_on_exit(model: nn.Module, weights: Sequence[Tensor] = ()) -> Iterator[None]:
    """Give `model` back its modules, parameters, hooks and attributes on exit.

    PEFT's own `unload` leaves modules that were trained in full in place, and some adapter types
    have none. Values are not copied: name in `weights` what may be written to inside.
    """
    kept = [vars(module) for module in model.modules()]
    inner = [value for entry in kept for value in entry.values() if isinstance(value, dict)]
    structure = [(entry, dict(entry)) for entry in kept + inner]
    values = [weight.clone() for weight in weights]
    try:
        yield
    finally:
        for entry, content in structure:
            entry.clear()
            entry.update(content)
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
