"""Undo the side effects of a probe on a model in training."""

import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Restore gradients, modes and random generators on exit; the body must not write weights.

    No copy of the weights is kept, because it would take as much memory as the adapter. A body that
    changes them is detected by a checksum of their bits, after everything else is restored. Version
    counters would not do: they do not count writes through `.data`.

    Args:
        model: the model whose modules get their train or eval modes back.
        params: name -> trainable tensor that the body must not write.

    Raises:
        RuntimeError: the body changed one of `params`.
    """
    before = {n: _checksum(p) for n, p in params.items()}
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
        written = [n for n, p in params.items() if bool(_checksum(p) != before[n])]
        if written:
            raise RuntimeError(
                f"a probe wrote to the adapter weights ({written[0]} and {len(written) - 1} more), "
                "which are not restored; only measure inside a probe and take optimizer steps "
                "outside"
            )


_MIX = 0x1E3779B9
_PIECE = 1 << 15
"""Entries that a checksum reads at a time on a CPU, so that what it computes stays in the cache."""
_PIECE_ELSEWHERE = 1 << 22


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """Return a sum over a tensor's bits, 0-d; each position has a factor of its own.

    It reads the tensor piece by piece, as temporaries of its size would take several times its
    memory. Integers of 32 bits, which may overflow, take a sixth of the time of 64. The sign is
    first mixed into lower bits, as the product of the highest bit would be the same at every
    position.
    """
    whole = torch.int16 if tensor.element_size() == 2 else torch.int32
    bits = tensor.detach().reshape(-1).view(whole)
    factors = _factors(bits.device)
    if len(bits) <= len(factors):
        return _piece_sum(bits, factors)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, piece in enumerate(bits.split(len(factors))):
        total.add_(_piece_sum(piece, factors), alpha=2 * number + 1)
    return total


def _piece_sum(piece: Tensor, factors: Tensor) -> Tensor:
    mixed = (piece >> 7).bitwise_xor_(piece)
    return (mixed * factors[: len(piece)]).sum(dtype=torch.int32)


@cache
def _factors(device: torch.device) -> Tensor:
    """Return the odd factors of the positions of a piece, int32."""
    size = _PIECE if device.type == "cpu" else _PIECE_ELSEWHERE
    return torch.arange(size, dtype=torch.int32, device=device).mul_(_MIX).bitwise_or_(1)


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
