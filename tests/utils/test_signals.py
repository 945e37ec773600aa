"""A terminated process saves what it has, in every phase."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from autopeft.utils.signals import postponed, terminable, uninterrupted


@pytest.mark.usefixtures("hangup_heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_block_is_interrupted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), terminable():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_report_is_written_to_its_end() -> None:
    with terminable(), uninterrupted():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_write_ends_before_it_is_interrupted(number: signal.Signals) -> None:
    done = []

    def write() -> None:
        with postponed():
            signal.raise_signal(number)
            done.append(1)

    with pytest.raises(KeyboardInterrupt), terminable():
        write()
    assert done


def test_a_second_signal_does_not_wait() -> None:
    done = []

    def write() -> None:
        with postponed():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not done


def test_a_thread_installs_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with terminable(), uninterrupted():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
