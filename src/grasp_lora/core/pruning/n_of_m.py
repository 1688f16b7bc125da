"""The ratios of n:m structures, in which n of every m neighbouring entries stay.

An n:m structure is one mask, so it knows two ratios: 0 (nothing is pruned) and 1 - n/m. A search
decides between the two.
"""

from collections.abc import Mapping

N_OF_M: Mapping[str, tuple[int, int]] = {"2:4": (2, 4), "4:8": (4, 8)}
"""Structure -> (entries that stay, entries of a group)."""


def known_ratio(structure: str, ratio: float) -> float:
    """Return the ratio that a structure prunes when it is asked for `ratio`, in [0, 1].

    "n:m" takes the nearer of the two that it knows, of two equally near the larger. The other
    structures count in each tensor, so they are asked for any ratio.
    """
    if structure not in N_OF_M:
        return ratio
    return nearer_known(ratio, *N_OF_M[structure])


def nearer_known(ratio: float, kept: int, size: int) -> float:
    """Return 0 or 1 - kept/size, whichever is nearer to `ratio`."""
    known = 1 - kept / size
    return known if ratio >= known / 2 else 0.0
