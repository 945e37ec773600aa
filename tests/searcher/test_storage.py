"""Tests of when a storage is asked again; `test_databases.py` has real ones."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, PendingRollbackError

from autopeft.errors import StorageFailure
from autopeft.searcher import storage as storage_module
from autopeft.searcher.storage import (
    TOKEN_KEY,
    RetryingStorage,
    is_transient,
    open_storage,
    reason_of,
)


class Said(Exception):
    """What a driver raises."""

    def __init__(self, text: str, **codes: str) -> None:
        super().__init__(text)
        vars(self).update(codes)


def wrapped(error: Exception) -> StorageInternalError:
    """Return the error as Optuna raises it."""
    outer = StorageInternalError("An exception is raised during the commit. This typically ...")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OperationalError("", None, Said("server closed the connection")), True),
        (InterfaceError("", None, Said("connection already closed")), True),
        (PendingRollbackError("Can't reconnect"), True),
        (OperationalError("", None, Said("disk", sqlstate="53100")), False),
        (OperationalError("", None, Said("locked", sqlite_errorname="SQLITE_BUSY")), True),
        (OperationalError("", None, Said("full", sqlite_errorname="SQLITE_FULL")), False),
        (IntegrityError("", None, Said("UNIQUE")), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_may_heal(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected
    assert is_transient(wrapped(error)) is expected


def test_the_reason_is_what_the_database_said() -> None:
    inner = OperationalError("INSERT INTO trials", {"x": 1}, sqlite3.OperationalError("full\nso"))
    assert reason_of(wrapped(inner)) == "full"
    assert reason_of(OSError(28, "No space left on device")).endswith("No space left on device")


class Gone(InMemoryStorage):
    """Creates trials, but does not answer the first few times."""

    def __init__(self, n_times: int) -> None:
        super().__init__()
        self.n_left = n_times

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        made = super().create_new_trial(study_id, template_trial)
        self.n_left -= 1
        if self.n_left >= 0:
            raise wrapped(OperationalError("", None, Said("server closed the connection")))
        return made


def started(storage: BaseStorage, **system_attrs: Any) -> int:
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "s")
    template = create_trial(state=TrialState.RUNNING, system_attrs=system_attrs)
    return storage.create_new_trial(study_id, template)


def test_a_trial_whose_creation_was_not_answered_is_created_once() -> None:
    storage = RetryingStorage(Gone(1), "here")
    assert started(storage, **{TOKEN_KEY: "t"}) == 0
    assert len(storage.get_all_trials(0)) == 1


def test_after_it_was_given_up_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("autopeft.searcher.storage.time.sleep", slept.append)
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", -1.0)
    storage = RetryingStorage(Gone(3), "here")
    with pytest.raises(StorageFailure, match="here: server closed"):
        started(storage)
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 99.0)
    with pytest.raises(StorageFailure):
        storage.create_new_trial(0)
    assert slept == []


def test_who_interrupts_the_wait_does_not_wait_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autopeft.searcher.storage.time.sleep", interrupted)
    storage = RetryingStorage(Gone(9), "here")
    with pytest.raises(KeyboardInterrupt):
        started(storage)
    with pytest.raises(StorageFailure):
        storage.create_new_trial(0)


class Signalled(Gone):
    """A storage that does not answer while a signal comes."""

    signal_at = -1

    def create_new_trial(self, *arguments: Any, **named: Any) -> int:
        if self.n_left == self.signal_at:
            signal.raise_signal(signal.SIGINT)
        return super().create_new_trial(*arguments, **named)


def ended(first: Callable[[], Any], last: Callable[[], Any]) -> None:
    """Do something, and then what a search does at its end, if it is interrupted too."""
    try:
        first()
    finally:
        last()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_after_a_signal_all_writes_share_one_short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: each of them had the whole patience once more (issue 18)."""
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 1e9)
    monkeypatch.setattr(storage_module, "_LAST_SECONDS", 0.05)
    inner = Signalled(0)
    storage = RetryingStorage(inner, "here")
    started(storage)
    inner.n_left = inner.signal_at = 10**9

    def last() -> None:
        for _ in range(2):
            with pytest.raises(StorageFailure):
                storage.create_new_trial(0)
        inner.n_left = 0  # What can be written is.
        storage.create_new_trial(0)

    with pytest.raises(KeyboardInterrupt):
        ended(lambda: storage.create_new_trial(0), last)
    inner.n_left = 3  # The process goes on after all.
    storage.create_new_trial(0)


def test_long_after_a_signal_nothing_that_was_given_up_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage_module, "_LAST_SECONDS", -1.0)
    monkeypatch.setattr(storage_module, "_HARD_SECONDS", -1.0)
    inner = Gone(0)
    storage = RetryingStorage(inner, "here")
    started(storage)
    inner.n_left = 1

    def last() -> None:
        # A server that is away may take ten seconds to say so, each time.
        for _ in range(2):
            with pytest.raises(StorageFailure, match="here: server closed"):
                storage.create_new_trial(0)

    with pytest.raises(KeyboardInterrupt):
        ended(interrupt, last)


def test_a_locked_file_does_not_keep_an_interrupted_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 1e9)
    monkeypatch.setattr(storage_module, "_LAST_SECONDS", 0.05)
    monkeypatch.setattr(storage_module, "_LOCKED_SECONDS", 1e6)
    study = optuna.create_study(storage=open_storage(tmp_path / "a.db"))
    other = sqlite3.connect(tmp_path / "a.db")
    other.execute("BEGIN EXCLUSIVE")

    def last() -> None:
        for _ in range(2):
            with pytest.raises(StorageFailure, match="database is locked"):
                study.set_user_attr("a", 1)
        other.rollback()
        study.set_user_attr("a", 2)

    with pytest.raises(KeyboardInterrupt):
        ended(interrupt, last)
    other.close()
    assert study.user_attrs["a"] == 2


def test_every_method_of_a_storage_is_passed_on() -> None:
    names = [name for name in vars(BaseStorage) if not name.startswith("_")]
    assert all(getattr(RetryingStorage, name) is not getattr(BaseStorage, name) for name in names)
