"""A study that cannot be read as it was written: one line that says where and what is wrong.

Optuna decodes what a database or a journal holds without checking it: a state of another name is a
LookupError, a value that is missing an AssertionError, a text in the place of a number itself.
"""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from autopeft.errors import StorageError, StorageFailure, UserError
from autopeft.utils.formatting import one_line

_REMEDY = "restore it from a copy, or begin a new search"

_N_TRIED = 2000
"""So many trials are read one by one to find the damaged one."""

_NAMED = ("get_study_id_from_name", "get_trial_id_from_study_id_trial_number")
"""Methods of a storage that raise KeyError for what is not there."""

_TABLES = ("study_directions", "trials", "trial_params", "trial_values", "trial_user_attributes")
"""Tables of Optuna that a study cannot be without; Optuna makes those anew that are missing."""

_BROKEN_FILE = ("malformed", "is not a database", "no such table", "no such column")
"""What SQLite says of a file that will not heal."""


def damaged(place: str, reason: str, *, study: str = "", number: int | None = None) -> StorageError:
    """Return the error of a study that is damaged.

    Args:
        place: The storage, for people.
        reason: What is wrong.
        study: Name of the study; "" if it is not known.
        number: Number of the trial; None if it is not known.
    """
    where = [f"study {study!r}"] if study else []
    where += [f"trial {number}"] if number is not None else []
    problem = f"{', '.join(where) or 'it'} is damaged ({reason})"
    return StorageError("storage", place, problem, _REMEDY)


def place_of(storage: BaseStorage) -> str:
    """Return a storage for people."""
    return str(getattr(storage, "shown", "") or type(storage).__name__)


@contextmanager
def damage_named(place: str, study: str = "", number: int | None = None) -> Iterator[None]:
    """Say in one line what is wrong where stored data cannot be decoded.

    Raises:
        StorageError: for every error but those of a user, and of a file or a storage that does not
            answer.
    """
    try:
        yield
    except (StorageFailure, StorageInternalError, UserError, OSError):
        raise
    except Exception as error:
        raise damaged(place, _reason(error), study=study, number=number) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, StorageError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UserError):
        return error.mistake
    text = one_line(error)[:200]
    return text.removesuffix(":")


def is_damage(method: str, error: Exception) -> bool:
    """Return whether an error of a storage's method, not of its database, tells of damage.

    Args:
        method: Name of the method.
        error: What it raised.
    """
    is_read = method.startswith("get_") and method not in _NAMED
    return is_read and not isinstance(error, UserError | StorageFailure)


def check_tables(file: Path) -> None:
    """Check that a SQLite file with studies has Optuna's tables.

    Raises:
        StorageError: if it lacks one: Optuna would make it anew, without a trial in it.
    """
    uri = f"file:{quote(str(file.expanduser().absolute()))}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as database:
            asked = "SELECT name FROM sqlite_master WHERE type = 'table'"
            names = {name for (name,) in database.execute(asked)}
    except sqlite3.Error:
        return  # Whoever opens it next says why it cannot be read.
    missing = [name for name in _TABLES if name not in names]
    if "studies" in names and missing:
        raise damaged(str(file), f"it has no table {missing[0]}")


def remedy_of(reason: str, default: str) -> str:
    """Return what to do about what a database said."""
    return _REMEDY if any(words in reason for words in _BROKEN_FILE) else default


def stored_trials(study: optuna.study.Study) -> list[FrozenTrial]:
    """Return all of a study's trials by number.

    Raises:
        StorageError: if one cannot be decoded, or is missing, or there twice.
    """
    storage, study_id = study._storage, study._study_id
    place, name = place_of(storage), study.study_name
    try:
        trials = study.get_trials(deepcopy=False)
    except (StorageFailure, StorageInternalError):  # It does not answer: nothing is damaged.
        raise
    except Exception as error:
        number = _first_damaged(storage, study_id)
        raise damaged(place, _reason(error), study=name, number=number) from error
    trials = sorted(trials, key=lambda trial: trial.number)
    for number, trial in enumerate(trials):
        if not (isinstance(trial.user_attrs, dict) and isinstance(trial.system_attrs, dict)):
            raise damaged(place, "its attributes are no mapping", study=name, number=trial.number)
        if trial.number != number:
            what = "is missing" if trial.number > number else "is there twice, or has no number"
            raise damaged(place, f"trial {number} {what}", study=name)
    return trials


def _first_damaged(storage: BaseStorage, study_id: int) -> int | None:
    """Return the number of the first trial that cannot be read; None if that cannot be told."""
    for number in itertools.islice(itertools.count(), _N_TRIED):
        try:
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        except Exception:
            return None
        try:
            storage.get_trial(trial_id)
        except Exception:
            return number
    return None


def check_values(frozen: FrozenTrial, n_objectives: int) -> None:
    """Check the numbers of one of Optuna's trials, which it stores and returns unchecked.

    Args:
        frozen: The trial.
        n_objectives: Number of values of a complete trial; 0 if the study does not name them.

    Raises:
        ValueError: saying what is no number, or not there.
    """
    if frozen.state == TrialState.COMPLETE:
        values = frozen.values or []
        if n_objectives and len(values) != n_objectives:
            raise ValueError(f"it has {len(values)} values for {n_objectives} objectives")
        for value in values:
            if not _is_number(value) or math.isnan(value):
                raise ValueError(f"its value is no number: {value!r}"[:200])
    for step, score in frozen.intermediate_values.items():
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"it has a score at step {step!r}"[:200])
        if not _is_number(score):
            raise ValueError(f"its score at step {step} is no number: {score!r}"[:200])


def checked_numbers(name: str, stored: Any) -> dict[str, float]:
    """Return a mapping of names to numbers that a trial's attribute holds.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"{name} is no mapping: {stored!r}"[:200])
    for key, value in stored.items():
        if not _is_number(value):
            raise ValueError(f"{name}.{key} is no number: {value!r}"[:200])
    return {str(key): float(value) for key, value in stored.items()}


def checked_words(attributes: Mapping[str, Any], name: str, default: str) -> str:
    """Return a text that a trial's attributes hold.

    Raises:
        ValueError: if it is none.
    """
    stored = attributes.get(name, default)
    if not isinstance(stored, str):
        raise ValueError(f"{name} is no text: {stored!r}"[:200])
    return stored


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
