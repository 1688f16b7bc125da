"""Leave no trace: whatever a probe does to a model in training is undone."""

import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Restore gradients, modes and random generators on exit; the body may not write weights.

    No copy of the weights is kept, which would cost as much memory as the adapter itself: a body
    that writes them is found out by the tensors' version counters, after all else is restored.

    Args:
        model: its modules' train or eval modes are restored.
        params: name -> the tensors that are watched.

    Raises:
        RuntimeError: the body wrote to one of `params`.
    """
    versions = {n: p._version for n, p in params.items()}
    gradients = {n: p.grad for n, p in params.items()}
    modes = [(m, m.training) for m in model.modules()]
    generators = _generator_states()
    for param in params.values():
        param.grad = None  # set aside, so that nothing inside can add to it
    try:
        yield
    finally:
        for name, param in params.items():
            param.grad = gradients[name]
        for module, training in modes:
            module.training = training
        _restore_generators(generators)
        written = [n for n, p in params.items() if p._version != versions[n]]
        if written:
            raise RuntimeError(
                f"what ran inside a probe wrote to the adapter weights ({written[0]} and "
                f"{len(written) - 1} more), which are not restored: measure there, and take "
                "optimizer steps outside"
            )


@contextmanager
def quiet_wrapping() -> Iterator[None]:
    """Let PEFT wrap a model in the body; what it draws, and its warning, leave no trace."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # PEFT asks for a name that transformers is about to drop; users can do nothing about it.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


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
