"""Session: composes data, space, controller, workers and report into one run of a search."""

from __future__ import annotations

import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from autopeft.confirm.finalists import confirmed_finalists, mark_lora_baselines, tuned_lora
from autopeft.confirm.race import seeds_of
from autopeft.confirm.store import ConfirmationStore
from autopeft.confirm.verdict import UntriedLora, judge
from autopeft.costs.objectives import Objective
from autopeft.engine.backend import make_backend, named_errors, run_all
from autopeft.engine.budget import BudgetTracker, Spent
from autopeft.engine.callback import CallbackList, Progress, SearchStart
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.search_plan import SearchPlan
from autopeft.errors import StorageFailure, UserError
from autopeft.integrations.trackers.registry import destinations, make_trackers
from autopeft.planning import fitted
from autopeft.prepare import PreparedSearch, prepare, versions
from autopeft.reporting.front_view import FrontView, view
from autopeft.reporting.markup import front_markdown
from autopeft.reporting.record import AdapterScore, BudgetReport, SearchRecord
from autopeft.reporting.write import write_report
from autopeft.result import SearchResult
from autopeft.searcher.controller import INTERRUPTED, SearchController
from autopeft.searcher.samplers.prior import PriorRow, point_of, read_prior
from autopeft.searcher.samplers.warm_start import WarmStartTrial, warm_start_trials
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import read_study
from autopeft.searcher.untried_lora import chance_of_better_lora
from autopeft.settings import SearchSettings
from autopeft.trial import Trial
from autopeft.utils.formatting import counted, one_line
from autopeft.utils.serialize import to_plain
from autopeft.workspace import Workspace

_SHOWN = ("model", "data", "task", "evaluate", "budget")
"""Settings that optuna-dashboard shows as attributes of the study, five of which it shows at once:
these, without data and task or without a function, and the verdict."""


class Session:
    """One run of a search, from settings to report.

    It began with the user's call, at `began` seconds of `time.monotonic()`.
    """

    def __init__(
        self,
        workspace: Workspace,
        callbacks: Iterable[Any] = (),
        *,
        began: float,
        is_resumed: bool = False,
    ) -> None:
        self._workspace = workspace
        self._callbacks = CallbackList(callbacks)
        self._is_resumed = is_resumed
        self._started = datetime.now(UTC) - timedelta(seconds=time.monotonic() - began)
        self._began = began
        self._phases = {"startup": time.monotonic() - began}

    def run(self, settings: SearchSettings) -> SearchResult:
        """Run the search.

        Raises:
            UserError: for a mistake in the settings, before any training.
            KeyboardInterrupt: after Ctrl-C or SIGTERM; everything is saved.
        """
        self._callbacks.callbacks = [*self._callbacks.callbacks, *make_trackers(settings.report_to)]
        prior = self._prior(settings)
        ready = prepare(settings, note=self._note, phase=self._phase)
        with self._phase("startup"):
            before = Spent()
            if self._is_resumed:
                before = self._workspace.recall("spent", Spent) or before
                ready = replace(ready, plan=self._reopened(ready.plan))
            else:
                ready = fitted(ready, settings, began=self._began, note=self._note)
            with _removed_on_error(self._workspace.folder, is_new=not self._is_resumed):
                # Keep what the user asked for: a resumed search looks at its machine again.
                self._workspace.create(
                    replace(
                        ready.settings,
                        workers=settings.workers,
                        gpus_per_worker=settings.gpus_per_worker,
                    )
                )
                self._workspace.remember("splits", ready.splits())
                self._workspace.remember("plan", ready.plan)
                if prior:
                    self._workspace.remember("prior_rows", to_plain(prior))
                controller = self._open(ready, prior)
        spent = replace(
            before,
            seconds=before.seconds + time.monotonic() - self._began,
            # An interrupted trial is run again, so it is not spent.
            trials=sum(o.reason != INTERRUPTED for o in controller.trials()),
        )
        budget = BudgetTracker(ready.budget, ready.plan.confirm_share, spent)
        return self._work(ready, controller, budget)

    def _reopened(self, plan: SearchPlan) -> SearchPlan:
        """Return the plan with the sizes open that the user left open, also when resuming.

        The settings on disk state all of them.
        """
        kept = self._workspace.recall("plan", SearchPlan) or plan
        same = tuple(name for name in kept.open if getattr(plan, name) == getattr(kept, name))
        return replace(plan, open=same)

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
        settings = ready.settings
        controller = SearchController(
            ready.space,
            ready.objectives,
            sampler=settings.sampler,
            pruner=settings.pruner,
            seed=settings.seed,
            storage=self._workspace.storage(settings),
            prices=ready.prices,
            constraints=ready.constraints,
            study_name=self._workspace.study_name(settings),
            resume=self._is_resumed,
            eta=float(settings.eta),
            audit_share=settings.audit_share,
            warm_start=self._warm_start(settings),
            prior=prior,
            n_portfolio=ready.plan.n_portfolio,
        )
        if prior:
            n_inside = sum(point_of(row, ready.space) is not None for row in prior)
            self._note(f"prior: {n_inside} of {len(prior)} rows are in the search space")
        for name, value in settings.to_mapping().items():
            if name in _SHOWN and value:
                controller.remember(name, value)
        self._note(f"watch it: autopeft dashboard {self._workspace.folder}")
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
        self._note(f"warm start: {counted(len(trials), 'trial')} of {earlier.folder}")
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
        dispatcher = Dispatcher(
            controller,
            budget,
            store,
            settings,
            plan=ready.plan,
            trials_per_worker=ready.trials_per_worker,
            test_share=ready.test_share,
            on_progress=self._observe(budget),
            callbacks=self._callbacks,
        )
        is_complete = False
        start = SearchStart(
            self._workspace.folder,
            self._workspace.study_name(settings),
            settings.to_mapping(),
            ready.objectives,
            self._is_resumed,
            self._id(),
            controller.trials(),
        )
        self._callbacks.call("on_search_begin", start)
        if found := destinations(self._callbacks.callbacks):
            self._note(f"reports to {found}")
        try:
            dispatcher.start()
            backend = make_backend(ready.context())
            # Entered first: Ray sets its own handler of SIGTERM when it starts.
            with named_errors(settings.backend), backend, _terminable():
                run_all(backend, settings.backend, dispatcher)
            is_complete = True
        finally:
            with _uninterrupted(), self._phase("report"):
                record = self._record(ready, controller, budget, dispatcher, store, is_complete)
                shown = view(record)
                write_report(shown, record.trials, self._workspace.folder)
                try:
                    notes = [front_markdown(shown), *self._attach(controller, shown)]
                    controller.conclude("\n\n".join(notes))
                    controller.remember("verdict", shown.verdict.text)
                except StorageFailure as failure:  # The folder has it all.
                    self._note(f"the study's last note is missing: {failure.reason}")
                phases, workers = record.budget.phases, record.budget.worker_seconds
                self._workspace.remember(
                    "spent", replace(budget.spent, phases=phases, workers=workers)
                )
                result = SearchResult(self._workspace.folder, shown, settings.model)
                self._callbacks.call("on_search_end", result)
        return result

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
        return [f"Too large for an artifact, see {folder / 'adapters'}: {', '.join(left_out)}"]

    def _id(self) -> str:
        """Return what tells this search from others; made when it is first asked for."""
        known = self._workspace.recall("id", str) or uuid.uuid4().hex[:8]
        self._workspace.remember("id", known)
        return known

    def _observe(self, budget: BudgetTracker) -> Callable[[Progress], None]:
        last = 0.0

        def observe(progress: Progress) -> None:
            nonlocal last
            # The budget spent so far must survive a kill, to the second.
            if time.monotonic() - last > 1.0:
                last = time.monotonic()
                self._workspace.remember("spent", budget.spent)
            self._callbacks.call("on_progress", progress)

        return observe

    def _record(
        self,
        ready: PreparedSearch,
        controller: SearchController,
        budget: BudgetTracker,
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
            if store.publish(finalist, chosen.seed) is None:
                continue
            n_rows = ready.n_generated("test") if ready.is_of_text else len(chosen.test_rows)
            split = "test" if chosen.is_held_out else "validation"
            scores[finalist.digest] = AdapterScore(chosen.seed, split, dict(chosen.test), n_rows)
        verdict = None
        if confirmed:
            n_proposals = _n_proposals(trials)
            verdict = judge(
                confirmed,
                ready.objectives,
                n_proposals=n_proposals,
                looks=store.looks(),
                untried=lambda gain: _untried(controller.space, quality, trials, gain),
            )
        # Who reads a verdict may resume the search because of it.
        store.note_look(seeds_of(confirmed))
        return SearchRecord(
            settings=ready.settings.to_mapping(),
            objectives=ready.objectives,
            trials=trials,
            budget=self._budget(ready, budget, dispatcher),
            finalists=confirmed,
            front=tuple(o.digest for o in controller.front()),
            baseline=tuned_lora(confirmed, trials, quality),
            reference=next((o.digest for o in trials if o.origin == "reference"), None),
            verdict=verdict,
            pick=ready.settings.pick,
            adapter_scores=scores,
            data=ready.summary(),
            unsearched=ready.unsearched,
            versions=versions(),
            warnings=(*dispatcher.warnings, *controller.warnings, *self._callbacks.failures),
            started=self._started.isoformat(timespec="seconds"),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            is_complete=is_complete,
        )

    def _budget(
        self, ready: PreparedSearch, budget: BudgetTracker, dispatcher: Dispatcher
    ) -> BudgetReport:
        phases = _sum(self._phases, dispatcher.phase_seconds())
        worker = dispatcher.activity
        working = phases.get("search", 0.0) + phases.get("confirmation", 0.0)
        workers = {
            "train": worker.train,
            "evaluate": worker.evaluate,
            "cache": worker.cache,
            "attach": worker.attach,
            "idle": max(0.0, (ready.settings.workers or 1) * working - worker.total),
        }
        spent = budget.spent
        return BudgetReport(
            limit=ready.budget.text,
            spent_seconds=spent.seconds,
            spent_flops=spent.flops,
            n_trials=spent.trials,
            phases=_sum(spent.phases, phases),
            worker_seconds=_sum(spent.workers, workers),
        )


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
    return sum(t.origin in ("design", "search") and t.state != "running" for t in trials)


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Add the seconds of two sessions by name."""
    return {k: first.get(k, 0.0) + second.get(k, 0.0) for k in {**first, **second}}


@contextmanager
def _removed_on_error(folder: Path, *, is_new: bool) -> Iterator[None]:
    """Remove a new folder's files if the user's mistake is found late."""
    existed = folder.exists()
    try:
        yield
    except UserError:
        if is_new:
            for path in folder.iterdir() if existed else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed and folder.exists():
                shutil.rmtree(folder)
        raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let the report be written to its end: a notebook's kernel may be interrupted twice."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that a terminated search is saved like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
