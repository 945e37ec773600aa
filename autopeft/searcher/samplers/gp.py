"""A model of quality: a Gaussian process on plans, whose kernel is a sum of plain assumptions.

Each term says one thing about adapters: qualities of plans are alike if their learning rates are
near, if they cost about the same, if they hold the same options on the whole, if neighboring
blocks hold the same options, if the very same blocks do, or if everything is alike at once. How
much each assumption counts is learned from the trials (by marginal likelihood, with a prior, so
that a dozen trials do not overrule it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from autopeft.searcher.space.grid import Grid

Array = NDArray[np.float64]

_N_DIMENSIONS = 24
"""Dimensions kept of the space of options; their similarity has few that matter."""

_BLOCK_NUMBERS = 1600
"""Numbers that may describe a plan block by block; more units get fewer dimensions each."""

TERMS = (
    "constant",
    "rate",
    "rate by method",
    "cost",
    "options",
    "options by depth",
    "options by block",
    "mixture at rate",
    "whole at rate",
)
"""What the kernel's terms compare, in order."""

_PRIOR = np.log(np.array([1.0, 0.3, 0.3, 0.1, 0.3, 0.2, 0.1, 0.3, 0.15]))
_PRIOR_SPREAD = 1.0
_NOISE_PRIOR, _NOISE_SPREAD = np.log(0.02), 1.5
_FIT_AT_MOST = 120
"""Trials the weights of the terms are learned from; more would only cost time."""


@dataclass(frozen=True)
class Features:
    """Plans as the kernel sees them.

    Attributes:
        position: Learning-rate positions, shape (n,).
        log_cost: Trainable parameters on a log scale, in [0, 1] over the space, shape (n,).
        shares: Share of units by method, "none" first, shape (n, n_methods + 1).
        blocks: Embedded option of each unit, flattened, shape (n, n_units * d).
        depths: The same, smoothed over neighboring units.
        total: Mean embedding over units, shape (n, d).
    """

    position: Array
    log_cost: Array
    shares: Array
    blocks: Array
    depths: Array
    total: Array

    def __len__(self) -> int:
        return len(self.position)

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Some of them."""
        return Features(
            self.position[rows],
            self.log_cost[rows],
            self.shares[rows],
            self.blocks[rows],
            self.depths[rows],
            self.total[rows],
        )


class Embedding:
    """Places options where alike ones are near: same method, near size, overlapping roles.

    Args:
        grid: The space's grid.
        log_range: Natural logarithms of fewest and most trainable parameters of a plan.
    """

    def __init__(self, grid: Grid, log_range: tuple[float, float]) -> None:
        self._grid = grid
        self._log_range = log_range
        self._vectors = _option_vectors(grid)
        n = len(grid.units)
        self._n_kept = min(max(_BLOCK_NUMBERS // n, 3), _N_DIMENSIONS)
        steps = np.abs(np.arange(n)[:, None] - np.arange(n)[None, :])
        smooth = np.exp(-steps / max(1.0, n / 6.0))
        values, vectors = np.linalg.eigh(smooth)
        keep = values > 0.02 * values.max()
        self._smoother = vectors[:, keep] * np.sqrt(values[keep])  # (units, fewer)

    def features(self, options: NDArray[np.int64], position: Array, log_params: Array) -> Features:
        """Plans as the kernel sees them.

        Args:
            options: Shape (n, n_units).
            position: Learning-rate positions, shape (n,).
            log_params: Natural logarithms of the trainable parameters, shape (n,).
        """
        n, n_units = options.shape
        vectors = self._vectors[options]  # (n, units, d)
        low, high = self._log_range
        methods = self._grid.method_of[options] + 1
        shares = np.stack(
            [(methods == m).mean(axis=1) for m in range(len(self._grid.methods) + 1)], axis=1
        )
        depths = np.tensordot(vectors, self._smoother, axes=(1, 0))  # (n, d, fewer)
        return Features(
            position,
            (log_params - low) / max(high - low, 1e-9),
            shares,
            vectors[:, :, : self._n_kept].reshape(n, -1) / np.sqrt(n_units),
            depths.reshape(n, -1) / n_units,
            vectors.mean(axis=1),
        )


def _option_vectors(grid: Grid) -> Array:
    """Vectors whose inner products are the options' similarities; shape (n_options, d).

    "none" is the zero vector: an adapter that is not there adds nothing.
    """
    size = np.where(np.isfinite(grid.params), grid.params, np.nan)
    log_size = np.log2(1.0 + np.nanmean(size, axis=0))[1:]
    names = sorted({role for place in grid.placements.values() for role in place})
    roles = np.zeros((len(grid.options), len(names)))
    for (_, option), specs in grid.sites.items():
        for spec in specs:
            roles[option, names.index(spec.role)] = 1.0
    unit = roles[1:] / np.linalg.norm(roles[1:], axis=1, keepdims=True)
    method = grid.method_of[1:]
    apart = log_size[:, None] - log_size[None, :]
    # Larger adapters tend to do more, with less and less to gain: proportional to the logarithm.
    amount = 1.6 * (log_size - log_size.min() + 1.0) / (np.ptp(log_size) + 1.0)
    alike = (
        (0.7 + 0.3 * (method[:, None] == method[None, :]))
        * (0.65 * np.exp(-0.5 * (apart / 4.0) ** 2) + 0.35 * np.outer(amount, amount))
        * (0.25 + 0.75 * unit @ unit.T)
    )
    values, vectors = np.linalg.eigh(alike)
    top = np.argsort(-values)[:_N_DIMENSIONS]
    table = np.zeros((len(grid.options), len(top)))
    table[1:] = vectors[:, top] * np.sqrt(np.maximum(values[top], 0.0))
    return table


def _square_distances(a: Array, b: Array) -> Array:
    inner = a @ b.T
    squares: Array = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * inner
    return np.maximum(squares, 0.0)


def terms(a: Features, b: Features, scales: tuple[float, float]) -> list[Array]:
    """The kernel's terms between two sets of plans, each of shape (len(a), len(b)).

    Args:
        a: Rows.
        b: Columns.
        scales: Typical squared distances of `total` and of `blocks`.
    """
    rate = (a.position[:, None] - b.position[None, :]) ** 2
    smooth_rate = np.exp(-rate / (2 * 0.35**2))
    cost = a.log_cost[:, None] - b.log_cost[None, :]
    mixture = np.exp(-_square_distances(a.total, b.total) / (2.0 * scales[0]))
    whole = np.exp(-_square_distances(a.blocks, b.blocks) / (2.0 * scales[1]))
    return [
        np.ones((len(a), len(b))),
        smooth_rate,
        np.exp(-rate / (2 * 0.2**2)) * (a.shares @ b.shares.T),
        np.exp(-(cost**2) / (2 * 0.25**2)),
        a.total @ b.total.T,
        a.depths @ b.depths.T,
        a.blocks @ b.blocks.T,
        mixture * smooth_rate,
        whole * smooth_rate,
    ]


class GaussianProcess:
    """The Gaussian process. Fit, then predict; weights of the terms are kept between fits.

    Args:
        embedding: Of the space.
    """

    def __init__(self, embedding: Embedding) -> None:
        self.embedding = embedding
        self._log_weights = np.append(_PRIOR, _NOISE_PRIOR)
        self._fitted_on = 0

    def fit(self, features: Features, values: Array, extra_noise: Array | None = None) -> None:
        """Learn from trials.

        Args:
            features: Their plans.
            values: Their qualities, larger is better, shape (n,).
            extra_noise: Standard deviations of values that are themselves estimates, in the unit
                of the values, shape (n,).
        """
        center, spread = float(np.median(values)), float(np.std(values))
        self._center, self._spread = center, spread if spread > 0 else 1.0
        self._points = features
        self._values = (values - center) / self._spread
        self._extra = np.zeros(len(values)) if extra_noise is None else extra_noise / self._spread
        self._scales = (
            max(float(np.median(_square_distances(features.total, features.total))), 1e-6),
            max(float(np.median(_square_distances(features.blocks, features.blocks))), 1e-6),
        )
        parts = terms(features, features, self._scales)
        if len(features) > 1.15 * self._fitted_on or len(features) < self._fitted_on:
            self._learn(parts)
            self._fitted_on = len(features)
        self._factor(parts)

    def _learn(self, parts: list[Array]) -> None:
        rows = np.arange(len(self._points))
        if len(rows) > _FIT_AT_MOST:
            rows = np.random.default_rng(0).choice(rows, _FIT_AT_MOST, replace=False)
        grams = np.array([part[np.ix_(rows, rows)] for part in parts])
        values, extra = self._values[rows], self._extra[rows]
        prior = np.append(_PRIOR, _NOISE_PRIOR)
        spread = np.append(np.full(len(_PRIOR), _PRIOR_SPREAD), _NOISE_SPREAD)

        def loss(log_weights: Array) -> tuple[float, Array]:
            weights = np.exp(log_weights)
            matrix = np.tensordot(weights[:-1], grams, axes=1)
            matrix[np.diag_indices_from(matrix)] += weights[-1] + extra**2 + 1e-6
            try:
                factor = cho_factor(matrix, lower=True)
            except np.linalg.LinAlgError:
                return 1e10, np.zeros_like(log_weights)
            alpha = cho_solve(factor, values)
            inverse = cho_solve(factor, np.eye(len(values)))
            outer = np.outer(alpha, alpha) - inverse
            slopes = 0.5 * np.tensordot(grams, outer, axes=([1, 2], [0, 1])) * weights[:-1]
            noise_slope = 0.5 * np.trace(outer) * weights[-1]
            value = 0.5 * values @ alpha + np.log(np.diag(factor[0])).sum()
            pull = (log_weights - prior) / spread
            return float(value + 0.5 * (pull**2).sum()), pull / spread - np.append(
                slopes, noise_slope
            )

        found = minimize(
            loss,
            self._log_weights,
            jac=True,
            method="L-BFGS-B",
            bounds=[(p - 6.0, p + 5.0) for p in prior],
            options={"maxiter": 40},
        )
        self._log_weights = found.x

    def _factor(self, parts: list[Array]) -> None:
        weights = np.exp(self._log_weights)
        matrix = sum(w * part for w, part in zip(weights[:-1], parts, strict=True))
        matrix = np.asarray(matrix, dtype=float)
        matrix[np.diag_indices_from(matrix)] += weights[-1] + self._extra**2 + 1e-6
        self._lower = np.linalg.cholesky(matrix)
        half = solve_triangular(self._lower, self._values, lower=True)
        self._alpha = solve_triangular(self._lower.T, half, lower=False)

    @property
    def noise(self) -> float:
        """Standard deviation of a trial's noise, in the unit of the values."""
        return float(np.exp(0.5 * self._log_weights[-1]) * self._spread)

    def weights(self) -> dict[str, float]:
        """How much each term counts (variance, in units of the values' variance)."""
        return dict(zip((*TERMS, "noise"), np.exp(self._log_weights).tolist(), strict=True))

    def predict(self, features: Features) -> tuple[Array, Array]:
        """Mean and standard deviation of the noise-free quality, each of shape (n,)."""
        weights = np.exp(self._log_weights)[:-1]
        parts = terms(features, self._points, self._scales)
        cross = np.zeros((len(features), len(self._points)))
        for weight, part in zip(weights, parts, strict=True):
            cross += weight * part
        mean = cross @ self._alpha
        half = solve_triangular(self._lower, cross.T, lower=True)
        own = self._own_variance(features, weights)
        variance = np.maximum(own - (half**2).sum(axis=0), 1e-9)
        return self._center + self._spread * mean, self._spread * np.sqrt(variance)

    def _own_variance(self, features: Features, weights: Array) -> Array:
        diagonal = [
            1.0,
            1.0,
            (features.shares**2).sum(axis=1),
            1.0,
            (features.total**2).sum(axis=1),
            (features.depths**2).sum(axis=1),
            (features.blocks**2).sum(axis=1),
            1.0,
            1.0,
        ]
        total = np.zeros(len(features))
        for weight, part in zip(weights, diagonal, strict=True):
            total += weight * part
        return total
