"""Decides what each free worker does next: search, then confirm, within the budget. No ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from autopeft.confirm.finalists import (
    Nominee,
    choose_finalists,
    lower_ranks,
)
from autopeft.confirm.store import ConfirmationStore
from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.engine.budget import Budget, BudgetTracker
from autopeft.engine.messages import (
    Activity,
    ConfirmMessage,
    FailureMessage,
    Job,
    Message,
    RungMessage,
)
from autopeft.plan import Candidate
from autopeft.searcher.controller import SearchController
from autopeft.trial import Decision, Trial

Phase = Literal["search", "confirmation", "done"]

_COMPRESSION_MARGIN = 0.9
"""Share of the time left that confirmations and lower ranks together may be expected to take."""


@dataclass(frozen=True)
class Progress:
    """The state of a search after a change.

    Attributes:
        phase: What the workers do.
        objectives: Quality first.
        n_trials: Ended trials by state: complete, pruned, failed.
        ended: The trial that ended last in this run, if any.
        front: The front so far, cheapest first.
        n_running: Jobs on workers now; one more may be waiting.
        n_confirmed: Confirmations done.
        n_to_confirm: Confirmations planned; 0 during the search.
        seconds_left: Of the budget; inf without a time limit.
    """

    phase: Phase
    objectives: tuple[Objective, ...]
    n_trials: Mapping[str, int]
    ended: Trial | None
    front: tuple[Trial, ...]
    n_running: int
    n_confirmed: int
    n_to_confirm: int
    seconds_left: float


class Dispatcher:
    """Hands out jobs and takes their messages; one object on the driver, called by one thread.

    Args:
        controller: Proposes candidates and keeps the study.
        budget: What may be spent and what has been.
        store: Where confirmations are kept.
        objectives: Quality first.
        seed: Search trainings use it; confirmations use the seeds after it.
        confirm_seeds: Seeds a finalist.
        max_finalists: Front members to confirm at most.
        n_workers: Workers; each runs one job or one group of jobs at once.
        trials_per_worker: Jobs a worker trains together at most.
        test_share: Time to score the test split over time to score the validation split.
        compress: Whether to score confirmed LoRAs at lower ranks too, where time is left for it.
        on_progress: Called after every change.
    """

    def __init__(
        self,
        controller: SearchController,
        budget: BudgetTracker,
        store: ConfirmationStore,
        objectives: Sequence[Objective],
        *,
        seed: int,
        confirm_seeds: int,
        max_finalists: int,
        n_workers: int,
        trials_per_worker: int = 1,
        test_share: float = 1.0,
        compress: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._controller = controller
        self._budget = budget
        self._store = store
        self._objectives = tuple(objectives)
        self._seed = seed
        self._confirm_seeds = confirm_seeds
        self._max_finalists = max_finalists
        self._n_workers = n_workers
        self._trials_per_worker = trials_per_worker
        self._test_share = test_share
        self._compress = compress
        self._expected: dict[str, float] = {}
        self._on_progress = on_progress
        self._running: dict[tuple[str, str, int], Trial | None] = {}
        self._flops_at: dict[int, float] = {}
        self._queue: deque[Job] = deque()
        self._early: deque[Job] = deque()
        self._confirmed = {("confirm", digest, seed) for digest, seed in store.done()}
        self._plan_early_confirmations()
        self._n_confirmed = 0
        self._n_to_confirm = 0
        self._longest_job = 0.0
        self._started_at: dict[tuple[str, str, int], float] = {}
        self.phase: Phase = "search"
        self._phase_seconds: dict[str, float] = {}
        self._phase_began = self._ticked = time.monotonic()
        self._has_heard = False
        self.activity = Activity()
        self.warnings: list[str] = []

    # --- handing out -----------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """The next job, or None when there is none now; `phase` "done" says there will be none."""
        if self.phase == "search":
            job = self._next_trial()
            if job is not None:
                return job
            if any(trial is not None for trial in self._running.values()):
                return self._early_confirmation()
            self._begin_confirmation()
        if self.phase == "confirmation":
            job = self._next_confirmation()
            if job is not None or self._running:
                return job
            self._enter("done")
        return None

    def _next_trial(self) -> Job | None:
        left = self._tick()
        if left is None or (left.seconds is not None and left.seconds < self._longest_job / 2):
            # A trial that cannot get half-way before the deadline would only be cut.
            return None
        trial = self._controller.ask()
        if trial is None:
            return None
        self._budget.spend(trials=1)
        job = Job("search", trial.candidate, trial.costs, self._seed, trial.number)
        self._note_start(job, trial)
        return job

    def _early_confirmation(self) -> Job | None:
        """Return a job for a worker that is free while the last trials end.

        The reference is confirmed in any case. Ray would stop an idle worker and load the model
        again for the confirmations.
        """
        while self._early:
            job = self._early.popleft()
            if self._key(job) not in {*self._confirmed, *self._running}:
                self._note_start(job, None)
                return job
        return None

    def _plan_early_confirmations(self) -> None:
        """Queue the confirmations of the reference, if its trial is complete."""
        for trial in self._controller.trials():
            if trial.origin == "reference" and trial.state == "complete":
                seeds = range(self._seed + 1, self._seed + 1 + self._confirm_seeds)
                self._early.extend(Job("confirm", trial.candidate, trial.costs, s) for s in seeds)

    def _begin_confirmation(self) -> None:
        self._enter("confirmation")
        nominees = choose_finalists(
            self._controller.trials(),
            self._objectives,
            max_finalists=self._max_finalists,
            test_share=self._test_share,
        )
        self._expected = {n.trial.candidate.digest: n.seconds for n in nominees}
        affordable = self._affordable(nominees)
        jobs = confirmation_jobs(
            affordable,
            first_seed=self._seed + 1,
            n_seeds=self._confirm_seeds,
            done=frozenset(
                (digest, seed)
                for kind, digest, seed in (*self._confirmed, *self._running)
                if kind == "confirm"
            ),
            lower_ranks=self._lower_ranks(nominees, affordable),
        )
        self._queue = deque(jobs)
        n_under_way = len(self._running)
        self._n_to_confirm = self._n_confirmed + n_under_way + len(jobs)

    def _affordable(self, nominees: Sequence[Nominee]) -> tuple[Nominee, ...]:
        """As many nominees as the rest of the budget pays for with all their seeds.

        The tuned LoRAs and the reference lead the list and are never dropped here: without them
        there is no verdict. Front members are dropped from the middle outwards, so that the
        cheapest and the best stay.
        """
        kept = list(nominees)
        left = self.seconds_left * self._n_workers

        def seconds(rows: Sequence[Nominee]) -> float:
            return sum(row.seconds for row in rows) * self._confirm_seeds

        while seconds(kept) > left and len(kept) > 4:
            front = [n for n in kept if n.trial.origin not in ("baseline", "reference")]
            if len(front) <= 2:
                break
            dropped = front[len(front) // 2]
            kept.remove(dropped)
        if len(kept) < len(nominees):
            self.warnings.append(
                f"the budget left paid for confirming {len(kept)} of {len(nominees)} finalists; "
                "raise --budget or --confirm-share to confirm all"
            )
        return tuple(kept)

    def _lower_ranks(
        self, nominees: Sequence[Nominee], affordable: Sequence[Nominee]
    ) -> dict[str, tuple[tuple[Candidate, Price], ...]]:
        """Digest -> the lower ranks to score with it, as long as the time left pays for them."""
        if not self._compress or len(affordable) < len(nominees):
            return {}
        trained = {trial.candidate.digest for trial in self._controller.trials()}
        seconds = sum(n.seconds for n in affordable) * self._confirm_seeds
        left = self.seconds_left * self._n_workers * _COMPRESSION_MARGIN - seconds
        price = self._controller.prices.price
        chosen: dict[str, tuple[tuple[Candidate, Price], ...]] = {}
        for nominee in affordable:
            lower = [c for c in lower_ranks(nominee.trial.candidate) if c.digest not in trained]
            left -= nominee.scoring_seconds * len(lower) * self._confirm_seeds
            if left < 0:
                break
            trained.update(candidate.digest for candidate in lower)
            chosen[nominee.trial.candidate.digest] = tuple((c, price(c)) for c in lower)
        return chosen

    def _next_confirmation(self) -> Job | None:
        if not self._queue:
            return None
        self._tick()
        is_over = self._budget.left(confirming=True) is None
        expected = self._expected.get(self._queue[0].candidate.digest, 0.0)
        # More than half of the job would lie past the deadline.
        if (is_over or self.seconds_left < expected / 2) and self._n_confirmed:
            self.warnings.append(
                f"the budget ended with {len(self._queue)} confirmations left out; "
                "`autopeft resume` with a larger budget adds them"
            )
            self._queue.clear()
            return None
        job = self._queue.popleft()
        self._note_start(job, None)
        return job

    def _note_start(self, job: Job, trial: Trial | None) -> None:
        self._running[self._key(job)] = trial
        self._started_at[self._key(job)] = time.monotonic()
        self._notify()

    @staticmethod
    def _key(job: Job) -> tuple[str, str, int]:
        return (job.kind, job.candidate.digest, job.seed)

    # --- taking back -----------------------------------------------------------------------------

    def take(self, job: Job, message: Message) -> bool:
        """Takes a worker's message. True: go on with the job; False: it has ended or must stop."""
        self.activity += message.activity
        self._note_heard(message.activity)
        if isinstance(message, FailureMessage):
            self.fail(job, message.reason)
            return False
        if isinstance(message, ConfirmMessage):
            self._store.save(job.candidate, message.score, message.files)
            for made in message.compressed:
                self._store.save_compressed(made, job.candidate)
            self._confirmed.add(self._key(job))
            self._budget.spend(flops=message.flops)
            self._n_confirmed += 1
            self._end(job)
            return False
        return self._take_rung(job, message)

    def _take_rung(self, job: Job, message: RungMessage) -> bool:
        trial = self._running.get(self._key(job))
        if trial is None:
            return False
        report = message.report
        self._budget.spend(flops=report.flops - self._flops_at.get(job.number, 0.0))
        self._flops_at[job.number] = report.flops
        decision = self._controller.report(trial, report.step, report.score)
        if message.is_last:
            quality = report.metrics[self._objectives[0].name]
            self._controller.tell(trial, score=quality, measured=message.measured)
            if trial.origin == "reference":
                self._plan_early_confirmations()
            self._end(job)
            return False
        if decision is Decision.STOP:
            self._end(job)
            return False
        if self._is_past_deadline():
            # Past the deadline at a rung: what has not finished cannot be on the front.
            self._controller.tell(trial, stopped="the search's share of the budget ended")
            self._end(job)
            return False
        self._notify()
        return True

    def fail(self, job: Job, reason: str) -> None:
        """The job will send nothing more."""
        trial = self._running.get(self._key(job))
        if trial is not None:
            self._controller.tell(trial, failed=reason)
        elif job.kind == "confirm" and self._key(job) in self._running:
            self.warnings.append(f"confirming {job.candidate.digest} failed: {reason}")
        self._end(job)

    def is_running(self, job: Job) -> bool:
        """Whether the job has neither ended nor failed."""
        return self._key(job) in self._running

    def _end(self, job: Job) -> None:
        key = self._key(job)
        self._running.pop(key, None)
        began = self._started_at.pop(key, None)
        if began is not None:
            seconds = time.monotonic() - began
            self._longest_job = max(self._longest_job, seconds)
            if job.kind == "confirm":
                self._expected[job.candidate.digest] = seconds
        self._notify()

    # --- keeping time ----------------------------------------------------------------------------

    def _tick(self) -> Budget | None:
        """Books the time since the last tick; what the search has left, None if nothing."""
        now = time.monotonic()
        self._budget.spend(seconds=now - self._ticked)
        self._ticked = now
        return self._budget.left()

    def _is_past_deadline(self) -> bool:
        """Whether the search's seconds or FLOPs are used up; a limit on trials cuts none short."""
        self._tick()
        budget, limits = self._budget, self._budget.budget
        share = 1.0 - budget.confirm_share
        return (limits.seconds is not None and budget.spent_seconds >= limits.seconds * share) or (
            limits.flops is not None and budget.spent_flops >= limits.flops * share
        )

    @property
    def seconds_left(self) -> float:
        """Wall-clock seconds left of the whole budget; inf without a time limit."""
        limit = self._budget.budget.seconds
        return float("inf") if limit is None else max(0.0, limit - self._budget.spent_seconds)

    def _enter(self, phase: Phase) -> None:
        self._tick()
        now = time.monotonic()
        self._book(now)
        self.phase, self._phase_began = phase, now
        self._notify()

    def start(self) -> None:
        """Called when the workers are asked for; until one is heard, time is start-up's."""
        self._tick()
        self._phase_began = time.monotonic()

    def _book(self, now: float) -> None:
        name: str = self.phase if self._has_heard else "startup"
        name = "report" if name == "done" else name
        self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + now - self._phase_began
        self._phase_began = now

    def _note_heard(self, activity: Activity) -> None:
        """The first message tells when training began: all before it was loading."""
        if not self._has_heard:
            self._book(time.monotonic() - activity.total)
            self._has_heard = True

    def phase_seconds(self) -> dict[str, float]:
        """Wall-clock seconds by phase, up to now."""
        self._book(time.monotonic())
        return dict(self._phase_seconds)

    def progress(self) -> Progress:
        """Return the state now."""
        controller = self._controller
        return Progress(
            self.phase,
            self._objectives,
            controller.counts(),
            controller.last_ended,
            controller.front(),
            min(len(self._running), self._n_workers * self._trials_per_worker),
            self._n_confirmed,
            self._n_to_confirm,
            self.seconds_left,
        )

    def _notify(self) -> None:
        self._on_progress(self.progress())


def confirmation_jobs(
    nominees: Sequence[Nominee],
    *,
    first_seed: int,
    n_seeds: int,
    done: frozenset[tuple[str, int]],
    lower_ranks: Mapping[str, tuple[tuple[Candidate, Price], ...]] = MappingProxyType({}),
) -> tuple[Job, ...]:
    """One job a nominee and seed, seed by seed, so that a cut leaves equal numbers of seeds.

    The seeds differ from the search's own: a candidate that won by a lucky seed must win again.
    """
    return tuple(
        Job(
            "confirm",
            nominee.trial.candidate,
            nominee.trial.costs,
            seed,
            lower_ranks=lower_ranks.get(nominee.trial.candidate.digest, ()),
        )
        for seed in range(first_seed, first_seed + n_seeds)
        for nominee in nominees
        if (nominee.trial.candidate.digest, seed) not in done
    )
