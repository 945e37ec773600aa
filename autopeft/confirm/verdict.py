"""The verdict: does the front beat a well-tuned LoRA? And the pick of one member.

Validation scores make all choices (the tuned LoRA, the pick); test scores only judge. Gains are
differences of mean row scores (`SeedScore.test_rows`, larger is better). Two sources of variance
count: the rows of the test split (paired bootstrap over rows) and the training seed (variance
between seeds, pooled over all finalists). Intervals are simultaneous over all comparisons (max-T),
so picking a winner from many members does not make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autopeft.confirm.finalists import Finalist, SeedScore, best_on_validation
from autopeft.confirm.intervals import LEVEL, mean_draws
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError
from autopeft.utils.pareto import knee, one_standard_error

PICKS: tuple[str, ...] = ("one_se", "knee", "best_quality")
"""Rules of `pick_best`."""

_N_RESAMPLES = 4000
_MUCH_CHEAPER = 0.5
"""A member that is only as good must cost at most this share of the tuned LoRA."""
_TOLERANCE = 0.1
"""Share of LoRA's own gain over the reference by which "as good" may fall short."""
_SMALL, _SMALL_SHARE = 0.01, 0.25
"""One point may always be missing, unless that is over a quarter of LoRA's own gain."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LevelVerdict:
    """One member of the front against the best LoRA at its cost.

    Attributes:
        digest: The front member.
        result: "wins", "ties" or "loses", on test quality, after correction for many comparisons.
        gain: Quality of the member minus quality of the tuned LoRA, sign such that more is better.
        gain_ci: Its corrected 95 % interval, same sign.
        cost_ratio: The member's first cost over that LoRA's.
        against: Digest of the LoRA compared with: the best one that costs no more than the member,
            or the tuned one where every LoRA costs more.
    """

    digest: str
    result: Literal["wins", "ties", "loses"]
    gain: float
    gain_ci: tuple[float, float]
    cost_ratio: float
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether the front beats a well-tuned LoRA; `text` says it in one sentence.

    Example:
        >>> verdict = autopeft.SearchResult.read("runs/first").verdict
        >>> isinstance(verdict.beats_lora, bool)
        True
    """

    beats_lora: bool
    text: str
    levels: tuple[LevelVerdict, ...] = ()


@dataclass(frozen=True)
class _Comparison:
    """A difference of two finalists' mean row scores, with its simultaneous interval."""

    gain: float
    low: float
    high: float


def judge(
    finalists: Sequence[Finalist], objectives: Sequence[Objective], *, seed: int = 0
) -> Verdict:
    """Compare the front with the tuned LoRA, member by member and in one sentence.

    The answer is yes only if some member is better than the tuned LoRA beyond chance at no more
    cost, or as good at no more than half its cost, where LoRA itself beats training no adapter and
    the member beats the best LoRA it can afford.

    Args:
        finalists: Origin "baseline" marks LoRAs, "reference" the untrained base; all others are
            members of the front.
        objectives: Quality first; costs are compared on the second.
        seed: Of the bootstrap.
    """
    quality = objectives[0]
    loras = [f for f in finalists if f.origin == "baseline" and f.seeds]
    members = [f for f in finalists if f.origin not in ("baseline", "reference") and f.seeds]
    if not loras:
        return Verdict(False, "No verdict: no LoRA baseline was confirmed.")
    tuned = best_on_validation(loras, quality)
    if not members:
        return Verdict(False, "No: LoRA is as good, the front holds nothing else.")
    if not _has_rows(finalists) and all(len(f.seeds) < 2 for f in finalists):
        why = "each finalist has one seed and no scores of single rows, so no error is known"
        return Verdict(False, f"Not decided: {why}; confirm with more seeds.")
    cost = objectives[1] if len(objectives) > 1 else None
    reference = next((f for f in finalists if f.origin == "reference" and f.seeds), None)
    # One comparison for each member with the tuned LoRA, one with the best LoRA it can afford.
    fair = []
    for member in members:
        affordable = [lora for lora in loras if _ratio(lora, member, cost) <= 1.0]
        fair.append(best_on_validation(affordable, quality) if affordable else tuned)
    pairs = [(m, tuned) for m in members] + list(zip(members, fair, strict=True))
    if reference is not None:
        pairs.append((tuned, reference))
    found = dict(
        zip([(a.digest, b.digest) for a, b in pairs], _compare(pairs, quality, seed), strict=True)
    )
    lora_gain = found[tuned.digest, reference.digest] if reference is not None else None
    levels, winners = [], []
    for member, opponent in zip(members, fair, strict=True):
        level, against = found[member.digest, opponent.digest], found[member.digest, tuned.digest]
        levels.append(
            LevelVerdict(
                member.digest,
                "wins" if level.low > 0 else "loses" if level.high < 0 else "ties",
                level.gain,
                (level.low, level.high),
                _ratio(member, opponent, cost),
                opponent.digest,
            )
        )
        ratio = _ratio(member, tuned, cost)
        if against.low > 0 and ratio <= 1.0:
            winners.append((member, against))
        elif lora_gain is not None and lora_gain.low > 0 and ratio <= _MUCH_CHEAPER:
            # How far a cheaper member may fall short and still be as good.
            margin = max(_TOLERANCE * lora_gain.gain, min(_SMALL, _SMALL_SHARE * lora_gain.gain))
            if against.low > -margin and (opponent is tuned or level.low > 0):
                winners.append((member, against))
    return Verdict(
        bool(winners),
        _sentence(winners, members, tuned, found, lora_gain, quality, cost),
        tuple(levels),
    )


def _rows(finalist: Finalist) -> Array:
    """Return the score of each test row, averaged over the seeds; shape (n_test_rows,)."""
    mean: Array = np.array([s.test_rows for s in finalist.seeds], dtype=float).mean(axis=0)
    return mean


def _has_rows(finalists: Sequence[Finalist]) -> bool:
    """Return whether every retraining tells the quality of its rows."""
    return all(seed.test_rows for finalist in finalists for seed in finalist.seeds)


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
    if not _has_rows(arms):
        return levels, np.tile(levels, (_N_RESAMPLES, 1))
    rows = np.array([_rows(f) for f in arms])  # (arms, test rows)
    n_rows = rows.shape[1]
    # Bootstrap weights: how often each row is drawn; (resamples, test rows).
    counts = rng.multinomial(n_rows, np.full(n_rows, 1.0 / n_rows), size=_N_RESAMPLES)
    return rows.mean(axis=1), counts @ rows.T / n_rows


def _compare(
    pairs: Sequence[tuple[Finalist, Finalist]], quality: Objective, seed: int
) -> list[_Comparison]:
    """Return differences with simultaneous intervals.

    Source: Westfall and Young, Resampling-Based Multiple Testing (1993), the single-step max-T.
    """
    rng = np.random.default_rng(seed)
    arms = {f.digest: f for pair in pairs for f in pair}
    names = list(arms)
    first = np.array([names.index(a.digest) for a, _ in pairs])
    second = np.array([names.index(b.digest) for _, b in pairs])
    n_seeds = np.array([len(f.seeds) for f in arms.values()])
    finalists = list(arms.values())
    between = _pooled_seed_variance(finalists, quality) / n_seeds  # (arms,)
    levels, means = _resampled(finalists, quality, rng)
    noise = rng.standard_normal(means.shape)
    if not _has_rows(finalists):
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
    return [
        _Comparison(float(gain), float(gain - r), float(gain + r))
        for gain, r in zip(gains, reach, strict=True)
    ]


def _row_variance(finalist: Finalist) -> float:
    """Return the variance of the mean quality between samples of test rows."""
    draws = mean_draws(finalist)
    if draws is not None:
        return float(draws.var())
    if not _has_rows([finalist]):
        return 0.0
    rows = _rows(finalist)
    return float(rows.var() / len(rows))


def _pooled_seed_variance(finalists: Sequence[Finalist], quality: Objective) -> float:
    """Return the variance of one seed's mean score, pooled: three seeds alone estimate it badly."""
    spreads = [
        np.array([_level(s, quality) for s in f.seeds]) for f in finalists if len(f.seeds) > 1
    ]
    freedom = sum(len(s) - 1 for s in spreads)
    if not freedom:
        return 0.0
    return float(sum(((s - s.mean()) ** 2).sum() for s in spreads)) / freedom


def _cost(finalist: Finalist, cost: Objective | None) -> float:
    if cost is None:
        return 1.0
    if cost.is_known:
        return finalist.costs.value(cost.name)
    return float(np.mean([s.objectives[cost.name] for s in finalist.seeds]))


def _ratio(first: Finalist, second: Finalist, cost: Objective | None) -> float:
    below = _cost(second, cost)
    return _cost(first, cost) / below if below > 0 else float("inf")


def _sentence(
    winners: Sequence[tuple[Finalist, _Comparison]],
    members: Sequence[Finalist],
    tuned: Finalist,
    found: dict[tuple[str, str], _Comparison],
    lora_gain: _Comparison | None,
    quality: Objective,
    cost: Objective | None,
) -> str:
    tuned_value = f"{tuned.mean(quality.name):.3f}"
    n_tests = f"corrected for {len(found)} comparisons"
    # Of equal members max() takes the first, the cheapest, as the front does.
    members = sorted(members, key=lambda m: _cost(m, cost))
    winners = sorted(winners, key=lambda w: _cost(w[0], cost))
    is_held_out = all(seed.is_held_out for f in (*members, tuned) for seed in f.seeds)
    where = "the test split" if is_held_out else "the rows that the search selected by"
    if winners:
        member, gain = max(winners, key=lambda w: (w[1].low > 0, w[1].gain))
    else:
        member = max(members, key=lambda m: found[m.digest, tuned.digest].gain)
        gain = found[member.digest, tuned.digest]
    name = f"{'+'.join(member.candidate.plan.methods) or 'no adapter'} {member.digest[:8]}"
    value = f"{quality.name} {member.mean(quality.name):.3f}"
    ratio = _ratio(member, tuned, cost)
    price = f" at {ratio:.2g} times its {cost.name}" if cost is not None else ""
    if winners:
        what = "is better than" if gain.low > 0 else "is as good as"
        return (
            f"Yes: {name} {what} the tuned LoRA: {value} "
            f"against {tuned_value} on {where} ({_interval(gain)}, {n_tests}){price}."
        )
    doubt = ""
    if lora_gain is not None and lora_gain.low <= 0:
        doubt = f"; LoRA itself is not better than no adapter ({_interval(lora_gain)})"
    return (
        f"No: LoRA is as good. The best other member ({name}) has {value} "
        f"against {tuned_value} for the tuned LoRA on {where} "
        f"({_interval(gain)}, {n_tests}){price}{doubt}."
    )


def _interval(gain: _Comparison) -> str:
    return f"difference {gain.gain:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}"


def check_pick(rule: str) -> Constraint | None:
    """Return the limit that a pick rule states, or None for a named rule."""
    if rule in PICKS:
        return None
    if "<" not in rule and "\u2264" not in rule:
        remedy = f"use {', '.join(PICKS)}, or a limit such as trainable_params<=50k"
        raise SettingsError("pick", rule, "no such rule", remedy)
    try:
        return Constraint.parse(rule)
    except SettingsError as error:
        raise SettingsError("pick", rule, error.problem, error.remedy) from None


def pick_best(
    finalists: Sequence[Finalist], objectives: Sequence[Objective], *, rule: str = "one_se"
) -> str | None:
    """Return the digest of the finalist to recommend, chosen on validation.

    Args:
        finalists: The reference is picked only if there is nothing else.
        objectives: Quality first; the cost is the second.
        rule: "one_se": the cheapest within one standard error of the best; "knee": the knee of the
            front; "best_quality"; or a limit such as "trainable_params<=50k": the best within it.

    Returns:
        None if there is no finalist, or none within the limit.
    """
    limit = check_pick(rule)
    rows = [f for f in finalists if f.seeds and f.origin != "reference"]
    if limit is not None:
        rows = [f for f in rows if limit.allows(f.costs)]
    else:
        rows = rows or [f for f in finalists if f.seeds]
    if not rows:
        return None
    quality = objectives[0]
    cost = objectives[1] if len(objectives) > 1 else None
    scores = np.array([quality.sign() * f.mean(quality.name, "validation") for f in rows])
    costs = np.array([_cost(f, cost) for f in rows])
    if rule == "knee" and cost is not None:
        shown = np.log(costs) if (costs > 0).all() else costs
        return rows[knee(np.column_stack([scores, -shown]))].digest
    if rule == "one_se" and cost is not None:
        between = _pooled_seed_variance(rows, quality)
        errors = np.array([np.sqrt(between / len(f.seeds) + _row_variance(f)) for f in rows])
        return rows[one_standard_error(scores, errors, costs)].digest
    return rows[int(np.argmax(scores))].digest
