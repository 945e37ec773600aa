"""Models of the qualities beside the leading one, and the chance that limits on them are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.searcher.samplers.gp import Embedding, Features, GaussianProcess
from autopeft.searcher.samplers.observations import History
from autopeft.searcher.space.encoding import Point
from autopeft.trial import Trial
from autopeft.utils.extremes import bounded, usable

Array = NDArray[np.float64]

_FEWEST = 4
"""Complete trials that a model needs."""

_MOST = 300
"""Complete trials that a model is fitted to: the time goes with the cube of their number."""


@dataclass(frozen=True)
class Squash:
    """Makes a quality that blows up fit for a Gaussian process: linear near 0, logarithmic beyond.

    Attributes:
        sign: Such that smaller is better, as with costs.
        scale: Where it bends: the median size of what was observed.
    """

    sign: float
    scale: float

    @classmethod
    def of(cls, objective: Objective, values: Array) -> Squash:
        """Return what suits some values."""
        typical = float(np.median(np.abs(values)))
        return cls(-objective.sign(), typical if typical > 0 else 1.0)

    def __call__(self, values: Array | float) -> Array:
        """Return the values as the model sees them."""
        squashed: Array = np.arcsinh(self.sign * bounded(values) / self.scale)
        return squashed


class FurtherQuality:
    """A Gaussian process of one quality, of its own: it shares nothing with the leading one's.

    Args:
        objective: The quality.
        is_objective: False if it is only limited.
        limits: The limits on it.
        embedding: Embedding of the space's options.
    """

    def __init__(
        self,
        objective: Objective,
        is_objective: bool,
        limits: Sequence[Constraint],
        embedding: Embedding,
    ) -> None:
        self.name = objective.name
        self.is_objective = is_objective
        self._objective = objective
        self._limits = tuple(limit.limit for limit in limits)
        self._model = GaussianProcess(embedding)
        self._squash: Squash | None = None
        self.worst = 0.0

    def fit(self, features: Features, values: Array) -> None:
        """Fit to complete trials, shape (n,)."""
        self._squash = Squash.of(self._objective, bounded(values))
        squashed = usable(self._squash(values))
        self._model.fit(features, squashed)
        # What breaks a limit adds no volume.
        bounds = [float(self._squash(limit)) for limit in self._limits]
        self.worst = min([float(squashed.max()), *bounds])

    def observed(self, value: float) -> float:
        """Return a value as `predict` returns it."""
        return float(self._squash(value)) if self._squash is not None else 0.0

    def predict(self, features: Features) -> tuple[Array, Array]:
        """Return mean and standard deviation, smaller is better, each of shape (n,)."""
        if self._squash is None:
            return np.zeros(len(features)), np.zeros(len(features))
        return self._model.predict(features)

    def chance(self, features: Features) -> Array:
        """Return the probability that the limits are kept, shape (n,)."""
        chance = np.ones(len(features))
        if self._squash is None or not self._limits:
            return chance
        mean, spread = self._model.predict(features)
        for limit in self._limits:
            chance *= ndtr((self._squash(limit) - mean) / spread)
        return chance


class FurtherQualities:
    """All qualities beside the leading one that are objectives or have limits.

    Those that are objectives are columns beside the costs, oriented alike: smaller is better.

    Args:
        objectives: The leading quality first.
        constraints: Limits; those on costs are passed over.
        embedding: Embedding of the space's options.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        embedding: Embedding,
    ) -> None:
        found = {o.name: o for o in objectives[1:] if not o.is_cost}
        limits = [limit for limit in constraints if limit.is_of_quality]
        named = {**{limit.name: limit.quality for limit in limits}, **found}
        self._parts = [
            FurtherQuality(
                o, name in found, [each for each in limits if each.name == name], embedding
            )
            for name, o in named.items()
        ]
        self._columns = [part for part in self._parts if part.is_objective]

    def fit(self, history: History, features: Callable[[Sequence[Point]], Features]) -> None:
        """Fit to the complete trials of the space, at most the last `_MOST`."""
        if not self._parts or len(history.complete) < _FEWEST:
            return
        complete = history.complete[-_MOST:]
        points = [p for i in complete if (p := history.points[i]) is not None]
        known = features(points)
        trials = [history.trials[i] for i in complete]
        for part in self._parts:
            part.fit(known, np.array([trial.value(part.name) for trial in trials]))

    @property
    def worst(self) -> Array:
        """Reference point of the columns, shape (n_columns,)."""
        return np.array([part.worst for part in self._columns])

    def predict(self, features: Features) -> tuple[Array, Array]:
        """Return mean and standard deviation, each of shape (n, n_columns)."""
        if not self._columns:
            return np.zeros((len(features), 0)), np.zeros((len(features), 0))
        means, spreads = zip(*(part.predict(features) for part in self._columns), strict=True)
        return np.stack(means, axis=1), np.stack(spreads, axis=1)

    def observed(self, trial: Trial) -> Array:
        """Return the columns of a complete trial, shape (n_columns,)."""
        return np.array([part.observed(trial.value(part.name)) for part in self._columns])

    def chance(self, features: Features) -> Array:
        """Return the probability that all limits are kept, shape (n,)."""
        chance = np.ones(len(features))
        for part in self._parts:
            chance *= part.chance(features)
        return chance
