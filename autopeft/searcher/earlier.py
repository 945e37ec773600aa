"""Reads what an earlier search left in its study."""

from __future__ import annotations

from autopeft.searcher.samplers.warm_start import WarmStartTrial, warm_start_trials
from autopeft.searcher.study import read_study


def read_warm_start(storage: str, study_name: str) -> tuple[WarmStartTrial, ...]:
    """Return the complete trials of an earlier search.

    Args:
        storage: Its storage, see `open_storage`.
        study_name: Its study's name.

    Raises:
        StorageError: if there is no such study.
    """
    return warm_start_trials(*read_study(storage, study_name))
