"""The output folder of a search: its settings, its state, and the study by default."""

from __future__ import annotations

import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import iglob
from pathlib import Path
from typing import Any, TypeVar

from autopeft.definition import check_unchanged, definition
from autopeft.errors import SettingsError, StorageError, UserError
from autopeft.inputs import Inputs
from autopeft.settings import FORMER_DEFAULTS, RENAMED, SearchSettings
from autopeft.utils.directory import working_directory
from autopeft.utils.files import remove_drafts, write_text
from autopeft.utils.folder_lock import BEAT_SECONDS, FolderLock, is_of_lock
from autopeft.utils.formatting import one_line
from autopeft.utils.remote_files import check_no_url, is_url
from autopeft.utils.remote_folder import PUSH_SECONDS, RemoteFolder
from autopeft.utils.serialize import read_json, strict_json
from autopeft.utils.timer import Timer
from autopeft.utils.yaml_files import read_yaml, to_yaml

T = TypeVar("T")

_STATE = "state"

SETTINGS = "settings.yaml"
STUDY = "study.db"
FRONT = "front.json"
_DEFINITION = "definition"
"""Name of what is remembered of the settings that a search was begun with."""

_SAVED = {"model": "model", "data": "data", "validation": "data", "test": "data"}
"""Setting -> folder of what was given as an object, see `autopeft.saved_inputs`."""

_ROWS = ("data", "validation", "test")
_PATHS = ("model", *_ROWS, "retain", "also", "warm_start", "prior", "storage")
"""Settings that may be paths."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a settings file."""
    return read_yaml(
        Path(path), field="settings", remedy="see examples/quickstart.yaml", error=SettingsError
    )


class Workspace:
    """The output folder of a search; `~` is expanded in its path.

    One that is named by a URL of fsspec is worked on in a copy on this machine.

    Attributes:
        folder: The folder, absolute: a user's function may change the working directory.
        given: The same as it was given, for messages and settings.
    """

    def __init__(self, folder: str | Path) -> None:
        self._began_in = working_directory()
        self._remote: RemoteFolder | None = None
        self.warnings: list[str] = []
        """What the user is told of the copies at the URL, once each."""
        if is_url(folder):
            self._remote = RemoteFolder(str(folder))
            folder = self._remote.local
        else:
            check_no_url(folder)
        self.given = Path(folder).expanduser()
        if not self._began_in and not self.given.is_absolute():
            problem = "is relative, and the working directory is gone"
            raise StorageError("folder", str(folder), problem, "cd to one that is there")
        self.folder = self.given.absolute()
        if self._remote is not None:
            self._remote.pull(self.recall("id", str))

    @property
    def url(self) -> str | None:
        """Where the folder is copied to; None if it is not."""
        return None if self._remote is None else self._remote.url

    @property
    def shown(self) -> str:
        """The folder, or its URL, as a shell reads it."""
        return shlex.quote(self.named)

    @property
    def named(self) -> str:
        """The folder, or its URL, as it was given."""
        return self.url or str(self.given)

    @contextmanager
    def held(self, *, is_new: bool) -> Iterator[FolderLock]:
        """Hold the folder for one search, from before its preparation to its end.

        One that has a URL is held there too, and copied there at an interval and at the end.

        Args:
            is_new: Whether a search begins: the folder must be free, and nothing stays in it if the
                block ends without settings.

        Raises:
            StorageError: if another search runs in the folder, or it cannot hold this one, or the
                last copy fails.
        """
        if not is_new:
            self._check_resumable()
        elif not self.folder.is_dir() or not any(map(is_of_lock, self.folder.iterdir())):
            # Nothing is written where there is no search, and none can begin.
            self.check_free()
        lock = FolderLock(self.folder, shown=self.url or "")
        is_unused = is_new
        try:
            with self._held_there(lock):
                if is_new:
                    self._remove_unbegun()
                    try:
                        self.check_free()
                    except StorageError:
                        is_unused = False
                        raise
                else:
                    self._check_resumable()
                    self._note_restored()
                    remove_drafts(self.folder)
                with self._copied():
                    yield lock
        finally:
            lock.release(is_unused=is_unused and not (self.folder / SETTINGS).exists())

    @contextmanager
    def _held_there(self, lock: FolderLock) -> Iterator[None]:
        """Hold the folder at its URL, if it has one."""
        if self._remote is None:
            yield
            return
        with self._remote.held(lock):
            self._remote.pull(self.recall("id", str))  # Another machine may just have ended.
            yield

    @contextmanager
    def _copied(self) -> Iterator[None]:
        """Copy the folder to its URL, if it has one, at an interval and at the end of the block."""
        remote = self._remote
        if remote is None:
            yield
            return

        def push() -> None:
            # Of a search that has not begun there is nothing to resume.
            search = self.recall("id", str)
            if search is not None and (self.folder / SETTINGS).exists():
                remote.push(search)

        try:
            with Timer(push, PUSH_SECONDS, on_error=self._note_not_copied):
                yield
        finally:
            if (self.folder / SETTINGS).exists():
                remote.push(self.id())
            else:
                remote.withdraw()

    def _note_not_copied(self, error: Exception) -> None:
        every = f"it is tried again every {PUSH_SECONDS:.0f} s"
        self.warn(f"the output was not copied: {one_line(error)}; {every}")

    def _note_restored(self) -> None:
        if self._is_emptied():
            copy = f"that in {self.folder} is put there"
            self.warn(f"{self.url} holds no copy of the search: {copy}")

    def warn(self, text: str) -> None:
        """Keep a warning for the user and the report, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Hold the folder of a search while something else than a search changes its files.

        Raises:
            StorageError: if there is no search, or another process uses the folder.
        """
        with self.held(is_new=False) as lock, Timer(lock.beat, BEAT_SECONDS):
            yield

    def check_free(self) -> None:
        """Check that a new search can be written here."""
        folder, remedy = self.folder, "choose another --output"
        parent = next(p for p in [folder, *folder.parents] if p.exists())
        if (folder / SETTINGS).exists() and self._is_emptied():
            problem = f"holds nothing, but {folder} is the copy of a search that was there"
            remedy = f"put it there again with `autopeft resume {self.shown}`, or move it away"
        elif (folder / SETTINGS).exists():
            problem = "the folder holds another search"
            remedy = f"continue it with `autopeft resume {self.shown}`, or {remedy}"
        elif folder.exists() and not folder.is_dir():
            problem = "is a file, not a folder"
        elif folder.is_dir() and not all(map(is_of_lock, folder.iterdir())):
            problem = "the folder is not empty"
            if self._remote is not None:
                problem = f"{folder}, where its copy would be, is not empty"
                remedy = f"move that folder away, or {remedy}"
        elif not os.access(parent, os.W_OK):
            problem = f"{parent} is not writable"
        elif self._remote is not None and not self._remote.is_empty():
            problem = "the folder is not empty"
        else:
            return
        raise StorageError("output", self.named, problem, remedy)

    def _is_emptied(self) -> bool:
        """Return whether the URL of this folder holds no copy of a search."""
        return self._remote is not None and not self._remote.has_copy()

    def create(self, settings: SearchSettings) -> None:
        """Create the folder and write the settings into it, with the name of their study."""
        settings = replace(settings, study_name=self.study_name(settings))
        text = to_yaml(settings.to_mapping())
        # First: a search that is killed in between has no settings, or none that changed.
        self.remember(_DEFINITION, definition(settings))
        write_text(self.folder / SETTINGS, text)
        self.remember("began_in", self._began_in)

    def _remove_unbegun(self) -> None:
        """Remove what a search has left that was killed before it had settings; no other file."""
        remove_drafts(self.folder, SETTINGS)
        state, kept = self.folder / _STATE, self._state(_DEFINITION)
        if (self.folder / SETTINGS).exists() or state.is_symlink() or not state.is_dir():
            return
        remove_drafts(state, kept.name)
        if all(path == kept and path.is_file() for path in state.iterdir()):
            kept.unlink(missing_ok=True)
            state.rmdir()

    def discard(self) -> None:
        """Remove what a new search has written before a mistake was found; no other file."""
        for name in (SETTINGS, STUDY, f"{STUDY}-journal"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / _STATE, ignore_errors=True)

    def _check_search(self) -> None:
        if not (self.folder / SETTINGS).exists():
            problem = f"holds no search ({SETTINGS} is missing)"
            remedy = "give the --output folder of a search"
            raise StorageError("folder", self.named, problem, remedy)

    def _check_resumable(self) -> None:
        self._check_search()
        if self._remote is not None and self._is_emptied() and not self._remote.is_empty():
            # Whose files these are is not known, and some would be written over.
            problem = f"is not empty and holds no copy of the search in {self.folder}"
            remedy = f"empty it, or go on there alone: `autopeft resume {self.folder}`"
            raise StorageError("folder", self.url or "", problem, remedy)

    def settings(self) -> SearchSettings:
        """Return the settings of the search in this folder, or raise a StorageError."""
        return self._here(self._written())

    def check_unedited(self) -> None:
        """Check that the settings file still defines the search that was begun.

        Budget, workers and the like may be edited, as they may change on resume. A search of an
        earlier version, which kept no record of what it was begun with, is not compared.

        Raises:
            UserError: naming the setting, both values and the remedy.
        """
        rows = self.recall(_DEFINITION, dict[str, Any])
        if rows is None:
            return
        try:
            begun = _current(rows)
        except UserError as wrong:
            path = self._state(_DEFINITION)
            raise StorageError(path.name, str(path), wrong.mistake, "delete it") from None
        now = self._written()
        digests = self.recall("inputs", Inputs) or Inputs()
        model = os.path.expanduser(os.path.expandvars(self._here(now).model))
        check_unchanged(
            begun,
            now,
            file=str(self.folder / SETTINGS),
            is_digested=bool(digests.model) and os.path.isdir(model),
        )

    def _written(self) -> SearchSettings:
        """Return the settings as the file has them."""
        self._check_search()
        rows = read_settings(self.folder / SETTINGS)
        # A search of an earlier version stays usable: its settings may have former names, and
        # columns of all tasks. Columns of these names are recognized anyway.
        if all(name in rows for name in FORMER_DEFAULTS):
            rows = {k: v for k, v in rows.items() if (k, v) not in FORMER_DEFAULTS.items()}
        return _current(rows)

    def _here(self, settings: SearchSettings) -> SearchSettings:
        """Return settings that find what they name, from any folder and wherever this one is.

        Relative paths are seen from where the search was begun, as long as something is there. What
        was saved in this folder is in it, if it was moved.
        """
        if not settings.output:
            return settings
        before = Path(settings.output).expanduser()
        # Earlier versions did not write the name of the study: it was that of the folder.
        name = settings.study_name or before.absolute().name
        began_in = self.recall("began_in", str)
        moved = {} if began_in is None else _moved(settings, began_in)
        moved |= {"output": str(self.given), "study_name": name}
        for name, part in _SAVED.items():
            value = getattr(settings, name)
            if isinstance(value, str) and Path(value).is_relative_to(before / part):
                moved[name] = str(self.given / Path(value).relative_to(before))
        return replace(settings, **moved)

    def as_begun(self, settings: SearchSettings) -> SearchSettings:
        """Return settings that find what they name, if a user's code has changed the directory."""
        return replace(settings, **_moved(settings, self._began_in))

    def remember(self, name: str, value: Any) -> None:
        """Keep a small value, a dataclass or plain values, in `state/`."""
        write_text(self._state(name), strict_json(value, indent=None))

    def recall(self, name: str, kind: type[T]) -> T | None:
        """Return what `remember` kept as a `kind`, or None."""
        path = self._state(name)
        return read_json(path, kind, remedy="delete it") if path.exists() else None

    def _state(self, name: str) -> Path:
        return self.folder / _STATE / f"{name}.json"

    @property
    def artifacts(self) -> Path:
        """The folder of the study's artifacts."""
        return self.folder / "artifacts"

    def storage(self, settings: SearchSettings) -> str | Path:
        """Return the user's Optuna storage, or by default a SQLite file in the folder."""
        storage = settings.storage
        if storage is None:
            return self.folder / STUDY
        if working_directory() == self._began_in:
            return storage
        # Its file need not exist yet.
        scheme = _SQLITE if storage.startswith(_SQLITE) else ""
        is_path = bool(scheme) or "://" not in storage
        path = Path(storage.removeprefix(scheme)).expanduser()
        return f"{scheme}{Path(self._began_in) / path}" if is_path else storage

    def study_name(self, settings: SearchSettings) -> str:
        """Return the name of the study in the storage."""
        return settings.study_name or self.folder.resolve().name or "search"

    def id(self) -> str:
        """Return what tells this search from others; made when it is first asked for.

        A copy of the folder is another search.
        """
        known, place = self.recall("id", str), _Place(str(self.folder.resolve()), self.inode)
        if known is None:
            # First: an id without a place is that of an earlier version, whose study was made.
            self.remember("place", place)
        if known is None or self.original() is not None:
            known = uuid.uuid4().hex[:8]
            self.remember("id", known)
        self.remember("place", place)
        return known

    def note_study(self) -> None:
        """Note that the study has been made."""
        self.remember("has_study", True)

    def has_study(self) -> bool:
        """Return whether the study has been made: a search may be killed just before."""
        # Earlier versions noted the id afterwards, and no place.
        is_former = self.recall("id", str) is not None and self.recall("place", _Place) is None
        return is_former or bool(self.recall("has_study", bool))

    @property
    def inode(self) -> int:
        """The folder's identity on its file system, whatever its name is."""
        return self.folder.stat().st_ino

    def original(self) -> Path | None:
        """Return the folder that this one was copied from, if that is on this machine."""
        place = self.recall("place", _Place)
        if place is None or place.inode == self.inode:
            return None
        if self._remote is not None and Path(place.path).name == self.folder.name:
            return None  # The same URL, seen by another user of this machine.
        other = Workspace(place.path)
        if not (other.folder / SETTINGS).exists() or other.folder.samefile(self.folder):
            return None  # It was moved.
        return other.folder if other.recall("id", str) == self.recall("id", str) else None


def _current(rows: Mapping[str, Any]) -> SearchSettings:
    """Return settings that may have former names."""
    return SearchSettings.from_mapping({RENAMED.get(key, key): rows[key] for key in rows})


def _moved(settings: SearchSettings, began_in: str) -> dict[str, Any]:
    """Return the settings that are paths as they were meant in a folder; none if it is this one."""
    if working_directory() == began_in:
        return {}
    place = Path(began_in)
    moved = {name: _seen_from(place, getattr(settings, name)) for name in _PATHS}
    if isinstance(settings.space, str) and Path(settings.space).suffix:  # Else, a name.
        moved["space"] = _seen_from(place, settings.space)
    return moved


def _seen_from(place: Path, value: Any) -> Any:
    """Return a path, or several, as they were meant in a folder, if they are still there."""
    if isinstance(value, str) and value:
        scheme = _SQLITE if value.startswith(_SQLITE) else ""
        path = place / value.removeprefix(scheme)
        is_there = os.path.exists(path) or next(iglob(str(path)), None) is not None
        return f"{scheme}{path}" if is_there else value
    if isinstance(value, tuple | list):
        return tuple(_seen_from(place, each) for each in value)
    if isinstance(value, Mapping):
        return {k: _seen_from(place, each) if k in _ROWS else each for k, each in value.items()}
    return value


_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class _Place:
    """Where a search is; a folder that is moved keeps its inode."""

    path: str
    inode: int
