"""How often the process that trained a candidate has died of it; kept with the study.

A worker that dies leaves its job without a message. The job is tried again, and so after a resume,
but not for ever: a candidate that kills whatever trains it must not end the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MAX_RETRIES = 2
"""Tries of a job after the first one."""

_KEY = "worker_deaths"
"""Attribute of the study: deaths by job."""


def trial_key(digest: str) -> str:
    """Return the key of a candidate's trial."""
    return f"search-{digest}"


def confirmation_key(digest: str, seed: int) -> str:
    """Return the key of a confirmation."""
    return f"confirm-{digest}-{seed}"


def died(n_deaths: int) -> str:
    """Return the reason of a trial that was tried often enough."""
    return f"the process that trained it died {n_deaths} times, perhaps for lack of memory"


class Losses:
    """Counts of deaths by job, written to the study before anything else is done.

    Args:
        study: The Optuna study.

    Example:
        >>> import optuna
        >>> from autopeft.searcher.losses import Losses, trial_key
        >>> study = optuna.create_study()
        >>> Losses(study).add([trial_key("d1")])
        >>> Losses(study).of(trial_key("d1"))
        1
    """

    def __init__(self, study: Any) -> None:
        self._study = study
        kept: Mapping[str, int] = study.user_attrs.get(_KEY, {})
        self._deaths = dict(kept)

    def of(self, key: str) -> int:
        """Return how often a process has died of a job."""
        return self._deaths.get(key, 0)

    def add(self, keys: Iterable[str]) -> None:
        """Count one death of each job."""
        self._change(keys, 1)

    def take_back(self, keys: Iterable[str]) -> None:
        """Count one death less of each job."""
        self._change(keys, -1)

    def _change(self, keys: Iterable[str], by: int) -> None:
        changed = {key: self.of(key) + by for key in keys}
        deaths = {key: n for key, n in (self._deaths | changed).items() if n > 0}
        self._study.set_user_attr(_KEY, deaths)
        self._deaths = deaths
