"""Remove a PEFT adapter of any type from a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored_on_exit(model: nn.Module, weights: Sequence[Tensor] = ()) -> Iterator[None]:
    """Restore the modules, parameters, hooks and attributes of `model` on exit.

    PEFT's `unload` does not remove fully trained modules, and some adapter types have no `unload`.

    Args:
        model: the model to restore. Its values are not copied.
        weights: tensors whose values are restored, because the body may overwrite them.
    """
    attributes = [vars(module) for module in model.modules()]
    nested = [value for entry in attributes for value in entry.values() if isinstance(value, dict)]
    structure = [(entry, dict(entry)) for entry in attributes + nested]
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
