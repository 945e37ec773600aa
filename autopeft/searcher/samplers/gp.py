"""A Gaussian process for quality, with an additive kernel over plans.

Each term of the kernel is one assumption about adapters: plans have similar quality if their
learning rates are close, if they cost about the same, if they contain the same options overall, if
nearby blocks have the same options, if the same blocks do, or if everything is similar at once. The
weights of the terms are learned by marginal likelihood with a Gaussian prior on their logarithms,
so that a dozen trials do not overrule it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.grid import Grid
from autopeft.searcher.space.space import SearchSpace

Array = NDArray[np.float64]

_N_DIMENSIONS = 24
"""Maximum dimensions of the embedding of options."""

_BLOCK_NUMBERS = 1600
"""Maximum length of a plan's features by block; with more units, each gets fewer dimensions."""

_PRIOR_WEIGHTS = {
    "constant": 1.0,
    "rate": 0.3,
    "rate by method": 0.3,
    "cost": 0.1,
    "options": 0.3,
    "options by depth": 0.2,
    "options by block": 0.1,
    "mixture at rate": 0.3,
    "whole at rate": 0.15,
}
"""Prior mean of each term's weight, in the order of `terms`."""

_PRIOR = np.log(np.array(list(_PRIOR_WEIGHTS.values())))
_PRIOR_SPREAD = 1.0
_NOISE_PRIOR, _NOISE_SPREAD = np.log(0.02), 1.5
_TRUSTS = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
"""Correlations of an earlier search with this one that are weighed; equally likely beforehand."""

_EARLIER_NOISE = 0.2
"""Noise of an earlier search's quality, in its standard deviations."""

_LEAST_SPREAD = 1e-100
"""Values that differ by less are equal; dividing by it must stay finite."""

_MAX_TO_LEARN = 120
"""Maximum number of trials that the weights are learned from; more only take time."""


@dataclass(frozen=True)
class Features:
    """Features of points for the kernel.

    Attributes:
        position: Learning-rate positions in [0, 1], shape (n,).
        log_cost: Log of trainable parameters, scaled to [0, 1] over the space, shape (n,).
        shares: Share of units with each method, "none" first, shape (n, n_methods + 1).
        blocks: Embedded option of each unit, flattened, shape (n, n_units * d).
        depths: The same, smoothed over nearby units, shape (n, d * m).
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

    def joined(self, other: Features) -> Features:
        """Return these points' features, then the other's."""
        parts = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Features(*(np.concatenate(pair) for pair in parts))


@dataclass(frozen=True)
class Earlier:
    """What earlier searches found, on other data or models.

    Attributes:
        features: Features of their points.
        values: Qualities, standardized within each search, larger is better, shape (n,).
        sources: Number of the search of each, from 1 on, shape (n,).
    """

    features: Features
    values: Array
    sources: NDArray[np.int64]


def log_params(points: Sequence[Point], space: SearchSpace) -> Array:
    """Return natural logarithms of the trainable parameters of points, shape (n,)."""
    if not points:
        return np.zeros(0)
    params = space.n_params(np.array([point.options for point in points]))
    logs: Array = np.log(np.maximum(params, 1.0))
    return logs


class Embedding:
    """Embeds options such that similar ones are close: same method, similar size, common roles.

    Args:
        grid: The space's grid.
        log_range: Natural logarithms of the fewest and most trainable parameters.
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

    def of(self, points: Sequence[Point], space: SearchSpace) -> Features:
        """Return the features of points of a space."""
        options = np.array([point.options for point in points])
        positions = np.array([point.position for point in points])
        return self.features(options, positions, log_params(points, space))

    def features(self, options: NDArray[np.int64], position: Array, log_params: Array) -> Features:
        """Return the features of points.

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
    """Return vectors whose inner products are the similarities of options, shape (n_options, d).

    "none" is the zero vector, because a missing adapter adds nothing.
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
    log_ratio = log_size[:, None] - log_size[None, :]
    # The effect of an adapter grows about with the logarithm of its size.
    effect = 1.6 * (log_size - log_size.min() + 1.0) / (np.ptp(log_size) + 1.0)
    similarity = (
        (0.7 + 0.3 * (method[:, None] == method[None, :]))
        * (0.65 * np.exp(-0.5 * (log_ratio / 4.0) ** 2) + 0.35 * np.outer(effect, effect))
        * (0.25 + 0.75 * unit @ unit.T)
    )
    values, vectors = np.linalg.eigh(similarity)
    top = np.argsort(-values)[:_N_DIMENSIONS]
    table = np.zeros((len(grid.options), len(top)))
    table[1:] = vectors[:, top] * np.sqrt(np.maximum(values[top], 0.0))
    return table


def _square_distances(a: Array, b: Array) -> Array:
    inner = a @ b.T
    squares: Array = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * inner
    return np.maximum(squares, 0.0)


def terms(a: Features, b: Features, scales: tuple[float, float]) -> list[Array]:
    """Return the kernel's terms between two sets of points, each of shape (len(a), len(b)).

    The scales are the median squared distances of `total` and of `blocks`.
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


def diagonals(features: Features) -> list[Array]:
    """Return the diagonals of `terms` of points with themselves, each of shape (n,)."""
    one = np.ones(len(features))
    shares, total, depths, blocks = (
        (part**2).sum(axis=1)
        for part in (features.shares, features.total, features.depths, features.blocks)
    )
    return [one, one, shares, one, total, depths, blocks, one, one]


def _weighted(weights: Array, parts: list[Array]) -> Array:
    total = np.zeros(parts[0].shape)
    for weight, part in zip(weights, parts, strict=True):
        total += weight * part
    return total


class GaussianProcess:
    """A Gaussian process; the weights of the terms are kept between fits.

    Earlier searches on other data share the kernel, as tasks: each has a level of its own, and its
    correlation with this search, its trust, is learned from this search's trials. So what an
    earlier search says fades as trials come in, and sooner where it is wrong.

    Args:
        embedding: Embedding of the space's options.

    Attributes:
        trust: Correlation of each earlier search with this one, shape (n_sources,).
    """

    def __init__(self, embedding: Embedding) -> None:
        self.embedding = embedding
        self._log_weights = np.append(_PRIOR, _NOISE_PRIOR)
        self._fitted_on = 0
        self.trust = np.zeros(0)

    def fit(
        self,
        features: Features,
        values: Array,
        extra_noise: Array | None = None,
        earlier: Earlier | None = None,
        *,
        learns: bool | None = None,
    ) -> None:
        """Fit to trials.

        Args:
            features: Features of their points.
            values: Qualities, larger is better, shape (n,); no NaN, and `usable`.
            extra_noise: Standard deviations of estimated values, in the values' unit, shape (n,);
                None for zeros.
            earlier: What earlier searches found. How far each agrees with this one is learned.
            learns: Whether to learn the weights of the terms again; None: if the number of trials
                has grown by 15 %, or fallen, since they were learned.
        """
        center, spread = float(np.median(values)), float(np.std(values))
        self._center, self._spread = center, spread if spread > _LEAST_SPREAD else 1.0
        self._points = features
        self._values = (values - center) / self._spread
        self._extra = np.zeros(len(values)) if extra_noise is None else extra_noise / self._spread
        self._sources = np.zeros(len(values), dtype=np.int64)
        if earlier is not None:
            features = self._points = features.joined(earlier.features)
            self._values = np.append(self._values, earlier.values)
            self._extra = np.append(self._extra, np.full(len(earlier.values), _EARLIER_NOISE))
            self._sources = np.append(self._sources, earlier.sources)
            n_sources = int(earlier.sources.max())
            if len(self.trust) != n_sources:
                self.trust = np.full(n_sources, _TRUSTS.mean())
        total, blocks = (
            max(float(np.median(_square_distances(part, part))), 1e-6)
            for part in (features.total, features.blocks)
        )
        self._scales = total, blocks
        parts = terms(features, features, self._scales)
        if learns is None:
            learns = len(values) > 1.15 * self._fitted_on or len(values) < self._fitted_on
        if learns:
            self._learn(self._linked(parts, self._sources))
            self._fitted_on = len(values)
        self._factor(self._linked(parts, self._sources))

    def _linked(self, parts: list[Array], sources: NDArray[np.int64]) -> list[Array]:
        """Weigh the terms by how well searches agree: one factor model of their correlations.

        Args:
            parts: As `terms` returns them, between some points and those of the fit.
            sources: Search of the former, shape (n,); 0 for this one.
        """
        if not len(self.trust):
            return parts
        loading = np.append(1.0, self.trust)
        correlation = np.outer(loading, loading)
        np.fill_diagonal(correlation, 1.0)
        link = correlation[np.ix_(sources, self._sources)]
        # Each search has a level of its own.
        own = sources[:, None] == self._sources[None, :]
        return [parts[0] * own, *(part * link for part in parts[1:])]

    def learn_trust(self) -> None:
        """Set each earlier search's trust to its mean under the likelihood of the fit's trials."""
        parts = terms(self._points, self._points, self._scales)
        for index in range(len(self.trust)):
            logs = []
            for value in _TRUSTS:
                self.trust[index] = value
                self._factor(self._linked(parts, self._sources))
                fit = 0.5 * self._values @ self._alpha
                logs.append(-float(fit + np.log(np.diag(self._lower)).sum()))
            chances = np.exp(np.array(logs) - max(logs))
            self.trust[index] = float(chances @ _TRUSTS / chances.sum())
        self._factor(self._linked(parts, self._sources))

    def _learn(self, parts: list[Array]) -> None:
        rows = np.arange(len(self._points))
        if len(rows) > _MAX_TO_LEARN:
            rows = np.random.default_rng(0).choice(rows, _MAX_TO_LEARN, replace=False)
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
        matrix = _weighted(weights[:-1], parts)
        matrix[np.diag_indices_from(matrix)] += weights[-1] + self._extra**2 + 1e-6
        self._lower = np.linalg.cholesky(matrix)
        half = solve_triangular(self._lower, self._values, lower=True)
        self._alpha = solve_triangular(self._lower.T, half, lower=False)

    def predict(self, features: Features) -> tuple[Array, Array]:
        """Return mean and standard deviation of the quality without noise, each of shape (n,)."""
        weights = np.exp(self._log_weights)[:-1]
        here = np.zeros(len(features), dtype=np.int64)
        parts = terms(features, self._points, self._scales)
        cross = _weighted(weights, self._linked(parts, here))
        mean = cross @ self._alpha
        half = solve_triangular(self._lower, cross.T, lower=True)
        own = _weighted(weights, diagonals(features))
        variance = np.maximum(own - (half**2).sum(axis=0), 1e-9)
        return self._center + self._spread * mean, self._spread * np.sqrt(variance)

    def draws(self, features: Features, n: int, rng: np.random.Generator) -> Array:
        """Return joint draws of the quality without noise, shape (n, len(features))."""
        weights = np.exp(self._log_weights)[:-1]
        here = np.zeros(len(features), dtype=np.int64)
        parts = terms(features, self._points, self._scales)
        cross = _weighted(weights, self._linked(parts, here))
        half = solve_triangular(self._lower, cross.T, lower=True)
        covariance = _weighted(weights, terms(features, features, self._scales)) - half.T @ half
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        normal = rng.standard_normal((n, len(features)))
        draws: Array = self._center + self._spread * (cross @ self._alpha + normal @ root.T)
        return draws
