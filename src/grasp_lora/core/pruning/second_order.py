"""Optimal Brain Surgeon for the two factors of a LoRA: saliency of entries, and compensation.

A LoRA module adds B A x to the output of a layer. Removing entries costs
`E = ||(B A - B' A') X||^2 = tr((B A - B' A') H (B A - B' A')^T)`, with the second moments
`H = X X^T` of the inputs. The Hessian of E is `(B^T B) kron H` in the entries of A, and
`A H A^T` in each row of B. As in SparseGPT (arXiv 2301.00774), H is damped. What differs from it:
the weight is a product of two factors, and the entries that stay are fitted exactly, block by
block, where SparseGPT goes through columns once.
"""

# torch leaves these results untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""What is added to the diagonal of H, as a fraction of its mean; that of SparseGPT."""
SWEEPS = 2
"""Passes over the row blocks of both factors."""
_RIDGE = 1e-9  # keeps [rank, rank] matrices of dead components invertible
_CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class Curvature:
    """The damped second moments of a module's inputs.

    Attributes:
        moments: H, [in, in], float32.
        inverse_diagonal: Diagonal of its inverse, [in], float64.
    """

    moments: Tensor
    inverse_diagonal: Tensor

    @classmethod
    def of(cls, moments: Tensor, damping: float = DAMPING) -> "Curvature":
        """Return the curvature of second moments, summed or averaged over tokens, [in, in].

        Raises:
            ValueError: If a moment is not finite.
        """
        if not bool(torch.isfinite(moments).all()):
            raise ValueError(
                "second moments of inputs must be finite, got a NaN or infinite one; measure them "
                "again in float32"
            )
        damped = _damped(moments.double(), damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return cls(damped.float(), inverse.diagonal().clone())


def saliency(A: Tensor, B: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
    """Return the least E after each entry alone was removed, of A [rank, in] and B [out, rank].

    "Least" is over all values of the other entries of the same factor:
    `a_kj^2 / ([(B^T B)^-1]_kk [H^-1]_jj)` and `b_ik^2 / [(A H A^T)^-1]_kk`.
    """
    down, up = A.detach().double(), B.detach().double()
    H = curvature.moments.to(down)
    by_column = curvature.inverse_diagonal.to(down)
    by_row = _inverse_diagonal(up.T @ up)
    of_components = _inverse_diagonal(down @ H @ down.T)
    score_A = down.square() / (by_row[:, None] * by_column)
    return score_A.float(), (up.square() / of_components).float()


def compensated(
    A: Tensor, B: Tensor, keep_A: Tensor, keep_B: Tensor, curvature: Curvature
) -> tuple[Tensor, Tensor]:
    """Return A' [rank, in] and B' [out, rank] of a pruned module with a low E, zero where pruned.

    The rows of B are fitted given A, exactly, then each row of A given B and the other rows, and
    so on for `SWEEPS`. No step raises E, so it ends no higher than with the kept entries unchanged.

    Args:
        A: Down projection before pruning, [rank, in].
        B: Up projection before pruning, [out, rank].
        keep_A: True for the entries that stay, [rank, in].
        keep_B: As `keep_A`, [out, rank].
        curvature: Of the module's inputs.
    """
    old_A, old_B = A.detach().double(), B.detach().double()
    H = curvature.moments.to(old_A)
    new_A = old_A * keep_A
    for _ in range(SWEEPS):
        new_B = _fitted_B(old_A, old_B, new_A, keep_B, H)
        new_A = _fitted_A(old_A, old_B, new_A, new_B, keep_A, H)
    new_B = _fitted_B(old_A, old_B, new_A, keep_B, H)
    return new_A.to(A.dtype), new_B.to(B.dtype)


def output_error(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], moments: Tensor) -> float:
    """Return E of a pruned module.

    Args:
        old: A [rank, in] and B [out, rank] before pruning.
        new: The same afterwards.
        moments: H, [in, in].
    """
    lost = old[1].double() @ old[0].double() - new[1].double() @ new[0].double()
    return float((lost @ moments.double() * lost).sum())


def _fitted_B(old_A: Tensor, old_B: Tensor, new_A: Tensor, keep: Tensor, H: Tensor) -> Tensor:
    """Return the B that fits best given `new_A`; each row has its own support."""
    gram = _damped(new_A @ H @ new_A.T, _RIDGE)  # [rank, rank]
    wanted = old_B @ (old_A @ H @ new_A.T)  # [out, rank]
    fitted = torch.empty_like(old_B)
    rows = max(1, _CHUNK_ENTRIES // gram.numel())
    for start in range(0, old_B.shape[0], rows):
        kept = keep[start : start + rows].to(gram)
        # A pruned entry gets an equation of its own: 1 x = 0.
        systems = gram * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(1 - kept)
        right = (wanted[start : start + rows] * kept)[:, :, None]
        fitted[start : start + rows] = torch.linalg.solve(systems, right)[:, :, 0] * kept
    return fitted


def _fitted_A(
    old_A: Tensor, old_B: Tensor, new_A: Tensor, new_B: Tensor, keep: Tensor, H: Tensor
) -> Tensor:
    """Return an A in which each row in turn fits best given `new_B` and the other rows."""
    gram, across = new_B.T @ new_B, new_B.T @ old_B  # [rank, rank]
    fitted = new_A.clone()
    for k in range(len(fitted)):
        weight = gram[k, k]
        if not bool(weight > 0):  # nothing of B reads this row
            continue
        kept = keep[k]
        free = fitted[k] + (across[k] @ old_A - gram[k] @ fitted) / weight  # the best unpruned row
        fitted[k] = torch.where(kept, free, 0.0)
        if bool(kept.any()) and not bool(kept.all()):
            factor = torch.linalg.cholesky(H[kept][:, kept])
            lost = H[kept][:, ~kept] @ free[~kept]
            fitted[k, kept] += torch.cholesky_solve(lost[:, None], factor)[:, 0]
    return fitted


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """Return a matrix with `damping` times the mean of its diagonal added to the diagonal.

    A matrix of zeros becomes the identity.
    """
    added = damping * float(matrix.diagonal().mean()) or 1.0
    return matrix + added * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _inverse_diagonal(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(_damped(matrix, _RIDGE)).diagonal()
