"""Which finalists are trained with another seed: those where it may change a decision.

All have one seed at first, then the better half two. From there on, a seed goes where it may settle
the verdict, or where the error of a finalist's own score may change the pick; the others have their
place. What is not trained makes no claim likelier to be wrong: `compare` accounts for each look at
the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from scipy.stats import norm

from autopeft.confirm.comparison import (
    Looks,
    cost_of,
    is_told_by_logarithm,
    pooled_seed_variance,
    quality_and_cost,
)
from autopeft.confirm.finalists import Finalist, best_on_validation
from autopeft.confirm.pick import pick_best
from autopeft.confirm.standing import Claim, Member, Standing, standing_of, why_unknown
from autopeft.costs.objectives import Objective

EXTRA_SEEDS = 2
"""So many more than usual are trained for the verdict, where the user has set no number."""

_LEAST_PAIRS = 3
"""Finalists with a second seed that tell the variance between trainings: from one or two alone it
is so uncertain that every interval is several times as wide."""

_WORTH = 0.2
"""Least chance of an answer for which seeds are spent."""


def next_seeds(
    finalists: Sequence[Finalist],
    objectives: Sequence[Objective],
    *,
    usual: int,
    most: int,
    pick: str = "one_se",
    looks: Looks = (),
) -> tuple[str, ...]:
    """Return the digests of those to train with one more seed each; () if none is worth it.

    It depends on the scores and the looks alone, so a resumed race goes on from those on disk.

    Args:
        finalists: Each with a score.
        objectives: Quality first, then the cost.
        usual: Seeds that a finalist gets at most for the pick's sake.
        most: And for the verdict's.
        pick: The rule of the pick.
        looks: Earlier looks, as for `compare`.
    """
    trained = {f.digest: f for f in finalists if not f.compressed_from}
    wanted: dict[str, None] = {}
    for limit, found in (
        (most, _for_the_verdict(finalists, objectives, most, looks)),
        (usual, _for_the_pick(finalists, objectives, usual, pick)),
    ):
        for each in found:
            # What was cut from another gets its seeds with that one's.
            source = trained[each.compressed_from or each.digest]
            if source.is_trained and len(source.seeds) < limit:
                wanted[source.digest] = None
    return tuple(wanted)


def expected_seeds(usual: int) -> float:
    """Return the seeds that a finalist gets on average, as `confirmation.py` measured."""
    return min(usual, 1.8)


def reserved_seeds(usual: int) -> float:
    """Return the seeds for which time is kept: in four of five races a finalist gets no more."""
    return min(usual, 1.2 + 0.4 * usual)


def n_rounds(usual: int) -> int:
    """Return the rounds of a race, as `confirmation.py` measured."""
    return 3 if usual > 1 else 1


def seeds_of(finalists: Sequence[Finalist]) -> Mapping[str, int]:
    """Return a look at these finalists: how many seeds each has."""
    return {f.digest: len(f.seeds) for f in finalists}


def _for_the_verdict(
    finalists: Sequence[Finalist], objectives: Sequence[Objective], most: int, looks: Looks
) -> Iterator[Finalist]:
    if all(len(f.seeds) < 2 for f in finalists if f.is_trained):
        yield from _better_half(finalists, objectives)
    elif why_unknown(finalists) is None:
        found = standing_of(finalists, objectives, looks=looks)
        if found.answer == "undecided":
            yield from _telling(found, pooled_seed_variance(finalists, objectives[0]), most)


def _better_half(
    finalists: Sequence[Finalist], objectives: Sequence[Objective]
) -> Iterator[Finalist]:
    """Yield the tuned LoRA, the better half on validation of those that cost no more, and others.

    What is cut from a finalist is scored with it and counts as that one.
    """
    quality, cost = quality_and_cost(objectives)
    loras = [f for f in finalists if f.origin == "baseline"]
    if not loras:
        return
    tuned = best_on_validation(loras, quality)
    others = ("compressed", "reference")
    trained = {f.digest: f for f in finalists if f.is_trained and f.origin not in others}
    best_first = sorted(
        finalists, key=lambda f: -quality.sign() * f.mean(quality.name, "validation")
    )
    rivals = [
        f.compressed_from or f.digest
        for f in best_first
        if f.origin not in ("baseline", "reference") and cost_of(f, cost) <= cost_of(tuned, cost)
    ]
    rivals = [digest for digest in dict.fromkeys(rivals) if digest != tuned.digest]
    chosen = dict.fromkeys([tuned.digest, *rivals[: (len(rivals) + 1) // 2]])
    for each in best_first:
        if len(chosen) < _LEAST_PAIRS and each.digest in trained:
            chosen[each.digest] = None
    yield from (trained[digest] for digest in chosen)


def _telling(found: Standing, variance: float, most: int) -> Iterator[Finalist]:
    """Yield those whose further seeds may decide, the likeliest first."""
    chances = [(_chances(member, found, variance, most), member) for member in found.members]
    all_no = math.prod(no for (_, no), _ in chances)
    for (yes, _), member in sorted(chances, key=lambda each: -each[0][0]):
        if member.answer != "undecided" or max(yes, all_no) < _WORTH:
            continue
        for claim in (c for way in member.ways for c in way if c.answer == "undecided"):
            few = min(len(f.seeds) for f in claim.pair if f.is_trained)
            yield from (f for f in claim.pair if len(f.seeds) == few)


def _chances(member: Member, found: Standing, variance: float, most: int) -> tuple[float, float]:
    """Return the chances that a member's answer is yes, and no, once all have `most` seeds."""
    # Few retrainings make the intervals wide; with more, about those of the normal distribution.
    reach = -float(norm.ppf(0.025 / found.n_comparisons))
    ways = [[_chance(claim, reach, variance, most) for claim in way] for way in member.ways]
    yes = max((min(claim[0] for claim in way) for way in ways), default=0.0)
    return yes, min((max(claim[1] for claim in way) for way in ways), default=1.0)


def _chance(claim: Claim, reach: float, variance: float, most: int) -> tuple[float, float]:
    """Return the chances that a claim is shown, and refuted, once both have `most` seeds."""
    now, then = 0.0, 0.0
    for each in (f for f in claim.pair if f.is_trained):
        now += variance / len(each.seeds)
        then += variance / max(most, len(each.seeds))
    found = claim.found
    error = math.sqrt(max(0.0, found.error**2 - found.seed_error**2) + then)
    width = (found.high - found.low) / 2
    half = min(reach, width / found.error) * error if found.error else 0.0
    # Given the scores so far, the gain with all seeds is normal about the gain now.
    gain, spread = found.gain, max(math.sqrt(max(0.0, now - then)), 1e-12)
    shown = float(norm.cdf((gain - half - claim.above) / spread))
    if claim.below is None:
        return shown, 0.0
    return shown, float(norm.cdf((claim.below - gain - half) / spread))


def _for_the_pick(
    finalists: Sequence[Finalist], objectives: Sequence[Objective], usual: int, rule: str
) -> Iterator[Finalist]:
    """Yield the pick, and those whose score may move so far that another would be picked."""
    quality = objectives[0]
    picked = pick_best(finalists, objectives, rule=rule)
    variance = pooled_seed_variance(finalists, quality)
    is_log = is_told_by_logarithm(finalists, quality)
    for i, each in enumerate(finalists):
        n_seeds = len(each.seeds)
        if n_seeds >= usual:
            continue
        shift = math.sqrt(variance * (1.0 / n_seeds - 1.0 / usual))
        if (each.digest == picked and n_seeds == 1) or any(
            pick_best([*finalists[:i], moved, *finalists[i + 1 :]], objectives, rule=rule) != picked
            for moved in (_moved(each, quality, by, is_log=is_log) for by in (shift, -shift))
        ):
            yield each


def _moved(finalist: Finalist, quality: Objective, by: float, *, is_log: bool) -> Finalist:
    """Return a finalist with another quality on validation, or logarithm of it."""
    name = quality.name

    def moved(value: float) -> float:
        return value * math.exp(by) if is_log else value + by

    return replace(
        finalist,
        seeds=tuple(
            replace(seed, validation={**seed.validation, name: moved(seed.validation[name])})
            for seed in finalist.seeds
        ),
    )
