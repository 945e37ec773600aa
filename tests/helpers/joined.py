"""Searches that share a study, each in a process of its own; `python joined.py SETTINGS` runs one.

What they train is written into a log that survives a kill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stand_in import trained

import autopeft
from autopeft.searcher import join, owner

LOG, HANG_AT = "JOINED_LOG", "JOINED_HANG_AT"
"""Environment variables: the log, and the line of it whose training never ends."""


def logged(candidate: autopeft.Candidate, *, seed: int, report: autopeft.TrialReport) -> Any:
    """Stand in for a training, and log it."""
    kind = "confirm" if report.is_confirming else "search"
    log = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{kind} {candidate.digest} {seed}\n".encode())
    os.fsync(log)
    os.close(log)
    if len(lines()) == int(os.environ.get(HANG_AT, 0)):
        time.sleep(100)
    time.sleep(0.1)
    return trained(candidate, seed=seed, report=report)


def lines(kind: str = "") -> list[tuple[str, ...]]:
    """Return digest and seed of the trainings of a kind, in order."""
    path = Path(os.environ[LOG])
    rows = path.read_text().splitlines() if path.exists() else []
    return [tuple(row.split()[1:]) for row in rows if row.startswith(kind)]


def begun(settings: dict[str, Any], **environment: str) -> subprocess.Popen[bytes]:
    """Begin a search in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(settings)], env={**os.environ, **environment}
    )


def hurry() -> None:
    """Let heartbeats of this process be short."""
    for module in (owner, join):
        module.WATCH_SECONDS = 3.0  # type: ignore[attr-defined]
    import autopeft.session

    autopeft.session.BEAT_SECONDS = 0.2  # type: ignore[attr-defined]


if __name__ == "__main__":
    hurry()
    autopeft.search(**json.loads(sys.argv[1]))
