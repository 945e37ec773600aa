"""A timer calls on, whatever a call does."""

from __future__ import annotations

import threading

from autopeft.utils.timer import Timer


def test_it_calls_in_another_thread_until_the_block_ends() -> None:
    calls, enough = [], threading.Event()

    def call() -> None:
        calls.append(threading.current_thread())
        if len(calls) == 3:
            enough.set()
        raise OSError("the disk is full")

    with Timer(call, 0.001):
        assert enough.wait(30)
    n_calls = len(calls)
    assert threading.current_thread() not in calls
    assert not enough.wait(0.0) or len(calls) == n_calls
