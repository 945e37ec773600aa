"""Backend: what runs a dispatcher's jobs on workers; and the table of them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from autopeft.errors import SettingsError
from autopeft.utils.gc import paused_gc
from autopeft.utils.registry import Registry, blamed, describe

if TYPE_CHECKING:
    from autopeft.engine.dispatcher import Dispatcher
    from autopeft.engine.messages import WorkerContext

F = TypeVar("F")


class Backend(AbstractContextManager["Backend", None], Protocol):
    """Runs jobs until the dispatcher has no more.

    It is made with a `WorkerContext`, which can be pickled and holds all that a worker needs. As a
    context manager, entering it starts what its workers need, and leaving it stops them, whatever
    they do.

    On the driver it calls `dispatcher.next_job()` for each job, gives every message of a worker to
    `dispatcher.take()`, stops a job for which that returns False, and calls `dispatcher.lose()`
    for jobs that are lost with their worker. About once a second it calls `dispatcher.tick()`, with
    what workers tell of their steps and of themselves; that returns jobs whose workers hang, which
    it replaces, with a call of `dispatcher.fail()`. All calls of the dispatcher come from one
    thread.

    A worker makes a `JobExecutor` with `make_executor` once, and runs one job after another on it.

    Example:
        >>> class OneProcess(autopeft.Backend):
        ...     def __init__(self, context):
        ...         self.context = context
        ...
        ...     def __exit__(self, *error):
        ...         pass
        ...
        ...     def run(self, dispatcher):
        ...         on_step = lambda step: dispatcher.tick([step])
        ...         executor = autopeft.make_executor(self.context, on_step)
        ...         while (job := dispatcher.next_job()) is not None:
        ...             executor.begin([job])
        ...             while dispatcher.take(job, executor.advance()[0]):
        ...                 pass
        ...             executor.drop([0])
        >>> settings = autopeft.SearchSettings(model="gpt2", data="a.csv", backend="local")
        >>> autopeft.register_backend("one-process", OneProcess) is OneProcess
        True
    """

    @abstractmethod
    def run(self, dispatcher: Dispatcher) -> None:
        """Run jobs until `dispatcher.phase` is "done".

        Raises:
            TrainingFailure: if workers cannot start.
            KeyboardInterrupt: if the user stops the search.
        """


BackendFactory = Callable[["WorkerContext"], Backend]


def _as_backend(_name: str, part: Any) -> BackendFactory:
    if not callable(part):
        raise TypeError("must be a class of backends, or a function that makes one of a context")
    if isinstance(part, type):
        lacking = [name for name in ("__enter__", "__exit__", "run") if not hasattr(part, name)]
        if lacking:
            raise TypeError(f"lacks {', '.join(lacking)}, which a Backend has")
    try:
        inspect.signature(part).bind(None)
    except (TypeError, ValueError) as wrong:
        raise TypeError(f"must be made with a WorkerContext alone ({wrong})") from None
    factory: BackendFactory = part
    return factory


BACKENDS: Registry[BackendFactory] = Registry(
    "backend", "autopeft.backends", __name__, _as_backend, keeps_given=False, is_carried=False
)
"""Every backend; each is imported when it is used."""


@overload
def register_backend(name: str, backend: None = None) -> Callable[[F], F]: ...
@overload
def register_backend(name: str, backend: F) -> F: ...
@overload
def register_backend(name: F) -> F: ...
def register_backend(name: Any, backend: Any = None) -> Any:
    """Register a backend, so that settings can name it.

    A call, or a decorator of a class. A package offers one with an entry point of the group
    `autopeft.backends`.

    Args:
        name: The class, or its name in settings.
        backend: The class, a function of a `WorkerContext` that makes a backend, or where it is
            found, as `module:name`.

    Returns:
        The class or function, or a decorator.

    Raises:
        SettingsError: if the name stands for another backend.

    Example:
        >>> autopeft.register_backend("cluster", "my_package.cluster:Cluster")
        'my_package.cluster:Cluster'
    """
    return BACKENDS.door(name, backend)


_BUILT_IN = {
    "ray": "autopeft.engine.ray_backend:RayBackend",
    "local": "autopeft.engine.local_backend:LocalBackend",
}
for _backend, _path in _BUILT_IN.items():
    register_backend(_backend, _path)


def check_backend(name: str) -> None:
    """Check what the settings name as backend; Ray is not imported for that.

    Raises:
        SettingsError: if there is no such backend, or it cannot be imported.
    """
    if name in _BUILT_IN:
        return
    if ":" not in name and name not in BACKENDS:
        problem = "no such backend is registered or installed"
        remedy = f"use {', '.join(BACKENDS)} or package.module:name, or give the object in Python"
        raise SettingsError("backend", name, problem, remedy)
    BACKENDS.resolve("backend", name)


def named_errors(name: str) -> AbstractContextManager[None]:
    """Name the errors of a backend of the user's in one line; ours are ours."""
    return nullcontext() if name in _BUILT_IN else blamed("backend", name, "fails")


def run_all(backend: Backend, name: str, dispatcher: Dispatcher) -> None:
    """Run a backend until the search is over.

    Raises:
        SettingsError: if it returns before.
    """
    backend.run(dispatcher)
    if dispatcher.phase != "done":
        problem = f"run returned in the phase {dispatcher.phase!r}, before all jobs were run"
        remedy = 'run jobs until `dispatcher.phase == "done"`; the search can be resumed'
        raise SettingsError("backend", name, problem, remedy)


def make_backend(context: WorkerContext) -> Backend:
    """Make the backend that the settings name.

    Raises:
        SettingsError: if a backend of the user's cannot be made.
    """
    name = context.settings.backend
    # Imported late: users learn of mistakes in their settings without waiting for torch and ray.
    with paused_gc():
        factory = BACKENDS.resolve("backend", name)
    with blamed("backend", name, "cannot be made with a WorkerContext"):
        made = factory(context)
    if not callable(getattr(made, "run", None)):
        problem = f"returned {describe(made)}, which has no run(dispatcher)"
        raise SettingsError("backend", name, problem, "return an autopeft.Backend")
    return made
