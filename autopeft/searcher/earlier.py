"""Reads what an earlier search left in its study."""

from __future__ import annotations

from autopeft.costs.objectives import objective
from autopeft.searcher.samplers.warm_start import PriorTrial, as_prior
from autopeft.searcher.study import stored_study
from autopeft.searcher.trials import read_record


def read_prior(storage: str, study_name: str) -> tuple[PriorTrial, ...]:
    """The complete trials of an earlier search.

    Args:
        storage: Its storage, see `open_storage`.
        study_name: Its study's name.

    Raises:
        StorageError: if there is no such study.
    """
    stored, names = stored_study(storage, study_name)
    objectives = [objective(name) for name in names]
    records = [read_record(trial, objectives) for trial in stored if "plan" in trial.attributes]
    ended = [record.outcome() for record in records if record.state != "running"]
    return as_prior(ended, objectives)
