"""Versions of the packages that matter, here and where workers run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_NAMES = ("autopeft", "torch", "transformers", "peft", "optuna", "ray", "datasets")

_TRAINING = ("autopeft", "torch", "transformers", "peft")
"""Packages that decide what a training computes."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, and of Python, by name."""
    return {name: _version(name) for name in _NAMES} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # A worker may need fewer packages.
        return "missing"


def mismatch(driver: Mapping[str, str], worker: Mapping[str, str]) -> str:
    """Return what differs between a driver and a worker, in one line; "": nothing that matters.

    Patches and builds (`2.13.0+cpu`, `2.13.1+cu130`) may differ.

    Example:
        >>> from autopeft.utils.versions import mismatch
        >>> mismatch({"torch": "2.13.0+cpu"}, {"torch": "2.13.1+cu130"})
        ''
        >>> mismatch({"torch": "2.13.0"}, {"torch": "2.6.0"})
        'a worker has torch 2.6.0, the driver 2.13.0: install the same versions on all nodes'
    """
    found = [
        f"{name} {worker[name]}, the driver {driver[name]}"
        for name in _TRAINING
        if name in driver and name in worker and _minor(driver[name]) != _minor(worker[name])
    ]
    if not found:
        return ""
    return f"a worker has {'; '.join(found)}: install the same versions on all nodes"


def _minor(text: str) -> list[str]:
    return text.partition("+")[0].split(".")[:2]
