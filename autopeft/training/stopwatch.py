"""Measures seconds apart from those that later trainings reuse."""

from __future__ import annotations

import time

from autopeft.training.acceleration import Acceleration


class Stopwatch:
    """Measures seconds since its creation, apart from those spent on filling the cache."""

    def __init__(self, cache: Acceleration) -> None:
        self._cache = cache
        self._setup_before = cache.setup_seconds
        self._started = time.perf_counter()

    def cache_seconds(self) -> float:
        """Return the seconds spent on filling the cache."""
        return self._cache.setup_seconds - self._setup_before

    def seconds(self) -> float:
        """Return all other seconds."""
        return time.perf_counter() - self._started - self.cache_seconds()
