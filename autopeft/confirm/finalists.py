"""Finalists: which trials are confirmed, and what their confirmation found."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, Protocol

from autopeft import methods
from autopeft.costs import Price
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.plan import AdapterPlan, Candidate
from autopeft.trial import Trial, front_of

FURTHER_SECONDS = ("retain_seconds", "also_seconds")
"""Measured values: the time to score what is retained, and the further tasks."""


@dataclass(frozen=True)
class SeedScore:
    """One retraining of a finalist.

    Attributes:
        seed: Seeds the adapter's initialization and the order of the data.
        validation: Metrics on the validation split (quality and "loss").
        test: Metrics on the test split.
        test_rows: Quality of each test row (1.0 right, 0.0 wrong; or minus its loss), in the order
            of the split; a paired bootstrap needs it. Shape (n_test_rows,); empty where a training
            function of the user's gave none.
        objectives: Value by objective name; the quality is that of the test split.
        test_draws: Where the quality is no mean over `test_rows`, as F1: the quality, signed so
            that larger is better, on resamples of the test rows. All candidates of a search share
            the resamples, so draws of the same position are paired. Shape (n_draws,).
        is_held_out: Whether `test` is of rows that the search has not seen; a training function of
            the user's may not score any.
        further: Qualities that are of other rows than those of the task, such as "forgetting" or
            "squad.f1", and measured costs that are no objectives but metered or limited.
    """

    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    test_rows: tuple[float, ...]
    objectives: Mapping[str, float]
    test_draws: tuple[float, ...] = ()
    is_held_out: bool = True
    further: Mapping[str, float] = field(default_factory=dict)


class Arm(Protocol):
    """What scores of test rows are compared of: a finalist, or an adapter trained elsewhere."""

    @property
    def digest(self) -> str:
        """Its identity among those that are compared."""
        ...

    @property
    def seeds(self) -> tuple[SeedScore, ...]:
        """One score for each training of it."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether the seed matters: a base model without adapter and head is only scored."""
        ...


@dataclass(frozen=True)
class Finalist:
    """A candidate retrained with several seeds and scored on the test split.

    Attributes:
        origin: Origin of its trial; "compressed" if it was cut from another finalist.
        seeds: One score for each retraining.
        compressed_from: Digest of the finalist it was cut from, or empty.
    """

    candidate: Candidate
    costs: Price
    origin: str
    seeds: tuple[SeedScore, ...]
    compressed_from: str = ""

    @property
    def digest(self) -> str:
        """The candidate's identity."""
        return self.candidate.digest

    @property
    def is_trained(self) -> bool:
        """Whether the seed matters: a base model without adapter and head is only scored."""
        if self.candidate.plan.specs or self.costs.trainable_params > 0:
            return True
        # A function of the user's may train what nobody knows of.
        return any(seed.test != self.seeds[0].test for seed in self.seeds)

    def mean(self, name: str, split: Literal["validation", "test"] = "test") -> float:
        """Return the mean of a metric over the seeds."""
        values = [(s.test if split == "test" else s.validation)[name] for s in self.seeds]
        return sum(values) / len(values)

    def further(self) -> dict[str, float]:
        """Return the mean over the seeds of what all of them tell beside the objectives."""
        return _means([seed.further for seed in self.seeds])

    def measured(self) -> dict[str, float]:
        """Return the mean over the seeds of each objective, and of what is told beside them."""
        return {**_means([seed.objectives for seed in self.seeds]), **self.further()}

    def broken(self, limits: Sequence[Constraint]) -> tuple[str, ...]:
        """Return those limits on measured values that the mean over the seeds breaks."""
        found = self.measured()
        return tuple(each.text for each in limits if not each.excess(found) <= 0)

    def best_seed(self, quality: Objective) -> SeedScore:
        """Return the retraining with the best validation quality."""
        return max(self.seeds, key=lambda seed: quality.sign() * seed.validation[quality.name])


def _means(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value that all seeds tell."""
    told = [set(seed) for seed in seeds]
    names = set.intersection(*told) if told else set()
    return {name: sum(seed[name] for seed in seeds) / len(seeds) for name in sorted(names)}


@dataclass(frozen=True)
class Compressed:
    """A candidate cut from a trained one of higher ranks.

    Attributes:
        candidate: Its plan, the same for all seeds, with the train settings of the training it was
            cut from.
        costs: Its own sizes, and the cost of that training.
        files: Its adapter: relative path -> content.
    """

    candidate: Candidate
    costs: Price
    score: SeedScore
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Retraining:
    """What confirming one finalist takes.

    Attributes:
        seconds: Of one seed.
        n_begun: Seeds until now.
    """

    seconds: float
    n_begun: int = 0

    def missing(self, n_seeds: float) -> float:
        """Return how many retrainings it lacks of so many."""
        return max(0.0, n_seeds - self.n_begun)

    def left(self, n_seeds: float) -> float:
        """Return the seconds of the retrainings that it lacks of so many."""
        return self.seconds * self.missing(n_seeds)


@dataclass(frozen=True)
class Nominee:
    """A trial to confirm.

    Attributes:
        seconds: Expected seconds of one retraining, scoring included.
        scoring_seconds: The scoring part of that.
        n_begun: Its retrainings until now, those of earlier sessions included.
    """

    trial: Trial
    seconds: float
    scoring_seconds: float = 0.0
    n_begun: int = 0

    @property
    def retraining(self) -> Retraining:
        """What confirming it takes."""
        return Retraining(self.seconds, self.n_begun)

    @classmethod
    def of(cls, trial: Trial, test_share: float) -> Nominee:
        """Expect what the trial took, and the test split's scoring."""
        scoring = trial.measured.get("validation_seconds", 0.0) * (1.0 + test_share)
        scoring += sum(trial.measured.get(name, 0.0) for name in FURTHER_SECONDS)
        return cls(trial, trial.measured.get("train_seconds", 0.0) + scoring, scoring)


def choose_finalists(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    *,
    max_finalists: int,
    test_share: float,
) -> tuple[Nominee, ...]:
    """Choose the trials to confirm, on validation scores alone.

    The verdict needs the best LoRA baseline and the cheapest one on the baselines' own front, so
    they come first; then the reference (no adapter); then the front, thinned evenly along the cost
    axis to `max_finalists`. `test_share` is the time to score the test split over the time to score
    the validation split.
    """
    complete = [t for t in mark_lora_baselines(trials) if t.state == "complete"]
    baselines = front_of([t for t in complete if t.origin == "baseline"], objectives)
    chosen: dict[str, Trial] = {}
    if baselines:
        tuned = _best_trial(baselines, objectives[0])
        chosen = {t.digest: t for t in (tuned, baselines[0])}
    chosen |= {t.digest: t for t in complete if t.origin == "reference"}
    # The empty plan is no adapter, so it takes no finalist's place and beats none.
    adapters = [t for t in complete if t.plan.specs]
    for trial in _spread(front_of(adapters, objectives), objectives, max_finalists):
        chosen.setdefault(trial.digest, trial)
    return tuple(Nominee.of(trial, test_share) for trial in chosen.values())


def _spread(
    front: Sequence[Trial], objectives: Sequence[Objective], n_members: int
) -> Sequence[Trial]:
    """Return at most `n_members` of a front: both ends, and even steps of log cost between."""
    if len(front) <= n_members:
        return front
    cost = objectives[1].name
    logs = [math.log(max(trial.values[cost], 1e-12)) for trial in front]
    picks: list[int] = [len(front) - 1]
    for i in range(n_members - 1):
        target = logs[0] + (logs[-1] - logs[0]) * i / (n_members - 1)
        free = [k for k in range(len(front)) if k not in picks]
        picks.append(min(free, key=lambda k: abs(logs[k] - target)))
    return [front[k] for k in sorted(picks)]


# --- the tuned LoRA ------------------------------------------------------------------------------


def mark_lora_baselines(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials with every ordinary LoRA marked as a baseline, whatever its origin.

    A LoRA of one rank on the same modules of every layer is what a user would write by hand. If the
    search finds a better one than the baseline grid holds, that is the tuned LoRA, and no evidence
    that something else beats LoRA.
    """
    baselines = [trial for trial in trials if trial.origin == "baseline"]
    layers = {frozenset(spec.layer for spec in trial.plan.specs) for trial in baselines}
    return tuple(
        replace(trial, origin="baseline") if _is_ordinary_lora(trial.plan, layers) else trial
        for trial in trials
    )


def _is_ordinary_lora(plan: AdapterPlan, layers: Collection[frozenset[int]]) -> bool:
    used = {spec.layer for spec in plan.specs}
    roles = {spec.role for spec in plan.specs}
    return (
        used in layers
        and plan.methods == ("lora",)
        and len({spec.rank for spec in plan.specs}) == 1
        and len(plan.specs) == len(used) * len(roles)  # a site holds one adapter: the same roles
    )


def best_on_validation(finalists: Sequence[Finalist], quality: Objective) -> Finalist:
    """Return the finalist with the best mean validation quality."""
    return max(finalists, key=lambda f: quality.sign() * f.mean(quality.name, "validation"))


def _best_trial(trials: Sequence[Trial], quality: Objective) -> Trial:
    return max(trials, key=lambda trial: quality.sign() * trial.values[quality.name])


def tuned_lora(
    finalists: Sequence[Finalist], trials: Sequence[Trial], quality: Objective
) -> str | None:
    """Return the digest of the tuned LoRA: the baseline that is best on validation.

    The finalists decide, by the mean over their seeds, or the search's complete trials where no
    baseline was confirmed.
    """
    confirmed = [finalist for finalist in finalists if finalist.origin == "baseline"]
    if confirmed:
        return best_on_validation(confirmed, quality).digest
    marked = mark_lora_baselines(trials)
    complete = [
        t for t in marked if t.origin == "baseline" and t.state == "complete" and not t.broken
    ]
    return _best_trial(complete, quality).digest if complete else None


# --- lower ranks ---------------------------------------------------------------------------------


CUT_DIVISORS = (2, 4, 8)
"""A confirmed LoRA is cut to these parts of its parameters."""


def can_be_cut(candidate: Candidate) -> bool:
    """Return whether all its methods can be cut to lower ranks."""
    plan = candidate.plan
    return bool(plan.specs) and all(methods.get(name).can_cut_rank for name in plan.methods)


def confirmed_finalists(
    trials: Sequence[Trial],
    scores: Mapping[str, tuple[SeedScore, ...]],
    compressed: Mapping[str, tuple[Candidate, Price, str]] = MappingProxyType({}),
) -> tuple[Finalist, ...]:
    """Return the confirmed candidates in the order of their trials, then those cut from them.

    `scores` and `compressed` are as the `ConfirmationStore` returns them, by candidate digest.
    """
    kept: dict[str, Finalist] = {}
    for trial in mark_lora_baselines(trials):
        digest = trial.digest
        is_confirmed = digest in scores and digest not in compressed
        if is_confirmed and digest not in kept and trial.state == "complete":
            kept[digest] = Finalist(trial.candidate, trial.costs, trial.origin, scores[digest])
    for digest, (candidate, costs, source) in compressed.items():
        if source in kept:
            kept[digest] = Finalist(candidate, costs, "compressed", scores[digest], source)
    return tuple(kept.values())
