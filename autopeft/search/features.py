"""Genomes as numbers for a model of quality: what was changed, where, how much, at which rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.search.options import Grid

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureTable:
    """Per-option features of a grid, so that features of many genomes are a lookup and a sum.

    Attributes:
        size: log2(1 + parameters a block) of each unit's option, scaled to [0, 1]; shape
            (n_units, n_options).
        method: One-hot method, shape (n_options, n_methods).
        roles: Roles an option adapts, shape (n_options, n_roles).
    """

    size: Array
    method: Array
    roles: Array

    @classmethod
    def of(cls, grid: Grid) -> FeatureTable:
        """The table of a grid."""
        per_block = grid.params / np.array([len(u.layers) for u in grid.units])[:, None]
        size = np.log2(1.0 + np.where(np.isfinite(per_block), per_block, 0.0))
        top = size.max()
        method = np.zeros((len(grid.options), len(grid.methods)))
        method[np.arange(1, len(grid.options)), grid.method_of[1:]] = 1.0
        roles = sorted({role for place in grid.placements.values() for role in place})
        table = np.zeros((len(grid.options), len(roles)))
        for option in range(1, len(grid.options)):
            used = {s.role for (_, o), specs in grid.sites.items() if o == option for s in specs}
            table[option] = [role in used for role in roles]
        return cls(size / (top if top > 0 else 1.0), method, table)

    def of_options(self, options: NDArray[np.int64], positions: Array, log_params: Array) -> Array:
        """Features of genomes.

        Args:
            options: Shape (n, n_units).
            positions: Learning-rate positions, shape (n,).
            log_params: Natural logarithm of the trainable parameters, shape (n,).

        Returns:
            Shape (n, 2 + n_methods + n_roles + n_units): rate position, log cost (scaled by 1/10),
            share of units by method, mean size by role, size by unit.
        """
        sizes = self.size[np.arange(options.shape[1]), options]
        shares = self.method[options].mean(axis=1)
        roles = (self.roles[options] * sizes[..., None]).mean(axis=1)
        return np.hstack([positions[:, None], log_params[:, None] / 10.0, shares, roles, sizes])
