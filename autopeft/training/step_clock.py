"""Watches a training between its steps: ends it at its deadline and tells how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, SupportsFloat

from autopeft.errors import OutOfTime

if TYPE_CHECKING:
    import torch

TELL_EVERY = 2.0
"""Seconds between two tellings of a training."""

Tell = Callable[[int, float, float | None], None]
"""Takes the steps done, the last loss, and steps per second; None while rows are scored."""


class Deadline:
    """A moment. Clocks of machines differ, so what is sent to another one is the seconds left.

    Args:
        seconds: Seconds from now.
    """

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds left; negative afterwards."""
        return self._ends - time.monotonic()

    def __reduce__(self) -> tuple[type[Deadline], tuple[float]]:
        return Deadline, (self.seconds_left,)


class StepClock:
    """Looks at the clock after each step of a training, and before each forward pass of a scoring.

    Args:
        deadline: When the training is to end; None: never.
        tell: Called about every two seconds.

    Attributes:
        step: Steps done, as it was last told.
    """

    def __init__(self, deadline: Deadline | None = None, tell: Tell | None = None) -> None:
        self._deadline = deadline
        self._tell = tell
        self._told_at = time.monotonic()
        self.step = 0
        self._loss: SupportsFloat = math.nan
        self.resume(0)

    @property
    def seconds_left(self) -> float:
        """Seconds left; inf without a deadline."""
        return math.inf if self._deadline is None else self._deadline.seconds_left

    def resume(self, step: int) -> None:
        """Count the speed from here: the steps go on after something else."""
        self._resumed_step, self._resumed_at = step, time.monotonic()

    def check(self, *, spare: float = 0.0) -> None:
        """Raise `OutOfTime` if the deadline was more than `spare` seconds ago."""
        if self._deadline is not None and self._deadline.seconds_left < -spare:
            raise OutOfTime("its time was up")

    def after_step(self, step: int, loss: SupportsFloat, *, is_last: bool = False) -> None:
        """Tell how far the training is, if it is time to.

        Args:
            step: Steps done.
            loss: Of the last one. It is read only when it is told: on an accelerator, reading it
                waits for all queued work.
            is_last: Whether the training has made all of its steps; then it goes on to its scoring.

        Raises:
            OutOfTime: if the deadline has passed.
        """
        self.step, self._loss = step, loss
        if self._tell is not None:
            self._tell_if_due(self._tell, is_training=True)
        if not is_last:
            self.check()

    def within_step(self) -> None:
        """Tell that a long step goes on; raise `OutOfTime` if the deadline has passed."""
        self.check()
        if self._tell is not None:
            self._tell_if_due(self._tell, is_training=False)

    @contextmanager
    def watching(
        self, model: torch.nn.Module, *, step: int = 0, spare: float = 0.0
    ) -> Iterator[None]:
        """Watch the scoring after a step at each forward pass, those of generated tokens too.

        It raises `OutOfTime` if the deadline was more than `spare` seconds ago.
        """
        self.step = step

        def before_pass(*_: Any) -> None:
            self.check(spare=spare)
            if self._tell is not None:
                self._tell_if_due(self._tell, is_training=False)

        handle = model.register_forward_pre_hook(before_pass)
        try:
            yield
        finally:
            handle.remove()

    def _tell_if_due(self, tell: Tell, *, is_training: bool) -> None:
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY:
            return
        self._told_at = now
        seconds = max(now - self._resumed_at, 1e-9)
        rate = (self.step - self._resumed_step) / seconds if is_training else None
        tell(self.step, float(self._loss), rate)
        self.resume(self.step)
