"""The intervals of differences hold as often as they say, also where there are few rows."""

import numpy as np
import pytest

from autopeft.comparing.judging import Scored
from autopeft.confirm.comparison import compare
from autopeft.confirm.finalists import SeedScore
from autopeft.confirm.intervals import quality_interval
from autopeft.costs.objectives import Objective

LOSS = Objective("loss", "minimize")


def scored(name: str, rows: np.ndarray, draws: tuple[float, ...] = ()) -> Scored:
    test = {"loss": float(-rows.mean())}
    return Scored(name, (SeedScore(0, {}, test, tuple(map(float, rows)), {}, draws),))


@pytest.mark.parametrize("has_draws", [False, True])
@pytest.mark.parametrize("n_rows", [8, 24])
def test_equal_adapters_scored_on_few_rows_are_seldom_told_apart(
    n_rows: int, has_draws: bool
) -> None:
    """Four of one quality; without Student's t, one in four comparisons on 8 rows showed one."""
    rng = np.random.default_rng(0)
    taken = rng.integers(n_rows, size=(1000, n_rows))
    n_wrong, n_times = 0, 250
    for _ in range(n_times):
        rows = rng.standard_normal((4, n_rows))
        arms = [
            scored(str(i), each, tuple(map(float, each[taken].mean(axis=1))) if has_draws else ())
            for i, each in enumerate(rows)
        ]
        pairs = [(a, b) for i, a in enumerate(arms) for b in arms[:i]]
        n_wrong += any(f.low > 0 or f.high < 0 for f in compare(pairs, LOSS, seed=0))
    assert n_wrong / n_times < 0.1


def test_draws_tell_no_more_than_their_rows() -> None:
    rows = np.random.default_rng(0).standard_normal(6)
    taken = np.random.default_rng(1).integers(6, size=(4000, 6))
    by_row = quality_interval(scored("a", rows), LOSS)
    by_draw = quality_interval(scored("a", rows, tuple(map(float, rows[taken].mean(axis=1)))), LOSS)
    assert by_draw == pytest.approx(by_row, abs=0.1)


def test_a_diverged_perplexity_is_worse_and_takes_no_interval_with_it() -> None:
    """Perplexities are compared by their logarithms, of which the draws are."""
    perplexity = Objective("perplexity", "minimize", bounds=(1.0, np.inf))
    rng = np.random.default_rng(0)

    def of(name: str, loss: float) -> Scored:
        draws = tuple(map(float, -loss + 0.02 * loss * rng.standard_normal(1000)))
        test = {"perplexity": float(np.exp(min(loss, 700.0)))}
        return Scored(name, (SeedScore(0, {}, test, (0.0,) * 40, {}, draws),))

    good, worse, diverged = of("good", 1.0), of("worse", 1.5), of("diverged", 700.0)
    low, high = quality_interval(diverged, perplexity) or (np.nan, np.nan)
    assert 1.0 < low < high < np.inf
    low, high = quality_interval(good, perplexity) or (np.nan, np.nan)
    assert 2.55 < low < np.e < high < 2.90
    alone = compare([(good, worse)], perplexity, seed=0)[0]
    found, beside = compare([(good, worse), (good, diverged)], perplexity, seed=0)
    assert found.gain == alone.gain == pytest.approx(0.5)
    assert 0 < found.low == pytest.approx(alone.low, abs=0.05)
    assert 0 < beside.low < beside.gain == pytest.approx(699.0)
