"""A backend: workers in processes of their own, without Ray."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import autopeft

_SPAWN = multiprocessing.get_context("spawn")


def _work(pipe: Connection, context: autopeft.WorkerContext) -> None:
    """Run one job after another; the driver answers each message with whether the job goes on."""
    try:
        executor = autopeft.make_executor(context)
    except autopeft.AutoPeftError as error:  # No job can run.
        pipe.send(error)
        return
    with suppress(EOFError):  # The driver is gone.
        while True:
            executor.begin([pipe.recv()])
            pipe.send(executor.advance()[0])
            while pipe.recv():
                pipe.send(executor.advance()[0])
            executor.drop([0])


class Processes(autopeft.Backend):
    """Runs each worker in a process."""

    def __init__(self, context: autopeft.WorkerContext) -> None:
        self._context = context
        self._workers: list[multiprocessing.process.BaseProcess] = []

    def __exit__(self, *error: object) -> None:
        """Stop the workers, whatever they do."""
        for process in self._workers:
            process.kill()
            process.join()

    def run(self, dispatcher: autopeft.Dispatcher) -> None:
        """Give jobs to idle workers, and their messages to the dispatcher."""
        idle = [self._start() for _ in range(self._context.settings.workers or 1)]
        running = {}
        while dispatcher.phase != "done":
            while idle and (job := dispatcher.next_job()) is not None:
                pipe = idle.pop()
                pipe.send(job)
                running[pipe] = job
            ready = wait(list(running), timeout=1.0) if running else []
            if not ready:
                dispatcher.tick()  # The time that is left goes on.
            for pipe in [each for each in ready if isinstance(each, Connection)]:
                try:
                    message = pipe.recv()
                except EOFError:
                    dispatcher.lose(running.pop(pipe), "its worker died")
                    idle.append(self._start())
                    continue
                if isinstance(message, autopeft.AutoPeftError):
                    raise message
                goes_on = dispatcher.take(running[pipe], message)
                pipe.send(goes_on)
                if not goes_on:
                    del running[pipe]
                    idle.append(pipe)

    def _start(self) -> Connection:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_work, args=(theirs, self._context), daemon=True)
        process.start()
        theirs.close()  # Else nobody would learn that the worker died.
        self._workers.append(process)
        return ours
