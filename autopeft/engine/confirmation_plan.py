"""Which confirmations the rest of the budget pays for, as jobs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from autopeft.confirm.finalists import Nominee, lower_ranks
from autopeft.costs import Price
from autopeft.engine.messages import Job
from autopeft.plan import Candidate

_COMPRESSION_MARGIN = 0.9
"""Share of the time left that confirmations and lower ranks together may be expected to take."""

_N_NEEDED = 4
"""Nominees without which there is no verdict: the two tuned LoRAs, the reference and a finalist."""


def affordable(
    nominees: Sequence[Nominee], *, worker_seconds: float, n_seeds: float
) -> tuple[Nominee, ...]:
    """Return as many nominees as the time left pays for, at `n_seeds` trainings each on average.

    The tuned LoRAs and the reference are never dropped. Front members are dropped from the middle
    outwards, so that the cheapest and the best stay. `worker_seconds` is the time left, over all
    workers.
    """
    kept = list(nominees)
    while len(kept) > _N_NEEDED and sum(n.seconds for n in kept) * n_seeds > worker_seconds:
        front = [n for n in kept if n.trial.origin not in ("baseline", "reference")]
        if len(front) <= 2:
            break
        kept.remove(front[len(front) // 2])
    return tuple(kept)


def affordable_lower_ranks(
    nominees: Sequence[Nominee],
    *,
    worker_seconds: float,
    n_seeds: float,
    trained: Collection[str],
    price: Callable[[Candidate], Price],
) -> dict[str, tuple[tuple[Candidate, Price], ...]]:
    """Return the lower ranks that the time left pays for, and their costs, by nominee's digest.

    The digests in `trained` are left out, because they have trials of their own.
    """
    taken = set(trained)
    left = worker_seconds * _COMPRESSION_MARGIN - sum(n.seconds for n in nominees) * n_seeds
    chosen: dict[str, tuple[tuple[Candidate, Price], ...]] = {}
    for nominee in nominees:
        lower = [c for c in lower_ranks(nominee.trial.candidate) if c.digest not in taken]
        left -= nominee.scoring_seconds * len(lower) * n_seeds
        if left < 0:
            break
        taken.update(candidate.digest for candidate in lower)
        chosen[nominee.trial.digest] = tuple((c, price(c)) for c in lower)
    return chosen


def confirmation_jobs(
    nominees: Sequence[Nominee],
    wanted: Collection[str],
    *,
    seeds: Sequence[int],
    begun: Collection[tuple[str, int]],
    lower_ranks: Mapping[str, tuple[tuple[Candidate, Price], ...]],
) -> tuple[Job, ...]:
    """Return a job for each wanted nominee, with the first seed that it has not begun."""
    by_digest = {nominee.trial.digest: nominee.trial for nominee in nominees}
    jobs = []
    for digest in wanted:
        trial = by_digest.get(digest)
        seed = next((seed for seed in seeds if (digest, seed) not in begun), None)
        if trial is not None and seed is not None:
            lower = lower_ranks.get(digest, ())
            jobs.append(Job("confirm", trial.candidate, trial.costs, seed, lower_ranks=lower))
    return tuple(jobs)
