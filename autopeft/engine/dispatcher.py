"""Decides what each free worker does next: search, then confirm, within the budget."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from autopeft.confirm.finalists import (
    Finalist,
    Nominee,
    Retraining,
    choose_finalists,
    confirmed_finalists,
)
from autopeft.confirm.race import expected_seeds, next_seeds, reserved_seeds, seeds_of
from autopeft.confirm.store import ConfirmationStore
from autopeft.engine.budget import Budget, BudgetTracker
from autopeft.engine.callback import CallbackList, Phase, Progress
from autopeft.engine.confirmation_plan import affordable, affordable_cuts, confirmation_jobs
from autopeft.engine.messages import (
    Activity,
    BeatMessage,
    ConfirmMessage,
    FailureMessage,
    HungJob,
    Job,
    Message,
    RungMessage,
    StepMessage,
    TimeUpMessage,
)
from autopeft.engine.rung_value import RungValue
from autopeft.engine.search_plan import (
    ENOUGH_TRIALS,
    N_BASIC,
    Pace,
    SearchPlan,
    missing_seconds,
    revised,
)
from autopeft.engine.watch import Watch
from autopeft.searcher.controller import SearchController
from autopeft.searcher.losses import MAX_RETRIES, confirmation_key, died, trial_key
from autopeft.settings import SearchSettings
from autopeft.training.step_clock import Deadline
from autopeft.trial import TIME_UP, Decision, Trial
from autopeft.utils.formatting import counted, without_numbers

FAILURES, STORM = 5, 20
"""So many trials in a row must fail alike until a search ends: while none has been trained, and
later, where a part of the space may be beyond what this model or machine can do."""

_N_REVISING, _REVISE_EVERY = 4, 1.05
"""The plan is revised once so many adapters are trained to their end, then at each trial, later at
each twentieth more."""

_N_RECENT = 1000
"""What a trial takes is the median of so many, the last ones."""

_CHANGED = 1.25
"""A plan of so many times more or fewer trials is worth a line."""


@dataclass
class _Running:
    """A job that a worker runs; `flops` and worker `seconds` are those that its trial has reported.

    One that `may_use_all` may go on to the end of the whole budget.
    """

    job: Job
    trial: Trial | None
    started: float
    flops: float = 0.0
    seconds: float = 0.0
    may_use_all: bool = False


def _is_adapter(trial: Trial) -> bool:
    """Return whether the trial has trained an adapter to its end."""
    return trial.state == "complete" and bool(trial.plan.specs)


def _needed(nominees: Sequence[Trial]) -> set[str]:
    """Return the digests without which there is no verdict: the tuned LoRAs and the reference.

    Without an adapter there is none in any case; without a LoRA, the first adapter is worth more
    than nothing.
    """
    adapters = [trial for trial in nominees if trial.plan.specs]
    loras = [trial for trial in adapters if trial.origin == "baseline"]
    references = [trial for trial in nominees if not trial.plan.specs]
    return {t.digest for t in (*(loras or adapters[:1]), *references)} if adapters else set()


def _death_key(job: Job) -> str:
    """Return the key under which the deaths of a job's workers are counted."""
    digest = job.candidate.digest
    return trial_key(digest) if job.kind == "search" else confirmation_key(digest, job.seed)


class Dispatcher:
    """Hands out jobs and takes their messages, on the driver. A single thread must call it.

    Args:
        controller: Proposes candidates and keeps the study.
        budget: What may be spent and what has been.
        store: Keeps confirmations.
        settings: As resolved: seed, workers.
        plan: What to confirm; None: what the settings say.
        trials_per_worker: Most jobs that a worker trains together.
        test_share: Time to score the test split over time to score the validation split.
        on_progress: Called after every change.
        callbacks: Hear of trials and confirmations.

    Attributes:
        phase: What the workers do; "done" once there are no more jobs.
        activity: Worker seconds so far by activity.
        warnings: Messages for the user's report.

    Example:
        >>> from pathlib import Path
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> controller = autopeft.SearchController(space, ["accuracy", "trainable_params"])
        >>> budget = BudgetTracker(Budget.parse("2trials"), 0.3)
        >>> dispatcher = autopeft.Dispatcher(
        ...     controller, budget, ConfirmationStore(Path("runs/own")), autopeft.SearchSettings()
        ... )
        >>> dispatcher.start()
        >>> job = dispatcher.next_job()
        >>> dispatcher.take(job, FailureMessage("out of memory"))  # whether the job goes on
        False
    """

    def __init__(
        self,
        controller: SearchController,
        budget: BudgetTracker,
        store: ConfirmationStore,
        settings: SearchSettings,
        *,
        plan: SearchPlan | None = None,
        trials_per_worker: int = 1,
        test_share: float = 1.0,
        on_progress: Callable[[Progress], None] = lambda _: None,
        callbacks: CallbackList | None = None,
    ) -> None:
        self._controller = controller
        self._budget = budget
        self._store = store
        self._settings = settings
        self._plan = plan or SearchPlan.of(settings)
        self._nominees: tuple[Nominee, ...] = ()
        self._to_cut: frozenset[str] = frozenset()
        self._begun: set[tuple[str, int]] = set()
        self._is_settled = False
        self._is_racing = False  # Whether a round was begun in this session.
        self._told_plan = self._plan
        self._n_ended = self._revised_at = self._told_at = 0
        self._n_workers = self._told_workers = settings.workers or 1
        self._trials_per_worker = trials_per_worker
        self._test_share = test_share
        self._expected: dict[str, float] = {}
        self._rung_value = RungValue()
        self._skipped: tuple[int, ...] = ()
        self._on_progress = on_progress
        self._callbacks = callbacks or CallbackList()
        self._running: dict[tuple[str, str, int], _Running] = {}
        self._steps: dict[tuple[str, str, int], StepMessage] = {}  # what running jobs last told
        self._queue: deque[Job] = deque()
        self._early: deque[Job] = deque()
        self._losses = controller.losses
        self._lost: deque[tuple[Job, Trial | None, str]] = deque()
        self._watch = self.new_watch()
        self._confirmed = set(store.done())
        self._plan_early_confirmations()
        self._scored: tuple[int, bool] | None = None
        self._n_confirmed = self._n_unconfirmed = 0
        self._n_to_confirm = 0
        self._needed: set[str] = set()
        self._longest_job = 0.0
        self._complete_seconds: deque[float] = deque(maxlen=_N_RECENT)
        self._has_adapter = any(map(_is_adapter, controller.trials()))
        self._failures: deque[str] = deque(maxlen=STORM)
        self._has_trained = self._is_hopeless = False
        self.phase: Phase = "search"
        self._phase_seconds: dict[str, float] = {}
        self._phase_began = self._ticked = self._counted_at = time.monotonic()
        self._offered = 0.0  # worker seconds of this phase until `_counted_at`
        self._has_heard = False
        self.activity = Activity()
        self.warnings: list[str] = []

    @property
    def has_answer(self) -> bool:
        """Whether what was to be confirmed is, or there was nothing; not if each one failed."""
        return bool(self._confirmed) or not self._n_unconfirmed

    @property
    def _seeds(self) -> range:
        """Seeds of the confirmations.

        A candidate that won by a lucky seed must win again: none of these is the search's own.
        """
        first = self._settings.seed + 1
        return range(first, first + self._plan.most_seeds)

    # --- handing out -----------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """Return the next job; None if there is none now (or, if `phase` is "done", ever)."""
        if (job := self._next_retry()) is not None:
            return job
        if self.phase == "search":
            job = self._next_trial()
            if job is not None:
                return job
            if any(running.trial is not None for running in self._running.values()):
                return self._early_confirmation()
            if who := self._controller.confirmed_by():
                self._leave_confirmation(who)
                return None
            self._begin_confirmation()
        if self.phase == "confirmation":
            job = self._next_confirmation()
            if job is not None or self._running:
                return job
            self._enter("done")
        return None

    def _next_trial(self) -> Job | None:
        left = self._tick()
        if (
            left is None
            or self._is_hopeless
            or (left.seconds is not None and left.seconds < self._expected_trial())
        ):
            # A trial that cannot end before the deadline would be stopped there.
            return None
        trial = self._controller.ask()
        if trial is None:
            return None
        self._budget.spend(trials=1)
        job = Job("search", trial.candidate, trial.costs, self._settings.seed, trial.number)
        return self._start_trial(job, trial)

    def _start_trial(self, job: Job, trial: Trial) -> Job:
        """Return the job of a trial with its rungs and its deadline."""
        # Until an adapter is trained there is nothing to confirm, nor without the reference.
        may_use_all = not trial.plan.specs or not (self._has_adapter or self._is_first_running())
        seconds = self._search_seconds_left(may_use_all=may_use_all)
        has_limit = self._budget.budget.seconds is not None
        # A candidate whose process died before is trained alone, so that no other dies with it.
        is_alone = job.is_alone or self._losses.of(_death_key(job)) > 0
        job = replace(
            job,
            skipped=self._skipped,
            deadline=Deadline(seconds) if has_limit else None,
            is_alone=is_alone,
        )
        self._note_start(job, trial)
        self._running[job.key].may_use_all = may_use_all
        return job

    def _next_retry(self) -> Job | None:
        """Return a job whose worker died; fail those for which no time is left."""
        while self._lost:
            job, trial, reason = self._lost.popleft()
            if trial is None:
                if not self._is_too_late(job):
                    self._note_start(job, None)
                    return job
            elif self._tick(again=True) is not None and not self._is_hopeless:
                return self._start_trial(job, trial)
            self._fail(job, trial, f"{reason}; the budget left no time to try again")
            self._notify()
        return None

    def _is_first_running(self) -> bool:
        """Return whether an adapter is being trained that may use the whole budget."""
        return any(
            running.may_use_all and running.trial is not None and running.trial.plan.specs
            for running in self._running.values()
        )

    def _expected_trial(self) -> float:
        """Return the seconds in which a trial can be expected to end, its wait included."""
        if not self._complete_seconds:
            return self._longest_job / 2
        return max(self._longest_job / 2, statistics.median(self._complete_seconds))

    def _early_confirmation(self) -> Job | None:
        """Return a job for a worker that is free while the last trials end.

        The reference is confirmed in any case. Ray would stop an idle worker and load the model
        again for the confirmations.
        """
        while self._early:
            job = self._early.popleft()
            # What may end this process waits until the trials have ended.
            is_safe = not self._losses.of(_death_key(job))
            if is_safe and job.key not in self._running and job.key[1:] not in self._confirmed:
                self._note_start(job, None)
                return job
        return None

    def _plan_early_confirmations(self) -> None:
        """Queue the confirmations of the reference, if its trial is complete."""
        if self._controller.is_shared:
            return  # Another search may be the one that confirms.
        for trial in self._controller.trials():
            if trial.origin == "reference" and trial.state == "complete":
                self._early.append(Job("confirm", trial.candidate, trial.costs, self._seeds[0]))

    def _begin_confirmation(self) -> None:
        self._enter("confirmation")
        self._revise()
        nominees = self._choose(self._plan.max_finalists)
        self._expected = {nominee.trial.digest: nominee.seconds for nominee in nominees}
        seconds = self.seconds_left * self._n_workers
        n_seeds = expected_seeds(self._plan.confirm_seeds)
        kept = affordable(nominees, worker_seconds=seconds, n_seeds=n_seeds)
        if len(kept) < len(nominees):
            self.warnings.append(
                f"the budget left paid for confirming {len(kept)} of {len(nominees)} finalists; "
                "raise --budget or --confirm-share to confirm all"
            )
        if self._settings.compress and len(kept) == len(nominees):
            self._to_cut = affordable_cuts(
                kept, worker_seconds=seconds, n_seeds=reserved_seeds(self._plan.confirm_seeds)
            )
        self._nominees = kept
        self._needed = _needed([nominee.trial for nominee in kept])
        scored = {digest for digest, _ in self._confirmed | self._begun}
        self._enqueue([n.trial.digest for n in kept if n.trial.digest not in scored])

    def _leave_confirmation(self, who: str) -> None:
        """End the search: another one that shares the study confirms."""
        text = (
            f"nothing is confirmed here: {who}; what ends later is confirmed by `autopeft resume` "
            "of that folder with a larger budget"
        )
        self.warnings.append(text)
        self.say(text)
        self._enter("done")

    def _choose(self, max_finalists: int) -> tuple[Nominee, ...]:
        """Return those that would be confirmed if the search ended now."""
        chosen = choose_finalists(
            self._controller.trials(),
            self._controller.objectives,
            max_finalists=max_finalists,
            test_share=self._test_share,
        )
        n_begun = Counter(digest for digest, _ in self._confirmed | self._begun)
        return tuple(replace(each, n_begun=n_begun[each.trial.digest]) for each in chosen)

    def _enqueue(self, wanted: Sequence[str]) -> None:
        jobs = confirmation_jobs(
            self._nominees,
            wanted,
            seeds=self._seeds,
            begun=self._confirmed | self._begun,
            to_cut=self._to_cut,
            cuts=self._store.cuts(),
        )
        self._queue = deque(self._with_deaths(jobs))
        self._n_to_confirm = self._n_confirmed + len(self._running) + len(self._queue)

    def _with_deaths(self, jobs: Iterable[Job]) -> list[Job]:
        """Return confirmations with those last of which a process has died, each of them alone.

        Those of which one has died often enough fail.
        """
        kept = []
        for job in jobs:
            n_deaths = self._losses.of(_death_key(job))
            if n_deaths > MAX_RETRIES:
                self._begun.add(job.key[1:])
                self._fail(job, None, died(n_deaths))
            else:
                kept.append(replace(job, is_alone=True) if n_deaths else job)
        return sorted(kept, key=lambda job: job.is_alone)

    def _begin_round(self) -> None:
        """Queue the trainings that may change a decision, once all that were queued have ended."""
        finalists = confirmed_finalists(
            self._controller.trials(), self._store.scores(), self._store.compressed()
        )
        self._enqueue(self._left_of_round(finalists))
        if not self._queue:
            self._enqueue(self._next_round(finalists))
        self._is_settled = not self._queue

    def _left_of_round(self, finalists: Sequence[Finalist]) -> tuple[str, ...]:
        """Return what an earlier session has not trained of the round that it was in.

        What it has trained is no reason to decide anew: it would be a look more at the scores, and
        another race than that of a search that was not killed.
        """
        if self._is_racing:
            return ()
        self._is_racing, has = True, seeds_of(finalists)
        planned = self._store.round()
        return tuple(d for d, n_seeds in planned.items() if 0 < has.get(d, 0) < n_seeds)

    def _next_round(self, finalists: Sequence[Finalist]) -> tuple[str, ...]:
        """Decide who is trained with another seed, and note it."""
        wanted = next_seeds(
            finalists,
            self._controller.objectives,
            usual=self._plan.confirm_seeds,
            most=len(self._seeds),
            pick=self._settings.pick,
            looks=self._store.looks(),
        )
        if wanted and self._settings.evaluate is not None:
            # Without an adapter, a function of the user's may still depend on the seed.
            wanted += tuple(
                f.digest for f in finalists if f.origin == "reference" and len(f.seeds) == 1
            )
        has = seeds_of(finalists)
        self._store.note_look(has)
        self._store.note_round({digest: has[digest] + 1 for digest in wanted})
        return wanted

    def _next_confirmation(self) -> Job | None:
        if not self._queue and not self._running and not self._is_settled:
            self._begin_round()
        if not self._queue:
            return None
        missing = self._without_confirmation()
        if self._is_too_late(self._queue[0]):
            kept: dict[str, Job] = {}
            for job in self._queue:
                # A cheap one that still fits is not lost with a dear one before it.
                if job.candidate.digest in missing or not self._is_too_late(job):
                    kept.setdefault(job.candidate.digest, job)
            if n_dropped := len(self._queue) - len(kept):
                self.warnings.append(
                    f"the budget ended before {counted(n_dropped, 'confirmation')}; "
                    "`autopeft resume` with a larger budget adds them"
                )
            self._queue = deque(kept.values())
            self._is_settled = True
            if not kept:
                return None
        job = self._queue.popleft()
        if job.candidate.digest not in missing:
            job = self._with_deadline(job)
        self._note_start(job, None)
        return job

    def _with_deadline(self, job: Job) -> Job:
        """Return a confirmation that ends where half of what it is expected to take is too late."""
        expected = self._expected.get(job.candidate.digest)
        if not expected or self.seconds_left == float("inf"):
            return job
        return replace(job, deadline=Deadline(self.seconds_left + expected / 2))

    def _is_too_late(self, job: Job) -> bool:
        """Return whether more than half of a confirmation would be past the end of the budget."""
        self._tick()
        expected = self._expected.get(job.candidate.digest, 0.0)
        return self._budget.left(confirming=True) is None or self.seconds_left < expected / 2

    def _without_confirmation(self) -> set[str]:
        """Return the digests that a verdict needs and that still lack one."""
        running = {digest for kind, digest, _ in self._running if kind == "confirm"}
        return self._needed - {digest for digest, _ in self._confirmed} - running

    def _note_start(self, job: Job, trial: Trial | None) -> None:
        self._running[job.key] = _Running(job, trial, time.monotonic())
        if job.kind == "confirm":
            self._begun.add(job.key[1:])
        if trial is not None:
            self._callbacks.call("on_trial_begin", trial)
        self._notify()

    # --- taking messages -------------------------------------------------------------------------

    def take(self, job: Job, message: Message) -> bool:
        """Take a worker's message; return whether the job goes on. If not, the worker stops it."""
        self.activity += message.activity
        if job.key in self._running:
            self._watch.sign(job.key)
        if not self._has_heard:
            # The time before the first message's activity counts as start-up.
            self._close_phase(time.monotonic() - message.activity.total)
            self._has_heard = True
        if isinstance(message, FailureMessage):
            self.fail(job, message.reason)
            return False
        if isinstance(message, TimeUpMessage):
            self._take_time_up(job, message)
            return False
        if isinstance(message, ConfirmMessage):
            if problem := self._unpaired(message):
                self.fail(job, problem)
                return False
            # First: a kill in between would lose them, because what is saved is not trained again.
            self._save_cuts(job, message)
            self._store.save(job.candidate, message.score, message.files)
            self._confirmed.add((job.candidate.digest, job.seed))
            self._budget.spend(flops=message.flops)
            self._n_confirmed += 1
            self._callbacks.call("on_confirmation", job.candidate, message.score, message.files)
            self._end(job)
            return False
        return self._take_rung(job, message)

    def _save_cuts(self, job: Job, message: ConfirmMessage) -> None:
        """Keep what was cut, unless it is a trial itself or was cut from another before."""
        trained = {trial.digest for trial in self._controller.trials()}
        source = job.candidate.digest
        known = {cut: origin for cut, (*_, origin) in self._store.compressed().items()}
        for made in message.compressed:
            digest = made.candidate.digest
            if digest not in trained and known.get(digest, source) == source:
                self._store.save_compressed(made, job.candidate)

    def _unpaired(self, message: ConfirmMessage) -> str | None:
        """Return why a confirmation cannot be compared with the others row by row."""
        score = message.score
        seen = (len(score.test_rows), score.is_held_out)
        if self._scored is None:
            known = [s for scores in self._store.scores().values() for s in scores]
            self._scored = (len(known[0].test_rows), known[0].is_held_out) if known else seen
        if seen == self._scored:
            return None
        if seen[1] != self._scored[1]:
            return "evaluate scored the test split for some finalists only; return it for all"
        return f"evaluate returned {seen[0]} rows, and {self._scored[0]} for another finalist"

    def _take_rung(self, job: Job, message: RungMessage) -> bool:
        running = self._running.get(job.key)
        if running is None or (trial := running.trial) is None:
            return False
        report = message.report
        self._budget.spend(flops=report.flops - running.flops)
        running.flops = report.flops
        running.seconds += message.activity.total - message.activity.cache
        # Each worker measures for itself: one of their lines is enough.
        told = {without_numbers(line) for line in self.warnings}
        if message.warning and without_numbers(message.warning) not in told:
            self.warnings.append(message.warning)
            self._callbacks.call("on_message", message.warning)
        decision = self._controller.report(
            trial, report.step, report.score, further=message.measured
        )
        self._has_trained = True
        self._failures.clear()
        self._callbacks.call("on_rung", trial, report.step, report.score)
        if message.is_last:
            quality = report.metrics[self._controller.objectives[0].name]
            self._controller.tell(trial, score=quality, measured=message.measured)
            if trial.plan.specs:
                self._rung_value.note_end(running.seconds)
            if trial.origin == "reference":
                self._plan_early_confirmations()
            self._end(job)
            return False
        if trial.plan.specs:
            self._note_rung(running, message, is_stopped=decision is Decision.STOP)
        if decision is not Decision.STOP:
            if not self._is_past_deadline(running):
                self._notify()
                return True
            # Only complete trials can be on the front, and this one would end too late.
            self._controller.tell(trial, stopped=TIME_UP)
        self._end(job)
        return False

    def _note_rung(self, running: _Running, message: RungMessage, *, is_stopped: bool) -> None:
        """Leave a rung out from now on if it takes more time than it saves.

        One that the user asked for stays, and all where time is not what runs out.
        """
        step, scoring = message.report.step, message.activity.evaluate
        value = self._rung_value
        value.note_rung(step, running.seconds, scoring=scoring, is_stopped=is_stopped)
        if "rungs" in self._plan.open and self._budget.budget.seconds is not None:
            for each in value.without_value({step}.difference(self._skipped)):
                self._skipped += (each,)
                self._callbacks.call("on_message", value.text(each))

    def _take_time_up(self, job: Job, message: TimeUpMessage) -> None:
        """Note a job that its worker stopped at its deadline; what it reported before stays."""
        running = self._running.get(job.key)
        if running is None:
            return
        self._budget.spend(flops=message.flops - running.flops)
        if running.trial is not None:
            self._controller.tell(running.trial, stopped=TIME_UP)
        else:
            self.warnings.append(
                f"confirming {job.candidate.digest} was stopped at step {message.step}: the budget "
                "ended; `autopeft resume` with a larger budget confirms it"
            )
        self._end(job)

    def _revise(self) -> None:
        """Let the confirmation follow what trials show: what it takes, and the time there is."""
        limit = self._budget.budget.seconds
        if limit is None or not self._plan.open:
            return
        pace = self._pace() if self.phase == "search" else None
        self._plan = revised(
            self._plan,
            self._retrainings,
            budget=limit,
            seconds_left=self.seconds_left,
            n_workers=self._n_workers,
            pace=pace,
        )
        self._budget.confirm_share = self._plan.confirm_share
        self._revised_at = self._n_ended
        if pace is not None and self._n_ended >= 2 * self._told_at:
            self._told_at = self._n_ended
            self._tell_plan(limit, pace)

    def _tell_plan(self, limit: float, pace: Pace) -> None:
        """Say what has become of the plan, and leave half of few trials to the searcher."""
        plan, told = self._plan, self._told_plan
        most = self._budget.budget.trials or 10**9
        n_trials = min(plan.n_trials or 0, most)
        plan = replace(plan, n_trials=n_trials)
        ratio = n_trials / told.n_trials if told.n_trials else 0.0
        is_same = (plan.max_finalists, plan.confirm_seeds) == (
            told.max_finalists,
            told.confirm_seeds,
        )
        if is_same and 1 / _CHANGED < ratio < _CHANGED:
            return
        self._told_plan = plan
        text = plan.line(f" after {counted(pace.n_trials, 'trial')}")
        if n_trials < min(ENOUGH_TRIALS, most):
            minutes = (limit + missing_seconds(n_trials, pace, self._n_workers)) / 60
            text += f"; {math.ceil(minutes)}m would pay for {ENOUGH_TRIALS} trials"
            self._controller.limit_portfolio(plan.n_portfolio or 0)
        self._callbacks.call("on_message", text)

    def _retrainings(self, max_finalists: int) -> list[Retraining]:
        """Return what confirming each takes that would be confirmed now, or that is to come."""
        chosen = [nominee for nominee in self._choose(max_finalists) if nominee.trial.plan.specs]
        known = [nominee.retraining for nominee in chosen]
        if self.phase != "search":
            return known
        mean = statistics.fmean(each.seconds for each in known) if known else 0.0
        return known + [Retraining(mean)] * (max_finalists + N_BASIC - len(known))

    def _pace(self) -> Pace:
        now = time.monotonic()
        # What is cached serves later trials.
        offered = self._offered + (now - self._counted_at) * self._n_workers
        spent = offered - self.activity.cache
        n_under_way = sum(running.trial is not None for running in self._running.values())
        n_begun = self._n_ended + min(n_under_way, self._n_workers) / 2
        return Pace(sum(self._controller.counts().values()), max(0.0, spent) / n_begun)

    def fail(self, job: Job, reason: str) -> None:
        """Mark the job failed; it sends no more messages."""
        running = self._running.get(job.key)
        if running is not None:
            self._fail(job, running.trial, reason)
        self._end(job)

    def _fail(self, job: Job, trial: Trial | None, reason: str) -> None:
        if trial is not None:
            self._controller.tell(trial, failed=reason)
            self._note_failure(reason)
        else:
            self._n_unconfirmed += 1
            self.warnings.append(f"confirming {job.candidate.digest} failed: {reason}")

    def lose(self, job: Job, reason: str) -> None:
        """Note that a job's worker died; try again, alone on a worker, then mark the job failed."""
        running = self._running.get(job.key)
        if running is None:
            return
        self._losses.add([_death_key(job)])
        n_deaths = self._losses.of(_death_key(job))
        if n_deaths > MAX_RETRIES:
            self.fail(job, f"{reason}; so did {n_deaths - 1} others before")
            return
        del self._running[job.key]
        self._steps.pop(job.key, None)
        self._watch.end(job.key)
        self._lost.append((replace(job, is_alone=True), running.trial, reason))
        self._notify()

    def may_die(self, jobs: Iterable[Job]) -> None:
        """Note that jobs are trained in this process: if it dies of them, a resume must know."""
        self._losses.add(map(_death_key, jobs))

    def survived(self, jobs: Iterable[Job]) -> None:
        """Take back what `may_die` noted: this process has survived them."""
        self._losses.take_back(map(_death_key, jobs))

    def _note_failure(self, reason: str) -> None:
        """End the search if its last trials all failed, and alike."""
        self._failures.append(without_numbers(reason.partition("\n")[0]))
        enough = STORM if self._has_trained else FAILURES
        last = list(self._failures)[-enough:]
        if len(last) == enough and len(set(last)) == 1 and not self._is_hopeless:
            self._is_hopeless = True
            self.warnings.append(
                f"the search ended before its budget: {enough} trials in a row failed with: "
                f"{reason}"
            )

    def new_watch(self) -> Watch:
        """Return what finds jobs that hang, as the settings and the budget say."""
        is_function = self._settings.evaluate is not None
        seconds = self._budget.budget.seconds
        return Watch(self._settings.hang_seconds, seconds, is_function=is_function)

    def say(self, text: str) -> None:
        """Tell the user a line."""
        self._callbacks.call("on_message", text)

    def is_running(self, job: Job) -> bool:
        """Return whether the job has neither ended nor failed."""
        return job.key in self._running

    def _end(self, job: Job) -> None:
        running = self._running.pop(job.key, None)
        self._steps.pop(job.key, None)
        self._watch.end(job.key)
        if running is not None:
            seconds = time.monotonic() - running.started
            self._longest_job = max(self._longest_job, seconds)
            if running.trial is not None:
                ended = self._controller.latest(running.trial)
                self._n_ended += 1
                if _is_adapter(ended):
                    self._complete_seconds.append(seconds)
                    self._has_adapter = True
                if (
                    len(self._complete_seconds) >= _N_REVISING
                    and self._n_ended >= _REVISE_EVERY * self._revised_at
                ):
                    self._revise()
                self._callbacks.call("on_trial_end", ended)
            if job.kind == "confirm":
                self._expected[job.candidate.digest] = seconds
        self._notify()

    # --- keeping time ----------------------------------------------------------------------------

    def tick(
        self, steps: Iterable[StepMessage] = (), beats: Iterable[BeatMessage] = ()
    ) -> tuple[HungJob, ...]:
        """Read the clock, note how far running jobs are, and find those that hang.

        A backend calls it about once a second, so that what users see goes on while no job has a
        message.

        Args:
            steps: What workers told of their steps.
            beats: What workers told of themselves; without them, only a long silence counts.

        Returns:
            Jobs that hang: the backend ends their workers and calls `fail` with the reason.
        """
        for beat in beats:
            for key in beat.jobs:
                if key in self._running:
                    self._watch.beat(key, beat.cpu_seconds, is_starting=beat.is_starting)
        for step in steps:
            if step.job in self._running:
                self._steps[step.job] = step
                self._watch.sign(step.job)
        self._notify()
        return tuple(self._hung())

    def _hung(self) -> Iterator[HungJob]:
        is_over = self.seconds_left <= 0.0
        for key, running in self._running.items():
            deadline = running.job.deadline
            # A function of the user's need not end before the whole budget does.
            is_late = (
                self._settings.evaluate is None
                and deadline is not None
                and deadline.seconds_left < 0
            )
            problem = self._watch.problem(key, is_over=is_over or is_late)
            if problem is not None:
                yield HungJob(running.job, problem)

    def _tick(self, *, again: bool = False) -> Budget | None:
        """Spend the time since the last tick; return what the search has left, None if nothing.

        `again`: for another try of a trial.
        """
        now = time.monotonic()
        self._budget.spend(seconds=now - self._ticked)
        self._ticked = now
        return self._budget.left(again=again)

    def _is_past_deadline(self, running: _Running) -> bool:
        """Return whether the search has used up the seconds or FLOPs that a trial may use."""
        self._tick()
        limits, spent = self._budget.budget, self._budget.spent
        share = 1.0 - self._budget.confirm_share
        return self._search_seconds_left(may_use_all=running.may_use_all) <= 0.0 or (
            limits.flops is not None and spent.flops >= limits.flops * share
        )

    def _search_seconds_left(self, *, may_use_all: bool) -> float:
        """Return the seconds left of the search's share, or of all; inf without a time limit."""
        limit, share = self._budget.budget.seconds, self._budget.confirm_share
        kept = share * limit if limit is not None and not may_use_all else 0.0
        return self.seconds_left - kept

    @property
    def seconds_left(self) -> float:
        """Seconds left of the whole budget; inf without a time limit."""
        limit = self._budget.budget.seconds
        return float("inf") if limit is None else max(0.0, limit - self._budget.spent.seconds)

    def _enter(self, phase: Phase) -> None:
        self._tick()
        self._close_phase(time.monotonic())
        self.phase = phase
        self._notify()

    def start(self) -> None:
        """Start the clock; time until a worker's first message counts as start-up."""
        self._tick()
        self._phase_began = self._counted_at = time.monotonic()

    def note_workers(self, n_workers: int) -> None:
        """Plan with another number of workers from now on: nodes joined or left the cluster."""
        before, now = self._told_workers, time.monotonic()
        if n_workers == before:
            return
        self._offered += (now - self._counted_at) * self._n_workers
        self._counted_at, self._told_workers = now, n_workers
        self._n_workers = max(1, n_workers)  # What is planned for none would be nothing.
        room = counted(n_workers, "worker") if n_workers else "no worker, so the search waits"
        text = f"the cluster has room for {room} now, {before} before"
        self._callbacks.call("on_message", text)

    def _close_phase(self, now: float) -> None:
        self._phase_seconds, self._phase_began = self._phases_until(now), now
        self._counted_at, self._offered = now, 0.0

    def _phases_until(self, now: float) -> dict[str, float]:
        name: str = self.phase if self._has_heard else "startup"
        name = "report" if name == "done" else name
        seconds = self._phase_seconds
        return {**seconds, name: seconds.get(name, 0.0) + now - self._phase_began}

    def phase_seconds(self) -> dict[str, float]:
        """Return the wall-clock seconds so far by phase; another thread may ask."""
        return self._phases_until(time.monotonic())

    def _notify(self) -> None:
        self._tick()
        controller = self._controller
        progress = Progress(
            self.phase,
            controller.objectives,
            controller.counts(),
            controller.last_ended,
            controller.front(),
            min(len(self._running), self._n_workers * self._trials_per_worker),
            self._n_confirmed,
            self._n_to_confirm,
            self.seconds_left,
            tuple(self._steps.values()),
        )
        self._on_progress(progress)
