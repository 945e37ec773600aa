"""The one place that silences other libraries. Errors always get through.

No library is imported here: one that has not been imported yet has nothing to say.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

QUANTIZERS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that list the optional kernels this machine lacks, on import and on use; the last one
warns of how torchao registers its enumerations."""

_PEFT_WARNINGS = (
    # LN tuning: peft asks every layer for its widths, which a normalization does not have.
    # No upstream issue known (huggingface/peft#2997 mends another method's).
    "Unsupported layer type",
    # BEFT over a module without a bias cannot be merged (huggingface/peft#3227); autopeft never
    # merges BEFT.
    "Detected that the base layer has no bias",
    # VeRA and others: autopeft draws their random matrices again from the seed, on purpose.
    "Specified to not (save|load) ",
    # It looks for the keys of patterns among modules only, but applies them to parameters too (no
    # upstream issue known).
    "The following (rank|alpha)_pattern keys did not match any targeted module",
)
"""Beginnings of peft's warnings that do not apply here."""


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Let loggers report errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for name in names:
        silence(name)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def silence(name: str, level: int = logging.ERROR) -> None:
    """Let a logger report nothing below a level, for the rest of the process."""
    logging.getLogger(name).setLevel(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep datasets and transformers from drawing progress bars."""
    data: Any = sys.modules.get("datasets")
    models: Any = sys.modules.get("transformers.utils.logging")
    with ExitStack() as afterwards:
        if data is not None and not data.are_progress_bars_disabled():
            data.disable_progress_bars()
            afterwards.callback(data.enable_progress_bars)
        if models is not None and models.is_progress_bar_enabled():
            models.disable_progress_bar()
            afterwards.callback(models.enable_progress_bar)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from logging, advising and drawing progress bars."""
    advice = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        with quiet_loggers("transformers"), without_bars():
            yield
    finally:
        if advice is None:
            # A user's function may have removed it.
            os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = advice


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep datasets and the hub's client from logging retries and drawing progress bars."""
    with quiet_loggers("huggingface_hub", "datasets"), without_bars():
        yield


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Ignore the warnings of peft that do not apply to how autopeft uses it."""
    with warnings.catch_warnings():
        for message in _PEFT_WARNINGS:
            warnings.filterwarnings("ignore", message, Warning)
        yield


@contextmanager
def ignored(category: type[Warning]) -> Iterator[None]:
    """Ignore one category of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
