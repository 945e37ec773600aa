"""What runs jobs on a worker, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from autopeft.engine.messages import Job, Message, OnStep, WorkerContext, ignore_step
from autopeft.utils.registry import restore


class JobExecutor(Protocol):
    """Runs one list of jobs after another. Failures are messages, never exceptions."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """Leave what is left of earlier jobs and take these."""

    def advance(self) -> dict[int, Message]:
        """Run to the next message of each job; return them by the job's index."""
        ...

    def drop(self, indices: Iterable[int]) -> None:
        """Stop these jobs, those of them that are still in progress."""

    def clear(self) -> None:
        """Stop all jobs."""


def make_executor(context: WorkerContext, on_step: OnStep = ignore_step) -> JobExecutor:
    """Load what trains, in a worker: the model, or the user's function.

    Args:
        context: As the driver sent it; what was registered there is registered here.
        on_step: Told about every two seconds how far a job is, by the thread that calls `advance`;
            a backend hands it on to `dispatcher.tick`.

    Raises:
        AutoPeftError: if it cannot be loaded; then no job can run.

    Example:
        >>> from autopeft.engine.evaluate import EVALUATORS
        >>> def train(candidate, *, seed, report):
        ...     return {"accuracy": 0.9}
        >>> settings = autopeft.SearchSettings(evaluate=EVALUATORS.text("evaluate", train))
        >>> context = autopeft.WorkerContext(settings, None, (10, 30), ("accuracy",), "cpu")
        >>> executor = autopeft.make_executor(context)
        >>> executor.clear()
    """
    if context.carried is not None:
        restore(context.carried)
    return executor_class(context)(context, on_step)


def executor_class(context: WorkerContext) -> Callable[[WorkerContext, OnStep], JobExecutor]:
    """Return what makes a search's executors: autopeft's own training, or the user's function."""
    # Imported late: a function of the user's may need neither torch nor peft.
    if context.settings.evaluate is not None:
        from autopeft.engine.function_executor import FunctionExecutor

        return FunctionExecutor
    from autopeft.engine.executor import Executor

    return Executor
