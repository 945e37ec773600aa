"""Trials that a folder tells of and its study has no more: its report would lose them, too."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from autopeft.errors import StorageError
from autopeft.utils.text_files import MAX_JSON_BYTES, Unreadable, long_fields, read_text


def check_none_lost(table: Path, states: Mapping[int, str], *, place: str, study: str) -> None:
    """Check that a study has every trial of a `trials.csv`, ended as it says.

    A table that is not there, or damaged, tells nothing: the search writes it again.

    Args:
        table: The file.
        states: Trial number -> state, in the study.
        place: The storage, for people.
        study: The study's name.

    Raises:
        StorageError: if trials are lost.
    """
    told = _told(table)
    lost = sorted(number for number, state in told.items() if states.get(number) != state)
    if not lost:
        return
    now = states.get(lost[0], "no trial of the search any more")
    problem = (
        f"study {study!r} has lost {len(lost)} of the {len(told)} trials in {table.name}: "
        f"trial {lost[0]} was {told[lost[0]]} and is {now}"
    )
    remedy = f"restore it from a copy, or delete {table} to go on without them"
    raise StorageError("storage", place, problem, remedy)


def _told(table: Path) -> dict[int, str]:
    """Return trial number -> state of a table; empty if it cannot be read."""
    if not table.is_file():
        return {}
    try:
        text = read_text(table, max_bytes=MAX_JSON_BYTES)
        with long_fields():
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        return {int(row["number"]): str(row["state"]) for row in rows}
    except (Unreadable, csv.Error, LookupError, TypeError, ValueError):
        return {}
