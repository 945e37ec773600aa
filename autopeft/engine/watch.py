"""Tells a worker that hangs from one that is slow: by its signs of progress and its CPU time.

A job gives a sign when it begins, after its steps and forward passes, and with each message. How
long it may be silent follows from how long jobs of this search were silent before, so that a loaded
machine raises no alarm. A worker that computes may be silent for much longer than one that sleeps:
even a starved worker gets some CPU time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
from dataclasses import dataclass

from autopeft.training.step_clock import TELL_EVERY

MOST_SECONDS, LEAST_SECONDS, BUDGET_SHARE = 300.0, 20.0, 0.25
"""Silence of a sleeping worker that is always allowed: a share of the budget, within limits."""

FACTOR = 20.0
"""As many times the longest silence that went well are allowed: a load of 8 jobs a core is less."""

START_FACTOR = 4.0
"""A worker that loads a model may sleep for so many times longer: it reads files."""

BUSY_FACTOR = 10.0
"""A worker that uses CPU time may be silent for so many times longer."""

ASLEEP = 0.05
"""Share of a core below which a worker sleeps. One of eight processes on a core gets 0.125."""

OVERTIME_SECONDS, OVERTIME_FACTOR = 15.0, 5.0
"""The same limits for a job whose time is up: all that it can still do is end."""

_BETWEEN_LOOKS = 5.0
"""Most seconds that pass between two looks: a search that was itself stopped for a while, as by
Ctrl-Z, a laptop's lid or a database that did not answer, has seen nothing meanwhile."""

_BETWEEN_SIGNS = 2.0 * TELL_EVERY
"""Seconds from one sign to the next where steps are fast: a worker tells, the driver asks."""


@dataclass
class _Watched:
    """A job on a worker; `cpu` is the worker's CPU seconds as it last told, None: not known."""

    seen: float
    is_starting: bool
    cpu: float | None = None
    cpu_seen: float | None = None


class Watch:
    """Watches the jobs that run.

    Args:
        hang_seconds: Silence that is always allowed; None: chosen by the budget.
        budget_seconds: Seconds of the whole budget; None: no limit.
        is_function: Whether a function of the user's trains. It may wait for another process, so
            nothing is known of its silence before its first one has ended well.

    Example:
        >>> from autopeft.engine.watch import Watch
        >>> watch = Watch(hang_seconds=30.0)
        >>> watch.beat("job", cpu_seconds=0.0)
        >>> watch.problem("job") is None
        True
    """

    def __init__(
        self,
        hang_seconds: float | None = None,
        budget_seconds: float | None = None,
        *,
        is_function: bool = False,
    ) -> None:
        limit = math.inf if budget_seconds is None else BUDGET_SHARE * budget_seconds
        usual = min(MOST_SECONDS, max(LEAST_SECONDS, limit))
        self._least = usual if hang_seconds is None else hang_seconds
        self._budget_seconds = budget_seconds or 0.0
        self._is_unknown = is_function and hang_seconds is None
        self._longest = self._longest_start = 0.0
        self._jobs: dict[Hashable, _Watched] = {}
        self._looked, self._watched = time.monotonic(), 0.0

    def _now(self) -> float:
        """Return the seconds watched so far."""
        now = time.monotonic()
        self._watched += min(_BETWEEN_LOOKS, now - self._looked)
        self._looked = now
        return self._watched

    def begin(self, key: Hashable, *, is_starting: bool = False) -> None:
        """Note that a worker has begun a job, or that it loads what trains it."""
        self._jobs[key] = _Watched(self._now(), is_starting)

    def sign(self, key: Hashable) -> None:
        """Note that a job goes on."""
        job, now = self._jobs.get(key), self._now()
        if job is None:
            self.begin(key)
            return
        silence = max(0.0, now - job.seen - _BETWEEN_SIGNS)
        if job.is_starting:
            self._longest_start = max(self._longest_start, silence)
        else:
            self._longest = max(self._longest, silence)
            self._is_unknown = False
        self._jobs[key] = _Watched(now, False, job.cpu, job.cpu)

    def beat(self, key: Hashable, cpu_seconds: float, *, is_starting: bool = False) -> None:
        """Note the CPU seconds of a job's worker so far; the first one begins the job."""
        job = self._jobs.get(key)
        if job is None:
            self.begin(key, is_starting=is_starting)
        elif job.is_starting and not is_starting:
            self.sign(key)
        job = self._jobs[key]
        job.cpu = cpu_seconds
        if job.cpu_seen is None:
            job.cpu_seen = cpu_seconds

    def end(self, key: Hashable) -> None:
        """Watch the job no longer."""
        self._jobs.pop(key, None)

    def problem(self, key: Hashable, *, is_over: bool = False) -> str | None:
        """Return why a job's worker hangs; None if it does not, or has not begun.

        Args:
            key: The job.
            is_over: Whether the job's time is up.
        """
        job = self._jobs.get(key)
        if job is None:
            return None
        silence = self._now() - job.seen
        if silence <= self._allowed(job, self._is_asleep(job, silence), is_over=is_over):
            return None
        when = " when the budget ended" if is_over else ""
        doing = " while it loaded the model" if job.is_starting else ""
        return f"no sign of progress for {silence:.0f} s{doing}{when}"

    def _is_asleep(self, job: _Watched, silence: float) -> bool:
        if job.cpu is None or job.cpu_seen is None:
            return False
        return job.cpu - job.cpu_seen < ASLEEP * silence

    def _allowed(self, job: _Watched, is_asleep: bool, *, is_over: bool) -> float:
        longest = self._longest_start if job.is_starting else self._longest
        if is_over:
            sleeping = max(min(OVERTIME_SECONDS, self._least), OVERTIME_FACTOR * longest)
            if is_asleep:
                return sleeping
            return max(2 * sleeping, FACTOR * longest, self._budget_seconds / 2)
        if self._is_unknown:
            return math.inf
        allowed = max(self._least, FACTOR * longest)
        if job.is_starting:
            allowed *= START_FACTOR
        return allowed if is_asleep else BUSY_FACTOR * allowed
