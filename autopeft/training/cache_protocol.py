"""The seam where cached hidden states can stand in for the frozen lower part of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from autopeft.tasks.batch import Batch


class Prefix(Protocol):
    """Stands in for the frozen lower blocks while a batch passes through the model."""

    @property
    def fill_seconds(self) -> float:
        """Seconds spent so far on computing what is served: paid once, not by each training."""
        ...

    def serving(self, batch: Batch) -> AbstractContextManager[None]:
        """A context in which the model's forward, given this batch, may skip its lower blocks."""
        ...


class _NoPrefix:
    """Every block computes."""

    fill_seconds = 0.0

    def serving(self, batch: Batch) -> AbstractContextManager[None]:
        """Changes nothing."""
        return nullcontext()


NO_PREFIX: Prefix = _NoPrefix()
