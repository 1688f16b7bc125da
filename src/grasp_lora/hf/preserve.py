"""Leave no trace: whatever a probe does to a model in training is undone."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def preserved(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """Restore weights, gradients, optimizer state, modes and random generators on exit."""
    weights = {n: p.detach().clone() for n, p in params.items()}
    gradients = {n: p.grad for n, p in params.items()}
    modes = [(m, m.training) for m in model.modules()]
    state = None if optimizer is None else _copy_state(optimizer)
    generators = _generator_states()
    for param in params.values():
        param.grad = None  # set aside, so that nothing inside can add to it
    try:
        yield
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(weights[name])
                param.grad = gradients[name]
        for module, training in modes:
            module.training = training
        if optimizer is not None and state is not None:
            _restore_state(optimizer, state)
        _restore_generators(generators)


def _copy_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {
        param: {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        for param, values in optimizer.state.items()
    }


@torch.no_grad()
def _restore_state(optimizer: torch.optim.Optimizer, state: dict[Tensor, dict[str, Any]]) -> None:
    for param in list(optimizer.state):
        if param not in state:
            del optimizer.state[param]
    for param, values in state.items():
        live = optimizer.state[param]
        for key, value in values.items():
            if isinstance(value, Tensor):
                live[key].copy_(value)
            else:
                live[key] = value


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def _restore_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
