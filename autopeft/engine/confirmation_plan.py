"""Which confirmations and cuts the rest of the budget pays for, as jobs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from autopeft.confirm.finalists import CUT_DIVISORS, Nominee, can_be_cut
from autopeft.engine.messages import Job
from autopeft.plan import Candidate

_COMPRESSION_MARGIN = 0.9
"""Share of the time left that confirmations and cuts together may be expected to take."""

_N_NEEDED = 4
"""Nominees without which there is no verdict: the two tuned LoRAs, the reference and a finalist."""


def affordable(
    nominees: Sequence[Nominee], *, worker_seconds: float, n_seeds: float
) -> tuple[Nominee, ...]:
    """Return as many nominees as the time left pays for, at `n_seeds` trainings each on average.

    The tuned LoRAs, the reference and what is confirmed with a seed already are never dropped.
    Front members are dropped from the middle outwards, so that the cheapest and the best stay.
    `worker_seconds` is the time left, over all workers.
    """
    kept = list(nominees)
    while len(kept) > _N_NEEDED and _seconds(kept, n_seeds) > worker_seconds:
        front = [n for n in kept if n.trial.origin not in ("baseline", "reference")]
        inner = [n for n in front[1:-1] if not n.n_begun]
        if not inner:
            break
        kept.remove(inner[len(inner) // 2])
    return tuple(kept)


def _seconds(nominees: Sequence[Nominee], n_seeds: float) -> float:
    """Return the seconds of the retrainings that are missing."""
    return sum(nominee.retraining.left(n_seeds) for nominee in nominees)


def affordable_cuts(
    nominees: Sequence[Nominee], *, worker_seconds: float, n_seeds: float
) -> frozenset[str]:
    """Return the digests of the nominees whose cuts to lower ranks the time left pays for."""
    left = worker_seconds * _COMPRESSION_MARGIN - _seconds(nominees, n_seeds)
    chosen = []
    for nominee in nominees:
        if can_be_cut(nominee.trial.candidate):
            n_missing = nominee.retraining.missing(n_seeds)
            left -= nominee.scoring_seconds * len(CUT_DIVISORS) * n_missing
            if left < 0:
                break
            chosen.append(nominee.trial.digest)
    return frozenset(chosen)


def confirmation_jobs(
    nominees: Sequence[Nominee],
    wanted: Collection[str],
    *,
    seeds: Sequence[int],
    begun: Collection[tuple[str, int]],
    to_cut: Collection[str] = (),
    cuts: Mapping[str, Sequence[Candidate]] = MappingProxyType({}),
) -> tuple[Job, ...]:
    """Return a job for each wanted nominee, with the first seed that it has not begun.

    Those in `to_cut` are also cut to lower ranks: where an earlier seed was, to its `cuts`.
    """
    by_digest = {nominee.trial.digest: nominee.trial for nominee in nominees}
    jobs = []
    for digest in wanted:
        trial = by_digest.get(digest)
        seed = next((seed for seed in seeds if (digest, seed) not in begun), None)
        if trial is not None and seed is not None:
            job = Job("confirm", trial.candidate, trial.costs, seed)
            if digest in to_cut:
                job = replace(job, compress=True, cuts=tuple(cuts.get(digest, ())))
            jobs.append(job)
    return tuple(jobs)
