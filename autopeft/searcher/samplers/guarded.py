"""Guards samplers: mistakes of a user's are named, ours propose at random where they fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from autopeft.errors import AutoPeftError, SettingsError
from autopeft.searcher.samplers.base import Sampler
from autopeft.searcher.space.encoding import Point
from autopeft.trial import Trial
from autopeft.utils.formatting import counted, one_line
from autopeft.utils.registry import blamed


class GuardedSampler:
    """Runs a sampler as a `Sampler`, and turns its errors into one line that names it.

    It is given a copy of the trials, which it may keep.

    Args:
        name: The setting's value.
        inner: The sampler; its `origin`, `propose_baseline` and `is_guided` are optional.
    """

    def __init__(self, name: str, inner: Any) -> None:
        self._name = name
        self.inner = inner

    @property
    def origin(self) -> str:
        """The inner sampler's; "search" if it has none."""
        return str(getattr(self.inner, "origin", "search"))

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return the inner sampler's point."""
        return self._point("propose", self.inner.propose, tuple(trials))

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the inner sampler's choice, or else the first."""
        choose = getattr(self.inner, "propose_baseline", None)
        if choose is None:
            return choices[0]
        return self._point("propose_baseline", choose, tuple(trials), choices)

    def is_guided(self, trials: Sequence[Trial]) -> bool:
        """Return what the inner sampler says, or else False."""
        ask = getattr(self.inner, "is_guided", None)
        if ask is None:
            return False
        with blamed("sampler", self._name, "is_guided fails"):
            return bool(ask(tuple(trials)))

    def _point(self, what: str, ask: Callable[..., Any], *arguments: Any) -> Point:
        with blamed("sampler", self._name, f"{what} fails"):
            point = ask(*arguments)
        if not isinstance(point, Point):
            problem = f"{what} returned a {type(point).__name__}, not a Point"
            remedy = "return e.g. space.point_sampler.uniform(rng)"
            raise SettingsError("sampler", self._name, problem, remedy)
        return point


class FallbackSampler:
    """Runs a sampler of autopeft; where its model fails, a random point is proposed.

    A search must not end because numbers are beyond a model, and resuming would not help.

    Args:
        name: The setting's value.
        inner: The sampler.
        fallback: Proposes a point instead.

    Attributes:
        n_failures: Proposals that it replaced.
        reason: Why the last of them failed.
    """

    def __init__(self, name: str, inner: Any, fallback: Sampler) -> None:
        self._name = name
        self.inner = inner
        self._fallback = fallback
        self.n_failures = 0
        self.reason = ""
        self._is_replaced = False

    @property
    def origin(self) -> str:
        """The inner sampler's, or that of the fallback's point."""
        return str(self._fallback.origin if self._is_replaced else self.inner.origin)

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return the inner sampler's point, or else a random one."""
        self._is_replaced = False
        try:
            point: Point = self.inner.propose(trials)
        except AutoPeftError:
            raise
        except Exception as error:
            self._note(error)
            self._is_replaced = True
            return self._fallback.propose(trials)
        return point

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the inner sampler's choice, or else the first."""
        try:
            point: Point = self.inner.propose_baseline(trials, choices)
        except AutoPeftError:
            raise
        except Exception as error:
            self._note(error)
            return choices[0]
        return point

    def is_guided(self, trials: Sequence[Trial]) -> bool:
        """Return what the inner sampler says; False if it fails."""
        ask = getattr(self.inner, "is_guided", None)
        try:
            return ask is not None and bool(ask(trials))
        except AutoPeftError:
            raise
        except Exception as error:
            self._note(error)
            return False

    def _note(self, error: Exception) -> None:
        self.n_failures += 1
        self.reason = one_line(error)
        if self.n_failures == 1:
            warnings.warn(self.warning, stacklevel=3)

    @property
    def warning(self) -> str:
        """What users should know; empty as long as it has not failed."""
        if not self.n_failures:
            return ""
        times = counted(self.n_failures, "time")
        return (
            f"sampler {self._name}: its model failed {times} ({self.reason}); what was proposed "
            "instead was random"
        )
