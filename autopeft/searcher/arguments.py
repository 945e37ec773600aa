"""What callers hand to the controller, checked: a mistake is a ValueError and changes nothing."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.errors import SettingsError, UserError
from autopeft.plan import Candidate
from autopeft.searcher.owner import StudyOwner
from autopeft.utils.extremes import one_nan
from autopeft.utils.formatting import one_line
from autopeft.utils.registry import describe
from autopeft.utils.serialize import to_float

_LAST_STEP = 2**31 - 1
"""Databases keep steps as 32-bit integers."""


def check_numbers(seed: Any, eta: Any, audit_share: Any, **counts: Any) -> tuple[float, float]:
    """Return eta and audit share as floats; the other numbers are right too, a count may be None.

    Raises:
        SettingsError: if one is of the wrong kind, or outside its range.
    """
    for name, number in {"seed": seed, **counts}.items():
        is_open = number is None and name in counts
        if not (is_open or (isinstance(number, int | np.integer) and number >= 0)):
            raise SettingsError(name, number, "must be an integer from 0", "use e.g. 3")
    share = to_float(audit_share)
    if share is None or not 0.0 <= share <= 1.0:
        raise SettingsError("audit_share", audit_share, "must be from 0 to 1", "use e.g. 0.1")
    ratio = to_float(eta)
    if ratio is None or not 1.0 < ratio <= _LAST_STEP:
        raise SettingsError("eta", eta, f"`1 < eta <= {_LAST_STEP}` must hold", "use 3")
    return ratio, share


def checked_items(name: str, value: Any, kinds: tuple[type, ...], remedy: str) -> tuple[Any, ...]:
    """Return a list that a controller is made with.

    Raises:
        SettingsError: if it is no list, or one of its items is of another kind.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise SettingsError(name, value, "must be a list", remedy)
    items = tuple(value)
    for item in items:
        if not isinstance(item, kinds):
            wanted = " or ".join("text" if kind is str else kind.__name__ for kind in kinds)
            raise SettingsError(name, item, f"each item must be {wanted}", remedy)
    return items


def check_parts(prices: Any, owner: Any, resume: Any) -> None:
    """Check the other parts that a controller is made with.

    Raises:
        SettingsError: if one is of the wrong kind.
    """
    if prices is not None and not callable(getattr(prices, "price", None)):
        raise SettingsError("prices", prices, "has no method `price`", "use a PriceTable, or None")
    if not isinstance(owner, StudyOwner | None):
        raise SettingsError("owner", owner, "must be a StudyOwner", "leave it out")
    if not isinstance(resume, bool):
        raise SettingsError("resume", resume, "must be True or False", "use True")


def checked_number(name: str, value: Any) -> float:
    """Return a number as a float, also one of numpy, torch or decimal; it may be NaN or infinite.

    Raises:
        ValueError: if it is text, a truth value, an array of several, or too large for a float.
    """
    number = to_float(value)
    if number is None:
        raise ValueError(f"{name} must be a number, but got {describe(value)}")
    return one_nan(number)


def checked_count(name: str, value: Any) -> int:
    """Return a number of things.

    Raises:
        ValueError: if it is no integer.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, but got {describe(value)}") from None


def checked_step(step: Any) -> int:
    """Return a number of steps.

    Raises:
        ValueError: if it is not an integer from 1 to 2,147,483,647.
    """
    number = checked_count("step", step)
    if not 1 <= number <= _LAST_STEP:
        raise ValueError(f"step must be from 1 to {_LAST_STEP}, but got {number}")
    return number


def checked_measured(measured: Any) -> dict[str, float]:
    """Return measured values as floats.

    Raises:
        ValueError: if it is no mapping of names to numbers.
    """
    if not isinstance(measured, Mapping) or not all(isinstance(name, str) for name in measured):
        raise ValueError(f"measured must map names to numbers, but got {describe(measured)}")
    return {name: checked_number(f"measured[{name!r}]", v) for name, v in measured.items()}


def checked_candidate(candidate: Any, price: Callable[[Candidate], None]) -> Candidate:
    """Return a candidate that can be priced.

    Raises:
        ValueError: if it is none, or pricing it fails.
    """
    if not isinstance(candidate, Candidate):
        raise ValueError(f"needs a Candidate, but got {describe(candidate)}")
    try:
        price(candidate)
    except UserError:
        raise
    except Exception as error:
        problem = f"candidate {candidate.digest[:8]} does not fit the model: {one_line(error)}"
        raise ValueError(problem) from error
    return candidate


def checked_key(key: Any) -> str:
    """Return a key of what is kept with the study.

    Raises:
        ValueError: if it is no text that a storage can hold.
    """
    if not isinstance(key, str):
        raise ValueError(f"a key must be text, but got {describe(key)}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a key holds half a character (a lone surrogate): {key!r}") from None
    return key


def checked_files(
    folder: Any, files: Any, adapters: Any
) -> tuple[Path, tuple[Path, ...], dict[str, Path]]:
    """Return the folder, files and adapters that are to be artifacts of the study.

    Raises:
        ValueError: if one is no path, or an adapter's name is none of a file.
    """
    if isinstance(files, str | bytes) or not isinstance(files, Iterable):
        raise ValueError(f"files must be a list of paths, but got {describe(files)}")
    if not isinstance(adapters, Mapping):
        raise ValueError(f"adapters must map names to folders, but got {describe(adapters)}")
    for name in adapters:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ValueError(f"an adapter's name must be that of a file, but got {name!r}")
    return (
        _checked_path("folder", folder),
        tuple(_checked_path("files", each) for each in files),
        {name: _checked_path("adapters", each) for name, each in adapters.items()},
    )


def _checked_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise ValueError(f"{name} must be a path, but got {describe(value)}")
    if "\0" in os.fspath(value):
        raise ValueError(f"{name} holds a NUL character: {os.fspath(value)!r}")
    return Path(value)


def checked_memory(key: Any, value: Any) -> tuple[str, Any]:
    """Return a key, and a value as JSON keeps it.

    Raises:
        ValueError: if the key is no text, or JSON cannot hold the value.
    """
    key = checked_key(key)
    try:
        return key, json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: JSON cannot hold the value ({one_line(error)})") from None
