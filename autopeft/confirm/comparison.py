"""Differences of finalists' test qualities, with intervals that hold for all of them at once.

Two sources of variance count: the rows of the test split (paired bootstrap over rows) and the
training seed (variance between seeds, pooled over all finalists). Intervals are simultaneous over
all comparisons (max-T), so picking a winner from many members does not make one. Where seeds were
added until the answer was clear (`race`), they are simultaneous over the looks at it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.confirm.finalists import Arm, Finalist, SeedScore
from autopeft.confirm.intervals import LEVEL, is_by_logarithm, mean_draws
from autopeft.costs.objectives import Objective
from autopeft.utils.extremes import bounded

_N_RESAMPLES = 4000
_KEPT = 4.0
"""A look spends all but a fourth of the error that the looks before it left."""

Array = NDArray[np.float64]
Looks = Sequence[Mapping[str, int]]
"""Seeds of each finalist, by digest, at each look at their scores."""


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
    pairs: Sequence[tuple[Arm, Arm]],
    quality: Objective,
    seed: int,
    *,
    looks: Looks | None = None,
    seed_error: float | None = None,
) -> list[Comparison]:
    """Return the differences of pairs.

    An interval is gain +- c * error. With one look, c is the 95 % quantile of the largest
    standardized difference of all pairs. Of several, look l spends the share a(l) - a(l - 1) of the
    error, a(l) = 0.05 * (1 - 4**-l): c(l) is what the largest difference exceeds with that chance
    where it has exceeded no earlier c. The chance is counted on resamples that all looks share, so
    a look that adds little costs little; and because a(l) is set in advance, whatever the scores
    are and whenever one stops, the intervals of all looks hold together.

    Sources: Westfall and Young, Resampling-Based Multiple Testing (1993), the single-step max-T;
    Lan and DeMets, Biometrika 70 (1983), error spending; Jennison and Turnbull, JRSS B 51 (1989),
    repeated confidence intervals.

    Args:
        pairs: Finalists to compare; all scored the same rows.
        quality: What they are compared in.
        seed: Of the bootstrap.
        looks: The looks at these finalists until now, if the scores decided whether to train more;
            what they have now is one more. None: the number of seeds was set in advance.
        seed_error: Standard deviation between trainings that differ in their seed alone, where it
            is known from elsewhere; None: the differences between the seeds tell it.
    """
    rng = np.random.default_rng(seed)
    arms = list({f.digest: f for pair in pairs for f in pair}.values())
    names = [f.digest for f in arms]
    first = np.array([names.index(a.digest) for a, _ in pairs])
    second = np.array([names.index(b.digest) for _, b in pairs])
    counts = _counts(arms, looks)  # (looks, arms)
    levels = np.array([np.mean([_level(s, quality) for s in f.seeds]) for f in arms])
    means = _row_noise(arms, counts, rng)  # (looks, resamples, arms)
    of_rows = (means[:, :, first] - means[:, :, second]).var(axis=1)  # (looks, pairs)
    of_a_seed = pooled_seed_variance(arms, quality) if seed_error is None else seed_error**2
    variance = np.array([of_a_seed * f.is_trained for f in arms])
    seen = np.maximum(counts, 1)
    between = variance / seen
    of_seeds = between[:, first] + between[:, second]
    noise = rng.standard_normal((_N_RESAMPLES, len(arms), int(seen.max()))).cumsum(axis=2)
    if seed_error is None and (freedom := _freedom(arms)):
        # Student's t: few retrainings tell little of their variance; one divisor for all arms.
        noise /= np.sqrt(rng.chisquare(freedom, (_N_RESAMPLES, 1, 1)) / freedom)
    if (freedom := _n_rows(arms) - 1) > 0:
        # Few rows tell little of theirs, too.
        means /= np.sqrt(rng.chisquare(freedom, (1, _N_RESAMPLES, 1)) / freedom)
    errors = np.sqrt(of_rows + of_seeds)
    scale = np.where(errors > 0, errors, 1.0)
    # A pair of which one has no score yet is not looked at.
    weight = ((counts[:, first] > 0) & (counts[:, second] > 0)) / scale
    largest = []
    for look, n_seeds in enumerate(seen):
        shift = noise[:, np.arange(len(arms)), n_seeds - 1] * np.sqrt(variance) / n_seeds
        draws = means[look] + shift
        largest.append((np.abs(draws[:, first] - draws[:, second]) * weight[look]).max(axis=1))
    gains = levels[first] - levels[second]
    reach = _reach(largest, is_raced=looks is not None) * errors[-1]
    columns = (gains, gains - reach, gains + reach, errors[-1], np.sqrt(of_seeds[-1]))
    return [Comparison(*map(float, row)) for row in zip(*columns, strict=True)]


def _counts(arms: Sequence[Arm], looks: Looks | None) -> NDArray[np.int_]:
    """Return the seeds of each finalist at each look, the one at what they have now included."""
    now = [len(f.seeds) for f in arms]
    rows = [[min(look.get(f.digest, 0), len(f.seeds)) for f in arms] for look in looks or ()]
    return np.array([row for row in rows if row != now] + [now])


def _reach(largest: Sequence[Array], *, is_raced: bool) -> float:
    """Return the standard errors that the intervals of the last look reach."""
    left = 1.0 - LEVEL
    if not is_raced:
        return float(np.quantile(largest[-1], 1.0 - left))
    inside = np.ones(len(largest[0]), dtype=bool)
    reach = 0.0
    for each in largest:
        spent, left = left - left / _KEPT, left / _KEPT
        reach = float(np.quantile(np.where(inside, each, 0.0), 1.0 - spent))
        inside &= each <= reach
    return reach


def has_rows(finalists: Sequence[Arm]) -> bool:
    """Return whether every retraining tells the quality of its rows."""
    return all(seed.test_rows for finalist in finalists for seed in finalist.seeds)


def _n_rows(arms: Sequence[Arm]) -> int:
    """Return how many rows were scored, 0 where that is not known."""
    return min((len(seed.test_rows) for arm in arms for seed in arm.seeds), default=0)


def row_variance(finalist: Arm) -> float:
    """Return the variance of the mean quality between samples of test rows."""
    draws = mean_draws(finalist.seeds)
    if draws is not None:
        return float(draws.var())
    if not has_rows([finalist]):
        return 0.0
    rows = _rows(finalist, len(finalist.seeds))
    return float(rows.var() / len(rows))


def pooled_seed_variance(finalists: Sequence[Arm], quality: Objective) -> float:
    """Return the variance of one seed's mean score, pooled: three seeds alone estimate it badly."""
    spreads = [np.array([_level(s, quality) for s in f.seeds]) for f in finalists if f.is_trained]
    freedom = _freedom(finalists)
    if not freedom:
        return 0.0
    return float(sum(((s - s.mean()) ** 2).sum() for s in spreads)) / freedom


def _freedom(finalists: Sequence[Arm]) -> int:
    """Return how many differences between seeds tell their variance."""
    return sum(len(f.seeds) - 1 for f in finalists if f.is_trained)


def quality_and_cost(objectives: Sequence[Objective]) -> tuple[Objective, Objective | None]:
    """Return the quality, and the cost that finalists are compared on, None without one."""
    return objectives[0], objectives[1] if len(objectives) > 1 else None


def cost_of(finalist: Finalist, cost: Objective | None) -> float:
    """Return a finalist's cost, the mean over its seeds if it is measured; 1.0 without a cost."""
    if cost is None:
        return 1.0
    if cost.is_known:
        return finalist.costs.value(cost.name)
    return float(np.mean([s.objectives[cost.name] for s in finalist.seeds]))


def is_told_by_logarithm(arms: Sequence[Arm], quality: Objective) -> bool:
    """Return whether errors and differences of a quality are those of its logarithm.

    So are those of a perplexity whose rows are losses; those of a function may be perplexities.
    """
    name, seeds = quality.name, [seed for arm in arms for seed in arm.seeds]
    return is_by_logarithm(quality) and all(
        min(seed.test[name], seed.validation.get(name, 1.0)) > 0.0
        and (seed.test_draws or not math.isclose(_level(seed, quality), -seed.test[name]))
        for seed in seeds
    )


def _rows(finalist: Arm, n_seeds: int) -> Array:
    """Return the score of each test row, averaged over the first seeds; shape (n_test_rows,)."""
    scores = [s.test_rows for s in finalist.seeds[:n_seeds]]
    mean: Array = np.array(scores, dtype=float).mean(axis=0)
    return mean


def _level(score: SeedScore, quality: Objective) -> float:
    """Return a retraining's test quality, larger is better, on the scale of its resamples."""
    if score.test_draws and is_by_logarithm(quality):
        return quality.sign() * math.log(score.test[quality.name])
    if score.test_draws or not score.test_rows:
        return float(bounded(quality.sign() * score.test[quality.name]))
    return float(np.mean(bounded(score.test_rows)))


def _row_noise(arms: Sequence[Arm], counts: NDArray[np.int_], rng: np.random.Generator) -> Array:
    """Return the noise of each arm's quality from the rows; (looks, resamples, arms)."""
    seen = np.maximum(counts, 1)
    parts = sorted({(arm, int(n)) for look in seen for arm, n in enumerate(look)})
    draws = [mean_draws(arms[arm].seeds[:n]) for arm, n in parts]
    shared = [d[:_N_RESAMPLES] for d in draws if d is not None]
    # A bootstrap spreads as rows about their own mean do, which is less than about the true one.
    n_rows = _n_rows(arms)
    widening = np.sqrt(n_rows / (n_rows - 1)) if n_rows > 1 else 1.0
    if len(shared) == len(parts):
        # As many as the noise of the seeds has: each is used about equally often.
        found = np.array(shared)
        found = found[:, np.arange(_N_RESAMPLES) % found.shape[1]].T
    elif not has_rows(arms):
        found = np.zeros((_N_RESAMPLES, len(parts)))
    else:
        found = _bootstrapped(np.array([_rows(arms[arm], n) for arm, n in parts]), rng)
    found = (found - found.mean(axis=0)) * widening
    columns = [[parts.index((arm, int(n))) for arm, n in enumerate(look)] for look in seen]
    noise: Array = found[:, columns].swapaxes(0, 1)
    return noise


def _bootstrapped(rows: Array, rng: np.random.Generator) -> Array:
    """Return the means of rows (arms, rows) on resamples; (resamples, arms)."""
    # The Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981): smooth weights of the rows in
    # place of how often each is drawn, (resamples, test rows).
    weights = rng.standard_exponential((_N_RESAMPLES, rows.shape[1]), dtype=np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    means: Array = (weights @ rows.T.astype(np.float32)).astype(float)
    # They spread a little less: by n + 1, not n.
    means *= np.sqrt(1.0 + 1.0 / rows.shape[1])
    return means
