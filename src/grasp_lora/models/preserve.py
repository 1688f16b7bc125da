"""Undo the side effects of a probe on a model in training."""

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
    """Restore gradients, modes and random generators on exit; the body must not write weights.

    No copy of the weights is kept, because it would take as much memory as the adapter. A body that
    writes them is detected by the tensors' version counters, after everything else is restored.

    Args:
        model: the model whose modules get their train or eval modes back.
        params: name -> trainable tensor that the body must not write.

    Raises:
        RuntimeError: the body wrote to one of `params`.
    """
    versions = {n: p._version for n, p in params.items()}
    gradients = {n: p.grad for n, p in params.items()}
    modes = [(m, m.training) for m in model.modules()]
    generators = _generator_states()
    for param in params.values():
        param.grad = None  # otherwise a backward pass in the body would add to it
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
                f"a probe wrote to the adapter weights ({written[0]} and {len(written) - 1} more), "
                "which are not restored; only measure inside a probe and take optimizer steps "
                "outside"
            )


@contextmanager
def quiet_wrapping() -> Iterator[None]:
    """Let PEFT wrap a model in the body without a warning and without changing random states."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # PEFT reads a name that transformers has deprecated; users cannot change that.
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
