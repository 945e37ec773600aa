"""Which of several scored adapters differ, and what it would take to tell the others apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from autopeft.confirm.comparison import Comparison, compare
from autopeft.confirm.finalists import Arm, SeedScore
from autopeft.confirm.power import POWER, Power, power_of, rounded_up
from autopeft.costs.objectives import Objective
from autopeft.utils.formatting import counted


@dataclass(frozen=True)
class Scored:
    """The score of one adapter, which is one training of it.

    Attributes:
        digest: Its name.
        seeds: Its one score.
        is_trained: Whether it was trained; False for the base model alone.
    """

    digest: str
    seeds: tuple[SeedScore, ...]
    is_trained: bool = True


@dataclass(frozen=True)
class Pair:
    """Two adapters compared; the first has the higher score.

    Attributes:
        better: Name of the one with the better score.
        worse: Name of the other.
        found: Their difference, with an interval that holds for all pairs at once.
        is_shown: Whether the interval excludes no difference, and covers all that it must.
        power: What it would take to show a difference as large as this one; None if its interval
            excludes no difference, or there is none.
    """

    better: str
    worse: str
    found: Comparison
    is_shown: bool
    power: Power | None = None

    def line(self) -> str:
        """Return it in one line."""
        low, high = self.found.low, self.found.high
        text = f"{self.better} over {self.worse}: {self.found.gain:+.4f}"
        if self.is_shown:
            return f"{text} ({low:+.4f} to {high:+.4f}): shown"
        if not self.found.gain:
            same = (
                "they score every row alike" if not self.found.error else "their scores are equal"
            )
            return f"{self.better} and {self.worse}: too close to call; {same}"
        needed = "more rows"
        if self.power is not None and self.power.rows_needed is not None:
            rows = counted(rounded_up(self.power.rows_needed), "test row")
            needed = f"about {rows}, not {self.power.n_rows:,},"
        return (
            f"{text} ({low:+.4f} to {high:+.4f}): too close to call; {needed} would show a "
            "difference this large"
        )


@dataclass(frozen=True)
class Judgement:
    """What a comparison shows.

    Attributes:
        order: Names, the best score first.
        pairs: Every pair that was compared.
        headline: The answer in one line.
        lines: One line for each pair that answers: the best with each other one, and each with the
            base model.
    """

    order: tuple[str, ...]
    pairs: tuple[Pair, ...]
    headline: str
    lines: tuple[str, ...]


def judge(
    arms: Sequence[Arm],
    quality: Objective,
    *,
    base: str | None = None,
    seed: int = 0,
    n_rows: int | None = None,
    is_share: bool | None = None,
    seed_error: float | None = None,
    is_seed_known: bool = True,
) -> Judgement:
    """Compare all adapters with each other, with intervals that hold for all pairs at once.

    Args:
        arms: What was scored, on the same rows.
        quality: What it was scored by.
        base: Name of the base model among them; None: it is not among them.
        seed: Of the bootstrap.
        n_rows: Rows that were scored; None: the scores tell.
        is_share: Whether the quality is a share of rows; None: the scores tell.
        seed_error: Standard deviation between trainings; None: the scores tell, if they can.
        is_seed_known: Whether the error of the seeds is in the intervals, or plays no part. If not,
            no difference is shown.
    """
    by_name = {arm.digest: arm for arm in arms}
    values = {n: quality.sign() * _score(arm, quality) for n, arm in by_name.items()}
    order = tuple(sorted(values, key=lambda name: -values[name]))
    named = list(combinations(order, 2))
    both = [(by_name[a], by_name[b]) for a, b in named]
    error = seed_error if is_seed_known else 0.0
    found = compare(both, quality, seed, seed_error=error) if both else []
    if n_rows is None:
        n_rows = len(arms[0].seeds[0].test_rows)
    if is_share is None:
        is_share = all(row in (0.0, 1.0) for arm in arms for row in arm.seeds[0].test_rows)
    pairs = []
    for (a, b), each in zip(both, found, strict=True):
        power = None
        if each.low <= 0 < each.gain and each.error > 0:
            n_seeds = min(len(a.seeds), len(b.seeds))
            power = power_of(each, each.gain, n_rows=n_rows, n_seeds=n_seeds, is_share=is_share)
        pairs.append(Pair(a.digest, b.digest, each, each.low > 0 and is_seed_known, power))
    adapters = tuple(name for name in order if name != base)
    told = [p for p in pairs if adapters[0] in (p.better, p.worse) or base in (p.better, p.worse)]
    headline = _headline(adapters, {(p.better, p.worse): p for p in pairs}, quality)
    return Judgement(order, tuple(pairs), headline, tuple(pair.line() for pair in told))


def _score(arm: Arm, quality: Objective) -> float:
    return sum(seed.test[quality.name] for seed in arm.seeds) / len(arm.seeds)


def _headline(
    adapters: Sequence[str], pairs: Mapping[tuple[str, str], Pair], quality: Objective
) -> str:
    first, *others = adapters
    if not others:
        return f"{first} is the only adapter."
    close = [name for name in others if not pairs[first, name].is_shown]
    word = "higher" if quality.direction == "maximize" else "lower"
    if not close:
        return f"{first} is the best: its {quality.name} is {word} than that of every other one."
    text = f"Too close to call: {first} has the best {quality.name}, but "
    if len(close) < len(others):
        text += f"of {len(others)} others only {len(others) - len(close)} are shown to be worse; "
    return text + f"{', '.join(close)} may be as good."


ONE_SEED = (
    "Each adapter is one training: the intervals cover the test rows, not the seeds. Another seed "
    "of the same recipe may score differently by more than they say."
)
"""What no comparison of single adapters can tell."""

LEVELS = f"95 % intervals that hold for all pairs at once; rows are for a chance of {POWER:.0%}"
"""How the intervals are to be read."""
