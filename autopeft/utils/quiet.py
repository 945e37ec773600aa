"""Keeps packages that quantize weights from logging what nobody can act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that tell, when imported and when used, of kernels this machine could do without."""


@contextmanager
def hushed() -> Iterator[None]:
    """While it is open, they log errors only."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
