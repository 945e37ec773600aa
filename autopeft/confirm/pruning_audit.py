"""The pruning audit: how well rungs predict the end, and what pruning saved and cost.

Rank correlations are taken over trials that were trained to the end. Those are the better ones, so
over all trials the correlations would be higher. The cost of pruning is estimated from trials that
would have been pruned but were finished on purpose (`audit_share`), an unbiased sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopeft.costs.objectives import Objective
from autopeft.trial import TIME_UP, Trial, front_of

_FEWEST = 4
"""Trials that a rank correlation needs."""


@dataclass(frozen=True)
class RungFidelity:
    """How well a rung predicts final quality.

    Attributes:
        step: Optimizer steps done.
        correlation: Spearman's rank correlation with final quality, oriented so that 1 is perfect.
        n_trials: Trials it is taken over.
    """

    step: int
    correlation: float
    n_trials: int


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
    """

    rungs: tuple[RungFidelity, ...]
    saved_share: float
    n_pruned: int
    n_audited: int
    n_audited_on_front: int
    regret: float | None

    def text(self) -> str:
        """Return one line of text."""
        parts = [
            f"rank correlation with the end {rung.correlation:.2f} at step {rung.step}"
            for rung in self.rungs
        ]
        parts.append(f"pruning saved {self.saved_share:.0%} of the training steps")
        if self.n_audited:
            parts.append(
                f"of {self.n_audited} trials finished although they would have been stopped, "
                f"{self.n_audited_on_front} reached the front (mean regret {self.regret:.4f})"
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
    return Fidelity(
        rungs=_rungs(complete, objectives[0]),
        saved_share=1.0 - done / full if full else 0.0,
        n_pruned=len(stopped),
        n_audited=len(audited),
        n_audited_on_front=sum(o.number in front for o in audited),
        regret=sum(regrets) / len(regrets) if regrets else None,
    )


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
            # Slow to import, and needed only at the end.
            from scipy.stats import spearmanr

            # Rung scores follow the direction of the quality objective, so no sign changes.
            correlation = float(spearmanr(scores, finals).statistic)
            found.append(RungFidelity(step, correlation, len(values)))
    return tuple(found)


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
