"""Power: which differences a run could have shown, and what it would take to show smaller ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import norm

from autopeft.confirm.comparison import Comparison
from autopeft.utils.formatting import counted

POWER = 0.8
"""Chance with which a detectable difference is found."""

_MOST_SEEDS = 20
"""Seeds above which no number is told: nobody trains each finalist so often."""

_TOO_MANY = (
    "more seeds (confirm_seeds) than a budget pays for: trainings of one plan differ too much"
)


@dataclass(frozen=True)
class Power:
    """What a confirmation could tell.

    Attributes:
        margin: Differences up to this count as none, in the unit of the quality; None where nothing
            says how much matters.
        detectable: The least difference that would have been shown with a chance of 80 %.
        n_rows: Test rows.
        n_seeds: Trainings of a finalist.
        rows_needed: Test rows for a detectable difference of `margin`; None without a margin.
        seeds_needed: Trainings of each finalist for that, beside `rows_needed`.

    Example:
        >>> Power(margin=0.01, detectable=0.04, n_rows=500, n_seeds=3).n_rows
        500
    """

    margin: float | None
    detectable: float
    n_rows: int
    n_seeds: int
    rows_needed: int | None = None
    seeds_needed: int | None = None


def power_of(
    found: Comparison, margin: float | None, *, n_rows: int, n_seeds: int, is_share: bool = False
) -> Power:
    """Return what a comparison could tell.

    The detectable difference is (q + z) standard errors: q of the simultaneous interval, z the
    normal quantile of the power. Both parts of the squared error shrink with their number, rows or
    seeds; where one of them alone cannot reach the margin, both grow alike.

    Args:
        found: The comparison.
        margin: Differences up to this count as none.
        n_rows: Test rows.
        n_seeds: Trainings of a finalist.
        is_share: Whether the quality is a share of rows. Where it differs by d, at least that share
            of the rows does, so a row's difference has a variance of d - d^2 at least, even if two
            equal candidates agree on every row.
    """
    if not found.error:
        return Power(margin, 0.0, n_rows, n_seeds)
    factor = (found.high - found.low) / 2 / found.error + float(norm.ppf(POWER))
    of_seeds = found.seed_error**2
    of_rows = max(0.0, found.error**2 - of_seeds)

    def rows_at(gain: float) -> float:
        """Return the part of the rows where the candidates differ by `gain`."""
        least = (gain - gain**2) / n_rows if is_share and n_rows and gain < 1.0 else 0.0
        return max(of_rows, least)

    detectable = factor * found.error
    for _ in range(50):
        detectable = factor * math.sqrt(of_seeds + rows_at(detectable))
    if not margin:
        return Power(margin, detectable, n_rows, n_seeds)
    wanted, of_rows = (margin / factor) ** 2, rows_at(margin)
    rows, seeds = 1.0, 1.0  # factors
    if of_rows + of_seeds > wanted:
        if of_rows < wanted / 2:
            seeds = of_seeds / (wanted - of_rows)
        elif of_seeds < wanted / 2:
            rows = of_rows / (wanted - of_seeds)
        else:
            rows, seeds = 2 * of_rows / wanted, 2 * of_seeds / wanted
    return Power(
        margin,
        detectable,
        n_rows,
        n_seeds,
        math.ceil(n_rows * max(rows, 1.0) - 1e-9),
        math.ceil(n_seeds * max(seeds, 1.0) - 1e-9),
    )


def shown_power(power: Power) -> str:
    """Return it in one sentence."""
    text = f"This run could have shown a difference of {power.detectable:.2g}"
    if power.rows_needed is None or power.seeds_needed is None:
        return text + "."
    needs = []
    if power.rows_needed > power.n_rows:
        rows = counted(rounded_up(power.rows_needed), "test row")
        needs.append(f"{rows}, not {power.n_rows:,}")
    if power.seeds_needed > power.n_seeds:
        seeds = counted(rounded_up(power.seeds_needed), "seed")
        is_payable = power.seeds_needed <= _MOST_SEEDS
        needs.append(f"{seeds} (confirm_seeds), not {power.n_seeds}" if is_payable else _TOO_MANY)
    if not needs:
        return text + "."
    about = "" if needs[0] == _TOO_MANY else "about "
    return f"{text}; one of {power.margin:.2g} takes {about}{', and '.join(needs)}."


def rounded_up(number: int) -> int:
    """Round up to two digits: more would be pretended."""
    digits = max(0, len(str(number)) - 2)
    return int(math.ceil(number / 10**digits) * 10**digits)
