"""Singular value decompositions of matrices of low rank, none of which decomposes a whole one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FIRST_SKETCH = 32
"""Columns of the first sketch; most adapters have ranks below."""

_OVERSAMPLING = 8
"""Columns of a sketch above the rank that is looked for."""


@dataclass(frozen=True)
class Directions:
    """A change of a weight, decomposed; the largest values first.

    Attributes:
        left: Shape (out, n).
        values: Shape (n,).
        right: Shape (n, in).
        left_out: Norm of what is missing.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    left_out: float = 0.0

    @classmethod
    def of_product(cls, b: torch.Tensor, a: torch.Tensor) -> Directions:
        """Decompose B A of B (out, rank) and A (rank, in)."""
        # B A = Q_b (R_b R_a^T) Q_a^T, so only a (rank, rank) matrix needs a decomposition.
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return cls(q_b @ left, values, right @ q_a.T)

    @classmethod
    def of_change(cls, change: torch.Tensor, *, max_rank: int, no_more: float) -> Directions:
        """Decompose a matrix of a rank that is not known, but probably at most `max_rank`.

        Its range is found from its product with a few random columns (Halko, Martinsson and Tropp,
        arXiv 0909.4061), which is the whole range if it has no more dimensions.
        Where more than `no_more` is missing, there are more columns, and at last all of them.

        Args:
            change: Shape (out, in), in double precision.
            max_rank: The highest rank of interest.
            no_more: Norm of what may be missing.
        """
        shorter, n = min(change.shape), min(_FIRST_SKETCH, max_rank + _OVERSAMPLING)
        generator = torch.Generator().manual_seed(0)
        norm = float(change.norm())
        while 2 * n < shorter:
            columns = torch.randn(change.shape[1], n, generator=generator, dtype=change.dtype)
            basis, _ = torch.linalg.qr(change @ columns.to(change.device))
            # Once more, so that rounding errors of full rank do not turn it (algorithm 4.4).
            basis, _ = torch.linalg.qr(change @ (change.T @ basis))
            rest = basis.T @ change
            # The basis is orthonormal: the squares of what it holds and of what is missing add up.
            missing = max(0.0, norm**2 - float(rest.norm()) ** 2) ** 0.5
            if missing <= no_more:
                found = cls.of_product(basis, rest)
                return cls(found.left, found.values, found.right, missing)
            if n >= max_rank + _OVERSAMPLING:
                break
            n = min(4 * n, max_rank + _OVERSAMPLING)
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        return cls(left, values, right)
