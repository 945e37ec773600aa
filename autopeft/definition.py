"""What defines a search: the settings that it was begun with, and must have whenever it is resumed.

Trials of other steps, batches or spaces in one study would be compared on one front as if they were
alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autopeft.errors import SettingsError
from autopeft.settings import RESUMABLE, SearchSettings
from autopeft.utils.serialize import finite, to_plain

_FREE = RESUMABLE | frozenset(
    (
        *("output", "storage", "study_name"),  # Where the results are: a database may move.
        *("max_data_gb", "activation_cache", "activation_cache_gb"),  # They change no result.
    )
)
"""Settings that may be edited in the file of a search that is resumed."""

_INPUTS = ("model", "data", "validation", "test", "retain", "also")
"""Settings that name files, which may move: digests of what is behind them are compared."""


def definition(settings: SearchSettings) -> dict[str, Any]:
    """Return the settings that define a search, as plain values.

    Args:
        settings: Of a search that begins, with the sizes that were planned.
    """
    names = [each.name for each in fields(settings) if each.name not in _FREE]
    values: dict[str, Any] = finite(to_plain({name: getattr(settings, name) for name in names}))
    return values


def check_unchanged(
    begun: SearchSettings, now: SearchSettings, *, file: str, is_digested: bool
) -> None:
    """Check that a search that is resumed is the one that was begun.

    Args:
        begun: What it was begun with; settings that may change are not looked at.
        now: What its settings file says.
        file: That file, for a message.
        is_digested: Whether the model is a folder whose digest is compared, as is none of a hub id.

    Raises:
        SettingsError: naming the first setting that differs, both values, and the remedy.
    """
    before, after = definition(begun), definition(now)
    for name, value in before.items():
        if after[name] == value:
            continue
        if name in _INPUTS and value and after[name] and (name != "model" or is_digested):
            continue
        place, was, found = _difference(name, value, after[name])
        raise SettingsError(
            place,
            found,
            f"the search was begun with {was!r}, and its trials would not be alike",
            f"put it back in {file}, or begin a new search with --warm-start on this folder",
        )


def _difference(place: str, before: Any, after: Any) -> tuple[str, Any, Any]:
    """Return the innermost key at which two values differ, and what each has there."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in (*before, *after):
            if before.get(key) != after.get(key):
                return _difference(f"{place}.{key}", before.get(key), after.get(key))
    return place, before, after
