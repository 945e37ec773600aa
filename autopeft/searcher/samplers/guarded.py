"""Guards a sampler of the user's: what it lacks is filled in, and its mistakes are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autopeft.errors import SettingsError
from autopeft.searcher.space.encoding import Point
from autopeft.trial import Trial
from autopeft.utils.registry import blamed


class GuardedSampler:
    """Runs a sampler as a `Sampler`, and turns its errors into one line that names it.

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
        return self._point("propose", self.inner.propose, trials)

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the inner sampler's choice, or else the first."""
        choose = getattr(self.inner, "propose_baseline", None)
        if choose is None:
            return choices[0]
        return self._point("propose_baseline", choose, trials, choices)

    def is_guided(self, trials: Sequence[Trial]) -> bool:
        """Return what the inner sampler says, or else False."""
        ask = getattr(self.inner, "is_guided", None)
        if ask is None:
            return False
        with blamed("sampler", self._name, "is_guided fails"):
            return bool(ask(trials))

    def _point(self, what: str, ask: Callable[..., Any], *arguments: Any) -> Point:
        with blamed("sampler", self._name, f"{what} fails"):
            point = ask(*arguments)
        if not isinstance(point, Point):
            problem = f"{what} returned a {type(point).__name__}, not a Point"
            remedy = "return e.g. space.point_sampler.uniform(rng)"
            raise SettingsError("sampler", self._name, problem, remedy)
        return point
