"""FrontView: what a reader is shown of a RunRecord, and what front.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopeft.confirm.finalists import Finalist
from autopeft.confirm.intervals import Interval, cost_interval, quality_interval
from autopeft.confirm.pruning_audit import Fidelity, fidelity
from autopeft.confirm.verdict import Verdict
from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.plan import Candidate
from autopeft.plan_text import plan_summary
from autopeft.reporting.record import AdapterScore, BudgetReport, DataSummary, RunRecord
from autopeft.trial import Trial
from autopeft.utils.pareto import Array, non_dominated, orient
from autopeft.utils.serialize import finite


@dataclass(frozen=True)
class SeedLine:
    """One retraining's metrics, without the score of each row."""

    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """One candidate with the numbers that are reported for it.

    Attributes:
        candidate: Plan and train settings.
        price: What it was known to cost.
        objectives: Value by objective name. Quality: mean over the seeds on the test split if
            `is_confirmed`, else the search's validation value. Costs: as priced, or the mean of
            what was measured.
        objectives_ci: 95 % interval by objective name; None where nothing tells the error.
        validation: Mean validation metrics over the seeds; of the trial where not confirmed.
        seeds: One line a retraining.
        adapter: Folder below the output folder, or None if no adapter was saved.
        adapter_score: What that adapter scores.
        origin: Where the candidate came from.
        trial: Number of its trial, or None if unknown.
        is_confirmed: True if retrained and scored on the test split.
        compressed_from: Digest of the finalist whose trained LoRA was cut to these ranks, or None.
        dominated_by: Digest of a finalist at least as good in every objective and better in one.
    """

    candidate: Candidate
    price: Price
    objectives: Mapping[str, float]
    objectives_ci: Mapping[str, Interval | None]
    validation: Mapping[str, float]
    seeds: tuple[SeedLine, ...] = ()
    adapter: str | None = None
    adapter_score: AdapterScore | None = None
    origin: str = "search"
    trial: int | None = None
    is_confirmed: bool = False
    compressed_from: str | None = None
    dominated_by: str | None = None

    @property
    def digest(self) -> str:
        """The candidate's identity."""
        return self.candidate.digest

    @property
    def summary(self) -> str:
        """What sits where, and what it was cut from if it was not trained."""
        text = plan_summary(self.candidate.plan)
        return f"{text}, cut from {self.compressed_from[:8]}" if self.compressed_from else text


@dataclass(frozen=True)
class FrontView:
    """The result as its readers see it.

    Attributes:
        objectives: Quality first, then costs.
        front: Non-dominated entries, cheapest first; finalists, unless `is_confirmed` is False.
        best: Digest of the pick.
        baseline: The tuned LoRA.
        reference: The empty plan, shown beside the front; it competes with no member, since it is
            no adapter and so no member.
        verdict: An undecided one before confirmation.
        budget: Where the budget went.
        trials: Number of trials by state.
        dominated_finalists: Finalists that others dominate on the reported numbers.
        unconfirmed: Members of the search's front that were not retrained; validation numbers.
        data: What was learned from.
        versions: Version by package.
        warnings: One line each.
        settings: As resolved, JSON-like values.
        n_layers: Blocks of the model that the search reached.
        started: ISO 8601 time.
        ended: ISO 8601 time.
        is_confirmed: True if the front's numbers are of the test split.
        is_complete: False if the search was interrupted.
        fidelity: How far rungs and pruning can be trusted; None if unknown.
    """

    objectives: tuple[Objective, ...]
    front: tuple[Entry, ...]
    best: str | None
    baseline: Entry | None
    reference: Entry | None
    verdict: Verdict
    budget: BudgetReport
    trials: Mapping[str, int]
    dominated_finalists: tuple[Entry, ...] = ()
    unconfirmed: tuple[Entry, ...] = ()
    data: DataSummary = field(default_factory=DataSummary)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    n_layers: int = 0
    started: str = ""
    ended: str = ""
    is_confirmed: bool = True
    is_complete: bool = True
    fidelity: Fidelity | None = None

    @property
    def quality(self) -> Objective:
        """The quality objective."""
        return self.objectives[0]

    @property
    def costs(self) -> tuple[Objective, ...]:
        """The cost objectives."""
        return self.objectives[1:]

    @property
    def model(self) -> str:
        """Folder or hub id of the base model."""
        return str(self.settings.get("model", ""))

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.settings.get("task", ""))

    def entries(self) -> tuple[Entry, ...]:
        """Every entry shown anywhere, each digest once."""
        others = [entry for entry in (self.baseline, self.reference) if entry is not None]
        shown = [*self.front, *self.dominated_finalists, *self.unconfirmed, *others]
        return tuple({entry.digest: entry for entry in reversed(shown)}.values())[::-1]

    def find(self, digest: str) -> Entry | None:
        """The entry with that digest, or None."""
        return next((entry for entry in self.entries() if entry.digest == digest), None)


def first_cost(entry: Entry, objectives: Sequence[Objective]) -> float:
    """The value fronts are drawn over: the first cost objective, else the trainable parameters."""
    if len(objectives) > 1:
        return entry.objectives.get(objectives[1].name, math.nan)
    return float(entry.price.trainable_params)


def _adapter(record: RunRecord, digest: str) -> tuple[str | None, AdapterScore | None]:
    score = record.adapter_scores.get(digest)
    return (None if score is None else f"adapters/{digest}"), score


def _mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _confirmed(record: RunRecord, finalist: Finalist, trial: int | None) -> Entry:
    quality = record.quality
    values: dict[str, float] = {quality.name: finalist.mean(quality.name)}
    intervals: dict[str, Interval | None] = {quality.name: quality_interval(finalist, quality)}
    for cost in record.costs:
        if cost.is_known:
            value = getattr(finalist.costs, cost.name)
            values[cost.name], intervals[cost.name] = value, (value, value)
        else:
            measured = [seed.objectives[cost.name] for seed in finalist.seeds]
            values[cost.name] = sum(measured) / len(measured)
            intervals[cost.name] = cost_interval(measured)
    adapter, score = _adapter(record, finalist.candidate.digest)
    return Entry(
        candidate=finalist.candidate,
        price=finalist.costs,
        objectives=values,
        objectives_ci=intervals,
        validation=_mean_metrics([seed.validation for seed in finalist.seeds]),
        seeds=tuple(SeedLine(s.seed, dict(s.validation), dict(s.test)) for s in finalist.seeds),
        adapter=adapter,
        adapter_score=score,
        origin=finalist.origin,
        trial=trial,
        is_confirmed=True,
        compressed_from=finalist.compressed_from or None,
    )


def _unconfirmed(record: RunRecord, trial: Trial) -> Entry:
    known = {o.name for o in record.costs if o.is_known}
    values = {
        o.name: getattr(trial.costs, o.name)
        if o.name in known
        else trial.values.get(o.name, math.nan)
        for o in record.objectives
    }
    adapter, score = _adapter(record, trial.candidate.digest)
    return Entry(
        candidate=trial.candidate,
        price=trial.costs,
        objectives=values,
        objectives_ci={name: (v, v) if name in known else None for name, v in values.items()},
        validation={record.quality.name: values[record.quality.name]},
        adapter=adapter,
        adapter_score=score,
        origin=trial.origin,
        trial=trial.number,
    )


def _points(entries: Sequence[Entry], objectives: Sequence[Objective]) -> Array:
    """Oriented values, one row an entry. Shape (len(entries), len(objectives))."""
    rows = [[e.objectives[o.name] for o in objectives] for e in entries]
    return orient(rows, [o.direction for o in objectives])


def _judge(entries: Sequence[Entry], objectives: Sequence[Objective]) -> tuple[list[Entry], ...]:
    """The non-dominated entries, and the rest, each told a member of the front that beats it."""
    points = _points(entries, objectives)
    mask = non_dominated(points)
    front = [entry for entry, is_kept in zip(entries, mask, strict=True) if is_kept]
    rest = []
    for entry, point in zip(entries, points, strict=True):
        if entry in front:
            continue
        beats = (points[mask] >= point).all(axis=1)  # never true of a NaN: it is beaten by none
        winner = front[int(beats.argmax())].digest if beats.any() else None
        rest.append(replace(entry, dominated_by=winner))
    return front, rest


def _undecided(record: RunRecord) -> Verdict:
    why = "no finalist was confirmed" if record.is_complete else "the search was interrupted"
    return Verdict(False, f"Not decided: {why}, so nothing was scored on the test split.")


def view(record: RunRecord) -> FrontView:
    """What a reader is shown of a record.

    Finalists compete on the numbers reported for them; where there are none (an interrupted run)
    the search's own front is shown with validation numbers and `is_confirmed` is False.
    """
    objectives = record.objectives
    trials = {trial.candidate.digest: trial.number for trial in record.trials}
    finalists = [
        _confirmed(record, f, trials.get(f.candidate.digest)) for f in record.finalists if f.seeds
    ]
    confirmed = {entry.digest for entry in finalists}
    search_only = {
        trial.candidate.digest: _unconfirmed(record, trial)
        for trial in record.trials
        if trial.state == "complete" and trial.candidate.digest not in confirmed
    }
    unconfirmed = [search_only[digest] for digest in record.front if digest in search_only]

    def by_cost(entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return tuple(sorted(entries, key=lambda e: (first_cost(e, objectives), e.digest)))

    # The empty plan is no adapter: it is shown beside the front and competes with no member.
    adapters = [e for e in finalists or unconfirmed if e.candidate.plan.specs]
    front, dominated = _judge(by_cost(adapters), objectives)
    known = search_only | {entry.digest: entry for entry in (*finalists, *front, *dominated)}
    warnings = list(record.warnings)
    best = known.get(record.best) if record.best else None
    if best is not None and best.dominated_by is not None:
        warnings.append(
            f"best ({best.digest}) was picked on validation and is dominated on the test split "
            f"by {best.dominated_by}"
        )
    return FrontView(
        objectives=objectives,
        front=tuple(front),
        best=record.best,
        baseline=known.get(record.baseline) if record.baseline else None,
        reference=known.get(record.reference) if record.reference else None,
        verdict=record.verdict or _undecided(record),
        budget=record.budget,
        trials=record.trial_counts(),
        dominated_finalists=tuple(dominated),
        unconfirmed=by_cost(
            [e for e in unconfirmed if e.candidate.plan.specs] if finalists else []
        ),
        data=record.data,
        versions=dict(record.versions),
        warnings=tuple(warnings),
        settings=finite(record.settings),
        n_layers=1
        + max((s.layer for o in record.trials for s in o.candidate.plan.specs), default=-1),
        started=record.started,
        ended=record.ended,
        is_confirmed=bool(finalists),
        is_complete=record.is_complete,
        fidelity=fidelity(record.trials, objectives),
    )
