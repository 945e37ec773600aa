"""Which candidates are confirmed, in which order, and where each confirmation is kept on disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.plan import AdapterPlan, Candidate
from autopeft.trial import Trial, front_of


def spread(front: Sequence[Trial], objectives: Sequence[Objective], n_members: int) -> list[Trial]:
    """At most `n_members` of a front: both ends, and between them even steps of log cost."""
    if len(front) <= n_members:
        return list(front)
    cost = objectives[1].name
    logs = [math.log(max(trial.values[cost], 1e-12)) for trial in front]
    picks: list[int] = [len(front) - 1]
    for i in range(n_members - 1):
        target = logs[0] + (logs[-1] - logs[0]) * i / (n_members - 1)
        free = [k for k in range(len(front)) if k not in picks]
        picks.append(min(free, key=lambda k: abs(logs[k] - target)))
    return [front[k] for k in sorted(picks)]


def as_lora_baselines(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials, every ordinary LoRA among them marked as a baseline, whoever proposed it.

    A LoRA of one rank on the same modules of every layer is what a user would write by hand. If the
    search finds a better one than the baseline grid holds, then that is the tuned LoRA, and no
    proof that something else beats LoRA.
    """
    layers = {
        frozenset(spec.layer for spec in trial.candidate.plan.specs)
        for trial in trials
        if trial.origin == "baseline"
    }
    return tuple(
        replace(trial, origin="baseline") if _is_ordinary_lora(trial, layers) else trial
        for trial in trials
    )


def _is_ordinary_lora(trial: Trial, layers: Collection[frozenset[int]]) -> bool:
    specs = trial.candidate.plan.specs
    roles: dict[int, set[str]] = {}
    for spec in specs:
        roles.setdefault(spec.layer, set()).add(spec.role)
    first = next(iter(roles.values()), set())
    return (
        frozenset(roles) in layers
        and trial.candidate.plan.methods == ("lora",)
        and len({spec.rank for spec in specs}) == 1
        and all(found == first for found in roles.values())
    )


def tuned_lora(
    confirmed: Sequence[Finalist], trials: Sequence[Trial], quality: Objective
) -> str | None:
    """Return the digest of the tuned LoRA: the best one on validation.

    Args:
        confirmed: Finalists; the mean over their seeds decides where a LoRA is among them.
        trials: Trials of the search; their validation quality decides otherwise.
        quality: The leading objective.
    """
    finals = [finalist for finalist in confirmed if finalist.origin == "baseline"]
    if finals:
        best = max(finals, key=lambda f: quality.sign() * f.mean(quality.name, "validation"))
        return best.candidate.digest
    loras = [t for t in as_lora_baselines(trials) if t.origin == "baseline"]
    complete = [trial for trial in loras if trial.state == "complete"]
    if not complete:
        return None
    return max(complete, key=lambda trial: quality.sign() * trial.values[quality.name]).digest


@dataclass(frozen=True)
class Nomination:
    """A candidate to confirm and the trial that earned it.

    Attributes:
        trial: Its trial.
        seconds: What one retraining will take, judging by the trial.
        scoring_seconds: What of that goes into scoring it.
    """

    trial: Trial
    seconds: float
    scoring_seconds: float = 0.0


def nominate(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    *,
    max_finalists: int,
    test_share: float,
) -> tuple[Nomination, ...]:
    """The candidates worth confirming: tuned LoRAs, the reference, the front.

    Chosen on validation alone. The best baseline and the cheapest baseline on the baselines' own
    front come first, since no verdict can do without them; then the reference (no adapter); then
    the front, thinned to `max_finalists` evenly along the cost axis if it has more members.

    Args:
        trials: All trials of the search.
        objectives: Quality first.
        max_finalists: Most front members to take.
        test_share: Time to score the test split over time to score the validation split.
    """
    complete = [o for o in as_lora_baselines(trials) if o.state == "complete"]
    baselines = front_of([o for o in complete if o.origin == "baseline"], objectives)
    chosen: dict[str, Trial] = {}
    if baselines:
        quality = objectives[0]
        best = max(baselines, key=lambda o: quality.sign() * o.values[quality.name])
        chosen[best.candidate.digest] = best
        chosen[baselines[0].candidate.digest] = baselines[0]
    for trial in complete:
        if trial.origin == "reference":
            chosen[trial.candidate.digest] = trial
    # The empty plan is no adapter: it neither takes a finalist's place nor beats one.
    adapters = [o for o in complete if o.candidate.plan.specs]
    for trial in spread(front_of(adapters, objectives), objectives, max_finalists):
        chosen.setdefault(trial.candidate.digest, trial)
    return tuple(_nomination(trial, test_share) for trial in chosen.values())


def _nomination(trial: Trial, test_share: float) -> Nomination:
    scoring = trial.measured.get("validation_seconds", 0.0) * (1.0 + test_share)
    return Nomination(trial, trial.measured.get("train_seconds", 0.0) + scoring, scoring)


_COMPRESSIBLE = frozenset({"lora", "rslora"})
"""Methods of which a lower rank can be cut."""


def lower_ranks(candidate: Candidate) -> tuple[Candidate, ...]:
    """A LoRA's half, quarter and eighth ranks (1 at least); () for whatever is not all LoRA."""
    plan = candidate.plan
    if not plan.specs or not _COMPRESSIBLE.issuperset(plan.methods):
        return ()
    found = []
    for divisor in (2, 4, 8):
        if max(spec.rank for spec in plan.specs) >= divisor:
            specs = (replace(spec, rank=max(1, spec.rank // divisor)) for spec in plan.specs)
            found.append(Candidate(AdapterPlan(specs), candidate.train))
    return tuple(found)


def finalists(
    trials: Sequence[Trial],
    scores: Mapping[str, tuple[SeedScore, ...]],
    compressed: Mapping[str, tuple[Candidate, Price, str]] = MappingProxyType({}),
) -> tuple[Finalist, ...]:
    """The confirmed candidates, in the order of their trials, then what was cut from them."""
    kept: dict[str, Finalist] = {}
    for trial in as_lora_baselines(trials):
        digest = trial.candidate.digest
        is_confirmed = digest in scores and digest not in compressed
        if is_confirmed and digest not in kept and trial.state == "complete":
            kept[digest] = Finalist(trial.candidate, trial.costs, trial.origin, scores[digest])
    for digest, (candidate, price, source) in compressed.items():
        if source in kept:
            kept[digest] = Finalist(candidate, price, "compressed", scores[digest], source)
    return tuple(kept.values())


@dataclass(frozen=True)
class SeedScore:
    """One retraining of a finalist.

    Attributes:
        seed: Seeds the adapter's initialization and the order of the data.
        validation: Metrics on the validation split (quality and "loss").
        test: Metrics on the test split.
        test_rows: Quality of each test row (1.0 right, 0.0 wrong; or minus its loss), in the order
            of the split: what a paired bootstrap needs. Shape (n_test_rows,).
        objectives: Every objective's value, quality taken from the test split.
    """

    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    test_rows: tuple[float, ...]
    objectives: Mapping[str, float]


@dataclass(frozen=True)
class Finalist:
    """A candidate retrained with several seeds and scored on the test split.

    Attributes:
        candidate: What it is.
        price: What it costs.
        origin: As of its trial; "compressed" if it was not trained but cut from another.
        seeds: One score a retraining.
        compressed_from: Digest of the finalist it was cut from, else empty.
    """

    candidate: Candidate
    price: Price
    origin: str
    seeds: tuple[SeedScore, ...]
    compressed_from: str = ""

    def mean(self, name: str, split: Literal["validation", "test"] = "test") -> float:
        """Mean of a metric over the seeds."""
        values = [(s.test if split == "test" else s.validation)[name] for s in self.seeds]
        return sum(values) / len(values)


@dataclass(frozen=True)
class Compressed:
    """A candidate that was not trained but cut from one of higher ranks.

    Attributes:
        candidate: Its plan; its train settings are those of the training it was cut from.
        price: Its own sizes, the cost of that training.
        score: Scores on both splits.
        files: Its adapter: relative path -> content.
    """

    candidate: Candidate
    price: Price
    score: SeedScore
    files: Mapping[str, bytes]
