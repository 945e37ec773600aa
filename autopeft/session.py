"""One sitting of a search: the one composer of data, space, controller, workers and report."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from autopeft.callbacks import Observer
from autopeft.confirm.finalists import Finalist, as_lora_baselines, finalists
from autopeft.confirm.store import ConfirmationStore
from autopeft.confirm.verdict import judge, pick_best
from autopeft.costs.objectives import Objective
from autopeft.engine.budget import Ledger
from autopeft.engine.dispatcher import Dispatcher, Snapshot
from autopeft.errors import UserError
from autopeft.prepare import Preparation, check_budget, prepare, versions
from autopeft.reporting.front_view import view
from autopeft.reporting.record import AdapterScore, BudgetReport, DataSummary, RunRecord
from autopeft.reporting.write import write_report
from autopeft.result import SearchResult
from autopeft.searcher.controller import INTERRUPTED, SearchController
from autopeft.searcher.earlier import read_prior
from autopeft.searcher.samplers.warm_start import PriorTrial
from autopeft.settings import SearchSettings
from autopeft.trial import Outcome
from autopeft.utils.gc import quick_imports
from autopeft.workspace import Workspace


@dataclass
class _Clock:
    """Wall-clock seconds by phase."""

    phases: dict[str, float]
    began: float

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the block's seconds under `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began


class Sitting:
    """One sitting of a search, from settings to report.

    Args:
        workspace: The output folder.
        observer: Told of progress.
        began: When the user asked for it, in seconds of `time.monotonic()`.
        is_resumed: Whether an earlier sitting is gone on with.
    """

    def __init__(
        self, workspace: Workspace, observer: Observer, *, began: float, is_resumed: bool = False
    ) -> None:
        self._workspace = workspace
        self._observer = observer
        self._is_resumed = is_resumed
        self._started = datetime.now(UTC) - timedelta(seconds=time.monotonic() - began)
        self._clock = _Clock({"startup": time.monotonic() - began}, began)

    def run(self, settings: SearchSettings) -> SearchResult:
        """Searches.

        Args:
            settings: As the user gave them.

        Returns:
            The result, as the output folder holds it.

        Raises:
            UserError: for a mistake in the settings, before any training.
            KeyboardInterrupt: after Ctrl-C or SIGTERM; everything is saved.
        """
        ready = prepare(settings, note=self._observer.note, phase=self._clock.phase)
        with self._clock.phase("startup"):
            before = self._workspace.recall("spent") if self._is_resumed else {}
            if not self._is_resumed:
                check_budget(ready, spent_seconds=time.monotonic() - self._clock.began)
            with _removed_on_error(self._workspace.folder, is_new=not self._is_resumed):
                # What is kept is what the user asked for; the machine is found anew on resume.
                self._workspace.create(
                    replace(
                        ready.settings,
                        workers=settings.workers,
                        gpus_per_worker=settings.gpus_per_worker,
                    )
                )
                self._workspace.remember("splits", ready.splits())
                controller = self._open(ready)
        ledger = Ledger(
            ready.budget,
            ready.settings.confirm_share,
            spent_seconds=before.get("seconds", 0.0) + time.monotonic() - self._clock.began,
            # The study knows: a trial that was interrupted is to be done again, so not yet spent.
            spent_trials=sum(o.reason != INTERRUPTED for o in controller.outcomes()),
            spent_flops=before.get("flops", 0.0),
        )
        return self._work(ready, controller, ledger, before)

    def _open(self, ready: Preparation) -> SearchController:
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
            prior=self._prior(settings),
        )
        self._observer.note(f"watch it: autopeft dashboard {self._workspace.folder}")
        return controller

    def _prior(self, settings: SearchSettings) -> tuple[PriorTrial, ...]:
        """The earlier search's trials, kept with this one: resuming needs no other folder."""
        if self._is_resumed or not settings.warm_start:
            rows = self._workspace.recall("prior").get("trials", [])
            return tuple(PriorTrial.from_json(row) for row in rows)
        earlier = Workspace(settings.warm_start)
        before = earlier.settings()
        trials = read_prior(earlier.storage(before), earlier.study_name(before))
        self._workspace.remember("prior", {"trials": [trial.to_json() for trial in trials]})
        self._observer.note(f"warm start: {len(trials)} trials of {earlier.folder}")
        return trials

    def _work(
        self,
        ready: Preparation,
        controller: SearchController,
        ledger: Ledger,
        before: Mapping[str, Any],
    ) -> SearchResult:
        settings = ready.settings
        store = ConfirmationStore(self._workspace.folder)
        dispatcher = Dispatcher(
            controller,
            ledger,
            store,
            ready.objectives,
            seed=settings.seed,
            confirm_seeds=settings.confirm_seeds,
            max_finalists=settings.max_finalists,
            n_workers=ready.n_workers,
            pack=ready.pack,
            # On a CPU the test split is scored in fp32, which takes twice the time of bf16.
            test_share=2.0 * len(ready.data.test) / len(ready.data.validation),
            compress=settings.compress,
            observer=self._observe(ledger),
        )
        is_complete = False
        try:
            self._train(ready, dispatcher)
            is_complete = True
        finally:
            with self._clock.phase("report"):
                record = self._record(
                    ready, controller, ledger, dispatcher, store, is_complete, before
                )
                write_report(record, self._workspace.folder)
            self._workspace.remember("spent", self._spent(ledger, record))
        return SearchResult.read(self._workspace.folder)

    def _spent(self, ledger: Ledger, record: RunRecord) -> dict[str, Any]:
        budget = record.budget
        return {
            **ledger.to_json(),
            "phases": dict(budget.phases),
            "workers": dict(budget.worker_seconds),
        }

    def _observe(self, ledger: Ledger) -> Callable[[Snapshot], None]:
        last = 0.0

        def observe(snapshot: Snapshot) -> None:
            nonlocal last
            # The budget already spent must survive a kill, to the second.
            if time.monotonic() - last > 1.0:
                last = time.monotonic()
                kept = self._workspace.recall("spent")
                self._workspace.remember("spent", {**kept, **ledger.to_json()})
            self._observer.snapshot(snapshot)

        return observe

    def _train(self, ready: Preparation, dispatcher: Dispatcher) -> None:
        with self._clock.phase("startup"):
            # Imported here: what the user got wrong has been told by now, without waiting for ray.
            with quick_imports():
                from autopeft.engine import ray_backend

            session = ray_backend.RaySession(
                ready.settings.ray_address,
                n_workers=ready.n_workers,
                object_bytes=ready.data_bytes,
            )
        with session, _terminable():
            dispatcher.start()
            ray_backend.run(
                dispatcher,
                ready.context(),
                n_workers=ready.n_workers,
                gpus_per_worker=ready.gpus_per_worker,
                pack=ready.pack,
            )

    def _record(
        self,
        ready: Preparation,
        controller: SearchController,
        ledger: Ledger,
        dispatcher: Dispatcher,
        store: ConfirmationStore,
        is_complete: bool,
        before: Mapping[str, Any],
    ) -> RunRecord:
        outcomes = controller.outcomes()
        confirmed = finalists(outcomes, store.scores(), store.compressed())
        quality = ready.objectives[0]
        baseline = _tuned_lora(confirmed, outcomes, quality)
        reference = next((o.candidate.digest for o in outcomes if o.origin == "reference"), None)
        scores = {}
        for finalist in confirmed:
            # The seed to hand out is chosen on validation, like everything else.
            chosen = max(finalist.seeds, key=lambda s: quality.sign() * s.validation[quality.name])
            store.publish(finalist, chosen.seed)
            scores[finalist.candidate.digest] = AdapterScore(
                chosen.seed, "test", dict(chosen.test), len(chosen.test_rows)
            )
        record = RunRecord(
            settings=ready.settings.to_mapping(),
            objectives=ready.objectives,
            outcomes=outcomes,
            budget=self._budget(ready, ledger, dispatcher, before),
            finalists=confirmed,
            front=tuple(o.candidate.digest for o in controller.front()),
            baseline=baseline,
            reference=reference,
            verdict=judge(confirmed, ready.objectives),
            adapter_scores=scores,
            data=DataSummary(
                {name: len(rows) for name, rows in ready.data.splits.items()},
                ready.data.n_dropped,
                ready.data.labels,
                ready.data.fingerprint,
            ),
            versions=versions(),
            warnings=tuple(dispatcher.warnings),
            started=self._started.isoformat(timespec="seconds"),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            is_complete=is_complete,
        )
        # Test means decide which finalists others dominate; which of the rest is best, validation.
        members = {entry.digest for entry in view(record).front}
        rows = [finalist for finalist in confirmed if finalist.candidate.digest in members]
        best = pick_best(rows, ready.objectives, rule=ready.settings.pick)
        if rows and best is None:
            unmet = f"no member of the front keeps pick={ready.settings.pick}, so none is the pick"
            record = replace(record, warnings=(*record.warnings, unmet))
        return replace(record, best=best)

    def _budget(
        self,
        ready: Preparation,
        ledger: Ledger,
        dispatcher: Dispatcher,
        before: Mapping[str, Any],
    ) -> BudgetReport:
        phases = dict(self._clock.phases)
        worker = dispatcher.activity
        for name, seconds in dispatcher.phase_seconds().items():
            phases[name] = phases.get(name, 0.0) + seconds
        working = phases.get("search", 0.0) + phases.get("confirmation", 0.0)
        workers = {
            "train": worker.train,
            "evaluate": worker.evaluate,
            "prefix": worker.prefix,
            "attach": worker.attach,
            "idle": max(0.0, ready.n_workers * working - worker.total),
        }
        return BudgetReport(
            limit=ready.budget.text,
            spent_seconds=ledger.spent_seconds,
            spent_flops=ledger.spent_flops,
            n_trials=ledger.spent_trials,
            phases=_sum(before.get("phases", {}), phases),
            worker_seconds=_sum(before.get("workers", {}), workers),
        )


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The seconds of two sittings, by name."""
    return {k: first.get(k, 0.0) + second.get(k, 0.0) for k in {**first, **second}}


def _tuned_lora(
    confirmed: tuple[Finalist, ...], outcomes: tuple[Outcome, ...], quality: Objective
) -> str | None:
    """Digest of the best LoRA baseline on validation: over the seeds, else of its one trial."""
    finals = [f for f in confirmed if f.origin == "baseline"]
    if finals:
        best = max(finals, key=lambda f: quality.sign() * f.mean(quality.name, "validation"))
        return best.candidate.digest
    trials = [
        o for o in as_lora_baselines(outcomes) if o.origin == "baseline" and o.state == "complete"
    ]
    if not trials:
        return None
    top = max(trials, key=lambda o: quality.sign() * o.objectives[quality.name])
    return top.candidate.digest


@contextmanager
def _removed_on_error(folder: Path, *, is_new: bool) -> Iterator[None]:
    """A user's mistake found late leaves nothing half-written behind."""
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
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt, so that a terminated search saves like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
