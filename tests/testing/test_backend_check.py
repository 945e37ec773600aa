"""The backends of autopeft pass the check; one that loses, repeats or leaves things is named."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import autopeft
from autopeft.engine.messages import FailureMessage
from autopeft.testing import check_backend


class Plain(autopeft.Backend):
    """The smallest backend there is."""

    executor: Any = None

    def __init__(self, context: autopeft.WorkerContext) -> None:
        self.context = context

    def __exit__(self, *error: object) -> None:
        if self.executor is not None:
            self.executor.clear()

    def run(self, dispatcher: autopeft.Dispatcher) -> None:
        self.executor = autopeft.make_executor(self.context)
        while (job := dispatcher.next_job()) is not None:
            self.train(dispatcher, job)

    def train(self, dispatcher: Any, job: Any) -> None:
        self.executor.begin([job])
        while dispatcher.take(job, self.executor.advance()[0]):
            pass
        self.executor.drop([0])


class Losing(Plain):
    def train(self, dispatcher: Any, job: Any) -> None:
        if job.number != 2:
            super().train(dispatcher, job)


class Deaf(Plain):
    """Does not stop what is to be stopped."""

    def train(self, dispatcher: Any, job: Any) -> None:
        self.executor.begin([job])
        while not getattr(message := self.executor.advance()[0], "is_last", True):
            dispatcher.take(job, message)
        dispatcher.take(job, message)


class Failing(Plain):
    def train(self, dispatcher: Any, job: Any) -> None:
        if job.number == 1:
            dispatcher.take(job, FailureMessage("lost"))
        else:
            super().train(dispatcher, job)


class Twice(Plain):
    def train(self, dispatcher: Any, job: Any) -> None:
        if job.kind == "confirm":
            self.executor.begin([job])
            self.executor.advance()
        super().train(dispatcher, job)


class Swallowing(Plain):
    def run(self, dispatcher: Any) -> None:
        try:
            super().run(dispatcher)
        except KeyboardInterrupt:
            pass


class Quiet(Plain):
    """Says nothing of workers that cannot start."""

    def run(self, dispatcher: Any) -> None:
        try:
            super().run(dispatcher)
        except autopeft.AutoPeftError:
            while (job := dispatcher.next_job()) is not None:
                dispatcher.fail(job, "no worker")


class Two(Plain):
    """Calls the dispatcher from another thread."""

    def train(self, dispatcher: Any, job: Any) -> None:
        thread = threading.Thread(target=lambda: super(Two, self).train(dispatcher, job))
        thread.start()
        thread.join()


def test_local_and_the_smallest_backend_pass() -> None:
    check_backend("local", workers=1)
    check_backend(Plain)


@pytest.mark.nightly  # It starts Ray four times.
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # Ray's own sockets and deprecations.
def test_ray_passes() -> None:
    check_backend("ray")


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (Losing, "has no end; give all its messages to take()"),
        (Deaf, "which has ended; stop it then"),
        (Failing, "trial 1 is failed (lost) and should be complete"),
        (Twice, "was run 2 times; run it once"),
        (Swallowing, "Ctrl-C in a search does not get through"),
        (Quiet, "workers that cannot start must end the run"),
        (Two, "threads call the dispatcher; use one"),
    ],
)
def test_a_broken_backend_is_named(backend: Any, text: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_backend(backend)
    assert str(caught.value).startswith(f"backend {backend.__name__}: ")
    assert text in str(caught.value)
