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
    nominees: Sequence[Nominee], *, worker_seconds: float, n_seeds: int
) -> tuple[Nominee, ...]:
    """Return as many nominees as the time left pays for with all their seeds.

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
    n_seeds: int,
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
    *,
    seeds: range,
    done: Collection[tuple[str, int]],
    lower_ranks: Mapping[str, tuple[tuple[Candidate, Price], ...]],
) -> tuple[Job, ...]:
    """Return one job for each nominee and seed, except those that are done or running.

    All nominees come with the first seed, then all with the second, ...: if the budget ends early,
    they have about the same number of seeds.
    """
    return tuple(
        Job("confirm", t.candidate, t.costs, seed, lower_ranks=lower_ranks.get(t.digest, ()))
        for seed in seeds
        for t in (nominee.trial for nominee in nominees)
        if (t.digest, seed) not in done
    )
