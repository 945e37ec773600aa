"""FrontView: what the report shows of a search, and what front.json holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopeft.confirm.finalists import Finalist
from autopeft.confirm.intervals import Interval, cost_interval, quality_interval
from autopeft.confirm.pick import pick_best
from autopeft.confirm.pruning_audit import Fidelity, fidelity
from autopeft.confirm.verdict import Verdict, undecided
from autopeft.costs import Price
from autopeft.costs.constraints import limited_costs
from autopeft.costs.objectives import Objective, reported_beside
from autopeft.plan import Candidate
from autopeft.plan_text import plan_summary
from autopeft.reporting.converted import Converted
from autopeft.reporting.record import AdapterScore, BudgetReport, SearchRecord
from autopeft.tasks.summary import DataSummary
from autopeft.trial import INTERRUPTED, Trial, oriented
from autopeft.utils.pareto import non_dominated
from autopeft.utils.serialize import finite

Number = int | float
"""Read from front.json as it was written: counts stay whole numbers."""


@dataclass(frozen=True)
class SeedLine:
    """The metrics of one retraining, without the score of each row."""

    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    further: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontEntry:
    """One candidate with its reported numbers.

    Attributes:
        candidate: Plan and train settings.
        price: Its costs as known before training.
        objectives: Value by objective name. Quality is the mean over the seeds on the test split if
            `is_confirmed`, else the validation value of its trial. Costs are known ones, or means
            of measured ones.
        objectives_ci: 95 % interval by objective name; None where it cannot be estimated.
        validation: Mean validation metrics over the seeds, or those of its trial.
        seeds: One line per retraining.
        adapter: Folder below the output folder; None if no adapter was saved.
        trial: Number of its trial; None if it was not a trial.
        is_confirmed: True if it was retrained and scored on the test split.
        compressed_from: Digest of the finalist whose trained LoRA was cut to these ranks.
        dominated_by: Digest of a member of the front that dominates it.
        further: Qualities of other rows than the task's, such as "forgetting" or "squad.f1", and
            costs of meters, such as "energy_joules": means over the seeds, or those of its trial.
        broken: Limits on these that it breaks, so that it is not on the front.
    """

    candidate: Candidate
    price: Price
    objectives: Mapping[str, Number]
    objectives_ci: Mapping[str, tuple[Number, Number] | None]
    validation: Mapping[str, float]
    seeds: tuple[SeedLine, ...] = ()
    adapter: str | None = None
    adapter_score: AdapterScore | None = None
    origin: str = "search"
    trial: int | None = None
    is_confirmed: bool = False
    compressed_from: str | None = None
    dominated_by: str | None = None
    further: Mapping[str, float] = field(default_factory=dict)
    broken: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The candidate's digest."""
        return self.candidate.digest

    @property
    def summary(self) -> str:
        """The plan in one line, and the finalist it was cut from, if any."""
        text = plan_summary(self.candidate.plan)
        return f"{text}, cut from {self.compressed_from[:8]}" if self.compressed_from else text


@dataclass(frozen=True)
class FrontView:
    """All that a report shows.

    Attributes:
        objectives: Quality first, then costs.
        front: Non-dominated entries, cheapest first; finalists if `is_confirmed`.
        best: Digest of the pick.
        baseline: The tuned LoRA.
        reference: The empty plan. It is shown beside the front and never competes with a member.
        trials: Number of trials by state, without those that were interrupted and run again.
        dominated_finalists: Finalists that others dominate on the reported numbers, or that break a
            limit.
        unconfirmed: Members of the search's front that were not retrained; validation numbers.
        unsearched: Path inside a block -> share of the blocks' parameters that have no role there;
            also roles of experts that are not in the space.
        versions: Version by package.
        settings: As resolved, JSON-like values.
        n_layers: Blocks of the model, up to the last one that a trial adapted.
        started: ISO 8601 time, as `ended`.
        is_confirmed: True if the front's numbers are from the test split.
        is_held_out: False if they are of rows that the search selected by, because a training
            function of the user's scores no others.
        is_complete: False if the search was interrupted, or every trial of an adapter failed.
        fidelity: How well the rungs predicted the end, and the cost of pruning; None if unknown.
        converted: Members in the form of an export, with their test quality in it.
        outdated: The same, scored with other weights than those that are saved now.
    """

    objectives: tuple[Objective, ...]
    front: tuple[FrontEntry, ...]
    best: str | None
    baseline: FrontEntry | None
    reference: FrontEntry | None
    verdict: Verdict
    budget: BudgetReport
    trials: Mapping[str, int]
    dominated_finalists: tuple[FrontEntry, ...] = ()
    unconfirmed: tuple[FrontEntry, ...] = ()
    data: DataSummary = field(default_factory=DataSummary)
    unsearched: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    n_layers: int = 0
    started: str = ""
    ended: str = ""
    is_confirmed: bool = True
    is_held_out: bool = True
    is_complete: bool = True
    fidelity: Fidelity | None = None
    converted: tuple[Converted, ...] = ()
    outdated: tuple[Converted, ...] = ()

    @property
    def has_failed(self) -> bool:
        """Whether there is no adapter because every trial of one failed."""
        has_adapters = self.front or self.unconfirmed or self.trials.get("pruned")
        return bool(self.trials.get("failed")) and not (self.is_complete or has_adapters)

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

    def entries(self) -> tuple[FrontEntry, ...]:
        """Return every entry of the view, each digest once."""
        others = [entry for entry in (self.baseline, self.reference) if entry is not None]
        shown = [*self.front, *self.dominated_finalists, *self.unconfirmed, *others]
        return tuple({entry.digest: entry for entry in reversed(shown)}.values())[::-1]

    def find(self, digest: str) -> FrontEntry | None:
        """Return the entry with that digest, or None."""
        return next((entry for entry in self.entries() if entry.digest == digest), None)


def view(record: SearchRecord) -> FrontView:
    """Build the view of a record.

    Finalists compete on their test numbers. An interrupted search without finalists shows its own
    front with validation numbers, and `is_confirmed` is False.
    """
    objectives = record.objectives
    trials = {trial.digest: trial.number for trial in record.trials}
    finalists = [_confirmed(record, f, trials.get(f.digest)) for f in record.finalists]
    confirmed = {entry.digest for entry in finalists}
    search_only = {
        trial.digest: _unconfirmed(record, trial)
        for trial in record.trials
        if trial.state == "complete" and trial.digest not in confirmed
    }
    unconfirmed = [search_only[digest] for digest in record.front if digest in search_only]
    # The empty plan is no adapter: it is shown beside the front and competes with no member.
    adapters = [e for e in finalists or unconfirmed if e.candidate.plan.specs]
    kept = [e for e in adapters if not e.broken]
    front, dominated = _split(_by_cost(kept, objectives), objectives)
    dominated += _by_cost([e for e in adapters if e.broken], objectives)
    known = search_only | {entry.digest: entry for entry in (*finalists, *front, *dominated)}
    # Test numbers decide which finalists are dominated; validation picks the best of the rest.
    members = {entry.digest for entry in front}
    rows = [finalist for finalist in record.finalists if finalist.digest in members]
    best, warnings = pick_best(rows, objectives, rule=record.pick), record.warnings
    if rows and best is None:
        text = f"no member of the front keeps pick={record.pick}, so none is the pick"
        warnings = (*warnings, text)
    unconfirmed = [e for e in unconfirmed if e.candidate.plan.specs] if finalists else []
    counts = Counter(trial.state for trial in record.trials if trial.reason != INTERRUPTED)
    layers = (spec.layer for trial in record.trials for spec in trial.plan.specs)
    return FrontView(
        objectives=objectives,
        front=tuple(front),
        best=best,
        baseline=known.get(record.baseline) if record.baseline else None,
        reference=known.get(record.reference) if record.reference else None,
        verdict=_undecided(record) if _failed(record) else record.verdict or _undecided(record),
        budget=record.budget,
        trials={state: counts[state] for state in ("complete", "pruned", "failed")},
        dominated_finalists=tuple(dominated),
        unconfirmed=tuple(_by_cost(unconfirmed, objectives)),
        data=record.data,
        unsearched=dict(record.unsearched),
        versions=dict(record.versions),
        warnings=warnings,
        settings=finite(record.settings),
        n_layers=1 + max(layers, default=-1),
        started=record.started,
        ended=record.ended,
        is_confirmed=bool(finalists),
        is_held_out=all(seed.is_held_out for f in record.finalists for seed in f.seeds),
        is_complete=record.is_complete and not _failed(record),
        fidelity=fidelity(record.trials, objectives),
    )


def _confirmed(record: SearchRecord, finalist: Finalist, trial: int | None) -> FrontEntry:
    """The entry of a finalist: means and intervals over its seeds on the test split."""
    quality, *costs = record.objectives
    values: dict[str, float] = {quality.name: finalist.mean(quality.name)}
    intervals: dict[str, Interval | None] = {quality.name: quality_interval(finalist, quality)}
    for cost in costs:
        if cost.is_known:
            value = finalist.costs.value(cost.name)
            values[cost.name], intervals[cost.name] = value, (value, value)
        else:
            measured = [seed.objectives[cost.name] for seed in finalist.seeds]
            values[cost.name] = sum(measured) / len(measured)
            intervals[cost.name] = cost_interval(measured)
    score = record.adapter_scores.get(finalist.digest)
    return FrontEntry(
        candidate=finalist.candidate,
        price=finalist.costs,
        objectives=values,
        objectives_ci=intervals,
        validation=_mean_metrics([seed.validation for seed in finalist.seeds]),
        seeds=tuple(
            SeedLine(s.seed, dict(s.validation), dict(s.test), dict(s.further))
            for s in finalist.seeds
        ),
        adapter=f"adapters/{finalist.digest}" if score else None,
        adapter_score=score,
        origin=finalist.origin,
        trial=trial,
        is_confirmed=True,
        compressed_from=finalist.compressed_from or None,
        further=finalist.further(),
        broken=finalist.broken(record.limits),
    )


def _unconfirmed(record: SearchRecord, trial: Trial) -> FrontEntry:
    """The entry of a trial that was not retrained: validation numbers of one seed."""
    quality, *costs = record.objectives
    known = {o.name for o in costs if o.is_known}
    values = {
        o.name: trial.costs.value(o.name) if o.name in known else trial.values.get(o.name, math.nan)
        for o in record.objectives
    }
    score = record.adapter_scores.get(trial.digest)
    return FrontEntry(
        candidate=trial.candidate,
        price=trial.costs,
        objectives=values,
        objectives_ci={name: (v, v) if name in known else None for name, v in values.items()},
        validation={quality.name: values[quality.name]},
        adapter=f"adapters/{trial.digest}" if score else None,
        adapter_score=score,
        origin=trial.origin,
        trial=trial.number,
        further=reported_beside(trial.measured, limited_costs(record.limits, values)),
        broken=trial.broken,
    )


def _mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _by_cost(entries: Iterable[FrontEntry], objectives: Sequence[Objective]) -> list[FrontEntry]:
    """Entries by their first cost, or by trainable parameters if there is no cost objective."""

    def key(entry: FrontEntry) -> tuple[float, str]:
        if len(objectives) > 1:
            return entry.objectives.get(objectives[1].name, math.nan), entry.digest
        return float(entry.price.trainable_params), entry.digest

    return sorted(entries, key=key)


def _split(
    entries: Sequence[FrontEntry], objectives: Sequence[Objective]
) -> tuple[list[FrontEntry], list[FrontEntry]]:
    """The non-dominated entries, and the rest, each with a member that dominates it."""
    points = oriented([entry.objectives for entry in entries], objectives)
    mask = non_dominated(points)
    front = [entry for entry, is_kept in zip(entries, mask, strict=True) if is_kept]
    rest = []
    for entry, point, is_kept in zip(entries, points, mask, strict=True):
        if not is_kept:
            beats = (points[mask] >= point).all(axis=1)  # False for NaN: nothing dominates it
            winner = front[int(beats.argmax())].digest if beats.any() else None
            rest.append(replace(entry, dominated_by=winner))
    return front, rest


def _failed(record: SearchRecord) -> tuple[Trial, ...]:
    """Return the trials of adapters if all of them failed; the bare model needs no training."""
    adapters = tuple(t for t in record.trials if t.plan.specs and t.reason != INTERRUPTED)
    return adapters if all(trial.state == "failed" for trial in adapters) else ()


def _undecided(record: SearchRecord) -> Verdict:
    why = "no finalist was confirmed" if record.is_complete else "the search was interrupted"
    if failed := _failed(record):
        has_others = any(trial.state != "failed" for trial in record.trials)
        n_failed = len(failed if has_others else record.trials)
        what = "trials of adapters" if has_others else "trials"
        return undecided(f"all {n_failed} {what} failed, the last with: {failed[-1].reason}")
    return undecided(f"{why}, so nothing was scored on the test split")
