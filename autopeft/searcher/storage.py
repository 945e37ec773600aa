"""Opens the storage of a study, and keeps a search going while it does not answer.

A database server that is restarted, or a SQLite file that another process has locked, is asked
again for a while. What still fails, or cannot heal, such as a full disk, is one line.
"""

from __future__ import annotations

import importlib
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import optuna
import sqlalchemy.event
from optuna.exceptions import StorageInternalError
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
)
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from autopeft.errors import StorageError, StorageFailure
from autopeft.searcher.damage import check_tables, damage_named, damaged, is_damage, remedy_of
from autopeft.searcher.journal import CheckedJournal, check_journal
from autopeft.utils.databases import is_in_memory
from autopeft.utils.formatting import one_line
from autopeft.utils.quiet import ignored
from autopeft.utils.signals import postponed

T = TypeVar("T")

PATIENCE_SECONDS = 150.0
"""So long a storage that does not answer is asked again: the restart of a server takes less."""

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
"""Seconds before the second try; each wait is twice the one before, up to the latter."""

_QUIET_SECONDS = 2.0
"""A wait that is longer is told."""

_CONNECT_SECONDS = 10
"""A server that does not answer a new connection for so long counts as not there."""

_LOCKED_SECONDS = 1
"""SQLite itself waits so long for the lock of another process, such as a dashboard that reads. No
signal ends that wait, and Optuna tries to create a trial several times in one call."""

_LAST_SECONDS, _HARD_SECONDS = 5.0, 15.0
"""From its interruption, a search asks so long again in all; later each write is tried once, and
after the latter none: a batch system kills it about 30 seconds after its signal."""

_LAST_LOCKED_SECONDS = 0.2
"""SQLite itself waits so long after an interruption."""

TOKEN_KEY = "autopeft:token"
"""System attribute that tells a trial that is created from any other."""

_REMEDY = "use a path ending in .db or .log, or a URL such as sqlite:///study.db"

_REACHABLE = "check its address and your rights, and that the server is up"
_WRITABLE = "check the path and your rights, and that the disk has room"

_DRIVERS = {
    "postgresql": "pip install 'autopeft[postgresql]' for postgresql+psycopg://...",
    "grpc": "pip install 'autopeft[grpc]'",
}


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """The storage behind a URL or a path.

    Args:
        storage: An SQLAlchemy URL; `grpc://host:port` for Optuna's storage proxy; a path ending in
            .log (journal file) or .db (SQLite); None for memory; or a storage, which passes
            through.

    Raises:
        StorageError: if it cannot be opened.
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, str | Path):
        raise StorageError("storage", storage, "neither a path nor a URL", _REMEDY)
    text = str(storage)
    shown = shown_place(text)
    if "\0" in text:  # SQLite would make a file of the name before it.
        raise StorageError("storage", shown, "holds a NUL character", "remove it")
    if is_in_memory(text):
        problem = "would be lost with this process: it is a database in memory"
        raise StorageError("storage", shown, problem, "leave it out, or name a file")
    if "://" not in text and not text.endswith((".log", ".db")):
        raise StorageError("storage", shown, "neither a URL nor a .db or .log file", _REMEDY)
    with _errors_named(text):
        return RetryingStorage(_opened(text), shown)


@contextmanager
def _errors_named(text: str) -> Iterator[None]:
    """Say in one line why a storage cannot be opened."""
    shown = shown_place(text)
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        is_missing = isinstance(error, ImportError)
        kind = text.partition("://")[0].partition("+")[0]
        reason = reason_of(error)
        usual = _REACHABLE if file_of(text) is None else _WRITABLE
        remedy = _DRIVERS.get(kind, _REMEDY) if is_missing else remedy_of(reason, usual)
        problem = f"cannot be opened ({reason})"
        raise StorageError("storage", shown, problem, remedy) from None


def open_to_read(storage: str | Path | BaseStorage) -> BaseStorage:
    """The storage behind a URL or a path, opened so that nothing in it changes and none is made.

    The folder of a search may have come from others, and its settings name the storage.

    Args:
        storage: As for `open_storage`, but not None.

    Raises:
        StorageError: if there is none, or it cannot be opened; also by every write.
    """
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage)
    check_file(text)
    file, shown = file_of(text), shown_place(storage)
    if file is None or file.endswith(".log"):
        return ReadOnlyStorage(open_storage(text), shown)
    with _errors_named(text):
        inner = _sqlite(Path(file), is_read_only=True)
        return ReadOnlyStorage(RetryingStorage(inner, shown), shown)


def check_file(storage: str | Path) -> None:
    """Check that the file of a storage is there, and whole: SQLite would make an empty one.

    Raises:
        StorageError: if it is not, or lacks a table.
    """
    file = file_of(str(storage))
    if file is not None and not Path(file).is_file():
        remedy = "restore it, or check the folder and its settings"
        raise StorageError("storage", file, "no such file", remedy)
    if file is not None and not file.endswith(".log"):
        check_tables(Path(file))


def file_of(storage: str) -> str | None:
    """Return the file of a storage, which need not exist; None for a server."""
    return _sqlite_file(storage) if "://" in storage else storage


def _sqlite_file(url: str) -> str | None:
    """Return the file of a URL of SQLite; None for any other database."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if not parts.drivername.startswith("sqlite"):
        return None
    return (parts.database or ":memory:").removeprefix("file:")


def _opened(text: str) -> BaseStorage:
    if text.startswith("grpc://"):
        return _proxy(text)
    if "://" not in text and text.endswith(".log"):
        check_journal(Path(text))
        backend = CheckedJournal(text)
        with damage_named(text):
            return JournalStorage(backend)
    return _relational(text) if "://" in text else _sqlite(Path(text))


def shown_place(storage: object) -> str:
    """Return the storage for people: without the password in a URL."""
    text = str(storage)
    if "://" not in text:
        return text
    try:
        return make_url(text).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return text


def reason_of(error: BaseException) -> str:
    """Return the first line of what the database said, without the layers around it."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    said: Any = getattr(error, "orig", None) or error
    details = getattr(said, "details", None)  # of gRPC
    text = str(details() if callable(details) else said).strip()
    return (text.splitlines() or [type(said).__name__])[0].strip()[:200]


def _proxy(url: str) -> BaseStorage:
    importlib.import_module("grpc")  # Optuna would not name what it lacks.
    parts = urlsplit(url)
    with ignored(optuna.exceptions.ExperimentalWarning):
        proxy = GrpcStorageProxy(host=parts.hostname or "localhost", port=parts.port or 13000)
    proxy.wait_server_ready(timeout=_CONNECT_SECONDS)
    return proxy


def _sqlite(path: Path, *, is_read_only: bool = False) -> BaseStorage:
    uri = f"file:{quote(str(path.expanduser().absolute()))}?mode={'ro' if is_read_only else 'rwc'}"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, timeout=_LOCKED_SECONDS, check_same_thread=False)

    # A URL cannot hold every name of a file: `?` begins its query, and Optuna formats braces.
    return _relational("sqlite:///study.db", connect)


def _relational(url: str, connect: Callable[[], Any] | None = None) -> BaseStorage:
    options: dict[str, Any] = {"pool_pre_ping": True}
    driver = make_url(url).drivername
    if connect is not None:
        options = {"creator": connect}
    elif driver.startswith("sqlite"):
        options = {"connect_args": {"timeout": _LOCKED_SECONDS}}
    elif driver in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        # A machine that vanishes closes no connection.
        alive = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
        options["connect_args"] = {"connect_timeout": _CONNECT_SECONDS, **alive}

    def opened() -> BaseStorage:
        return optuna.storages.get_storage(RDBStorage(url, engine_kwargs=options))

    # Whoever opens a new database makes its tables. Of those that do so at once (two searches, a
    # search and a dashboard) one may be refused; at its next try it finds them made.
    for _ in range(2):
        try:
            return opened()
        except SQLAlchemyError:
            time.sleep(0.2)
    return opened()


if TYPE_CHECKING:
    # No abstract methods for the type checker: the loop below defines them.
    _Complete = InMemoryStorage
else:
    _Complete = BaseStorage


class _Storage(_Complete):
    """Every method of a storage, each a call of `_attempt` with the inner storage's method."""

    inner: BaseStorage

    def _attempt(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        raise NotImplementedError


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: _Storage, *arguments: Any, **named: Any) -> Any:
        return self._attempt(getattr(self.inner, name), *arguments, **named)

    method.__name__ = name
    return method


# All of them by a loop, so that one that Optuna adds is not forgotten.
for _name in [name for name in vars(BaseStorage) if not name.startswith("_")]:
    setattr(_Storage, _name, _passed_on(_name))
_Storage.__abstractmethods__ = frozenset()


class RetryingStorage(_Storage):
    """A storage that is asked again while it does not answer.

    Every write may be repeated: a trial that is created carries a token by which it is found again,
    and all other writes set a value.

    Args:
        inner: The storage.
        shown: Its place, for messages.
    """

    def __init__(self, inner: BaseStorage, shown: str) -> None:
        self.inner = inner
        self.shown = shown
        self._is_given_up = False
        self._interrupted_at: float | None = None
        self._reason = ""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial, at most once for a template that has a token."""
        token = template_trial.system_attrs.get(TOKEN_KEY) if template_trial else None
        is_retry = False

        def create() -> int:
            nonlocal is_retry
            known = created_trial(self.inner, study_id, token) if is_retry and token else None
            is_retry = True
            return known if known is not None else inner_create(study_id, template_trial)

        inner_create = self.inner.create_new_trial
        return self._attempt(create)

    def _attempt(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        began, wait, is_told = time.monotonic(), _FIRST_WAIT, False
        self._note_interruption()
        if self._is_given_up and self._since_interruption() > _HARD_SECONDS:
            raise StorageFailure(self.shown, self._reason)
        while True:
            try:
                with postponed():
                    result = call(*arguments, **named)
                self._is_given_up = False
                return result
            except Exception as error:
                if not is_of_storage(error):
                    if is_damage(call.__name__, error):
                        raise damaged(self.shown, one_line(error)[:200]) from error
                    raise
                waited = time.monotonic() - began
                is_over = waited > PATIENCE_SECONDS or self._since_interruption() > _LAST_SECONDS
                # After it was given up, the last writes of a search do not wait once more each.
                if not is_transient(error) or self._is_given_up or is_over:
                    self._is_given_up, self._reason = True, reason_of(error)
                    tried = 0.0 if wait == _FIRST_WAIT else waited
                    raise StorageFailure(self.shown, self._reason, tried) from error
                if waited > _QUIET_SECONDS and not is_told:
                    is_told = True
                    self._tell(reason_of(error))
            try:
                time.sleep(wait)
            except BaseException:  # Who interrupts a search does not want to wait at its end.
                self._is_given_up = True
                raise
            wait = min(2 * wait, _LONGEST_WAIT)

    def _note_interruption(self) -> None:
        """Notice that this thread is being ended by Ctrl-C or SIGTERM, or goes on after all."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not _is_interrupted():
            self._interrupted_at = None
        elif self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
            _shorten_waits(self.inner)

    def _since_interruption(self) -> float:
        since = self._interrupted_at
        return -1.0 if since is None else time.monotonic() - since

    def _tell(self, reason: str) -> None:
        warnings.warn(
            f"storage {self.shown} does not answer ({reason}); it is asked again for "
            f"{PATIENCE_SECONDS:.0f} seconds",
            stacklevel=2,
        )


def _is_interrupted() -> bool:
    """Return whether the caller is in the `finally` of a KeyboardInterrupt."""
    error = sys.exception()
    while isinstance(error, StorageFailure):  # It came while another write was tried.
        error = error.__context__
    return isinstance(error, KeyboardInterrupt)


def _shorten_waits(storage: BaseStorage) -> None:
    """Let SQLite wait for no lock from now on, or nearly so."""
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    if (
        engine is not None
        and engine.dialect.name == "sqlite"
        and not sqlalchemy.event.contains(engine, "checkout", _shorten)
    ):
        sqlalchemy.event.listen(engine, "checkout", _shorten)


def _shorten(connection: Any, *_: Any) -> None:
    connection.execute(f"PRAGMA busy_timeout = {_LAST_LOCKED_SECONDS * 1000:.0f}")


class ReadOnlyStorage(_Storage):
    """A storage that can be read, and refuses every write.

    Args:
        inner: The storage.
        shown: Its place, for messages.
    """

    def __init__(self, inner: BaseStorage, shown: str) -> None:
        self.inner = inner
        self.shown = shown

    def _attempt(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        if call.__name__.startswith(("create_", "set_", "delete_", "record_", "fail_")):
            remedy = "write to it with Optuna, or with `autopeft resume`"
            raise StorageError("storage", self.shown, "is opened to be read alone", remedy)
        return call(*arguments, **named)


def created_trial(storage: BaseStorage, study_id: int, token: str) -> int | None:
    """Return the id of the trial with a token; None if there is none."""
    for trial in storage.get_all_trials(study_id, deepcopy=False):
        if trial.system_attrs.get(TOKEN_KEY) == token:
            return trial._trial_id
    return None


def is_of_storage(error: Exception) -> bool:
    """Return whether it tells of the storage, not of what it was asked for."""
    is_database = isinstance(error, StorageInternalError | SQLAlchemyError | OSError)
    return is_database or _grpc_code(error) is not None


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a little later."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, PendingRollbackError | PoolTimeoutError):
        return True
    if isinstance(error, DBAPIError):
        said: Any = error.orig
        if (name := getattr(said, "sqlite_errorname", None)) is not None:
            return str(name).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
        if getattr(said, "sqlstate", None) == _DISK_FULL:
            return False
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    # The proxy answers, but the database behind it may not.
    return _grpc_code(error) == "UNAVAILABLE" or "during the commit" in reason_of(error)


_DISK_FULL = "53100"
"""The code of PostgreSQL."""


def _grpc_code(error: BaseException) -> str | None:
    """Return the status of an error of gRPC; None for any other."""
    code = getattr(error, "code", None)
    name = getattr(code(), "name", None) if callable(code) else None
    return str(name) if name else None
