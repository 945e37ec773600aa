"""The pruning audit: how well rungs predict the end, and what pruning saved and cost.

Rank correlations are taken over trials that were trained to the end. Those are the better ones, so
over all trials the correlations would be higher. The cost of pruning is estimated from trials that
would have been pruned but were finished on purpose (`audit_share`), an unbiased sample. What they
add to the hypervolume is scaled up to all trials that were stopped, and so is its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopeft.confirm.intervals import LEVEL, Interval
from autopeft.costs.objectives import Objective
from autopeft.trial import TIME_UP, Trial, front_of
from autopeft.utils.formatting import counted
from autopeft.utils.pareto import hypervolume
from autopeft.utils.ranks import correlation_interval, rank_correlation

_FEWEST = 4
"""Trials that a rank correlation needs."""

_FEWEST_AUDITED, _N_DRAWS = 3, 2000
"""Audited trials that an interval needs, and its bootstrap draws."""


@dataclass(frozen=True)
class RungFidelity:
    """How well a rung predicts final quality.

    Attributes:
        step: Optimizer steps done.
        correlation: Spearman's rank correlation with final quality, oriented so that 1 is perfect.
        n_trials: Trials it is taken over.
        interval: Its 95 % interval.
    """

    step: int
    correlation: float
    n_trials: int
    interval: Interval | None = None


@dataclass(frozen=True)
class Fidelity:
    """What rungs and pruning did in one search.

    Attributes:
        rungs: By step; only those with enough trials.
        saved_share: Training steps that pruning saved, over those of all trials in full.
        n_pruned: Trials pruned.
        n_audited: Trials finished although they would have been pruned.
        n_audited_on_front: Those on the search's front at the end.
        regret: Mean quality by which they exceed the best complete peer that costs no more, 0
            where they do not; None without audited trials.
        lost_volume: Estimated share of the hypervolume (quality over log costs) that pruning lost;
            None where that is unknown: too few were audited, or none of them added any.
        lost_volume_interval: Its 95 % bootstrap interval, over the audited trials.
        front_share_interval: 95 % interval of the share of the stopped trials that would have
            reached the front.
    """

    rungs: tuple[RungFidelity, ...]
    saved_share: float
    n_pruned: int
    n_audited: int
    n_audited_on_front: int
    regret: float | None
    lost_volume: float | None = None
    lost_volume_interval: Interval | None = None
    front_share_interval: Interval | None = None

    def text(self) -> str:
        """Return one line of text."""
        parts = [
            f"rank correlation with the end {rung.correlation:.2f}{_shown(rung.interval)} "
            f"at step {rung.step}"
            for rung in self.rungs
        ]
        parts.append(f"pruning saved {self.saved_share:.0%} of the training steps")
        if self.n_audited and self.regret is not None:
            parts.append(
                f"of {counted(self.n_audited, 'trial')} finished that would have been stopped, "
                f"{self.n_audited_on_front} reached the front (mean regret {self.regret:.4f})"
            )
        if self.front_share_interval is not None:
            low, high = self.front_share_interval
            parts.append(f"so {low:.0%} to {high:.0%} of the stopped ones would have")
        if self.lost_volume is not None and self.lost_volume_interval is not None:
            low, high = self.lost_volume_interval
            parts.append(
                f"pruning lost about {self.lost_volume:.1%} of the hypervolume "
                f"({low:.1%} to {high:.1%})"
            )
        return "; ".join(parts)


def fidelity(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Fidelity:
    """Audit rungs and pruning of a search from all of its trials."""
    complete = [o for o in trials if o.state == "complete"]
    stopped = [o for o in trials if o.state == "pruned" and o.reason != TIME_UP]
    audited = [o for o in complete if o.audited_at]
    front = {o.number for o in front_of(complete, objectives)}
    full = sum(o.train.steps for o in (*complete, *stopped))
    done = sum(o.train.steps for o in complete)
    done += sum(max((step for step, _ in o.rungs), default=0) for o in stopped)
    regrets = [_regret(o, complete, objectives) for o in audited]
    n_on_front = sum(o.number in front for o in audited)
    lost = _lost_volume(complete, audited, len(stopped), objectives)
    return Fidelity(
        rungs=_rungs(complete, objectives[0]),
        saved_share=1.0 - done / full if full else 0.0,
        n_pruned=len(stopped),
        n_audited=len(audited),
        n_audited_on_front=n_on_front,
        regret=sum(regrets) / len(regrets) if regrets else None,
        lost_volume=lost and lost[0],
        lost_volume_interval=lost and lost[1],
        front_share_interval=_share_interval(n_on_front, len(audited)),
    )


def _share_interval(n_hits: int, n: int) -> Interval | None:
    """Return the exact interval of a share (Clopper and Pearson, 1934)."""
    if n < _FEWEST_AUDITED:
        return None
    # Slow to import, and needed only at the end.
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = float(betaincinv(n_hits, n - n_hits + 1, tail)) if n_hits else 0.0
    high = float(betaincinv(n_hits + 1, n - n_hits, 1 - tail)) if n_hits < n else 1.0
    return low, high


def _lost_volume(
    complete: Sequence[Trial],
    audited: Sequence[Trial],
    n_stopped: int,
    objectives: Sequence[Objective],
) -> tuple[float, Interval] | None:
    """Return the share of the hypervolume that stopped trials would have added, with an interval.

    Gains of several trials overlap, so their sum is an upper bound.
    """
    if len(audited) < _FEWEST_AUDITED or len(objectives) < 2:
        return None
    points = _oriented(complete, objectives)
    reference = points.min(axis=0) - 1e-9
    total = hypervolume(points, reference)
    if not total > 0:
        return None
    numbers = [trial.number for trial in complete]
    gains = np.array(
        [
            1.0 - hypervolume(np.delete(points, numbers.index(o.number), axis=0), reference) / total
            for o in audited
        ]
    )
    if not gains.any():
        # That a few added nothing tells of the share above, not how much one may add.
        return None
    rng = np.random.default_rng(0)
    means = rng.choice(gains, (_N_DRAWS, len(gains))).mean(axis=1)
    tail = (1 - LEVEL) / 2
    added = n_stopped * np.array([gains.mean(), *np.quantile(means, (tail, 1 - tail))])
    lost, low, high = (added / (1.0 + added)).tolist()
    return lost, (low, high)


def _oriented(trials: Sequence[Trial], objectives: Sequence[Objective]) -> np.ndarray:
    """Return the quality and minus the logarithms of the costs, shape (n, n_objectives)."""
    quality, *costs = objectives
    rows = [
        [
            quality.sign() * trial.values[quality.name],
            *(-math.log(max(trial.values[cost.name], 1e-9)) for cost in costs),
        ]
        for trial in trials
    ]
    return np.array(rows)


def _rungs(complete: Sequence[Trial], quality: Objective) -> tuple[RungFidelity, ...]:
    pairs: dict[int, list[tuple[float, float]]] = {}
    for trial in complete:
        for step, score in trial.rungs:
            if step < trial.candidate.train.steps:
                pair = score, trial.values[quality.name]
                if all(map(math.isfinite, pair)):
                    pairs.setdefault(step, []).append(pair)
    found = []
    for step, values in sorted(pairs.items()):
        scores, finals = zip(*values, strict=True)
        # The rank correlation of a constant is undefined.
        if len(values) >= _FEWEST and len(set(scores)) > 1 and len(set(finals)) > 1:
            # Rung scores follow the direction of the quality objective, so no sign changes.
            correlation = rank_correlation(np.array(scores), np.array(finals))
            interval = correlation_interval(correlation, len(values))
            found.append(RungFidelity(step, correlation, len(values), interval))
    return tuple(found)


def _shown(interval: Interval | None) -> str:
    return f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""


def _regret(trial: Trial, complete: Sequence[Trial], objectives: Sequence[Objective]) -> float:
    """Return how much better a trial is than every complete one that costs no more."""
    quality, *costs = objectives
    peers = [
        quality.sign() * peer.values[quality.name]
        for peer in complete
        if peer.number != trial.number
        and all(peer.values[c.name] <= trial.values[c.name] for c in costs)
    ]
    own = quality.sign() * trial.values[quality.name]
    return max(0.0, own - max(peers)) if peers else 0.0
