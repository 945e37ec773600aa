"""Checks a backend: each job runs once, a stop is obeyed, nothing is lost and nothing is left."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.confirm.store import ConfirmationStore
from autopeft.engine.backend import BACKENDS, Backend, BackendFactory
from autopeft.engine.budget import Budget, BudgetTracker
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.evaluate import EVALUATORS
from autopeft.engine.messages import BeatMessage, HungJob, Job, Message, StepMessage, WorkerContext
from autopeft.errors import AutoPeftError
from autopeft.searcher.controller import SearchController
from autopeft.settings import SearchSettings
from autopeft.testing.plain_space import plain_prices, plain_space
from autopeft.testing.requirement import Requirement
from autopeft.trial import Decision, Trial
from autopeft.utils.registry import carried

_RUNGS = (1, 3, 9)
_N_TRIALS = 8
_STOPPED = (3, 4)
"""Trials that are stopped at their first rung."""

_PATIENCE = 20.0
"""Seconds that workers may take to end after the backend is left."""

_UNKNOWN = "autopeft.testing.backend:no_such_function"


def check_backend(backend: Any, *, workers: int = 2) -> None:
    """Check that a backend keeps the contract of `autopeft.Backend`.

    It runs small searches over a function: each job is run once; a job that the dispatcher stops
    goes no further; jobs of a worker that dies are reported lost; a worker that cannot start ends
    the run with an error; Ctrl-C gets through; and when the backend is left, its workers are gone.
    A backend that waits for ever for a message that it lost hangs here too.

    Args:
        backend: The class, a function that makes one, or its name. Its workers must see this
            machine's temporary files.
        workers: Workers that the settings ask for.

    Raises:
        AssertionError: if it does not; the message is one line.
        SettingsError: if it is no backend.

    Example:
        >>> from autopeft.testing import check_backend
        >>> check_backend("local", workers=1)
    """
    make = BACKENDS.resolve("backend", backend)
    name = backend if isinstance(backend, str) else getattr(make, "__name__", "given")
    checked = _Checked(Requirement(f"backend {name}"), make, workers)
    with tempfile.TemporaryDirectory(prefix="autopeft-") as folder:
        is_here = checked.runs_all(Path(folder) / "whole")
        if not is_here:  # Whatever ends this process's worker ends this process.
            checked.reports_lost(Path(folder) / "lost")
        checked.is_interrupted(Path(folder) / "interrupted")
        checked.tells_that_it_cannot_start(Path(folder) / "cannot")


def _training(folder: Path, *, is_fatal: bool) -> Callable[..., dict[str, float]]:
    """Return a training function that notes what it does in a file of its own for each call.

    If `is_fatal`, its process dies in the trial of the empty plan.
    """

    def train(candidate: Any, *, seed: int, report: Any) -> dict[str, float]:
        kind = "confirm" if report.is_confirming else "search"
        note = folder / f"{kind}-{candidate.digest}-{seed}.{uuid.uuid4().hex}"
        note.write_text(f"{socket.gethostname()} {os.getpid()}\n")
        for step in _RUNGS[:-1]:
            report(step, 0.5)
            with note.open("a") as file:
                file.write(f"{step}\n")
            if is_fatal and kind == "search" and not candidate.plan.specs:
                os._exit(1)
        return {"accuracy": 0.5}

    return train


@dataclass(frozen=True)
class _Note:
    """What one call of the function wrote."""

    job: str
    host: str
    pid: int
    steps: tuple[int, ...]


def _notes(folder: Path) -> list[_Note]:
    found = []
    for path in sorted(folder.iterdir()):
        place, *steps = path.read_text().splitlines()
        host, pid = place.split()
        found.append(_Note(path.name.partition(".")[0], host, int(pid), tuple(map(int, steps))))
    return found


def _name(job: Job) -> str:
    return "-".join(map(str, job.key))


class _Stopping(SearchController):
    """Stops some trials at their first rung."""

    def report(self, trial: Trial, step: int, score: float, **further: Any) -> Decision:
        decision = super().report(trial, step, score, **further)
        if trial.number not in _STOPPED:
            return decision
        self.tell(trial, stopped="stopped by the check")
        return Decision.STOP


class _Watched(Dispatcher):
    """A dispatcher that notes how it is used."""

    def __init__(self, *arguments: Any, interrupt_at: int | None) -> None:
        super().__init__(*arguments)
        self.handed: list[Job] = []
        self.problems: list[str] = []
        self.threads: set[int] = set()
        self._n_taken = 0
        self._interrupt_at = interrupt_at

    def next_job(self) -> Job | None:
        self.threads.add(threading.get_ident())
        job = super().next_job()
        if job is not None:
            self.handed.append(job)
        return job

    def take(self, job: Job, message: Message) -> bool:
        self.threads.add(threading.get_ident())
        if not self.is_running(job):
            self.problems.append(f"gives a message of {_name(job)}, which has ended; stop it then")
        self._n_taken += 1
        if self._n_taken == self._interrupt_at:
            raise KeyboardInterrupt
        return super().take(job, message)

    def tick(
        self, steps: Iterable[StepMessage] = (), beats: Iterable[BeatMessage] = ()
    ) -> tuple[HungJob, ...]:
        self.threads.add(threading.get_ident())
        return super().tick(steps, beats)

    def lose(self, job: Job, reason: str) -> None:
        self.threads.add(threading.get_ident())
        super().lose(job, reason)

    def fail(self, job: Job, reason: str) -> None:
        self.threads.add(threading.get_ident())
        super().fail(job, reason)


class _Checked:
    def __init__(self, require: Requirement, make: BackendFactory, workers: int) -> None:
        self._require = require
        self._make = make
        self._workers = workers

    def runs_all(self, folder: Path) -> bool:
        """Check a whole search; return whether its jobs ran in this process."""
        with self._search(folder, stopped=True) as (backend, dispatcher, controller):
            with self._require.no_error("a search"), backend:
                backend.run(dispatcher)
        self._is_done(dispatcher)
        states = {trial.number: trial for trial in controller.trials()}
        for number, trial in states.items():
            wanted = "pruned" if number in _STOPPED else "complete"
            text = f"trial {number} is {trial.state} ({trial.reason}) and should be {wanted}"
            self._require.that(trial.state == wanted, text)
        notes = _notes(folder)
        runs = Counter(note.job for note in notes)
        for job in dispatcher.handed:
            text = f"the job {_name(job)} was run {runs[_name(job)]} times; run it once"
            self._require.that(runs[_name(job)] == 1, text)
        stopped = {_name(job) for job in dispatcher.handed if job.number in _STOPPED}
        for note in notes:
            if note.job in stopped:
                text = f"the job {note.job} was stopped, but went on to step {note.steps[-1:]}"
                self._require.that(note.steps == (), f"{text}; end it where take() returns False")
        self._is_left(notes)
        return any(self._is_of_here(note) and note.pid == os.getpid() for note in notes)

    def reports_lost(self, folder: Path) -> None:
        """Check a search in which a worker dies."""
        with self._search(folder, is_fatal=True) as (backend, dispatcher, controller):
            with self._require.no_error("a search whose worker dies"), backend:
                backend.run(dispatcher)
        self._is_done(dispatcher)
        for trial in controller.trials():
            wanted = "complete" if trial.plan.specs else "failed"
            text = (
                f"a worker died, and trial {trial.number} is {trial.state} and should be {wanted}"
            )
            self._require.that(
                trial.state == wanted, f"{text}; call dispatcher.lose() for its jobs"
            )
        self._is_left(_notes(folder))

    def is_interrupted(self, folder: Path) -> None:
        """Check that Ctrl-C gets through and leaves nothing."""
        with self._search(folder, interrupt_at=3) as (backend, dispatcher, _):
            try:
                with backend:
                    backend.run(dispatcher)
            except KeyboardInterrupt:
                pass
            else:
                self._require.that(False, "Ctrl-C in a search does not get through")
        self._is_left(_notes(folder))

    def tells_that_it_cannot_start(self, folder: Path) -> None:
        """Check a search whose workers cannot load what they train."""
        with self._search(folder, evaluate=_UNKNOWN) as (backend, dispatcher, _):
            try:
                with backend:
                    backend.run(dispatcher)
            except AutoPeftError:
                return
        text = "workers that cannot start must end the run with a TrainingFailure"
        self._require.that(False, text)

    @contextmanager
    def _search(
        self,
        folder: Path,
        *,
        stopped: bool = False,
        is_fatal: bool = False,
        interrupt_at: int | None = None,
        evaluate: str | None = None,
    ) -> Iterator[tuple[Backend, _Watched, SearchController]]:
        """Set up a search over the function; its notes go to the folder."""
        folder.mkdir()
        name = evaluate or f"train_{uuid.uuid4().hex}"
        if evaluate is None:
            EVALUATORS.register(name, _training(folder, is_fatal=is_fatal))
        settings = SearchSettings(
            model="none",
            evaluate=name,
            metric="accuracy",
            steps=_RUNGS[-1],
            workers=self._workers,
            confirm_seeds=1,
            max_finalists=1,
        )
        objectives = ("accuracy", "trainable_params")
        controller = (_Stopping if stopped else SearchController)(
            plain_space(_RUNGS[-1]),
            objectives,
            sampler="random",
            pruner="none",
            prices=plain_prices(),
        )
        budget = BudgetTracker(Budget.parse(f"{_N_TRIALS}trials"), 0.3)
        store = ConfirmationStore(folder.with_name(f"{folder.name}-confirmations"))
        dispatcher = _Watched(controller, budget, store, settings, interrupt_at=interrupt_at)
        try:
            sent = carried()
            context = WorkerContext(settings, None, _RUNGS, objectives, "cpu", carried=sent)
            self._require.pickled(context)
            with self._require.no_error("making it with a WorkerContext"):
                backend = self._make(context)
            dispatcher.start()
            yield backend, dispatcher, controller
        finally:
            EVALUATORS.forget(name)

    def _is_done(self, dispatcher: _Watched) -> None:
        self._require.that(not dispatcher.problems, "; ".join(dispatcher.problems[:1]))
        lost = [_name(job) for job in dispatcher.handed if dispatcher.is_running(job)]
        text = (
            f"run() returned, but the job {', '.join(lost[:1])} has no end; give all its messages"
        )
        self._require.that(not lost, f"{text} to take(), or call lose()")
        text = f"run() returned in the phase {dispatcher.phase!r}; run until it is 'done'"
        self._require.that(dispatcher.phase == "done", text)
        n_threads = len(dispatcher.threads)
        self._require.that(n_threads == 1, f"{n_threads} threads call the dispatcher; use one")

    def _is_of_here(self, note: _Note) -> bool:
        return note.host == socket.gethostname()

    def _is_left(self, notes: list[_Note]) -> None:
        """Check that nothing of the backend runs after it was left."""
        others = {note.pid for note in notes if self._is_of_here(note)} - {os.getpid()}
        ends = time.monotonic() + _PATIENCE
        while running := [*filter(_is_alive, others), *_functions()]:
            text = f"is left, but its workers go on ({', '.join(map(str, running))}); stop them"
            self._require.that(time.monotonic() < ends, f"{text} in __exit__")
            time.sleep(0.05)


def _functions() -> list[str]:
    """Return the threads of training functions in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name == "evaluate"]


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        # A process that has ended and that nobody has asked for is listed still.
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
