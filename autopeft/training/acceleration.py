"""What accelerations share: how they are applied, and the check that they change nothing.

Each acceleration (the activation cache, the last block, rounded weights, attention, multi-adapter
training) is compared once with the plain computation and is not used where they differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from autopeft.errors import AutoPeftError
from autopeft.tasks.batch import Batch

TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest allowed difference between the accelerated and the plain result, relative to the largest
plain value. Both round the same numbers in a different order."""


class Acceleration(Protocol):
    """Skips work in forward passes without changing what is learned."""

    @property
    def setup_seconds(self) -> float:
        """Seconds spent so far on results that later trainings reuse."""
        ...

    def serving(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context in which the model's forward pass on this batch may be accelerated."""
        ...

    def leave_device(self) -> None:
        """Free what is kept on the device, which has run out of memory."""


class _NoAcceleration:
    """Computes everything."""

    setup_seconds = 0.0

    def serving(self, batch: Batch) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()

    def leave_device(self) -> None:
        """Keep nothing, as before."""


NO_ACCELERATION: Acceleration = _NoAcceleration()


@contextmanager
def without_gradients() -> Iterator[None]:
    """Compute without gradients in this context, in the middle of a training's pass or a scoring.

    torch 2.6 keeps what autocast rounded meanwhile, and would use it in the pass itself: weights
    that would get no gradient.
    """
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def verified(
    fast: torch.Tensor,
    plain: torch.Tensor,
    tolerance: float,
    *,
    what: str,
    error: type[AutoPeftError] | None = None,
) -> bool:
    """Return whether an accelerated result equals the plain one; warn if it does not.

    The largest difference may be `tolerance` times the largest plain value; 0: bit for bit. NaN
    counts as a difference. `error` is raised instead of a warning.
    """
    gap = float((fast - plain).abs().max())
    scale = float(plain.abs().max())
    if gap <= tolerance * scale:
        return True
    reason = f"results differ by {gap:.2g} of {scale:.2g}"
    if error is not None:
        raise error(f"{what} is off: {reason}")
    warn_off(what, reason)
    return False


def warn_off(what: str, reason: str) -> None:
    """Warn that an acceleration is off, and why."""
    warnings.warn(f"{what} is off: {reason}; training is slower but correct", stacklevel=3)
