"""How much each entry of a LoRA module matters: weights (and input norms) -> one score per entry.

One choice serves the search and the final run. The published code searched with magnitudes and
pruned the final run by the activation rule, so its ratio was learned for another mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 22
"""Most entries of `B @ A` held at once by `activation` (16 MiB in float32)."""


def magnitude(A: Tensor, B: Tensor, input_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return |A| [rank, in] and |B| [out, rank]; the input norms are not looked at."""
    return A.detach().abs(), B.detach().abs()


def activation(A: Tensor, B: Tensor, input_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return how fast the activated weight mass changes with each entry of A and B.

    With `S = sum_ij |B A|_ij n_j` the scores are `|dS/dA| = |B^T sgn(BA) diag(n)|` and
    `|dS/dB| = |sgn(BA) diag(n) A^T|` (the Wanda-like rule used by arXiv 2601.06702 for its final
    run). `B @ A` is computed in chunks of rows and never held whole.

    A blank factor (`is_blank`) makes every score of the other one equal to 0, which says nothing
    about its entries; `magnitude` is used then.

    Args:
        A: Down projection, [rank, in].
        B: Up projection, [out, rank].
        input_norms: L2 norm of each input feature over the data, [in], at least 0.

    Raises:
        ValueError: If the input norms are missing, of another size, negative or not finite.
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
    """Return whether a factor is all zero, like the B of a fresh adapter."""
    return not bool(factor.any())


IMPORTANCE: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "magnitude": magnitude,
    "activation": activation,
}
"""Name -> (A [rank, in], B [out, rank], input norms [in] or None) -> (scores of A, scores of B)."""

NEEDS_NORMS = frozenset({"activation"})
"""The rules that look at the input norms."""


def _checked_norms(A: Tensor, input_norms: Tensor | None) -> Tensor:
    if input_norms is None:
        raise ValueError(
            "importance 'activation' needs the input norms, got None; measure them on the training "
            "rows or use importance 'magnitude'"
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
