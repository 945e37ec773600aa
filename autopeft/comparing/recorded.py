"""What a recorded table of scores can show, where most methods were trained once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.comparing.judging import LEVELS, Judgement, Pair, Scored, judge
from autopeft.confirm.comparison import pooled_seed_variance
from autopeft.confirm.finalists import SeedScore
from autopeft.confirm.power import rounded_up
from autopeft.costs.objectives import Objective
from autopeft.utils.formatting import counted

_N_DRAWS = 4000

SCORE = Objective("score", "maximize", bounds=(0.0, 1.0))
"""What a table is judged by: a share of rows."""


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: What was trained; lines of one name are trainings that differ in their seed, scored on
            the same rows.
        score: Share of the test rows.
        n_rows: Test rows.
        n_seeds: Trainings that the score is the mean of.
    """

    name: str
    score: float
    n_rows: int
    n_seeds: int = 1


@dataclass(frozen=True)
class TableJudgement:
    """What a table shows.

    Attributes:
        lines: What was read.
        seed_sd: Standard deviation between trainings; None: neither told nor in the table.
        judgement: The pairs. Without `seed_sd` none of them is shown, whatever its interval, which
            is of the rows alone.
        verdict: One line for each pair of the best with another one.
    """

    lines: tuple[str, ...]
    seed_sd: float | None
    judgement: Judgement
    verdict: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """How the intervals are to be read."""
        rows = "which rows each one answered is not in a table, so the intervals are not paired"
        return (LEVELS, rows)


def judge_table(
    table: Sequence[Line], *, seed_sd: float | None = None, seed: int = 0
) -> TableJudgement:
    """Judge the scores of a table by the binomial error of the rows and the error of the seeds.

    Args:
        table: Its lines.
        seed_sd: Standard deviation between trainings that differ in their seed alone; None: the
            lines of one name tell it, if there are several of one.
        seed: Of the draws.
    """
    arms = _arms(table, np.random.default_rng(seed))
    has_means = any(line.n_seeds > 1 for line in table)
    learned = None
    if seed_sd is None and not has_means and any(len(arm.seeds) > 1 for arm in arms):
        learned = math.sqrt(pooled_seed_variance(arms, SCORE))
    known = learned if seed_sd is None else seed_sd
    n_rows = min(line.n_rows for line in table)
    found = judge(
        arms,
        SCORE,
        seed=seed,
        n_rows=n_rows,
        is_share=True,
        seed_error=seed_sd if learned is None else None,
        is_seed_known=known is not None,
    )
    counts = {arm.digest: len(arm.seeds) for arm in arms}
    told = [pair for pair in found.pairs if pair.better == found.order[0]]
    verdict = [_line(pair, counts) if known is None else _settled_line(pair) for pair in told]
    about = f"{counted(len(arms), 'name')} in {counted(len(table), 'line')}"
    lines = (about, _seed_line(seed_sd, learned, arms, has_means=has_means))
    return TableJudgement(lines, known, found, tuple(verdict))


def _arms(table: Sequence[Line], rng: np.random.Generator) -> list[Scored]:
    """Return one arm for each name; its draws are scores on other samples of as many rows."""
    arms = []
    # Sorted: the order of the lines says nothing, so it decides no draw and no tie.
    for name in sorted({line.name for line in table}):
        mine = [line for line in table if line.name == name]
        mine.sort(key=lambda line: (line.score, line.n_seeds))
        mean = sum(line.score * line.n_seeds for line in mine) / sum(line.n_seeds for line in mine)
        draws = tuple(_other_scores(mean, mine[0].n_rows, rng).tolist())
        scores = [line.score for line in mine for _ in range(line.n_seeds)]
        arms.append(Scored(name, tuple(_seed_score(i, s, draws) for i, s in enumerate(scores))))
    return arms


def _other_scores(score: float, n_rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw scores on other samples of as many rows, with the given one as their mean.

    A share of 0 or 1 has an error, too: as in the interval of Agresti and Caffo (2000, "Simple and
    effective confidence intervals for proportions"), one right and one wrong answer are added.
    """
    added = n_rows + 2
    return (rng.binomial(added, (score * n_rows + 1) / added, _N_DRAWS) - 1) / n_rows


def _seed_score(number: int, score: float, draws: tuple[float, ...]) -> SeedScore:
    return SeedScore(number, {}, {SCORE.name: score}, (), {}, test_draws=draws)


def _seed_line(
    told: float | None, learned: float | None, arms: Sequence[Scored], *, has_means: bool
) -> str:
    """Return where the spread between seeds is from."""
    if told is not None:
        return f"standard deviation between seeds: {told:.4f}, as given"
    if learned is not None:
        n = sum(len(arm.seeds) - 1 for arm in arms)
        return (
            f"standard deviation between seeds: {learned:.4f}, from the repeats in the table "
            f"({counted(n, 'degree')} of freedom)"
        )
    why = "its lines are means" if has_means else "no name has a second line"
    return f"standard deviation between seeds: unknown ({why}); --seed-sd gives it"


def _line(pair: Pair, counts: dict[str, int]) -> str:
    """Return what a pair shows where the error of the seeds is unknown."""
    found = pair.found
    text = f"{pair.better} over {pair.worse}: {found.gain:+.4f}"
    if not found.low > 0:
        return f"{text}: too close to call by its rows alone{_needed(pair)}"
    reach = (found.high - found.low) / 2 / found.error
    left = (found.gain / reach) ** 2 - found.error**2
    shares = sum(1 / counts[name] for name in (pair.better, pair.worse))
    limit = math.sqrt(max(0.0, left) / shares)
    return (
        f"{text} ({found.low:+.4f} to {found.high:+.4f} by its rows alone): not shown; it would be "
        f"if the standard deviation between seeds were below {limit:.4f}"
    )


def _settled_line(pair: Pair) -> str:
    found = pair.found
    text = f"{pair.better} over {pair.worse}: {found.gain:+.4f}"
    text += f" ({found.low:+.4f} to {found.high:+.4f}): "
    return text + ("shown" if pair.is_shown else f"too close to call{_needed(pair)}")


def _needed(pair: Pair) -> str:
    power = pair.power
    if power is None or power.rows_needed is None or power.seeds_needed is None:
        return ""
    needs = []
    if power.rows_needed > power.n_rows:
        needs.append(f"{counted(rounded_up(power.rows_needed), 'test row')}, not {power.n_rows:,}")
    if power.seeds_needed > power.n_seeds:
        seeds = counted(rounded_up(power.seeds_needed), "seed")
        needs.append(f"{seeds} each, not {power.n_seeds}")
    return f"; a difference this large takes about {', and '.join(needs)}" if needs else ""
