"""The factors to write: one rank for all modules and a scaling of 1, trimmed if asked for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_lora.adapters.attach import FactorPair
from grasp_lora.adapters.folder import one_rank, own_ranks
from grasp_lora.core.lora import LoraFactors, merge, rank_errors


@dataclass(frozen=True)
class Ready:
    """Factors that are ready to be written, all of one rank and with a scaling of 1.

    Attributes:
        pairs: full module name -> (A [rank, in], B [out, rank]), float32.
        lost: module -> relative error of its trimmed delta; empty where nothing was trimmed.
        own: module -> its own rank, where zeros fill it up to that of the others.
    """

    pairs: dict[str, FactorPair]
    lost: dict[str, float]
    own: dict[str, int]

    @property
    def rank(self) -> int:
        """The rank of all modules."""
        return next(iter(self.pairs.values()))[0].shape[0]


def ready(
    adapter: Mapping[str, LoraFactors], rank: int | None = None, tolerance: float | None = None
) -> Ready:
    """Return the factors of an adapter as they are written.

    Args:
        adapter: full module name -> factors.
        rank: the rank to trim to, by singular values; None keeps the delta whole.
        tolerance: the largest relative error of a module, in the Frobenius norm; the smallest rank
            that keeps to it is taken.

    Raises:
        ValueError: the rank is below 1, the tolerance is outside [0, 1), or both are given.
    """
    if rank is not None and tolerance is not None:
        raise ValueError("--rank and --tolerance say the same in two ways; give one of them")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank {rank} is no rank; give 1 or more")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"--tolerance {tolerance:g} is outside [0, 1); give a share like 0.01")
    whole = max(factors.rank for factors in adapter.values())
    wanted = rank
    if tolerance is not None or (rank is not None and rank < whole):
        errors = {name: rank_errors(factors) for name, factors in adapter.items()}
        if tolerance is not None:
            wanted = max(_rank_within(one, tolerance) for one in errors.values())
    if wanted is None or wanted >= whole:
        return _ready(_pairs(adapter, None), {})
    lost = {name: one[min(wanted, len(one) - 1)] for name, one in errors.items()}
    return _ready(_pairs(adapter, wanted), lost)


def _ready(pairs: Mapping[str, FactorPair], lost: dict[str, float]) -> Ready:
    return Ready(one_rank(pairs), lost, own_ranks(pairs))


def _rank_within(errors: list[float], tolerance: float) -> int:
    # Rounding leaves about 1e-8 of what is 0.
    return max(1, next(k for k, error in enumerate(errors) if error <= max(tolerance, 1e-7)))


def _pairs(adapter: Mapping[str, LoraFactors], rank: int | None) -> dict[str, FactorPair]:
    kind = "cat" if rank is None else "svd"
    merged = merge(kind, [adapter], [1.0], rank)
    return {name: (one.A, one.B) for name, one in merged.items()}


def check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Check that a number format holds the largest values.

    Args:
        tensors: name -> finite values.
        dtype: the number format.

    Raises:
        ValueError: values of a tensor would become infinite.
    """
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        largest = float(tensor.abs().max())
        if largest > most:
            raise ValueError(
                f"{name} holds values up to {largest:.3g}, but {str(dtype).removeprefix('torch.')} "
                f"ends at {most:.3g}; give --dtype bfloat16 or float32"
            )


def difference(first: Mapping[str, FactorPair], second: Mapping[str, FactorPair]) -> float:
    """Return the relative distance of two adapters' deltas: Frobenius norms over all modules.

    Args:
        first, second: module -> (A, B) with a scaling of 1; `second` is what `first` is held to.

    Raises:
        ValueError: they have other modules.
    """
    if first.keys() != second.keys():
        raise ValueError(
            f"{len(first.keys() ^ second.keys())} modules are in one adapter alone, first "
            f"{min(first.keys() ^ second.keys())}; export it again"
        )
    apart = whole = torch.zeros((), dtype=torch.float64)
    for name, (A, B) in second.items():
        other_A, other_B = first[name]
        apart = apart + _square(
            torch.cat([B.double(), -other_B.double()], dim=1),
            torch.cat([A.double(), other_A.double()], dim=0),
        )
        whole = whole + _square(B.double(), A.double())
    return float((apart / whole).sqrt()) if whole > 0 else float(apart.sqrt())


def _square(B: Tensor, A: Tensor) -> Tensor:
    """Return the squared Frobenius norm of B A, without the [out, in] matrix."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)
