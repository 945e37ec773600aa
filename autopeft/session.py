"""Session: composes data, space, controller, workers and report into one run of a search."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any

from autopeft.confirm.finalists import confirmed_finalists, mark_lora_baselines, tuned_lora
from autopeft.confirm.over_limit import loras_over_limits
from autopeft.confirm.race import seeds_of
from autopeft.confirm.store import ConfirmationStore
from autopeft.confirm.verdict import UntriedLora, judge
from autopeft.costs.objectives import Objective
from autopeft.engine.backend import make_backend, named_errors, run_all
from autopeft.engine.budget import BudgetTracker, Spent
from autopeft.engine.callback import CallbackList, Progress, SearchStart
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.evaluate import EVALUATORS
from autopeft.engine.messages import WorkerContext
from autopeft.engine.search_plan import SearchPlan
from autopeft.errors import StorageError, StorageFailure, UserError
from autopeft.inputs import Inputs, beside_digest, code_digest, model_digests, rows_digest
from autopeft.integrations.trackers.registry import destinations, make_trackers
from autopeft.planning import fitted
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.reporting.front_view import FrontView, view
from autopeft.reporting.lost_trials import check_none_lost
from autopeft.reporting.markup import front_markdown
from autopeft.reporting.record import AdapterScore, BudgetReport, SearchRecord
from autopeft.reporting.write import write_report
from autopeft.result import SearchResult
from autopeft.searcher.controller import SearchController
from autopeft.searcher.join import Shared, check_reachable, read_shared
from autopeft.searcher.owner import StudyOwner
from autopeft.searcher.samplers.prior import PriorRow, point_of, read_prior
from autopeft.searcher.samplers.warm_start import WarmStartTrial, warm_start_trials
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.storage import shown_place
from autopeft.searcher.study import StudyExists, read_states, read_study
from autopeft.searcher.untried_lora import chance_of_better_lora
from autopeft.settings import SearchSettings
from autopeft.tasks.metrics import METRICS
from autopeft.tasks.registry import TASKS
from autopeft.trial import INTERRUPTED, Trial
from autopeft.utils.folder_lock import BEAT_SECONDS, FolderLock
from autopeft.utils.formatting import counted, one_line
from autopeft.utils.registry import Registry
from autopeft.utils.remote_folder import PUSH_SECONDS
from autopeft.utils.serialize import to_plain
from autopeft.utils.signals import terminable, uninterrupted
from autopeft.utils.timer import Timer
from autopeft.utils.versions import versions
from autopeft.workspace import SETTINGS, Workspace

_SHOWN = ("model", "data", "task", "evaluate", "budget")
"""Settings that optuna-dashboard shows as attributes of the study, five of which it shows at once:
these, without data and task or without a function, and the verdict."""


class Session:
    """One run of a search, from settings to report.

    It began with the user's call, at `began` seconds of `time.monotonic()`, and holds the folder by
    `lock`.
    """

    def __init__(
        self,
        workspace: Workspace,
        callbacks: Iterable[Any] = (),
        *,
        lock: FolderLock,
        began: float,
        is_resumed: bool = False,
    ) -> None:
        self._workspace = workspace
        self._lock = lock
        self._callbacks = CallbackList(callbacks)
        self._is_resumed = is_resumed
        self._started = datetime.now(UTC) - timedelta(seconds=time.monotonic() - began)
        self._began = began
        self._phases = {"startup": time.monotonic() - began}
        self._before = Spent()
        self._budget: BudgetTracker | None = None
        self._dispatcher: Dispatcher | None = None
        self._booking = Lock()
        self._owner: StudyOwner | None = None
        self._n_workers = 1
        self._beaten = time.monotonic()
        self._n_told = 0
        self._unpublished: StorageError | None = None

    def run(self, settings: SearchSettings) -> SearchResult:
        """Run the search.

        Raises:
            UserError: for a mistake in the settings, before any training.
            KeyboardInterrupt: after Ctrl-C or SIGTERM; everything is saved.
        """
        if self._is_resumed:
            self._check_not_copied(settings)
            self._check_none_lost(settings)
            self._before = self._workspace.recall("spent", Spent) or Spent()
        try:
            with Timer(self._beat, 1.0), Timer(self._beat_study, BEAT_SECONDS):
                return self._run(settings)
        finally:
            if self._owner is not None:
                with suppress(StorageFailure):  # Its heartbeat ends.
                    self._owner.end()

    def _check_not_copied(self, settings: SearchSettings) -> None:
        """Refuse a copy of a folder whose study is elsewhere: both would write into it."""
        original = self._workspace.original()
        if settings.storage is not None and original is not None:
            raise StorageError(
                "folder",
                self._workspace.named,
                f"is a copy of {original}, and both have one study, outside of their folders",
                "resume that folder, or begin a new search with --warm-start on this one",
            )

    def _check_none_lost(self, settings: SearchSettings) -> None:
        """Refuse a study that lost trials: the folder's report would lose them, too."""
        table = self._workspace.folder / "trials.csv"
        if not table.is_file() or not self._workspace.has_study():
            return
        storage, name = self._workspace.storage(settings), self._workspace.study_name(settings)
        place = shown_place(storage)
        check_none_lost(table, read_states(storage, name), place=place, study=name)

    def _run(self, settings: SearchSettings) -> SearchResult:
        self._callbacks.callbacks = [*self._callbacks.callbacks, *make_trackers(settings.report_to)]
        self._tell_warnings()
        prior = self._prior(settings)
        if settings.join:
            check_reachable(settings)
        try:
            ready, controller = self._begun(settings, prior)
        except StudyExists:
            if not settings.join:
                raise
            # Another search has begun the study meanwhile.
            ready, controller = self._begun(settings, prior)
        spent = replace(
            self._before,
            seconds=self._before.seconds + time.monotonic() - self._began,
            # An interrupted trial is run again, so it is not spent.
            trials=controller.n_spent,
        )
        self._budget = BudgetTracker(ready.budget, ready.plan.confirm_share, spent)
        return self._work(ready, controller, self._budget)

    def _begun(
        self, settings: SearchSettings, prior: Sequence[PriorRow]
    ) -> tuple[PreparedSearch, SearchController]:
        """Prepare the search, write its folder, and open its study."""
        shared = read_shared(settings) if settings.join else None
        if shared is not None:
            self._note(f"joins the study {settings.study_name}, with its seed, {shared.seed}")
            settings = shared.adopted(settings)
        ready = prepare(settings, note=self._note, phase=self._phase)
        ready = replace(ready, settings=self._workspace.as_begun(ready.settings))
        with self._phase("startup"):
            inputs = self._checked_inputs(ready)
            if self._is_resumed:
                ready = replace(ready, plan=self._reopened(ready.plan))
            else:
                ready = fitted(ready, settings, began=self._began, note=self._note)
            if shared is not None:
                shared.check(ready.settings, inputs)
                self._note_changed_code(shared.inputs, inputs)
            with self._discarded_on_error():
                # Keep what the user asked for: a resumed search looks at its machine again.
                self._workspace.create(
                    replace(
                        ready.settings,
                        workers=settings.workers,
                        gpus_per_worker=settings.gpus_per_worker,
                    )
                )
                self._workspace.remember("splits", ready.splits())
                self._workspace.remember("inputs", inputs)
                self._workspace.remember("plan", ready.plan)
                if prior:
                    self._workspace.remember("prior_rows", to_plain(prior))
                if settings.join:
                    begun = Shared.of(ready.settings, inputs)
                    controller = self._open_joined(ready, prior, begun, is_new=shared is None)
                else:
                    controller = self._open(ready, prior)
        return ready, controller

    def _checked_inputs(self, ready: PreparedSearch) -> Inputs:
        """Return digests of data and model; a search that is resumed must have the same."""
        settings = ready.settings
        now = Inputs(
            ready.data.fingerprint if ready.data is not None else "",
            rows_digest(ready.splits()),
            *model_digests(settings.model),
            {each.name: each.fingerprint for each in ready.data.second} if ready.data else {},
            beside_digest(settings.model),
            _code_of(ready),
        )
        if self._is_resumed:
            # Earlier versions kept the rows of the splits alone.
            splits = self._workspace.recall("splits", dict[str, dict[str, Any]]) or {}
            before = self._workspace.recall("inputs", Inputs) or Inputs(rows=rows_digest(splits))
            before.check_same(now, model=settings.model, data=settings.data)
            self._note_changed_code(before, now)
            now = replace(now, code={**now.code, **before.code})  # What the first trials had.
        return now

    def _note_changed_code(self, before: Inputs, now: Inputs) -> None:
        for name in before.changed_code(now):
            self._workspace.warn(
                f"{name}: its module is not as when the search was begun; scores from before and "
                "after may not be alike"
            )

    @contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        """Remove what a new search has written if the user's mistake is found late."""
        try:
            yield
        except UserError:
            if not self._is_resumed:
                with self._booking:  # Else the timer might write into the folder once more.
                    self._workspace.discard()
            raise

    def _beat(self) -> None:
        """Book the time, and tell others that this search is alive; called from a timer's thread.

        What was spent must survive a kill, to the second, whatever the search does meanwhile.
        """
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._lock.beat()
        # Of a search that has not begun there is nothing to resume.
        with self._booking:
            if (self._workspace.folder / SETTINGS).exists():
                self._workspace.remember("spent", self._spent())

    def _beat_study(self) -> None:
        if self._owner is not None:
            self._owner.beat()

    def _spent(self) -> Spent:
        """Return what was spent until now, earlier sessions included."""
        spent = self._before if self._budget is None else self._budget.spent
        phases, workers = self._phases_so_far(), {}
        if self._dispatcher is not None:
            workers = self._worker_seconds(phases)
        return replace(
            spent,
            seconds=self._before.seconds + time.monotonic() - self._began,
            phases=_sum(self._before.phases, phases),
            workers=_sum(self._before.workers, workers),
        )

    def _phases_so_far(self) -> dict[str, float]:
        """Return the seconds of this session by phase; what is of no phase is start-up."""
        phases = dict(self._phases)
        if self._dispatcher is not None:
            phases = _sum(phases, self._dispatcher.phase_seconds())
        rest = time.monotonic() - self._began - sum(phases.values())
        return _sum(phases, {"startup": max(0.0, rest)})

    def _worker_seconds(self, phases: Mapping[str, float]) -> dict[str, float]:
        """Return the seconds of all workers by activity."""
        assert self._dispatcher is not None, "there are workers"
        worker = self._dispatcher.activity
        working = phases.get("search", 0.0) + phases.get("confirmation", 0.0)
        return {
            "train": worker.train,
            "evaluate": worker.evaluate,
            "cache": worker.cache,
            "attach": worker.attach,
            "idle": max(0.0, self._n_workers * working - worker.total),
        }

    def _reopened(self, plan: SearchPlan) -> SearchPlan:
        """Return the plan with the sizes open that the user left open, also when resuming.

        The settings on disk state all of them.
        """
        kept = self._workspace.recall("plan", SearchPlan) or plan
        same = tuple(name for name in kept.open if getattr(plan, name) == getattr(kept, name))
        return replace(plan, open=same)

    def _progress(self, progress: Progress) -> None:
        self._tell_warnings()
        self._callbacks.call("on_progress", progress)

    def _tell_warnings(self) -> None:
        """Say what the copying found, from this thread: callbacks need not be safe in others."""
        for text in self._workspace.warnings[self._n_told :]:
            self._n_told += 1
            self._note(text)

    def _note(self, text: str) -> None:
        self._callbacks.call("on_message", text)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - began

    def _open(self, ready: PreparedSearch, prior: Sequence[PriorRow]) -> SearchController:
        is_known = not self._is_resumed or self._workspace.has_study()
        search = self._workspace.id()
        if ready.settings.storage is not None:
            self._owner = StudyOwner(search, self._workspace.inode)
        if not is_known:
            # It may have been killed before its study was made.
            with suppress(StorageError):
                return self._open_study(ready, prior, is_resumed=True)
            return self._open_study(ready, prior, is_resumed=False)
        return self._open_study(ready, prior, is_resumed=self._is_resumed)

    def _open_joined(
        self, ready: PreparedSearch, prior: Sequence[PriorRow], shared: Shared, *, is_new: bool
    ) -> SearchController:
        self._owner = StudyOwner(
            self._workspace.id(),
            self._workspace.inode,
            folder=self._workspace.shown,
            shared=shared.to_plain(),
        )
        # What was in the study of a search that is resumed must be there.
        is_there = not is_new or (self._is_resumed and self._workspace.has_study())
        return self._open_study(ready, prior, is_resumed=is_there)

    def _open_study(
        self, ready: PreparedSearch, prior: Sequence[PriorRow], *, is_resumed: bool
    ) -> SearchController:
        settings = ready.settings
        controller = SearchController(
            ready.space,
            ready.objectives,
            sampler=settings.sampler,
            pruner=settings.pruner,
            # Searches that share a study propose different candidates.
            seed=int(self._workspace.id(), 16) % 2**31 if settings.join else settings.seed,
            storage=self._workspace.storage(settings),
            prices=ready.prices,
            constraints=ready.constraints,
            study_name=self._workspace.study_name(settings),
            resume=is_resumed,
            owner=self._owner,
            eta=float(settings.eta),
            audit_share=settings.audit_share,
            warm_start=self._warm_start(settings),
            prior=prior,
            n_portfolio=ready.plan.n_portfolio,
        )
        self._workspace.note_study()
        if prior:
            n_inside = sum(point_of(row, ready.space) is not None for row in prior)
            self._note(f"prior: {n_inside} of {len(prior)} rows are in the search space")
        for name, value in settings.to_mapping().items():
            if name in _SHOWN and value:
                controller.remember(name, value)
        if self._workspace.url is not None:
            every = f"every {PUSH_SECONDS:.0f} s and at the end"
            self._note(f"the output is copied to {self._workspace.url} {every}")
        self._note(f"watch it: autopeft dashboard {self._workspace.shown}")
        trials = controller.trials()
        outside = sum(ready.space.encoder.point_of(trial.candidate) is None for trial in trials)
        if outside:
            self._note(
                f"{outside} of {len(trials)} trials are not in the search space as it is now: they "
                "stay where they are on the front, but the sampler learns little from them"
            )
        return controller

    def _warm_start(self, settings: SearchSettings) -> tuple[WarmStartTrial, ...]:
        """Return the earlier search's trials; a copy is kept, so resuming needs no other folder."""
        if self._is_resumed or not settings.warm_start:
            kept = self._workspace.recall("prior", dict[str, list[dict[str, Any]]]) or {}
            return tuple(WarmStartTrial.from_json(row) for row in kept.get("trials", []))
        earlier = Workspace(settings.warm_start)
        before = earlier.settings()
        stored = read_study(earlier.storage(before), earlier.study_name(before))
        trials = warm_start_trials(*stored)
        self._workspace.remember("prior", {"trials": [trial.to_json() for trial in trials]})
        self._note(f"warm start: {counted(len(trials), 'trial')} of {earlier.named}")
        return trials

    def _prior(self, settings: SearchSettings) -> tuple[PriorRow, ...]:
        """Return the rows of the prior; a copy is kept, so resuming needs no file."""
        if self._is_resumed:
            return self._workspace.recall("prior_rows", tuple[PriorRow, ...]) or ()
        return read_prior(settings.prior) if settings.prior else ()

    def _work(
        self, ready: PreparedSearch, controller: SearchController, budget: BudgetTracker
    ) -> SearchResult:
        settings = ready.settings
        store = ConfirmationStore(self._workspace.folder)
        store.check([objective.name for objective in ready.objectives])
        dispatcher = Dispatcher(
            controller,
            budget,
            store,
            settings,
            plan=ready.plan,
            trials_per_worker=ready.trials_per_worker,
            test_share=ready.test_share,
            on_progress=self._progress,
            callbacks=self._callbacks,
        )
        self._n_workers, self._dispatcher = settings.workers or 1, dispatcher
        is_complete = False
        context = self._context(ready)
        start = SearchStart(
            self._workspace.folder,
            self._workspace.study_name(settings),
            settings.to_mapping(),
            ready.objectives,
            self._is_resumed,
            self._workspace.id(),
            controller.trials(),
        )
        self._callbacks.call("on_search_begin", start)
        if found := destinations(self._callbacks.callbacks):
            self._note(f"reports to {found}")
        try:
            dispatcher.start()
            backend = make_backend(context)
            # Entered first: Ray sets its own handler of SIGTERM when it starts.
            with named_errors(settings.backend), backend, terminable():
                run_all(backend, settings.backend, dispatcher)
            is_complete = dispatcher.has_answer
        finally:
            with uninterrupted(), self._phase("report"):
                record = self._record(ready, controller, dispatcher, store, is_complete)
                shown = write_report(view(record), record.trials, self._workspace.folder)
                try:
                    is_complete = record.is_complete
                    if is_complete and self._owner is not None:
                        self._owner.note_confirmed()
                    if self._owner is None or self._owner.has_last_word:
                        notes = [front_markdown(shown), *self._attach(controller, shown)]
                        controller.conclude("\n\n".join(notes))
                        controller.remember("verdict", shown.verdict.text)
                except StorageFailure as failure:  # The folder has it all.
                    self._note(f"the study's last note is missing: {failure.reason}")
                result = SearchResult(
                    self._workspace.folder,
                    shown,
                    context.settings.model,
                    self._workspace.url,
                    str(self._workspace.given),
                )
                self._callbacks.call("on_search_end", result)
                self._workspace.remember("spent", self._spent())
        if self._unpublished is not None:
            raise self._unpublished
        return result

    def _context(self, ready: PreparedSearch) -> WorkerContext:
        """Return what the workers need; they name the output as the user does."""
        context = ready.context()
        if self._workspace.url is None:
            return context
        return replace(context, settings=replace(context.settings, output=self._workspace.url))

    def _attach(self, controller: SearchController, shown: FrontView) -> list[str]:
        """Attach the report and the adapters to the study; return what is to be said about it."""
        folder = self._workspace.folder
        files = [*sorted((folder / "plots").glob("*.png")), folder / "report.html"]
        adapters = {
            f"adapter-{entry.digest[:8]}": folder / entry.adapter
            for entry in shown.entries()
            if entry.adapter is not None
        }
        try:
            left_out = controller.attach(self._workspace.artifacts, files, adapters)
        except OSError as error:
            return [f"The files of the report are not among the artifacts: {one_line(error)}"]
        if not left_out:
            return []
        place = self._workspace.given / "adapters"
        return [f"Too large for an artifact, see {place}: {', '.join(left_out)}"]

    def _record(
        self,
        ready: PreparedSearch,
        controller: SearchController,
        dispatcher: Dispatcher,
        store: ConfirmationStore,
        is_complete: bool,
    ) -> SearchRecord:
        trials = controller.trials()
        confirmed = confirmed_finalists(trials, store.scores(), store.compressed())
        quality = ready.objectives[0]
        scores = {}
        for finalist in confirmed:
            # The adapter handed out is of the seed that is best on validation.
            chosen = finalist.best_seed(quality)
            try:
                if store.publish(finalist, chosen.seed) is None:
                    continue
            except StorageError as error:  # A full disk may have room for the smaller files.
                self._unpublished = self._unpublished or error
                continue
            n_rows = ready.n_generated("test") if ready.is_of_text else len(chosen.test_rows)
            split = "test" if chosen.is_held_out else "validation"
            scores[finalist.digest] = AdapterScore(chosen.seed, split, dict(chosen.test), n_rows)
        verdict, limits = None, tuple(c for c in ready.constraints if c.is_measured)
        kept = tuple(finalist for finalist in confirmed if not finalist.broken(limits))
        if confirmed:
            n_proposals = _n_proposals(trials)
            verdict = judge(
                kept,
                ready.objectives,
                n_proposals=n_proposals,
                looks=store.looks(),
                untried=lambda gain: _untried(controller.space, quality, trials, gain),
                no_lora=loras_over_limits(trials, confirmed, limits),
            )
        # Who reads a verdict may resume the search because of it.
        store.note_look(seeds_of(confirmed))
        return SearchRecord(
            settings=ready.settings.to_mapping(),
            objectives=ready.objectives,
            trials=trials,
            budget=self._report_of(ready),
            finalists=confirmed,
            front=tuple(o.digest for o in controller.front()),
            baseline=tuned_lora(kept, trials, quality),
            reference=next((o.digest for o in trials if o.origin == "reference"), None),
            verdict=verdict,
            pick=ready.settings.pick,
            adapter_scores=scores,
            data=ready.summary(),
            unsearched=ready.unsearched,
            versions=versions(),
            warnings=(
                *dispatcher.warnings,
                *controller.warnings,
                *self._callbacks.failures,
                *self._workspace.warnings,
            ),
            started=self._started.isoformat(timespec="seconds"),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            is_complete=is_complete and self._unpublished is None,
            limits=limits,
        )

    def _report_of(self, ready: PreparedSearch) -> BudgetReport:
        spent = self._spent()
        return BudgetReport(
            limit=ready.budget.text,
            spent_seconds=spent.seconds,
            spent_flops=spent.flops,
            n_trials=spent.trials,
            phases=spent.phases,
            worker_seconds=spent.workers,
        )


def _code_of(ready: PreparedSearch) -> dict[str, str]:
    """Return digests of the code of the user's own parts that say what a score is, by setting."""
    settings, found = ready.settings, {}
    task = settings.task or (ready.data.task if ready.data is not None else None)
    named: tuple[tuple[str, Registry[Any], str | None], ...] = (
        ("metric", METRICS, settings.metric),
        ("task", TASKS, task),
        ("evaluate", EVALUATORS, settings.evaluate),
    )
    for name, parts, value in named:
        with suppress(UserError):  # One that needs no module, such as a pattern.
            part = parts.resolve(name, value) if value else None
            if part is not None and (digest := code_digest(getattr(part, "function", part))):
                found[name] = digest
    return found


def _untried(
    space: SearchSpace, quality: Objective, trials: Sequence[Trial], gain: float
) -> UntriedLora | None:
    """Return how likely a LoRA that was not tried exceeds the tuned one by a gain."""
    marked = mark_lora_baselines(trials)
    chance = chance_of_better_lora(space, quality, marked, gain)
    n_baselines = sum(t.origin == "baseline" and t.state == "complete" for t in marked)
    return None if chance is None else UntriedLora(n_baselines, chance)


def _n_proposals(trials: Sequence[Trial]) -> int:
    """Return the number of ended trials that the searcher thought of itself."""
    ended = [t for t in trials if t.state != "running" and t.reason != INTERRUPTED]
    return sum(t.origin in ("design", "search") for t in ended)


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Add the seconds of two sessions by name."""
    return {k: first.get(k, 0.0) + second.get(k, 0.0) for k in {**first, **second}}
