"""Differences of finalists' test qualities, with intervals that hold for all of them at once.

Two sources of variance count: the rows of the test split (paired bootstrap over rows) and the
training seed (variance between seeds, pooled over all finalists). Intervals are simultaneous over
all comparisons (max-T), so picking a winner from many members does not make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.confirm.finalists import Finalist, SeedScore
from autopeft.confirm.intervals import LEVEL, mean_draws
from autopeft.costs.objectives import Objective

_N_RESAMPLES = 4000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A difference of two finalists' test qualities, with its simultaneous interval.

    Attributes:
        gain: Quality of the first minus quality of the second, such that more is better.
        low: Lower end of the interval.
        high: Upper end.
        error: Standard error of the gain.
        seed_error: The part of it that comes from the training seeds; the squares of the parts add.
    """

    gain: float
    low: float
    high: float
    error: float = 0.0
    seed_error: float = 0.0

    def __str__(self) -> str:
        return f"difference {self.gain:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


def compare(
    pairs: Sequence[tuple[Finalist, Finalist]], quality: Objective, seed: int
) -> list[Comparison]:
    """Return the differences of pairs.

    Source: Westfall and Young, Resampling-Based Multiple Testing (1993), the single-step max-T.

    Args:
        pairs: Finalists to compare; all scored the same rows.
        quality: What they are compared in.
        seed: Of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    arms = {f.digest: f for pair in pairs for f in pair}
    names = list(arms)
    first = np.array([names.index(a.digest) for a, _ in pairs])
    second = np.array([names.index(b.digest) for _, b in pairs])
    n_seeds = np.array([len(f.seeds) for f in arms.values()])
    finalists = list(arms.values())
    between = pooled_seed_variance(finalists, quality) / n_seeds  # (arms,)
    levels, means = _resampled(finalists, quality, rng)
    noise = rng.standard_normal(means.shape)
    if not has_rows(finalists):
        # Few retrainings are all that tells the error: Student's t, as one divisor for all arms.
        freedom = int(n_seeds.sum()) - len(finalists)
        noise /= np.sqrt(rng.chisquare(freedom, (len(means), 1)) / freedom)
    means = means + noise * np.sqrt(between)
    gains = levels[first] - levels[second]
    draws = means[:, first] - means[:, second] - gains  # (resamples, pairs)
    errors = draws.std(axis=0)
    scale = np.where(errors > 0, errors, 1.0)
    highest = np.abs(draws / scale).max(axis=1)
    reach = float(np.quantile(highest, LEVEL)) * errors
    of_seeds = np.minimum(np.sqrt(between[first] + between[second]), errors)
    columns = (gains, gains - reach, gains + reach, errors, of_seeds)
    return [Comparison(*map(float, row)) for row in zip(*columns, strict=True)]


def has_rows(finalists: Sequence[Finalist]) -> bool:
    """Return whether every retraining tells the quality of its rows."""
    return all(seed.test_rows for finalist in finalists for seed in finalist.seeds)


def row_variance(finalist: Finalist) -> float:
    """Return the variance of the mean quality between samples of test rows."""
    draws = mean_draws(finalist)
    if draws is not None:
        return float(draws.var())
    if not has_rows([finalist]):
        return 0.0
    rows = _rows(finalist)
    return float(rows.var() / len(rows))


def pooled_seed_variance(finalists: Sequence[Finalist], quality: Objective) -> float:
    """Return the variance of one seed's mean score, pooled: three seeds alone estimate it badly."""
    spreads = [
        np.array([_level(s, quality) for s in f.seeds]) for f in finalists if len(f.seeds) > 1
    ]
    freedom = sum(len(s) - 1 for s in spreads)
    if not freedom:
        return 0.0
    return float(sum(((s - s.mean()) ** 2).sum() for s in spreads)) / freedom


def cost_of(finalist: Finalist, cost: Objective | None) -> float:
    """Return a finalist's cost, the mean over its seeds if it is measured; 1.0 without a cost."""
    if cost is None:
        return 1.0
    if cost.is_known:
        return finalist.costs.value(cost.name)
    return float(np.mean([s.objectives[cost.name] for s in finalist.seeds]))


def _rows(finalist: Finalist) -> Array:
    """Return the score of each test row, averaged over the seeds; shape (n_test_rows,)."""
    mean: Array = np.array([s.test_rows for s in finalist.seeds], dtype=float).mean(axis=0)
    return mean


def _level(score: SeedScore, quality: Objective) -> float:
    """Return a retraining's test quality, larger is better, on the scale of its resamples."""
    if score.test_draws or not score.test_rows:
        return quality.sign() * score.test[quality.name]
    return float(np.mean(score.test_rows))


def _resampled(
    arms: Sequence[Finalist], quality: Objective, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return the quality of each arm, (arms,), and on resamples of the rows, (resamples, arms)."""
    levels = np.array([np.mean([_level(s, quality) for s in f.seeds]) for f in arms])
    draws = [mean_draws(f) for f in arms]
    shared = [d for d in draws if d is not None]
    if len(shared) == len(arms):
        return levels, np.array(shared).T
    if not has_rows(arms):
        return levels, np.tile(levels, (_N_RESAMPLES, 1))
    rows = np.array([_rows(f) for f in arms])  # (arms, test rows)
    # The Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981): smooth weights of the rows in
    # place of how often each is drawn, (resamples, test rows), with the same spread.
    weights = rng.standard_exponential((_N_RESAMPLES, rows.shape[1]), dtype=np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return rows.mean(axis=1), (weights @ rows.T.astype(np.float32)).astype(float)
