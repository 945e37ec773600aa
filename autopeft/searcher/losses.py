"""How often the process that trained a candidate has died of it; kept with the study.

A worker that dies leaves its job without a message. The job is tried again, and so after a resume,
but not for ever: a candidate that kills whatever trains it must not end the search.
"""

from __future__ import annotations

from collections import Counter
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
        search: The search's id in a study that several share, each of which keeps its own counts;
            "" where it has the study alone.

    Example:
        >>> import optuna
        >>> from autopeft.searcher.losses import Losses, trial_key
        >>> study = optuna.create_study()
        >>> Losses(study).add([trial_key("d1")])
        >>> Losses(study).of(trial_key("d1"))
        1
    """

    def __init__(self, study: Any, search: str = "") -> None:
        self._study = study
        self._key = f"{_KEY}:{search}" if search else _KEY
        kept: Mapping[str, Mapping[str, int]] = {
            key: counts for key, counts in study.user_attrs.items() if key.startswith(_KEY)
        }
        self._deaths = dict(kept.get(self._key, {}))
        # A trial that is taken over has those that its search has counted.
        others = (counts for key, counts in kept.items() if key != self._key)
        self._of_others = sum(map(Counter, others), Counter[str]())

    def of(self, key: str) -> int:
        """Return how often a process has died of a job."""
        return self._deaths.get(key, 0) + self._of_others[key]

    def add(self, keys: Iterable[str]) -> None:
        """Count one death of each job."""
        self._change(keys, 1)

    def take_back(self, keys: Iterable[str]) -> None:
        """Count one death less of each job."""
        self._change(keys, -1)

    def _change(self, keys: Iterable[str], by: int) -> None:
        changed = {key: self._deaths.get(key, 0) + by for key in keys}
        deaths = {key: n for key, n in (self._deaths | changed).items() if n > 0}
        self._study.set_user_attr(self._key, deaths)
        self._deaths = deaths
