"""Optuna's journal file, with a last line that a kill or a full disk left unfinished cut off."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._storage import JournalOperation

from autopeft.errors import StorageError

_CHUNK = 2**16

_SYNCED = frozenset(
    {
        JournalOperation.CREATE_STUDY,
        JournalOperation.DELETE_STUDY,
        JournalOperation.SET_STUDY_USER_ATTR,
        JournalOperation.SET_TRIAL_STATE_VALUES,
    }
)
"""Records that are on the disk when the call returns, with all before them. What a running trial
tells survives the process, not the machine: if that dies, the trial is trained again. To wait for
the disk takes longer than all else that a report does."""


class CheckedJournal(JournalFileBackend):
    """A journal that is never written on after an unfinished line.

    Optuna would put the next record on the same line, which nothing can read any more.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        # It is opened again for each write, and a user's function may change the directory.
        path = os.path.abspath(path)
        super().__init__(path)
        self._path = path
        self._own_lock = JournalFileSymlinkLock(path)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records; either all of them are written or none."""
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        text = "".join(f"{line}\n" for line in lines).encode()
        self._own_lock.acquire()
        try:
            with open(self._path, "r+b", buffering=0) as file:
                end = _cut_unfinished(file, self._path)
                try:
                    view = memoryview(text)
                    while len(view):
                        view = view[file.write(view) :]
                    if any(log["op_code"] in _SYNCED for log in logs):
                        os.fsync(file.fileno())
                except BaseException:
                    # A full disk takes a part of a line.
                    file.truncate(end)
                    raise
        finally:
            self._own_lock.release()


def _cut_unfinished(file: Any, shown: str) -> int:
    """Cut the file after its last whole line, and go there; return its length."""
    end: int = file.seek(0, os.SEEK_END)
    if end and file.seek(end - 1) >= 0 and file.read(1) == b"\n":
        return end
    size = end
    while end:
        start = max(0, end - _CHUNK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)
        warnings.warn(
            f"{shown}: its last line was unfinished, {size - end} bytes; they are cut off, and "
            "what they told is lost",
            stacklevel=2,
        )
    file.seek(end)
    return end


def check_journal(path: Path) -> None:
    """Check that every whole line of a journal can be read; a file that is not there is fine.

    Raises:
        StorageError: if one cannot, with its number.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and not _is_record(line):
                raise StorageError(
                    "storage",
                    str(path),
                    f"line {number} of the journal is damaged",
                    "restore the file from a copy, or remove that line and what it told",
                )


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and {"op_code", "worker_id"} <= set(record)
