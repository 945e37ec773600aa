"""Runs a training function of the user's own, one job at a time. Imports neither torch nor ray."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from autopeft.confirm.finalists import SeedScore
from autopeft.costs.objectives import COSTS, reported_beside
from autopeft.engine.evaluate import (
    EVALUATORS,
    TEST,
    TrialOutOfTime,
    TrialReport,
    TrialStopped,
    parse_result,
)
from autopeft.engine.messages import (
    Activity,
    ConfirmMessage,
    FailureMessage,
    Job,
    Message,
    OnStep,
    RungMessage,
    StepMessage,
    TimeUpMessage,
    WorkerContext,
    ignore_step,
)
from autopeft.errors import AutoPeftError, OutOfTime, TrainingFailure
from autopeft.training.step_clock import StepClock
from autopeft.trial import RungReport
from autopeft.utils.formatting import one_line
from autopeft.utils.quiet import without_bars
from autopeft.utils.scratch import scratch_folder

_SECONDS_AT_REPORT = 0.5
"""How long a function that waits at a report may take to leave."""

_SECONDS_TO_LEAVE = 10.0
"""How long an interrupted search waits for a function that does not come to a report."""

_THREAD = "evaluate"
"""Name of the thread of a call."""

_SILENT = (
    "evaluate reported nothing before its end, so no trial can be stopped early; "
    "call report(step, score) at each step of report.rungs"
)


class FunctionExecutor:
    """Calls the function in a thread that waits at each report for the search's answer.

    The next job begins only when the function of the last one has ended, so that two of them never
    share a GPU's memory.
    """

    def __init__(self, context: WorkerContext, on_step: OnStep = ignore_step) -> None:
        self._context = context
        self._on_step = on_step
        # A function that cannot be found here is every job's problem.
        EVALUATORS.resolve("evaluate", context.settings.evaluate)
        self._call: _Call | None = None

    def begin(self, jobs: Sequence[Job]) -> None:
        """Take a job; jobs that are trained together need a model that autopeft trains."""
        (job,) = jobs
        self.drop([0])
        if any(thread.name == _THREAD for thread in threading.enumerate()):
            raise TrainingFailure(
                "a call of evaluate that hung still runs in this process; resume the search in a "
                "new one, or use --backend ray, which replaces such workers"
            )
        self._call = _Call(job, self._context)

    def advance(self) -> dict[int, Message]:
        """Let the function run to its next report, or to its end."""
        assert self._call is not None, "begin comes first"
        message = self._call.advance()
        while isinstance(message, StepMessage):
            self._on_step(message)
            message = self._call.next_message()
        return {0: message}

    def drop(self, indices: Iterable[int]) -> None:
        """Stop the job at its report, and wait until its function has ended."""
        if self._call is not None and 0 in indices:
            self._call.stop(None)
            self._call = None

    def clear(self) -> None:
        """Stop what runs, and wait a little."""
        if self._call is not None:
            self._call.stop(_SECONDS_TO_LEAVE)
            self._call = None


class _Call:
    """One call of the function, in a thread of its own."""

    def __init__(self, job: Job, context: WorkerContext) -> None:
        self._job = job
        self._context = context
        self._quality = context.objectives[0]
        self._messages: SimpleQueue[Message | StepMessage] = SimpleQueue()
        self._answers: SimpleQueue[None] = SimpleQueue()
        self._is_stopped = False
        self._clock = StepClock(
            job.deadline, lambda *at: self._messages.put(StepMessage.of(job, *at))
        )
        self._last_step = 0
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._seconds = 0.0
        self._told_seconds = 0.0
        self._resumed = 0.0

    def advance(self) -> Message | StepMessage:
        """Return the next message; the function runs until then."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(None)
        return self.next_message()

    def next_message(self) -> Message | StepMessage:
        """Wait for the next message of a function that runs."""
        return self._messages.get()

    def stop(self, seconds: float | None) -> None:
        """End the function at its next report; with `seconds`, at once, waiting no longer."""
        thread = self._thread.ident
        if thread is None or not self._thread.is_alive():
            return
        self._is_stopped = True
        self._answers.put(None)
        self._thread.join(_SECONDS_AT_REPORT if seconds is not None else None)
        if seconds is not None and self._thread.is_alive():
            # The user waits: the function need not come to a report. Python raises in its thread as
            # soon as what runs in C returns.
            error = ctypes.py_object(TrialStopped)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)
            self._thread.join(seconds)

    # In the thread

    def _run(self) -> None:
        with suppress(TrialStopped):  # One that comes when the function has just ended.
            self._call()

    def _call(self) -> None:
        self._resumed = time.perf_counter()
        message: Message
        try:
            self._clock.check()
            message = self._message()
        except (TrialOutOfTime, OutOfTime):
            step = max(self._last_step, self._clock.step)
            message = TimeUpMessage(step, self._flops(step), self._activity())
        except TrialStopped:
            reason = "evaluate raised TrialStopped, but nothing stopped it"
            message = FailureMessage(reason, self._activity())
        except AutoPeftError as error:
            message = FailureMessage(str(error)[:500], self._activity())
        except BaseException as error:  # Also SystemExit: a user's function may do anything.
            reason = one_line(error)
            message = FailureMessage(reason[:500], self._activity())
        if not self._is_stopped:
            self._messages.put(message)

    def _message(self) -> Message:
        function = EVALUATORS.resolve("evaluate", self._context.settings.evaluate)
        is_confirming = self._job.kind == "confirm"
        with scratch_folder() as folder:
            report = TrialReport(
                rungs=self._context.rungs,
                is_confirming=is_confirming,
                folder=folder,
                send=self._send,
                clock=self._clock,
            )
            with without_bars():
                returned = function(self._job.candidate, seed=self._job.seed, report=report)
            metrics, rows = parse_result(returned, self._quality)
            files = {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(folder.rglob("*") if is_confirming else ())
                if path.is_file()
            }
        activity = self._activity()
        measured = self._measured(metrics)
        if not is_confirming:
            steps = self._job.candidate.train.steps
            is_silent = not report.last_step and len(report.rungs) > 1
            return RungMessage(
                self._rung(steps, metrics[self._quality], metrics),
                is_last=True,
                measured=measured,
                activity=activity,
                # An empty plan has nothing to train.
                warning=_SILENT if is_silent and self._job.candidate.plan.specs else "",
            )
        score = self._score(metrics, rows, measured)
        return ConfirmMessage(score, files, activity, self._job.costs.train_flops)

    def _send(self, step: int, score: float) -> None:
        if self._is_stopped:
            raise TrialStopped("the trial was stopped")
        self._last_step = step
        if self._job.kind == "confirm":
            if self._clock.seconds_left < 0:
                raise TrialOutOfTime("its time was up")
            return
        self._messages.put(
            RungMessage(self._rung(step, score, {}), is_last=False, activity=self._activity())
        )
        self._answers.get()
        self._resumed = time.perf_counter()
        if self._is_stopped:
            raise TrialStopped("the trial was stopped")

    def _rung(self, step: int, score: float, metrics: dict[str, float]) -> RungReport:
        return RungReport(
            step=step,
            score=score,
            loss=metrics.get("loss", float("nan")),
            metrics=metrics,
            seconds=self._seconds,
            evaluation_seconds=0.0,
            flops=self._flops(step),
        )

    def _flops(self, step: int) -> float:
        return self._job.costs.train_flops * min(1.0, step / self._job.candidate.train.steps)

    def _activity(self) -> Activity:
        """Return the seconds since the last message; the function waits from now on."""
        now = time.perf_counter()
        self._seconds += now - self._resumed
        self._resumed = now
        new, self._told_seconds = self._seconds - self._told_seconds, self._seconds
        return Activity(train=new)

    def _measured(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the measured costs: those that the function returned, and its seconds."""
        measured = {"train_seconds": self._seconds, "validation_seconds": 0.0}
        for name in self._context.measured[1:]:
            is_known = (name in COSTS and COSTS[name].is_known) or ":" in name
            if is_known or name in measured:
                continue
            if name not in metrics:
                what = "has a limit" if name in self._context.limited else "is an objective"
                raise TrainingFailure(f"evaluate returned no {name!r}, which {what}")
            measured[name] = metrics[name]
        return measured

    def _score(
        self, metrics: dict[str, float], rows: tuple[float, ...], measured: dict[str, Any]
    ) -> SeedScore:
        validation = {k: v for k, v in metrics.items() if not k.startswith(TEST)}
        unseen = {k.removeprefix(TEST): v for k, v in metrics.items() if k.startswith(TEST)}
        is_held_out = self._quality in unseen
        test = unseen if is_held_out else validation
        sign = -1.0 if self._context.settings.direction == "minimize" else 1.0
        objectives = {self._quality: test[self._quality]}
        for name in self._context.objectives[1:]:
            known = measured[name] if name in measured else self._job.costs.value(name)
            objectives[name] = float(known)
        return SeedScore(
            seed=self._job.seed,
            validation=validation,
            test=test,
            test_rows=tuple(sign * row for row in rows),
            objectives=objectives,
            is_held_out=is_held_out,
            further=reported_beside(measured, self._context.limited),
        )
