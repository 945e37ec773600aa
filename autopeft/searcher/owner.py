"""Who searches in a study: one search at a time, or all that join it on purpose.

Searches that share a study tell each other what they do by records that each writes of its own. Who
of them confirms is decided as in Lamport's bakery algorithm ("A new solution of Dijkstra's
concurrent programming problem", 1974), which needs nothing but such records.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

from autopeft.errors import StorageError
from autopeft.utils.folder_lock import WATCH_SECONDS, Holder, lives
from autopeft.utils.serialize import from_plain, to_plain

_KEY = "autopeft:owner"
"""System attribute of a study, in one that is shared followed by the search's id; people look at
the user attributes."""

SHARED_KEY = "autopeft:shared"
"""System attribute of a study that searches share: what all of them must have alike."""

_POLL_SECONDS = 0.2

_State = Literal["searching", "choosing", "waiting", "confirming", "ended"]


@dataclass(frozen=True)
class _Record:
    """The last session of a search in a study.

    Attributes:
        search: The search's id.
        inode: That of its folder, which stays when the folder is moved or seen from elsewhere.
        holder: Its process.
        folder: Its folder, for messages.
        state: What it does; one that has ended its trials draws a ticket and waits for the others.
        ticket: A number above all that were drawn before.
        has_confirmed: Whether it has confirmed finalists; then no other search does.
    """

    search: str
    inode: int
    holder: Holder
    folder: str = ""
    state: _State = "searching"
    ticket: int = 0
    has_confirmed: bool = False


class StudyOwner:
    """One session's claim on a study, kept alive by a heartbeat.

    Trials that are running belong to the search that started them as long as it lives: another one
    that took the study over would train them again.

    Args:
        search: The search's id.
        inode: Inode of its folder, which the session holds: an earlier session there has ended.
        folder: The folder, for messages.
        shared: What all searches must have alike that share the study; None if it is this one's.

    Example:
        >>> import optuna
        >>> from autopeft.searcher.owner import StudyOwner
        >>> study = optuna.create_study()
        >>> owner = StudyOwner("d1", inode=1)
        >>> owner.claim(study)
        >>> owner.end()
    """

    def __init__(
        self, search: str, inode: int, *, folder: str = "", shared: Mapping[str, Any] | None = None
    ) -> None:
        self._record = _Record(search, inode, Holder.here(), folder)
        self._shared = shared
        self._key = _KEY if shared is None else f"{_KEY}:{search}"
        self._study: Any = None
        self._writing = Lock()  # The heartbeat comes from a thread of its own.

    @property
    def search(self) -> str:
        """The search's id."""
        return self._record.search

    @property
    def is_shared(self) -> bool:
        """Whether other searches may share the study."""
        return self._shared is not None

    def claim(self, study: Any) -> None:
        """Take the study, an `optuna.Study`, or join those that share it.

        Raises:
            StorageError: if a search lives that has it.
        """
        last, mine = _records(study).get(self._key), self._record
        if last is not None and (last.search, last.inode) != (mine.search, mine.inode):

            def again() -> Holder | None:
                record = _records(study).get(self._key)
                return record.holder if record is not None else None

            if lives(last.holder, again):
                raise StorageError(
                    "study_name",
                    study.study_name,
                    f"a search runs in this study: {last.holder.text}",
                    "wait for it or stop it; a study has one search at a time",
                )
        if self._shared is not None:
            attributes = study._storage.get_study_system_attrs(study._study_id)
            if SHARED_KEY not in attributes:
                study._storage.set_study_system_attr(study._study_id, SHARED_KEY, self._shared)
            if last is not None:
                self._record = replace(mine, has_confirmed=last.has_confirmed)
        self._study = study
        self.beat()

    def beat(self) -> None:
        """Note that the session is alive, once it has a study."""
        if self._study is not None:
            self._write(time.time())

    def end(self) -> None:
        """Note that the session has ended."""
        if self._study is not None:
            self._write(0.0)
            self._study = None

    def _write(self, heartbeat: float, **changes: Any) -> None:
        with self._writing:
            holder = replace(self._record.holder, heartbeat=heartbeat)
            self._record = replace(self._record, holder=holder, **changes)
            study = self._study
            study._storage.set_study_system_attr(study._study_id, self._key, to_plain(self._record))

    # --- the other searches that share the study --------------------------------------------------

    def living(self, searches: Collection[str]) -> set[str]:
        """Return which of other searches live, by watching their heartbeats."""
        watch = _Watch()
        while True:
            lives = {r.search: watch.lives(r) for r in self._others() if r.search in searches}
            if None not in lives.values():
                return {search for search, is_alive in lives.items() if is_alive}
            time.sleep(_POLL_SECONDS)

    def confirmed_by(self) -> str:
        """Return who confirms and why, now that this search's trials have ended; "": this one.

        Of those that share a study, the last one that searches does, or the one that has done so
        before: a finalist is trained once, and one search counts the looks at the test split.
        """
        if self._record.has_confirmed:
            self._write(time.time(), state="confirming")
            return ""
        self._write(time.time(), state="choosing")
        ticket = 1 + max((record.ticket for record in self._others()), default=0)
        self._write(time.time(), state="waiting", ticket=ticket)
        watch = _Watch()
        while (who := self._chosen(watch)) is None:
            time.sleep(_POLL_SECONDS)
        self._write(time.time(), state="ended" if who else "confirming")
        return who

    def _chosen(self, watch: _Watch) -> str | None:
        """Return who confirms, "": this search; None as long as that is not decided."""
        mine, later, is_open = (self._record.ticket, self.search), "", False
        for other in self._others():
            if other.has_confirmed:
                return f"the search in {other.folder} has confirmed before"
            is_alive = watch.lives(other)
            if is_alive is False or other.state == "ended":
                continue
            place = f"the search in {other.folder} ({other.holder.text})"
            if is_alive and other.state in ("searching", "confirming"):
                return f"{place} is {other.state}"
            if is_alive and other.state == "waiting" and (other.ticket, other.search) > mine:
                later = f"{place} has ended its trials last"
            else:  # It is about to draw its ticket, or to decide, or may be dead.
                is_open = True
        return None if is_open else later

    @property
    def has_last_word(self) -> bool:
        """Whether what it says of the study in the end is what holds: it is alone, or confirms."""
        return not self.is_shared or self._record.state == "confirming"

    def note_confirmed(self) -> None:
        """Note that this search, if it confirmed, has done so to the end."""
        if self._study is not None and self._record.state == "confirming":
            self._write(time.time(), has_confirmed=True)

    def _others(self) -> list[_Record]:
        records = _records(self._study)
        return [record for key, record in sorted(records.items()) if key != self._key]


class _Watch:
    """Finds by their heartbeats which searches live; clocks of machines may differ a little."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float, bool]] = {}

    def lives(self, record: _Record) -> bool | None:
        """Return whether a search lives, as far as it has been watched; None: not known yet."""
        now, beat = time.monotonic(), record.holder.heartbeat
        if record.holder.is_stale:
            return False
        before, since, has_changed = self._seen.get(record.search, (beat, now, False))
        if beat != before:
            since, has_changed = now, True
        self._seen[record.search] = (beat, since, has_changed)
        if now - since > WATCH_SECONDS:
            return False
        return True if has_changed else None


def _records(study: Any) -> dict[str, _Record]:
    """Return the records in a study by their attribute."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    return {
        key: from_plain(_Record, kept, field=key, error=StorageError)
        for key, kept in attributes.items()
        if key.startswith(_KEY)
    }
