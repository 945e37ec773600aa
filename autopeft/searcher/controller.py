"""The documented core: ask for a candidate, report its rungs, tell its trial. A for-loop will do.

```python
controller = SearchController(space, ["accuracy", "trainable_params"], seed=0)
for _ in range(50):
    trial = controller.ask()
    controller.tell(trial, score=evaluate(trial.candidate))
print(controller.front())
```
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.costs import Price, PriceTable
from autopeft.costs.constraints import Constraint, limited_costs, parse_constraints
from autopeft.costs.objectives import Objective, Pricer, check_leading, objective, with_costs
from autopeft.errors import SettingsError
from autopeft.plan import Candidate
from autopeft.searcher.arguments import (
    check_numbers,
    check_parts,
    checked_candidate,
    checked_count,
    checked_files,
    checked_items,
    checked_key,
    checked_measured,
    checked_memory,
    checked_number,
    checked_step,
)
from autopeft.searcher.latest_trials import LatestTrials
from autopeft.searcher.losses import MAX_RETRIES, Losses, died, trial_key
from autopeft.searcher.owner import StudyOwner
from autopeft.searcher.pruners.registry import Rungs, make_pruner
from autopeft.searcher.samplers.optuna_adapters import OptunaAdapter, make_sampler
from autopeft.searcher.samplers.prior import PriorRow, checked_rows, read_prior
from autopeft.searcher.samplers.registry import Problem
from autopeft.searcher.samplers.warm_start import WarmStart, WarmStartTrial
from autopeft.searcher.space import initial_design
from autopeft.searcher.space.encoding import Point, snap
from autopeft.searcher.space.readable import ReadableParams
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import StudyStore, TrialEnded, distribution
from autopeft.trial import INTERRUPTED, Decision, Trial, front_of
from autopeft.utils.formatting import counted
from autopeft.utils.registry import describe

__all__ = ["INTERRUPTED", "Decision", "SearchController", "Trial"]

_ONE_LORA_IN = 5
"""Proposals of the sampler between two LoRA baselines, once the first ones are through."""

_STARTS, _RATE_STEP = ("baseline", "portfolio"), 0.2
"""A start that fails is tried again at a position lower by this, as long as that is positive."""

_N_TRIES = 5
"""Proposals that may be duplicates or break a constraint before other ways are tried."""


class SearchController:
    """Proposes candidates and keeps the study. Calls from several threads wait for each other.

    Args:
        space: What may be proposed.
        objectives: Names or `Objective`s, quality first, then the costs to trade against it.
        sampler: "autopeft", "tpe", "nsga2", "gp", "random", a sampler of Optuna, or one of your own
            (see `register_sampler`).
        pruner: "gap", "none", "median", "asha", ..., a pruner of Optuna, or one of your own (see
            `register_pruner`).
        seed: Random seed.
        storage: None (memory), an SQLAlchemy URL, grpc://host:port, or a path ending in .db or
            .log.
        prices: Prices candidates; None for prices computed from the space's topology.
        constraints: Limits such as "trainable_params<=200k"; `ask` returns no candidate over one.
            One on what is only measured, such as "serving_latency_ms<=50", "forgetting<=0.05" or
            "squad.f1>=0.6", keeps complete trials off the front; `tell` needs the value.
        study_name: Name of the study in the storage; None for a generated one.
        n_baselines: Number of LoRA trials at the start, from `space.baselines`; later, one in
            six trials is another one. None for a number that suits most budgets; 0 for none.
        n_portfolio: Number of known recipes of other methods after them; None for a few.
        resume: True to continue the study of that name.
        owner: Claims the study before its running trials are taken for those of a killed search;
            None where no other search can have it.
        eta: Ratio between rungs, for the pruner.
        warm_start: Trials of an earlier search on other data. Its front is tried first, its
            qualities guide the proposals as far as they agree with this search.
        prior: Rows of trainings on other models and data, or a JSON file of them; see
            `autopeft.searcher.samplers.prior`. They guide the proposals likewise.
        audit_share: Share of the pruned trials that are trained to the end anyway, to estimate
            what pruning costs (see `autopeft.confirm.pruning_audit`).

    Raises:
        UserError: if objectives, sampler, pruner, constraints or storage are not usable.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> controller = autopeft.SearchController(space, ["accuracy", "trainable_params"])
        >>> trial = controller.ask()
        >>> controller.report(trial, step=10, score=0.6)
        <Decision.CONTINUE: 'continue'>
        >>> controller.tell(trial, score=0.8)
        >>> [member.number for member in controller.front()]
        [0]
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective | str],
        sampler: Any = "autopeft",
        pruner: Any = "gap",
        seed: int = 0,
        storage: str | Path | Any | None = None,
        *,
        prices: Pricer | None = None,
        constraints: Iterable[str | Constraint] = (),
        study_name: str | None = None,
        n_baselines: int | None = None,
        n_portfolio: int | None = None,
        resume: bool = False,
        owner: StudyOwner | None = None,
        eta: float = 3.0,
        audit_share: float = 0.0,
        warm_start: Sequence[WarmStartTrial] = (),
        prior: str | Path | Sequence[PriorRow] = (),
    ) -> None:
        if not isinstance(space, SearchSpace):
            remedy = "use SearchSpace.from_source"
            raise SettingsError("space", space, "must be a SearchSpace", remedy)
        eta, audit_share = check_numbers(
            seed, eta, audit_share, n_baselines=n_baselines, n_portfolio=n_portfolio
        )
        check_parts(prices, owner, resume)
        constraints = checked_items(
            "constraints", constraints, (str, Constraint), "use e.g. ['trainable_params<=200k']"
        )
        warm_start = checked_items(
            "warm_start", warm_start, (WarmStartTrial,), "use `warm_start_trials`, or leave it out"
        )
        rows: tuple[PriorRow, ...] = (
            read_prior(prior)
            if isinstance(prior, str | Path)
            else checked_rows(
                checked_items("prior", prior, (PriorRow,), "give a file or rows, or leave it out")
            )
        )
        self.space = space
        self.objectives = _objectives(objectives)
        table: Pricer = prices or PriceTable.from_topology(
            space.topology, batch_size=space.base.batch_size, prompt_sizes=space.prompt_sizes
        )
        self.constraints = parse_constraints(
            constraints, base_params=getattr(table, "base_params", None)
        )
        self._further = tuple(o.name for o in self.objectives[1:] if not o.is_cost)
        self._limits = tuple(limit for limit in self.constraints if limit.is_measured)
        qualities = [limit for limit in self._limits if limit.is_of_quality]
        directions = {limit.name: limit.quality for limit in reversed(qualities)}
        directions |= {o.name: o for o in self.objectives if o.name in directions}
        for limit in qualities:
            limit.check_direction(directions[limit.name])
        names = [cost.name for cost in self.objectives[1:]]
        names += [limit.name for limit in self.constraints]
        self.prices = with_costs(table, names)
        self._rng = np.random.default_rng(seed)
        self._readable = ReadableParams(space)
        self._distributions = {n: distribution(r) for n, r in self._readable.parameters.items()}
        self._check_constraints()
        known = WarmStart.of(warm_start, space, rows)
        if rows and not known.n_rows:
            raise SettingsError(
                "prior",
                f"{len(rows)} rows",
                "none of them is in this space",
                "give rows of the space's methods, roles and learning rates, or leave it out",
            )
        if warm_start and len(known) == known.n_rows:
            raise SettingsError(
                "warm_start",
                f"{len(warm_start)} trials",
                "none of the earlier search's trials is in this space",
                "warm-start from a search of the same model and space, or leave it out",
            )
        self._earlier_front = known.front
        steps = space.base.steps
        self._sampler = make_sampler(
            sampler, Problem(space, self.objectives, self.prices, self.constraints, seed, known)
        )
        self._search = owner.search if owner is not None and owner.is_shared else ""
        self._store = StudyStore(
            storage,
            study_name,
            self.objectives,
            OptunaAdapter(space, self.objectives, self.prices, self._sampler),
            make_pruner(
                pruner,
                Rungs(
                    max(1, round(steps / eta**2)),
                    steps,
                    eta,
                    self._further,
                    self._compared_costs(),
                    # Trials are compared by the other limited values.
                    tuple(q.text for q in qualities if q.name not in self._further),
                ),
            ),
            resume=resume,
        )
        self._owner = owner
        if owner is not None:
            owner.claim(self._store.study)
        self.losses = Losses(self.study, self._search)
        self._lock = threading.RLock()
        self._proposed: tuple[Candidate, str, Price] | None = None  # not written yet
        self._unsure: set[int] = set()  # trials whose last write failed
        self._n_ended_elsewhere = 0
        self._others: set[int] = set()  # trials of the other searches that share the study
        self._undecided: dict[int, int] = {}  # the step at which they were to be pruned or not
        self._trials = LatestTrials()
        self._front: tuple[Trial, ...] = ()
        self.last_ended: Trial | None = None  # in this run
        self._counts: Counter[str] = Counter()  # trials by state and by origin
        self._digests: set[str] = set()
        self._queue: deque[tuple[Candidate, str]] = deque()
        self._loras: Sequence[Point] = initial_design.lora_choices(space.encoder)
        self._audit_share = audit_share
        # Not the same stop in every search: the first ones are of a kind, the baselines.
        self._audit_offset = float(np.random.default_rng([seed, 1]).uniform())
        self._n_baselines = initial_design.N_BASELINES if n_baselines is None else n_baselines
        self._load()
        self.last_ended = None
        self._enqueue_start(initial_design.N_PORTFOLIO if n_portfolio is None else n_portfolio)

    def _compared_costs(self) -> tuple[str, ...] | None:
        """Return the costs that the pruner compares, None where they are the objectives.

        A trial may be the only one that keeps a limit: others stop it only if they cost no more in
        what is limited, as far as known costs tell.
        """
        limited = limited_costs(self._limits, [o.name for o in self.objectives])
        if not limited:
            return None
        return (*(o.name for o in self.objectives[1:] if o.is_cost), *limited)

    # --- asking ----------------------------------------------------------------------------------

    def ask(self) -> Trial | None:
        """The next candidate to train; None if the space is exhausted.

        No candidate is handed out twice, none that breaks a constraint at all.
        """
        with self._lock:
            while True:
                self.follow()
                # Kept until it is written: after an error, the next call hands it out.
                if self._proposed is None:
                    self._proposed = self._next()
                if self._proposed is None:
                    return None
                trial = self._start(*self._proposed)
                self._proposed = None
                if trial is not None:
                    return trial

    def _next(self) -> tuple[Candidate, str, Price] | None:
        """Return what is handed out next, with its origin and price."""
        while self._queue and not self._can_skip_starts():
            candidate, origin = self._safer(*self._queue[0])
            price = self.prices.price(candidate)
            self._queue.popleft()
            if candidate.digest not in self._digests:
                return candidate, origin, price
        if (baseline := self._baseline_due()) is not None:
            return baseline, "baseline", self.prices.price(baseline)
        for point, origin in self._points():
            candidate = self.space.encoder.to_candidate(point)
            price_or_none = self._acceptable(candidate)
            if price_or_none is not None:
                return candidate, origin, price_or_none
        return None

    def _can_skip_starts(self) -> bool:
        """Return whether earlier searches, proven here, tell more than the recipes left."""
        is_recipe = self._queue[0][1] == "portfolio"
        return is_recipe and self._sampler.is_guided(self._trials)

    def _safer(self, candidate: Candidate, origin: str) -> tuple[Candidate, str]:
        """Lower the rate of a start where trials of as high a rate have only failed."""
        while origin in _STARTS and self._is_too_high(candidate):
            lower = self._lower(candidate)
            if lower is None:
                break
            candidate = lower
        return candidate, origin

    def _is_too_high(self, candidate: Candidate) -> bool:
        """Return whether two trials or more of as high a rate failed, and none did not."""
        point_of = self.space.encoder.point_of
        point = point_of(candidate)
        as_high = [
            trial.state == "failed"
            for trial in self._trials
            if trial.state != "running" and trial.reason != INTERRUPTED and trial.plan.specs
            if point and (other := point_of(trial.candidate)) and other.position >= point.position
        ]
        return len(as_high) > 1 and all(as_high)

    def _lower(self, candidate: Candidate) -> Candidate | None:
        """Return the candidate at the next lower rate; None if there is none."""
        point = self.space.encoder.point_of(candidate)
        if point is None or point.position < _RATE_STEP:
            return None
        lower = replace(point, position=snap(point.position - _RATE_STEP))
        return self.space.encoder.to_candidate(lower)

    def _baseline_due(self) -> Candidate | None:
        """Now and then another LoRA, so that LoRA is tuned as hard as everything else."""
        if not self._n_baselines or not self._loras:
            return None
        # A failed one tells half as much.
        failed = [trial.state == "failed" for trial in self._trials.baselines()]
        n_baselines = len(failed) - sum(failed) / 2
        n_searched = self._counts["search"] + self._counts["design"]
        if n_baselines > self._n_baselines + n_searched / _ONE_LORA_IN:
            return None
        while self._loras:
            point = self._sampler.propose_baseline(self._trials, self._loras)
            candidate = self.space.encoder.to_candidate(point)
            is_acceptable = self._acceptable(candidate) is not None
            self._loras = [other for other in self._loras if other is not point]
            if is_acceptable:
                return candidate
        return None

    def enqueue(self, candidate: Candidate, origin: str = "user") -> None:
        """Hand this candidate out before anything else is proposed.

        It may lie outside the space; the sampler then learns from its place on the front alone. One
        that was handed out already is passed over.

        Raises:
            ValueError: if it is no candidate, or cannot be priced: its plan is of another model.
        """
        with self._lock:
            self._queue.append((checked_candidate(candidate, self._price), str(origin)))

    def _price(self, candidate: Candidate) -> None:
        self.prices.price(candidate)
        self._readable.of(candidate)

    def limit_portfolio(self, n_portfolio: int) -> None:
        """Hand out at most so many known recipes of other methods, those handed out included.

        Raises:
            ValueError: if it is no integer.
        """
        n_portfolio = checked_count("n_portfolio", n_portfolio)
        with self._lock:
            left = n_portfolio - self._counts["portfolio"]
            kept = []
            for candidate, origin in self._queue:
                left -= origin == "portfolio"
                if origin != "portfolio" or left >= 0:
                    kept.append((candidate, origin))
            self._queue = deque(kept)

    def _acceptable(self, candidate: Candidate) -> Price | None:
        """Its price, or None if it was handed out before or breaks a constraint."""
        if candidate.digest in self._digests:
            return None
        price = self.prices.price(candidate)
        return price if all(limit.allows(price) for limit in self.constraints) else None

    def _points(self) -> Iterator[tuple[Point, str]]:
        """Yield proposals with their origin, then random points, then all of a small space."""
        for _ in range(_N_TRIES):
            point = self._sampler.propose(self._trials)
            yield point, self._sampler.origin
        sampler = self.space.point_sampler
        for attempt in range(300):
            draw = sampler.stratified if attempt % 2 else sampler.uniform
            yield draw(self._rng), "search"
        for point in self.space.enumerate(limit=20_000):
            yield point, "search"

    def _start(self, candidate: Candidate, origin: str, price: Price) -> Trial | None:
        """Create the trial; None if another search that shares the study did so before."""
        params = self._readable.of(candidate)
        trial = self._store.start(
            candidate, price, origin, params, self._distributions, search=self._search
        )
        self._digests.add(candidate.digest)
        if trial is not None:
            self._add(trial)
        return trial

    # --- the other searches that share the study --------------------------------------------------

    def follow(self) -> None:
        """Take over what the other searches that share the study have begun and ended."""
        if not self._search:
            return
        with self._lock:
            ended = {trial.number for trial in self._trials if trial.state != "running"}
            for trial in self._store.of_others(self._search, ended):
                is_known = self._trials.of(trial.number) is not None
                if not is_known and trial.state == "running" and trial.digest in self._digests:
                    continue  # Its search is about to drop it.
                self._others.add(trial.number)
                self._trials.put(trial)
                self._counts[trial.origin] += not is_known
                if trial.state != "running":
                    self._count_end(trial)
                self._digests.add(trial.digest)
                if trial.reason == INTERRUPTED and all(
                    other.reason == INTERRUPTED
                    for other in self._trials
                    if other.digest == trial.digest
                ):
                    self._digests.remove(trial.digest)

    def confirmed_by(self) -> str:
        """Return who confirms the front of a study that is shared; "": this search.

        To be called once this search has ended its trials; it may wait for the others to decide.
        """
        if self._owner is None or not self._search:
            return ""
        who = self._owner.confirmed_by()
        self.follow()
        return who

    @property
    def is_shared(self) -> bool:
        """Whether other searches may share the study."""
        return bool(self._search)

    @property
    def n_spent(self) -> int:
        """Number of this search's own trials that have ended and are not run again."""
        return sum(
            trial.number not in self._others and trial.reason != INTERRUPTED
            for trial in self.trials()
        )

    # --- reporting and telling -------------------------------------------------------------------

    def report(
        self, trial: Trial, step: int, score: float, *, further: Mapping[str, float] | None = None
    ) -> Decision:
        """A rung's score, in the direction of the quality objective.

        A second report of the same step changes nothing. After a storage error it may be repeated.

        Args:
            trial: As `ask` gave it.
            step: Optimizer steps done. The last rung never stops a trial.
            score: The quality, or what replaces it at rungs (such as minus the loss). NaN or
                infinite counts as failed.
            further: The objectives at this rung that are qualities beside the first, by name. A
                trial that lacks one is not compared by the gap pruner.

        Returns:
            STOP if the trial should end now; it is then already marked pruned, or failed.

        Raises:
            ValueError: if the trial is not of this controller, the step no integer from 1, or the
                score no number.
            StorageFailure: if the storage fails.
        """
        with self._lock:
            trial = self._latest(trial)
            step, score = checked_step(step), checked_number("score", score)
            told = checked_measured(further or {})
            told = {name: told[name] for name in self._further if name in told}
            if trial.state != "running":
                return Decision.STOP
            is_stored = step in dict(trial.rungs)
            if is_stored and self._undecided.get(trial.number) != step:
                return Decision.CONTINUE
            if not math.isfinite(score):
                self._fail(trial, f"score at step {step} is {score}")
                return Decision.STOP
            with self._changing(trial):
                self._undecided[trial.number] = step
                if not is_stored:
                    self._store.report(trial.number, step, score, told)
                    trial = self._put(trial, rungs=tuple(sorted((*trial.rungs, (step, score)))))
                decision = self._decide(trial, step)
                self._undecided.pop(trial.number, None)
                return decision
            return Decision.STOP  # It has ended in the study.

    def _decide(self, trial: Trial, step: int) -> Decision:
        """Prune a trial, or let it continue."""
        if step >= trial.train.steps or trial.audited_at or self._is_kept(trial):
            return Decision.CONTINUE
        gap = self._store.prune_gap(trial.number)
        if not gap > 0:
            return Decision.CONTINUE
        if self._is_audit_due():
            self._store.note_audit(trial.number, step)
            self._put(trial, audited_at=step)
            return Decision.CONTINUE
        self._prune(trial, f"pruned at step {step}{self._why(gap)}", gap)
        return Decision.STOP

    def _is_kept(self, trial: Trial) -> bool:
        """Return whether it is one of the first baselines, which are trained to the end."""
        if trial.origin != "baseline":
            return False
        return sum(t.state == "complete" for t in self._trials.baselines()) < self._n_baselines

    def _why(self, gap: float) -> str:
        """Return what the pruner's gap means; a score that is no number has none worth naming."""
        is_number = self._store.has_gaps and gap < 1e100
        return f", {gap:.3g} behind a trial that costs no more" if is_number else ""

    def _is_audit_due(self) -> bool:
        """Return whether the stop just decided is one that is not carried out."""
        n_audited = self._trials.n_audited
        n_stops = 1 + n_audited + self._counts["pruned"]
        return math.floor(n_stops * self._audit_share + self._audit_offset) > n_audited

    def tell(
        self,
        trial: Trial,
        score: float | None = None,
        *,
        measured: Mapping[str, float] | None = None,
        failed: str | None = None,
        stopped: str | None = None,
    ) -> None:
        """How the trial ended: exactly one of score, failed, stopped.

        Telling a trial again changes nothing: a pruned trial stays pruned. After a storage error it
        may be told again: it is written before anything else changes.

        Args:
            trial: As `ask` gave it.
            score: The quality objective's final value. NaN or infinite counts as failed.
            measured: Measured values; must include the costs that are not known before training.
            failed: Why it could not be trained.
            stopped: Why it was stopped from outside at a rung; it counts as pruned.

        Raises:
            ValueError: if the trial is not of this controller, none or several of score, failed,
                stopped are given, one is of the wrong kind, or a cost that is not known before
                training is missing.
            StorageFailure: if the storage fails.
        """
        with self._lock:
            trial = self._latest(trial)
            if sum(given is not None for given in (score, failed, stopped)) != 1:
                raise ValueError("tell exactly one of score, failed, stopped")
            values = checked_measured(measured or {})
            if score is not None:
                score = checked_number("score", score)
            if trial.state != "running":
                return
            if score is not None:
                self._complete(trial, score, values)
            elif failed is not None:
                self._fail(trial, str(failed))
            else:
                self._prune(trial, str(stopped))
            self._store.post(self.trials)

    def _complete(self, trial: Trial, score: float, measured: dict[str, float]) -> None:
        name = self.objectives[0].name
        if name in trial.costs.others:
            raise ValueError(f"score would overwrite the cost {name!r}; give the quality its own")
        values = {name: score}
        for cost in self.objectives[1:]:
            if cost.is_known:
                values[cost.name] = trial.costs.value(cost.name)
            elif cost.name in measured:
                values[cost.name] = measured[cost.name]
            else:
                raise ValueError(f"measured must hold {cost.name!r}, but got {sorted(measured)}")
        lacking = [limit.name for limit in self._limits if limit.name not in measured]
        if lacking:
            raise ValueError(f"measured must hold {lacking[0]!r}, but got {sorted(measured)}")
        checked = {**values, **{limit.name: measured[limit.name] for limit in self._limits}}
        bad = [name for name, value in checked.items() if not math.isfinite(value)]
        if bad:
            self._fail(trial, f"{bad[0]} is {checked[bad[0]]}")
            return
        excess = {limit.text: limit.excess(measured) for limit in self._limits}
        broken = tuple(sorted(text for text, much in excess.items() if not much <= 0))
        ended = {"values": values, "measured": measured, "broken": broken}
        with self._ending(trial, state="complete", **ended):
            self._store.complete(trial.number, list(values.values()), measured, excess=excess)

    def _prune(self, trial: Trial, reason: str, gap: float = 1.0) -> None:
        with self._ending(trial, state="pruned", reason=reason):
            self._store.prune(trial.number, reason, gap)

    def _fail(self, trial: Trial, reason: str) -> None:
        with self._ending(trial, state="failed", reason=reason):
            self._store.fail(trial.number, reason)

    @contextmanager
    def _ending(self, trial: Trial, **changes: Any) -> Iterator[None]:
        """Change the trial as soon as the block has written how it ended."""
        ended = replace(trial, **changes)
        with self._changing(trial):
            self._store.write_note(ended)
            yield
            self._trials.put(ended)
            self._note_end(ended)

    # --- writing comes first: what a failed write left is read before the next change -------------

    @contextmanager
    def _changing(self, trial: Trial) -> Iterator[None]:
        """Read the trial again before its next change, if the block fails.

        A trial that has ended in the study meanwhile, by the hand of another process, has ended.
        """
        self._unsure.add(trial.number)
        try:
            yield
        except TrialEnded:
            self._read_again(trial.number)
            self._n_ended_elsewhere += 1
        else:
            self._unsure.discard(trial.number)

    def _read_again(self, number: int) -> None:
        """Take over what the study holds of a trial."""
        stored = self._store.read(self._known(number))
        self._unsure.discard(number)
        self._trials.put(stored)
        if stored.state != "running":
            self._note_end(stored)

    def _settle(self) -> None:
        """Take over what failed writes left, as far as the storage answers."""
        for number in tuple(self._unsure):
            try:
                self._read_again(number)
            except Exception:  # It is tried again, and raises, before the trial's next change.
                return

    # --- the trials so far: a change replaces one value, nothing is rebuilt -----------------------

    def _latest(self, trial: Trial) -> Trial:
        """Return the latest value of a trial that was handed out."""
        if not isinstance(trial, Trial):
            raise ValueError(f"needs a Trial as `ask` returned it, but got {describe(trial)}")
        if type(trial.number) is not int:
            raise ValueError(f"a trial's number must be int, but got {describe(trial.number)}")
        latest = self._trials.of(trial.number)
        if latest is None or latest.candidate != trial.candidate:
            raise ValueError(f"trial {trial.number} was not handed out by this controller")
        if trial.number in self._unsure:
            self._read_again(trial.number)
        return self._known(trial.number)

    def _known(self, number: int) -> Trial:
        trial = self._trials.of(number)
        assert trial is not None, number
        return trial

    def _add(self, trial: Trial) -> None:
        self._trials.put(trial)
        self._counts[trial.origin] += 1
        if trial.state != "running":
            self._note_end(trial)

    def _put(self, trial: Trial, **changes: Any) -> Trial:
        changed = replace(trial, **changes)
        self._trials.put(changed)
        return changed

    def _note_end(self, trial: Trial) -> None:
        self._count_end(trial)
        if trial.reason == INTERRUPTED:
            return
        self.last_ended = trial
        if trial.origin in _STARTS and trial.state == "failed" and trial.reason != INTERRUPTED:
            self._try_lower(trial, self._queue.appendleft)
        elif trial.origin == "portfolio" and self._learned_nothing(trial):
            self._try_lower(trial, self._queue.append)  # The other recipes come first.

    def _count_end(self, trial: Trial) -> None:
        if trial.reason == INTERRUPTED:
            self._counts[trial.origin] -= 1  # Its candidate is trained again.
            return
        self._counts[trial.state] += 1
        if trial.state == "complete":
            members = sorted((*self._front, trial), key=lambda member: member.number)
            self._front = front_of(members, self.objectives)

    def _try_lower(self, trial: Trial, put: Callable[[tuple[Candidate, str]], None]) -> None:
        """Put a trial's candidate at the next lower rate, if there is one, into the queue."""
        lower = self._lower(trial.candidate)
        if lower is not None:
            put((lower, trial.origin))

    def _learned_nothing(self, trial: Trial) -> bool:
        """Return whether it ended no better than the bare model; too high a rate does that, too.

        Only for the first trial of a plan: where nothing can be learned, no rate helps.
        """
        bare = next((t for t in self._trials if t.origin == "reference"), None)
        if trial.state != "complete" or bare is None or bare.state != "complete":
            return False
        quality = self.objectives[0]
        gain = quality.sign() * (trial.values[quality.name] - bare.values[quality.name])
        others = (t for t in self._trials if t.number != trial.number)
        return gain <= 0.0 and all(t.plan != trial.plan for t in others)

    # --- reading ---------------------------------------------------------------------------------

    def trials(self) -> tuple[Trial, ...]:
        """Return every trial that has ended, by number."""
        with self._lock:
            self._settle()
            return tuple(t for t in self._trials.by_number() if t.state != "running")

    def latest(self, trial: Trial) -> Trial:
        """Return what has become of a trial that `ask` returned."""
        with self._lock:
            return self._latest(trial)

    def running(self) -> tuple[Trial, ...]:
        """Return every trial that has not ended."""
        with self._lock:
            self._settle()
            return tuple(t for t in self._trials if t.state == "running")

    def counts(self) -> dict[str, int]:
        """Return the number of ended trials by state: complete, pruned, failed.

        A trial that was interrupted is none of them: its candidate is trained again.
        """
        with self._lock:
            self._settle()
            return {state: self._counts[state] for state in ("complete", "pruned", "failed")}

    def front(self) -> tuple[Trial, ...]:
        """Return the non-dominated complete trials, cheapest first."""
        with self._lock:
            self._settle()
            return self._front

    def post(self) -> None:
        """Write note and graphs for optuna-dashboard now; `tell` does it every 20 seconds."""
        with self._lock:
            self._store.post(self.trials, now=True)

    def conclude(self, text: str) -> None:
        """Write the last note for optuna-dashboard, in Markdown: what the confirmation found."""
        with self._lock:
            self._store.post(self.trials, now=True)
            self._store.conclude(text)

    def attach(
        self, folder: Path, files: Sequence[Path], adapters: Mapping[str, Path]
    ) -> tuple[str, ...]:
        """Attach files to the study for optuna-dashboard; see `searcher.artifacts`.

        Raises:
            ValueError: if one is no path, or an adapter's name is none of a file.
        """
        from autopeft.searcher.artifacts import save_artifacts

        folder, files, adapters = checked_files(folder, files, adapters)
        with self._lock:
            return save_artifacts(self.study, folder, files, adapters)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What users should know of the sampler and the study, one line each."""
        lines = [getattr(self._sampler, "warning", "")]
        if self._n_ended_elsewhere:
            trials = counted(self._n_ended_elsewhere, "trial")
            lines.append(f"{trials} had been ended in the study by another process; that counts")
        return tuple(filter(None, lines))

    @property
    def study(self) -> Any:
        """The Optuna study."""
        return self._store.study

    def remember(self, key: str, value: Any) -> None:
        """Keep plain data with the study.

        Raises:
            ValueError: if the key is no text, or the value nothing that JSON can hold.
        """
        with self._lock:
            self.study.set_user_attr(*checked_memory(key, value))

    def recall(self, key: str, default: Any = None) -> Any:
        """What `remember` kept.

        Raises:
            ValueError: if the key is no text.
        """
        with self._lock:
            return self.study.user_attrs.get(checked_key(key), default)

    # --- starting --------------------------------------------------------------------------------

    def _load(self) -> None:
        """Take over a study's trials; those left running failed when their search was killed."""
        interrupted: list[tuple[Candidate, str]] = []
        suspects: list[tuple[Candidate, str]] = []
        stored, owners = self._store.trials(), self._store.owners()
        running = {owners.get(t.number, "") for t in stored if t.state == "running"}
        living = self._owner.living(running) if self._owner is not None and self._search else ()
        for trial in stored:
            search = owners.get(trial.number, "")
            if search != self._search:
                self._others.add(trial.number)
            self._add(trial)
            n_deaths = self.losses.of(trial_key(trial.digest))
            if trial.state == "running" and search not in living:
                self._fail(trial, INTERRUPTED if n_deaths <= MAX_RETRIES else died(n_deaths))
                trial = self._known(trial.number)
            if trial.state == "failed" and trial.reason == INTERRUPTED:
                again = interrupted if n_deaths < MAX_RETRIES else suspects
                again.append((trial.candidate, trial.origin))
            else:
                self._digests.add(trial.digest)
        self._queue.extendleft(reversed(interrupted))  # Before a second try of others.
        self._suspects = suspects

    def _enqueue_start(self, n_portfolio: int) -> None:
        """The tuned-LoRA grid, the reference and the portfolio, as far as constraints allow.

        What trains in about half the time of any baseline or less comes before them: so a front
        stands early.
        """
        start = [(c, "baseline") for c in self.space.baselines(self._n_baselines)]
        start.append((self.space.reference(), "reference"))
        start += [(candidate, "portfolio") for candidate in _thinned(self._earlier_front)]
        start += [(candidate, "portfolio") for candidate in self.space.portfolio(n_portfolio)]
        priced = [(c, origin, p) for c, origin in start if (p := self._acceptable(c)) is not None]
        flops = [p.train_flops for _, origin, p in priced if origin == "baseline"]
        least = min(flops or [p.train_flops for _, _, p in priced], default=0.0)
        # The baselines stay together: the largest rank is among the first four.
        priced.sort(
            key=lambda row: min(
                0, round(math.log2(max(row[2].train_flops / max(least, 1.0), 1e-6)))
            )
        )
        # A LoRA is among the first trials, whatever else is cheap: without one there is no verdict.
        loras = [row for row in priced if row[1] == "baseline"]
        if loras and loras[0] not in priced[:4]:
            priced.remove(loras[0])
            priced.insert(3, loras[0])
        self._queue.extend((candidate, origin) for candidate, origin, _ in priced)
        # What may end this process, too, comes when the others have been tried.
        self._queue.extend(self._suspects)

    def _check_constraints(self) -> None:
        """Some candidate must keep the constraints."""
        if not self.constraints:
            return
        draws = [self.space.sample_stratified(self._rng) for _ in range(100)]
        prices = [self.prices.price(candidate) for candidate in draws]
        for limit in self.constraints:
            if not any(limit.allows(price) for price in prices):
                least = min(price.value(limit.name) for price in prices)
                raise SettingsError(
                    "constraint",
                    limit.text,
                    f"nothing in the space keeps it: the least found is {least:.4g}",
                    "raise the limit or widen the space",
                )


def _thinned(candidates: Sequence[Candidate], n_most: int = 4) -> list[Candidate]:
    """A few of them, evenly from first to last."""
    if len(candidates) <= n_most:
        return list(candidates)
    return [candidates[round(i * (len(candidates) - 1) / (n_most - 1))] for i in range(n_most)]


def _objectives(given: Sequence[Objective | str]) -> tuple[Objective, ...]:
    items = checked_items("objectives", given, (str, Objective), "use e.g. ['accuracy']")
    found = tuple(objective(item) if isinstance(item, str) else item for item in items)
    if not found:
        raise SettingsError("objectives", [], "needs a quality objective", "use e.g. accuracy")
    check_leading("objectives", found[0])
    if len({o.name for o in found}) < len(found):
        raise SettingsError(
            "objectives", [o.name for o in found], "one is named twice", "name each once"
        )
    return found
