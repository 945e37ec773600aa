"""Says why a search ended where Ray ends its process.

Ray's library calls `_exit(1)` in a process whose raylet or whose cluster's head is gone, as soon as
it notices (`QuickExit` in Ray's `src/ray/util/process_utils.cc`). Python can neither prevent nor
follow it: no exception, no `atexit`. So a small process beside the search waits for the end of a
pipe that it has from it. It runs this file by itself, so the file imports only what comes with
Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_END = b"."
"""What the search writes when it is done with Ray; before, it may write the path of a log."""

_TAIL_BYTES = 20_000
_LINE = re.compile(r"\[[^\]]* ([WEFC]) \d+ \d+\] (?:\(.*?\) )?\S+:\d+: (.*)")
_ENDS = re.compile(r"terminat|exiting|shutting down", re.IGNORECASE)


class ExitNotice:
    """A process that tells the user why this one has ended, unless the block has.

    Args:
        folder: The run folder that can be resumed; None: there is nothing to resume yet.

    Example:
        >>> from autopeft.engine.ray_exit import ExitNotice
        >>> with ExitNotice("runs/first"):
        ...     pass  # An exception is not what it waits for.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ExitNotice:
        # In a session of its own: a signal to the search's group is not for it.
        with suppress(OSError):  # Without it, all goes on as well.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, self._folder or ""],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._write(_END)
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait()

    def read(self, log: Path) -> None:
        """Let it look for Ray's reason in the log that Ray keeps of this process."""
        self._write(os.fsencode(log) + b"\n")

    def _write(self, text: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # It was killed.
                self._process.stdin.write(text)
                self._process.stdin.flush()


def reason_in(log: str) -> str | None:
    """Return why Ray ended the process, by the log that Ray keeps of it; None if Ray did not.

    Example:
        >>> from autopeft.engine.ray_exit import reason_in
        >>> line = "connection.cc:216: The connection to the plasma store is failed. Terminate it."
        >>> reason_in(f"[2026-11-29 17:51:27,935 W 6214 6438] {line}")
        'The connection to the plasma store is failed'
        >>> reason_in("[2026-11-29 17:51:27,935 W 6214 6438] worker.cc:7: It is slow.") is None
        True
    """
    found = [match.groups() for line in log.splitlines() if (match := _LINE.match(line))]
    ends = [text for level, text in found if level in "FC" or _ENDS.search(text)]
    # Its first sentence; the others give advice and links.
    return ends[-1].split(". ")[0].strip()[:200] if ends else None


def last_words(folder: str, log: str) -> str:
    """Return the line for the user, from the run folder and Ray's log of the process."""
    reason = reason_in(log)
    if reason is None:
        what = "the search's process was killed, perhaps for lack of memory"
    else:
        what = f"Ray ended the search's process ({reason}): one of Ray's own died or was stopped"
    remedy = f"what was told is saved: `autopeft resume {folder}` continues"
    line = f"autopeft: {what}; {remedy if folder else 'run the same command again'}"
    # What is not printable, a terminal would obey.
    return "".join(character if character.isprintable() else "?" for character in line)


def _read_end(path: bytes) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except (OSError, ValueError):  # There is none.
        return ""


def _wait(folder: str) -> None:
    told = sys.stdin.buffer.read()
    if told.endswith(_END):
        return
    # A progress line has hidden the cursor and stands where this one begins.
    start = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{start}{last_words(folder, _read_end(told.strip()))}\n")


if __name__ == "__main__":
    _wait(sys.argv[1])
