"""95 % intervals of a finalist's objectives, from its seeds and its test rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from autopeft.confirm.finalists import Arm, SeedScore
from autopeft.costs.objectives import PERPLEXITY, Objective

Interval = tuple[float, float]

LEVEL = 0.95
"""Level of every interval."""

METHOD = (
    "95 % t intervals. Quality: variance between seeds plus variance between test rows "
    "(Welch-Satterthwaite degrees of freedom); where the metric is not a mean over rows, as F1, a "
    "bootstrap over rows of the metric itself. Measured costs: variance between seeds. No interval "
    "goes beyond what its value can be. Prices are exact."
)
"""How the intervals are computed, for readers of front.json."""


def _variance_of_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)


def _t_interval(mean: float, parts: Sequence[tuple[float, int]]) -> Interval | None:
    """Return the interval about `mean`, or None where its error is unknown.

    Its squared standard error is the sum of `parts`: (square, degrees of freedom); parts without
    freedom are skipped.
    """
    usable = [(square, df) for square, df in parts if df > 0]
    if not usable or not math.isfinite(mean):
        return None
    square = sum(part for part, _ in usable)
    if not math.isfinite(square):
        return None
    if square == 0.0:
        return (mean, mean)
    # Satterthwaite: degrees of freedom of a sum of independent variance estimates.
    # The shares of the sum, for a square of a diverged perplexity's has no square itself.
    df = 1.0 / sum((part / square) ** 2 / n for part, n in usable)
    half = float(stdtrit(df, 0.5 + LEVEL / 2)) * math.sqrt(square)
    return (mean - half, mean + half)


def is_by_logarithm(quality: Objective) -> bool:
    """Return whether draws are of the logarithm of a quality: of a perplexity, also a further one.

    Resamples of one that is large have no useful variance.
    """
    return quality.name.rpartition(".")[2] == PERPLEXITY


def mean_draws(seeds: Sequence[SeedScore]) -> NDArray[np.float64] | None:
    """Return the bootstrap draws of the signed quality, averaged over seeds, shape (n_draws,).

    None where the quality is a mean over rows, so that the rows themselves can be resampled.
    """
    lengths = {len(seed.test_draws) for seed in seeds}
    if len(lengths) != 1 or 0 in lengths:
        return None
    draws: NDArray[np.float64] = np.mean([seed.test_draws for seed in seeds], axis=0)
    return draws


def _row_means(finalist: Arm) -> list[float]:
    """Return the quality of each test row, averaged over seeds; [] if their numbers differ."""
    lengths = {len(seed.test_rows) for seed in finalist.seeds}
    if len(lengths) != 1 or 0 in lengths:
        return []
    columns = zip(*(seed.test_rows for seed in finalist.seeds), strict=True)
    return [sum(column) / len(column) for column in columns]


def _row_scale(finalist: Arm, quality: Objective) -> float | None:
    """Return the metric's derivative by the mean row quality; None where it is no mean over rows.

    1 for a mean over rows (accuracy; loss, even when it weighs rows by their tokens), the metric
    itself for perplexity (the delta method), None for others.
    """
    if quality.name == "loss":
        return 1.0
    if quality.name == "perplexity":
        return float(np.mean([seed.test["perplexity"] for seed in finalist.seeds]))
    is_row_mean = all(
        math.isclose(
            sum(seed.test_rows) / len(seed.test_rows),
            quality.sign() * seed.test[quality.name],
            abs_tol=1e-6,
        )
        for seed in finalist.seeds
    )
    return 1.0 if is_row_mean else None


def quality_interval(finalist: Arm, quality: Objective) -> Interval | None:
    """Return the interval of the mean test quality over the seeds, in the metric's own unit.

    None for one seed of a metric that is no row mean.
    """
    scores = [seed.test[quality.name] for seed in finalist.seeds]
    draws = mean_draws(finalist.seeds)
    is_log = draws is not None and is_by_logarithm(quality)
    if is_log:
        scores = [math.log(score) for score in scores]
    parts = [(_variance_of_mean(scores), len(scores) - 1)] if len(scores) > 1 else []
    if draws is not None:
        # The draws are as many as one likes; what they tell is what the rows do.
        n_rows = min(len(seed.test_rows) for seed in finalist.seeds)
        square = float(np.var(draws, ddof=1))
        if n_rows > 1:
            parts.append((square * n_rows / (n_rows - 1), n_rows - 1))
        else:
            parts.append((square, len(draws) - 1))
        interval = _t_interval(sum(scores) / len(scores), parts)
        if is_log and interval is not None:
            # Above e^700 there is no float.
            interval = (math.exp(min(interval[0], 700.0)), math.exp(min(interval[1], 700.0)))
        return _within(interval, quality.bounds)
    rows = _row_means(finalist)
    scale = _row_scale(finalist, quality) if len(rows) > 1 else None
    is_share = scale is not None and all(0.0 <= row <= 1.0 for row in rows)
    if scale is not None:
        square = _variance_of_mean(rows) * scale**2
        if is_share:  # the rule of three: n right rows say "above 1 - 3/n", not "exactly 1"
            square = max(square, (1.5 / len(rows)) ** 2)
        parts.append((square, len(rows) - 1))
    interval = _t_interval(sum(scores) / len(scores), parts)
    return _within(interval, (0.0, 1.0) if is_share else quality.bounds)


def _within(interval: Interval | None, bounds: Interval) -> Interval | None:
    """Return the part of an interval that is possible; none of its values is hidden by that."""
    if interval is None:
        return None
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in interval)
    return (low, high)


def cost_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval of a cost measured once per seed; None for one measurement."""
    if len(values) < 2:
        return None
    parts = [(_variance_of_mean(values), len(values) - 1)]
    return _within(_t_interval(sum(values) / len(values), parts), (0.0, math.inf))
