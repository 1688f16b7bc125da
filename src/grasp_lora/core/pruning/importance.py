"""Score the importance of each entry of a LoRA module from its weights (and input norms).

The search and the final run use the same rule. Our departure from the published code: it searched
with magnitudes and pruned the final run by the activation rule, so it learned its ratio for a
different mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 22
"""Largest number of entries of `B @ A` that `activation` holds at once (16 MiB in float32)."""


def magnitude(A: Tensor, B: Tensor, input_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return |A| [rank, in] and |B| [out, rank]; the input norms are ignored."""
    return A.detach().abs(), B.detach().abs()


def activation(A: Tensor, B: Tensor, input_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scores of A [rank, in] and of B [out, rank]: how fast the activated mass changes.

    The activated mass is `S = sum_ij |B A|_ij n_j` with input norms n. The scores are
    `|dS/dA| = |B^T sgn(BA) diag(n)|` and `|dS/dB| = |sgn(BA) diag(n) A^T|`. This is the Wanda-like
    rule that arXiv 2601.06702 uses for its final run. `B @ A` is computed in chunks of rows and
    never held whole.

    If one factor is all zero (`is_blank`), every score of the other factor would be 0 and would not
    rank its entries. `magnitude` is used in that case.

    Args:
        A: Down projection, [rank, in].
        B: Up projection, [out, rank].
        input_norms: L2 norm of each input feature over the data, [in], at least 0.

    Raises:
        ValueError: If the input norms are missing, of the wrong size, negative or not finite.
    """
    norms = _checked_norms(A, input_norms)
    if is_blank(A) or is_blank(B):
        return magnitude(A, B, None)
    down, up = A.detach().float(), B.detach().float()
    score_A = torch.zeros_like(down)
    score_B = torch.empty_like(up)
    rows = max(1, CHUNK_ENTRIES // down.shape[1])
    for start in range(0, up.shape[0], rows):
        part = up[start : start + rows]  # [rows, rank]
        signed = torch.sign(part @ down) * norms  # [rows, in]
        score_A += part.T @ signed
        score_B[start : start + rows] = signed @ down.T
    return score_A.abs(), score_B.abs()


def is_blank(factor: Tensor) -> bool:
    """Return whether a factor is all zero, like B of an untrained adapter."""
    return not bool(factor.any())


IMPORTANCE: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "magnitude": magnitude,
    "activation": activation,
}
"""Rule -> function(A [rank, in], B [out, rank], input norms [in] or None) -> scores of A and B."""

NEEDS_NORMS = frozenset({"activation"})
"""The rules that need the input norms."""


def _checked_norms(A: Tensor, input_norms: Tensor | None) -> Tensor:
    if input_norms is None:
        raise ValueError(
            "importance 'activation' needs the input norms, got None; measure them on the training "
            "examples or use importance 'magnitude'"
        )
    if input_norms.shape != A.shape[1:]:
        raise ValueError(
            f"input norms must be one per input feature, [{A.shape[1]}], got "
            f"{list(input_norms.shape)}; measure them on the module they belong to"
        )
    norms = input_norms.detach().to(device=A.device, dtype=torch.float32)
    if not bool((torch.isfinite(norms) & (norms >= 0)).all()):
        raise ValueError(
            "input norms must be finite and at least 0, got a negative, NaN or infinite one; "
            "measure them again in float32"
        )
    return norms
