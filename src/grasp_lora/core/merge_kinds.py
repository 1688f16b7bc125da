"""The kinds of merge that a run knows by name. Reading the settings does not load torch."""

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["cat", "linear", "svd", "layer-swap", "ties-delta"]
UNWEIGHTED: tuple[Literal["layer-swap"], Literal["ties-delta"]] = ("layer-swap", "ties-delta")
"""Kinds that have no weights."""
BLENDED: tuple[Kind, ...] = ("svd", "ties-delta")
"""Kinds whose result does not keep the adapters apart."""
SUMMED_RANKS: tuple[Kind, ...] = ("cat", "ties-delta")
"""Kinds whose result has the sum of the adapters' ranks."""
