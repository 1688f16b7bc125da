"""Score the importance of each entry of a LoRA module from its weights and what was measured.

What a rule needs beside the weights of a block is its third argument: nothing (`magnitude`), the
input norms (`activation`), averages of gradients (`taylor`, `taylor-smoothed`) or the second
moments of the inputs (`obs`). Without it, or where a factor is all zero, a rule says nothing.

The search and the final run use the same rule. Our departure from the published code: it searched
with magnitudes and pruned the final run by the activation rule, so it learned its ratio for a
different mask.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from grasp_lora.core.pruning.second_order import Curvature, compensated, saliency

CHUNK_ENTRIES = 1 << 22
"""Largest number of entries of `B @ A` that `activation` holds at once (16 MiB in float32)."""


_Measured = TypeVar("_Measured")


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


def taylor(A: Tensor, B: Tensor, gradients: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return |A dL/dA| [rank, in] and |B dL/dB| [out, rank]: what a loss changes without an entry.

    It is the first order of the change, as in LLM-Pruner (arXiv 2305.11627). Where a factor is all
    zero, `magnitude` is used.

    Args:
        A: Down projection, [rank, in].
        B: Up projection, [out, rank].
        gradients: Of the training loss by A [rank, in] and by B [out, rank].

    Raises:
        ValueError: If the gradients are missing.
    """
    by_A, by_B = _given("taylor", gradients)
    if is_blank(A) or is_blank(B):
        return magnitude(A, B, None)
    return (A.detach().float() * by_A).abs(), (B.detach().float() * by_B).abs()


def taylor_smoothed(
    A: Tensor, B: Tensor, averages: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return the smoothed sensitivity of A [rank, in] and B [out, rank] times its uncertainty.

    The sensitivity of an entry is |w dL/dw|; its uncertainty is the averaged distance of single
    steps from the average. This is the importance of AdaLoRA (arXiv 2303.10512).

    Args:
        A: Down projection, [rank, in].
        B: Up projection, [out, rank].
        averages: Of A, [2, rank, in], and of B, [2, out, rank]: sensitivity and uncertainty.

    Raises:
        ValueError: If the averages are missing.
    """
    of_A, of_B = _given("taylor-smoothed", averages)
    if is_blank(A) or is_blank(B):
        return magnitude(A, B, None)
    return of_A[0] * of_A[1], of_B[0] * of_B[1]


def obs(A: Tensor, B: Tensor, curvature: Curvature | None) -> tuple[Tensor, Tensor]:
    """Return the error of the layer's output that the loss of each entry costs at least.

    See `second_order.saliency`. Where a factor is all zero, `magnitude` is used.

    Raises:
        ValueError: If the second moments are missing or of the wrong size.
    """
    known = _given("obs", curvature)
    if known.moments.shape[0] != A.shape[1]:
        raise ValueError(
            f"second moments must be one for each pair of {A.shape[1]} input features, got "
            f"{list(known.moments.shape)}; measure them on the module they belong to"
        )
    if is_blank(A) or is_blank(B):
        return magnitude(A, B, None)
    return saliency(A, B, known)


def _given(rule: str, measured: _Measured | None) -> _Measured:
    if measured is None:
        raise ValueError(
            f"importance {rule!r} needs what is measured on the training examples, got None; "
            "measure it, or use importance 'magnitude'"
        )
    return measured


def is_blank(factor: Tensor) -> bool:
    """Return whether a factor is all zero, like B of an untrained adapter."""
    return not bool(factor.any())


IMPORTANCE: dict[str, Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]] = {
    "magnitude": magnitude,
    "activation": activation,
    "taylor": taylor,
    "taylor-smoothed": taylor_smoothed,
    "obs": obs,
}
"""Rule -> function(A [rank, in], B [out, rank], what was measured or None) -> scores of A and B."""

FITS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]] = {
    "obs": compensated
}
"""Rule -> function(A, B, which of A and of B stay, what was measured) -> new A and B. By the other
rules the entries that stay keep their values."""

NEEDS_NORMS = frozenset({"activation"})
"""The rules that need the input norms."""
NEEDS_GRADIENTS = frozenset({"taylor", "taylor-smoothed"})
"""The rules that need averages of gradients; a training gathers them as it goes."""
READS_ROWS = NEEDS_NORMS | NEEDS_GRADIENTS | {"obs"}
"""The rules that read the train examples once where nothing is trained."""


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
