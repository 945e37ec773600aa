"""Who searches in a study: a study that machines can share belongs to one search at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from autopeft.errors import StorageError
from autopeft.utils.folder_lock import Holder, lives
from autopeft.utils.serialize import from_plain, to_plain

_KEY = "autopeft:owner"
"""System attribute of a study; people look at the user attributes."""


@dataclass(frozen=True)
class _Record:
    """The last session that searched in a study.

    Attributes:
        search: The search's id.
        inode: That of its folder, which stays when the folder is moved or seen from elsewhere.
        holder: Its process.
    """

    search: str
    inode: int
    holder: Holder


class StudyOwner:
    """One session's claim on a study, kept alive by a heartbeat.

    Trials that are running belong to the search that started them as long as it lives: another one
    that took the study over would train them again.

    Args:
        search: The search's id.
        inode: Inode of its folder, which the session holds: an earlier session there has ended.

    Example:
        >>> import optuna
        >>> from autopeft.searcher.owner import StudyOwner
        >>> study = optuna.create_study()
        >>> owner = StudyOwner("d1", inode=1)
        >>> owner.claim(study)
        >>> owner.end()
    """

    def __init__(self, search: str, inode: int) -> None:
        self._record = _Record(search, inode, Holder.here())
        self._study: Any = None

    def claim(self, study: Any) -> None:
        """Take the study, an `optuna.Study`.

        Raises:
            StorageError: if a search lives that has it.
        """
        last, mine = _read(study), self._record
        if last is not None and (last.search, last.inode) != (mine.search, mine.inode):

            def again() -> Holder | None:
                record = _read(study)
                return record.holder if record is not None else None

            if lives(last.holder, again):
                raise StorageError(
                    "study_name",
                    study.study_name,
                    f"a search runs in this study: {last.holder.text}",
                    "wait for it or stop it; a study has one search at a time",
                )
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

    def _write(self, heartbeat: float) -> None:
        record = replace(self._record, holder=replace(self._record.holder, heartbeat=heartbeat))
        study = self._study
        study._storage.set_study_system_attr(study._study_id, _KEY, to_plain(record))


def _read(study: Any) -> _Record | None:
    kept = study._storage.get_study_system_attrs(study._study_id).get(_KEY)
    if kept is None:
        return None
    return from_plain(_Record, kept, field=_KEY, error=StorageError)
