"""Expands the paths of settings."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from autopeft.settings import SearchSettings, Source
from autopeft.tasks.second_tasks import read_also


def expand(settings: SearchSettings, *, needs_data: bool = True) -> SearchSettings:
    """Return settings with `~` and `$VARIABLES` expanded in every path."""
    settings.check_sources(needs_data=needs_data)

    def path(value: str) -> str:
        return os.path.expanduser(os.path.expandvars(value))

    def source(value: Source) -> Source:
        return path(value) if isinstance(value, str) else tuple(map(path, value))

    return replace(
        settings,
        model=path(settings.model),
        data=source(settings.data),
        validation=None if settings.validation is None else source(settings.validation),
        test=None if settings.test is None else source(settings.test),
        retain=None if settings.retain is None else path(settings.retain),
        also=tuple(
            {k: source(v) if k in _PATHS and _is_source(v) else v for k, v in row.items()}
            for row in read_also([path(e) if isinstance(e, str) else e for e in settings.also])
        ),
    )


_PATHS = ("data", "validation", "test")
"""Settings of a further task that are paths."""


def _is_source(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
    )
